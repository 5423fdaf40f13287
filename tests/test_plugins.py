"""Every file of a plug-in package keeps its package's contract; a new file is covered on arrival."""

from __future__ import annotations

import ast
import importlib
import inspect
import random
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from actors.archive import Archive
from actors.attacks import Attack, AttackPrompt, Outcome, load_attack
from actors.domains import Checker, Demonstration, Domain, Problem, Role, load_domain
from actors.domains.arithmetic import Arithmetic
from actors.records import Message, Split
from cluster.config import Config, load_plugin, plugin_names
from tests.loss_batches import VARIABLES, random_batch, without_targets
from tests.sampled_tokens import sampled
from trainers.losses import Loss, LossOutput, PairBatch, TokenBatch, load_loss

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"actors.domains": "domain.kind", "actors.attacks": "attack.kind", "trainers.losses": "loss.kind"}
"""Each package of plug-ins and the key that names one of them."""
PLUGINS = [(package, name) for package in PACKAGES for name in plugin_names(package)]
DOMAINS = plugin_names("actors.domains")
ATTACKS = plugin_names("actors.attacks")
LOSSES = plugin_names("trainers.losses")


def module_of(package: str, name: str) -> ModuleType:
    return importlib.import_module(f"{package}.{name}")


def domain_called(name: str) -> tuple[Domain, Checker]:
    return load_domain(name, module_of("actors.domains", name).Config())


# ------------------------------------------------------------------------------------------------------- every plug-in


@pytest.mark.parametrize(("package", "name"), PLUGINS)
def test_a_plugin_has_a_config_whose_fields_say_what_they_mean(package: str, name: str) -> None:
    config = module_of(package, name).Config
    assert issubclass(config, Config)
    assert config.__module__ == f"{package}.{name}", "a plug-in's settings are its own"
    assert config.__doc__
    undocumented = [field for field, info in config.model_fields.items() if not info.description]
    assert undocumented == []
    # Every setting has a default, and the defaults pass their own checks.
    assert config() == config.model_validate_json("{}", strict=True)


@pytest.mark.parametrize(("package", "name"), PLUGINS)
def test_a_plugin_says_what_it_is(package: str, name: str) -> None:
    first = (module_of(package, name).__doc__ or "").splitlines()[0]
    assert first.rstrip().endswith((".", ":", ","))


@pytest.mark.parametrize(("package", "key"), PACKAGES.items())
def test_a_wrong_name_is_answered_with_those_that_exist(package: str, key: str) -> None:
    names = plugin_names(package)
    assert names
    with pytest.raises(ValueError, match=key) as caught:
        load_plugin(package, "no_such_thing", where=key)
    assert all(name in str(caught.value) for name in names)


def test_a_second_look_at_a_step_is_refused_where_no_batch_can_carry_it(monkeypatch: pytest.MonkeyPatch) -> None:
    dpo = importlib.import_module("trainers.losses.dpo")
    monkeypatch.setattr(dpo, "first_pass", lambda batch, config: torch.zeros(1, 1), raising=False)
    with pytest.raises(
        ValueError, match='got "dpo", whose first_pass looks at a step of PairBatch, wanted one of docu'
    ):
        load_loss("dpo")


@pytest.mark.parametrize("package", PACKAGES)
def test_a_plugin_is_found_by_its_file_alone(package: str) -> None:
    files = {path.stem for path in (ROOT / package.replace(".", "/")).glob("*.py")} - {"__init__"}
    assert files == set(plugin_names(package))
    # No table of plug-ins: the package never names them.
    source = (ROOT / package.replace(".", "/") / "__init__.py").read_text(encoding="utf-8")
    named = {node.id for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Name)}
    assert not named & files


def assert_signature(function: Any, *wanted: str) -> None:
    """Check a function's parameters; those after "*" are keyword-only."""
    shown: list[str] = []
    for parameter in inspect.signature(function).parameters.values():
        assert parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD), f"{function} takes anything"
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(parameter.name)
    assert shown == list(wanted), function


def members_of(protocol: type) -> dict[str, Any]:
    """Return a protocol's public methods and attributes."""
    methods = {name: value for name, value in vars(protocol).items() if callable(value) and not name.startswith("_")}
    return {**dict.fromkeys(inspect.get_annotations(protocol)), **methods}


def assert_provides(instance: object, protocol: type) -> None:
    """Check that an object has a protocol's members, with the same parameters and defaults."""
    for name, method in members_of(protocol).items():
        assert hasattr(instance, name), f"{type(instance).__name__} lacks {name}"
        if method is None:
            continue
        wanted = list(inspect.signature(method).parameters.values())[1:]
        found = list(inspect.signature(getattr(instance, name)).parameters.values())
        assert [(p.name, p.kind, p.default) for p in found] == [(p.name, p.kind, p.default) for p in wanted], name


# ------------------------------------------------------------------------------------------------------------- domains


def problems_in(domain: Domain, messages: tuple[Message, ...], *, response: str = "") -> list[Problem]:
    """Return every problem that a word or a line of a conversation poses."""
    texts = [message.content for message in messages] + [response]
    pieces = {piece for text in texts for piece in [text, *text.splitlines(), *text.split()]}
    return [problem for piece in sorted(pieces) if (problem := domain.parse(piece)) is not None]


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_provides_its_protocol_and_so_does_its_checker(name: str) -> None:
    module = module_of("actors.domains", name)
    assert_signature(module.make_domain, "config")
    assert_signature(module.make_checker, "config")
    domain, checker = domain_called(name)
    assert_provides(domain, Domain)
    assert_provides(checker, Checker)
    assert domain.name == name


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_has_no_method_that_tells_truth(name: str) -> None:
    domain, checker = domain_called(name)
    public = {member for member in dir(domain) if not member.startswith("_")}
    assert public == set(members_of(Domain)), "what else a domain can say, any role can ask it"
    truth = {member for member in dir(checker) if not member.startswith("_")}
    assert not public & truth
    held = [value for value in vars(domain).values() if isinstance(value, type(checker)) or hasattr(value, "correct")]
    assert held == []


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("split", list(Split))
def test_seeds_are_distinct_problems_of_the_cell_and_split_that_were_asked_for(name: str, split: Split) -> None:
    domain, _ = domain_called(name)
    for cell in [*domain.cells(), *domain.out_of_distribution_cells()]:
        found = domain.seeds(cell, split=split, num=5, seed=1)
        assert len({problem.canonical for problem in found}) == len(found) == 5
        assert {(problem.facets, problem.split) for problem in found} == {(cell, split)}
        assert {problem.in_scope for problem in found} == {cell in domain.cells()}
        assert [domain.parse(problem.text) for problem in found] == found
        assert domain.seeds(cell, split=split, num=5, seed=1) == found
        assert len(cell) == len(domain.facet_names)
    assert domain.seeds(domain.cells()[-1], split=split, num=5, seed=2) != found


@pytest.mark.parametrize("name", DOMAINS)
def test_cells_in_scope_and_out_of_distribution_are_apart(name: str) -> None:
    domain, _ = domain_called(name)
    inside, outside = domain.cells(), domain.out_of_distribution_cells()
    assert inside
    assert outside
    assert len(set(inside) | set(outside)) == len(inside) + len(outside)
    assert domain.cells() == inside


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize("easy", [False, True])
def test_demonstrations_show_train_problems_in_scope_only(name: str, role: Role, easy: bool) -> None:
    domain, _ = domain_called(name)
    rows = domain.demonstrations(role, rng=random.Random(0), num=300, easy=easy)
    assert len(rows) == 300
    for row in rows:
        assert row.role == role
        assert row.response
        # Whatever stands in a prompt counts too: a critic's prompt holds a problem and an answer to it.
        posed = problems_in(domain, row.messages, response=row.response)
        assert posed, f"no problem is found in {row}"
        assert {(problem.split, problem.in_scope) for problem in posed} == {("train", True)}, row


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("role", list(Role))
def test_demonstrations_are_addressed_as_the_role_will_be_asked(name: str, role: Role) -> None:
    domain, _ = domain_called(name)
    rows = domain.demonstrations(role, rng=random.Random(0), num=100)
    assert domain.demonstrations(role, rng=random.Random(0), num=100) == rows
    assert len({row.messages for row in rows}) > 1
    for row in rows:
        assert row.messages == _asked(domain, row)


def _asked(domain: Domain, row: Demonstration) -> tuple[Message, ...]:
    """Return the prompt that the loop would give for what a demonstration is about."""
    posed = problems_in(domain, row.messages, response=row.response)[0]
    if row.role == Role.ATTACKER:
        return domain.attack_messages(posed.facets)
    if row.role == Role.LEARNER:
        return domain.learner_messages(posed.text)
    answer = row.messages[-1].content.split(posed.text, 1)[1].strip()
    return domain.critic_messages(posed.text, answer)


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("role", list(Role))
def test_easy_demonstrations_are_shorter(name: str, role: Role) -> None:
    domain, _ = domain_called(name)
    easy, full = (
        sum(
            len(row.messages[-1].content + row.response)
            for row in domain.demonstrations(role, rng=rng, num=300, easy=e)
        )
        for rng, e in ((random.Random(0), True), (random.Random(0), False))
    )
    assert easy <= full


@pytest.mark.parametrize("name", DOMAINS)
def test_the_roles_are_told_apart_by_their_prompts(name: str) -> None:
    domain, _ = domain_called(name)
    cell = domain.cells()[0]
    text = domain.seeds(cell, split=Split.TRAIN, num=1, seed=0)[0].text
    prompts = {domain.attack_messages(cell), domain.learner_messages(text), domain.critic_messages(text, "an answer")}
    assert len(prompts) == 3
    assert len({domain.attack_messages(each) for each in domain.cells()}) == len(domain.cells())


@pytest.mark.parametrize("name", DOMAINS)
def test_the_attacker_is_shown_the_cell_that_it_is_asked_for(name: str) -> None:
    domain, _ = domain_called(name)
    for row in domain.demonstrations(Role.ATTACKER, rng=random.Random(0), num=100):
        problem = domain.parse(row.response)
        assert problem is not None
        assert row.messages == domain.attack_messages(problem.facets)


@pytest.mark.parametrize("name", DOMAINS)
def test_the_learner_is_shown_well_formed_answers_right_ones_and_wrong_ones(name: str) -> None:
    domain, checker = domain_called(name)
    rows = domain.demonstrations(Role.LEARNER, rng=random.Random(0), num=200)
    assert all(domain.well_formed(row.problem, row.response) for row in rows)
    assert all(row.messages == domain.learner_messages(row.problem) for row in rows)
    right = sum(checker.correct(row.problem, row.response) for row in rows)
    assert 60 < right < 180, "a learner without a weakness, or without a start"


@pytest.mark.parametrize("name", DOMAINS)
def test_a_solution_is_right_and_states_a_final_answer(name: str) -> None:
    domain, checker = domain_called(name)
    for cell in domain.cells():
        for problem in domain.seeds(cell, split=Split.TRAIN, num=8, seed=1):
            solution = checker.solution(problem.text)
            assert checker.correct(problem.text, solution)
            assert domain.well_formed(problem.text, solution)
            assert domain.final_answer(problem.text, solution)
            assert domain.final_answer(problem.text, "no answer") is None


@pytest.mark.parametrize("name", DOMAINS)
def test_a_demonstration_names_the_problem_that_it_is_about(name: str) -> None:
    domain, _ = domain_called(name)
    for role in Role:
        for row in domain.demonstrations(role, rng=random.Random(0), num=50):
            problem = domain.parse(row.problem)
            assert problem is not None
            assert problem.split is Split.TRAIN
            assert row.problem in "\n".join([*(message.content for message in row.messages), row.response])


@pytest.mark.parametrize("name", DOMAINS)
def test_problems_fall_into_splits_of_eighty_ten_and_ten_percent(name: str) -> None:
    domain, _ = domain_called(name)
    rng = random.Random(0)
    found: dict[str, str] = {}
    # Seeds come from one split each, so a mixture is drawn by rendering: every text that a changed digit makes.
    for cell in domain.cells():
        for split in Split:
            for problem in domain.seeds(cell, split=split, num=8, seed=0):
                for _ in range(60):
                    place = rng.randrange(len(problem.text))
                    changed = domain.parse(problem.text[:place] + rng.choice("123456789") + problem.text[place + 1 :])
                    if changed is not None and changed.canonical != problem.canonical:
                        found[changed.canonical] = changed.split
    shares = {split: list(found.values()).count(split) / len(found) for split in Split}
    assert len(found) > 1_000
    bound = 5 * 0.4 / len(found) ** 0.5
    assert shares == pytest.approx({Split.TRAIN: 0.8, Split.PROBE: 0.1, Split.SEALED: 0.1}, abs=bound)


@pytest.mark.parametrize("name", DOMAINS)
@pytest.mark.parametrize("junk", ["", " ", "\n", "junk", "?", "\x00", "\ud7ff", "1", "+", "🙂", "a" * 10_000])
def test_junk_poses_no_problem_and_is_no_answer(name: str, junk: str) -> None:
    domain, checker = domain_called(name)
    assert domain.parse(junk) is None
    query = domain.seeds(domain.cells()[0], split=Split.TRAIN, num=1, seed=0)[0].text
    assert not domain.well_formed(query, junk)
    assert not checker.correct(query, junk)
    # A critic may be asked about anything that a learner wrote.
    assert domain.critic_messages(query, junk)


# ------------------------------------------------------------------------------------------------------------- attacks


def attack_called(name: str) -> tuple[Attack, Domain]:
    domain, _ = domain_called("arithmetic")
    assert isinstance(domain, Arithmetic)
    return load_attack(name, module_of("actors.attacks", name).Config(), domain=domain), domain


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_provides_its_protocol(name: str) -> None:
    assert_signature(module_of("actors.attacks", name).make_attack, "config", "*", "domain")
    assert_provides(attack_called(name)[0], Attack)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_proposes_what_was_asked_the_same_for_the_same_seed(name: str) -> None:
    attack, domain = attack_called(name)
    archive = Archive.empty(domain.cells())
    before = archive.snapshot()
    found = attack.propose(archive, 50, seed=1)
    assert len(found) == 50
    assert all(isinstance(prompt, AttackPrompt) and prompt.messages for prompt in found)
    assert {prompt.target for prompt in found} <= set(domain.cells())
    assert attack.propose(archive, 50, seed=1) == found == attack_called(name)[0].propose(archive, 50, seed=1)
    assert attack.propose(archive, 50, seed=2) != found
    assert archive.snapshot() == before, "to propose is to read the archive"
    assert attack.propose(archive, 0, seed=1) == []


@pytest.mark.parametrize("name", ATTACKS)
def test_what_an_attack_has_learnt_is_in_the_archive(name: str) -> None:
    attack, domain = attack_called(name)
    archive = Archive.empty(domain.cells())
    outcomes = [
        Outcome(query_id=str(i), canonical=str(i), facets=cell, num_judged=8, num_failed=i % 9)
        for i, cell in enumerate(domain.cells() * 3)
    ]
    attack.observe(archive, outcomes)
    assert sum(row.num_queries for row in archive.cells.values()) == len(outcomes)
    # A resumed run has nothing but the archive: an attack made anew must go on as this one would.
    restored = Archive.restore(archive.snapshot())
    assert attack_called(name)[0].propose(restored, 50, seed=3) == attack.propose(archive, 50, seed=3)
    attack.observe(archive, [])
    assert restored == archive


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_states_where_it_is_from(name: str) -> None:
    assert "arXiv" in (module_of("actors.attacks", name).__doc__ or "")


# -------------------------------------------------------------------------------------------------------------- losses


def toy_batch(kind: type, *, masked: bool = False, scale: float = 1.0) -> tuple[Any, torch.Tensor]:
    """Return a small batch of a kind and the tensor that its gradient is taken by."""
    if kind is PairBatch:
        policy = torch.tensor([-10.0, -6.0, -12.0, -7.0], dtype=torch.float64, requires_grad=True)
        lengths = torch.tensor([0.0, 0.0] if masked else [5.0, 4.0], dtype=torch.float64)
        reference = torch.tensor([-11.0, -6.5, -11.5, -6.0], dtype=torch.float64)
        return (
            PairBatch(
                policy_chosen=policy[:2],
                policy_rejected=policy[2:],
                reference_chosen=reference[:2],
                reference_rejected=reference[2:],
                chosen_lengths=lengths,
                rejected_lengths=lengths,
                weights=torch.full((2,), scale, dtype=torch.float64),
            ),
            policy,
        )
    if kind is not TokenBatch:
        batch = random_batch(kind, seed=0)
        (name, *_) = VARIABLES[kind]  # fails where a new kind is not known there
        leaf = getattr(batch, name).requires_grad_()
        batch = without_targets(batch) if masked else batch
        return replace(batch, weights=batch.weights * scale), leaf
    logprobs = torch.tensor([[0.0, -1.0, -2.0], [0.0, -0.5, -3.0]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[False, True, True], [False, True, False]])
    batch = TokenBatch(
        logprobs=logprobs, mask=mask & (not masked), weights=torch.full((2,), scale, dtype=torch.float64)
    )
    return sampled(batch), logprobs


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_provides_its_protocol(name: str) -> None:
    module = load_loss(name)
    assert_signature(module.loss, "batch", "config")
    assert isinstance(module.uses_reference, bool)
    assert set(members_of(Loss)) <= set(vars(module))


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_pure_function_with_a_gradient_and_detached_metrics(name: str) -> None:
    module = load_loss(name)
    batch, leaf = toy_batch(module.batch)
    first = module.loss(batch, module.Config())
    assert isinstance(first, LossOutput)
    assert first.loss.shape == ()
    assert torch.isfinite(first.loss)
    assert first.metrics
    for metric in first.metrics.values():
        assert metric.shape == ()
        assert torch.isfinite(metric)
        assert not metric.requires_grad
    (gradient,) = torch.autograd.grad(first.loss, leaf, retain_graph=True)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    second = module.loss(batch, module.Config())
    assert torch.equal(first.loss, second.loss)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_with_nothing_to_learn_from_is_zero(name: str) -> None:
    module = load_loss(name)
    batch, leaf = toy_batch(module.batch, masked=True)
    found = module.loss(batch, module.Config())
    assert found.loss.item() == 0.0
    assert not torch.autograd.grad(found.loss, leaf)[0].any()
    assert not any(torch.isnan(metric) for metric in found.metrics.values())


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_a_weighted_mean(name: str) -> None:
    module = load_loss(name)
    losses = [module.loss(toy_batch(module.batch, scale=scale)[0], module.Config()).loss for scale in (1.0, 3.0)]
    assert losses[0].item() == pytest.approx(losses[1].item())


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_no_files_and_starts_nothing(name: str) -> None:
    tree = ast.parse((ROOT / "trainers" / "losses" / f"{name}.py").read_text(encoding="utf-8"))
    imported = {
        (node.module or "") if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    allowed = {"__future__", "cluster", "dataclasses", "math", "pydantic", "torch", "trainers", "typing"}
    assert {module.split(".")[0] for module in imported} <= allowed
