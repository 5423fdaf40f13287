"""A run's settings: how files and flags compose, and the one line that each mistake is answered with."""

from __future__ import annotations

import json
import math
import pickle
import tomllib
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config import ConfigError, Settings, describe, flag_settings, layered, plugin_names, read_settings
from serve.manifest import config_toml
from tests.default_loss import LOSS_KEY
from trainers.feedback.training_data import material_of
from trainers.losses import grpo
from trainers.run_config import RunConfig, load_run_config, read_resolved


def written(folder: Path, text: str, name: str = "a.toml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(folder: Path, text: str, *flags: tuple[str, str]) -> list[str]:
    """Return what is wrong with one file and flags, the folder's name left out."""
    with pytest.raises(ConfigError) as caught:
        load_run_config([written(folder, text)], flags=flags)
    return [line.replace(f"{folder}/", "") for line in caught.value.problems]


def test_later_files_and_then_flags_win(tmp_path: Path) -> None:
    one = written(tmp_path, "seed = 1\n[critic]\nreplicas = 2\n[loop]\nepochs = 3\n", "one.toml")
    two = written(tmp_path, "seed = 2\n[critic]\nreplicas = 4\n", "two.toml")
    config = load_run_config([one, two], flags=[("critic.replicas", "6"), ("rollouts.sampling.max-tokens", "40")])
    assert (config.seed, config.critic.replicas, config.loop.epochs) == (2, 6, 3)
    assert config.rollouts.sampling.max_tokens == 40


def test_keys_that_a_file_leaves_out_keep_the_sections_defaults(tmp_path: Path) -> None:
    config = load_run_config([written(tmp_path, f"[critic.engine]\nthreads = 2\n[loss]\n{LOSS_KEY} = 0.3\n")])
    assert config.critic.engine.model == RunConfig().critic.engine.model
    assert config.loss.model_dump() == {**RunConfig().loss.model_dump(), LOSS_KEY: 0.3}


def test_another_kind_of_plugin_takes_its_own_defaults(tmp_path: Path) -> None:
    config = load_run_config([written(tmp_path, '[loss]\nkind = "sft"\n')])
    assert config.loss.model_dump() == {"kind": "sft"}


def test_a_resolved_config_reads_back_as_itself(tmp_path: Path) -> None:
    config = load_run_config([], flags=[(f"loss.{LOSS_KEY}", "0.25"), ("name", "x1")])
    written(tmp_path, config.model_dump_json(), "resolved.json")
    assert read_resolved(tmp_path / "resolved.json") == config


def test_a_price_of_the_kl_in_the_reward_is_to_the_first_weights_unless_it_is_zero() -> None:
    # To the weights at the update's start k1 is 0: the price would be none.
    of = partial(load_run_config, [])
    for kind in ("ppo", "relc", "rloo", "reinforce_pp"):
        flags = [("loss.kind", kind), ("learner.training.value_head", "true")]
        assert of(flags=flags).reference_weights == "bootstrap"
        assert of(flags=[*flags, ("loss.kl_coefficient", "0")]).reference_weights == "start_of_update"
    for kind in ("dpo", "kto", "grpo", "exo_group"):
        assert of(flags=[("loss.kind", kind)]).reference_weights == "start_of_update"
        said = [("loss.kind", kind), ("learner.reference", "bootstrap")]
        assert of(flags=said).reference_weights == "bootstrap"


def test_a_loss_takes_temperature_and_length_from_the_sampling_unless_it_is_told() -> None:
    sampling = [("rollouts.sampling.temperature", "0.7"), ("rollouts.sampling.max_tokens", "40")]
    dapo = load_run_config([], flags=[*sampling, ("loss.kind", "grpo"), ("loss.form", "dapo")]).loss_as_sampled
    assert isinstance(dapo, grpo.Config)
    assert (dapo.temperature, dapo.max_tokens, dapo.overlong) == (0.7, 40, 8)
    told = [*sampling, ("loss.kind", "grpo"), ("loss.form", "dapo"), ("loss.overlong_buffer_tokens", "3")]
    assert load_run_config([], flags=told).loss_as_sampled.overlong == 3  # type: ignore[attr-defined]
    dpo = load_run_config([], flags=[*sampling, ("loss.kind", "dpo")])
    assert dpo.loss_as_sampled == dpo.loss


@pytest.mark.parametrize(
    ("kind", "refused"), [("dpo", True), ("kto", True), ("pro", True), ("gce", False), ("weak_to_strong", False)]
)
def test_older_samples_want_temperature_1_where_log_probs_correct_for_their_age(kind: str, refused: bool) -> None:
    flags = [("loop.max_policy_age", "1"), ("rollouts.sampling.temperature", "0.7"), ("loss.kind", kind)]
    if not refused:
        assert load_run_config([], flags=flags).loop.max_policy_age == 1
        return
    with pytest.raises(ConfigError, match=r"rollouts\.sampling\.temperature: got 0\.7 with loop\.max_policy_age = 1"):
        load_run_config([], flags=flags)


def test_log_ratios_per_token_have_a_beta_of_their_own_and_one_that_is_set_is_kept(tmp_path: Path) -> None:
    per_token = written(tmp_path, '[loss]\nkind = "dpo"\nlength_norm = true\n')
    config = load_run_config([per_token])
    assert config.loss.model_dump() == {"kind": "dpo", "length_norm": True, "beta": 5.0, "nll_weight": 0.0}
    assert load_run_config([per_token], flags=[("loss.beta", "0.1")]).loss.model_dump()["beta"] == 0.1
    written(tmp_path, config.model_dump_json(), "resolved.json")
    assert read_resolved(tmp_path / "resolved.json") == config


def test_no_cap_on_an_importance_ratio_can_be_written_and_reads_back(tmp_path: Path) -> None:
    text = '[loss]\nkind = "rloo"\nimportance_cap = inf\n[loop.importance]\ncap = inf\n'
    config = load_run_config([written(tmp_path, text)])
    assert config.loss.model_dump()["importance_cap"] == config.loop.importance.cap == math.inf
    # JSON has no infinity.
    resolved = json.dumps(config.model_dump(mode="json"), allow_nan=False)
    assert read_resolved(written(tmp_path, resolved, "resolved.json")) == config
    assert load_run_config([written(tmp_path, config_toml(config))]) == config
    assert pickle.loads(pickle.dumps(config)) == config


def test_plugin_settings_travel_by_pickle() -> None:
    assert pickle.loads(pickle.dumps(RunConfig())) == RunConfig()


def test_every_key_has_a_meaning() -> None:
    keys = describe(RunConfig, defaults=RunConfig().model_dump(mode="json"))
    assert [doc.key for doc in keys if doc.key.startswith(("critic.", "loop.", "name")) and not doc.meaning] == []
    # Plug-ins of one kind may have a key of one name; the meaning then begins with whose it is.
    assert len({(doc.key, doc.meaning) for doc in keys}) == len(keys)


def test_every_plugin_of_every_kind_has_settings() -> None:
    for package, section in (("actors.domains", "domain"), ("actors.attacks", "attack"), ("trainers.losses", "loss")):
        for name in plugin_names(package):
            if section == "loss" and material_of(name) is None:
                continue  # no iteration makes what it takes: see below
            flags = [(f"{section}.kind", name), ("learner.training.value_head", "true")]
            if name == "modpo":
                flags.append(("objectives.weights", "[0.9, 0.1]"))
            assert getattr(load_run_config([], flags=flags), section).kind == name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[critic]\nreplics = 2\n", "a.toml:2: critic.replics: unknown key, did you mean critic.replicas?"),
        ("sed = 3\n", "a.toml:1: sed: unknown key, did you mean seed?"),
        ("replicas = 3\n", "a.toml:1: replicas: unknown key, did you mean "
         "attacker.replicas or rollouts.replicas or critic.replicas?"),
        ('[critic]\n\n# six\nreplicas = "6"\n', 'a.toml:4: critic.replicas: got "6", wanted a whole number'),
        ("critic = 3\n", "a.toml:1: critic: got 3, wanted a table"),
        ("[critic]\nreplicas = 2.5\n", "a.toml:2: critic.replicas: got 2.5, wanted a whole number"),
        ("ray.dashboard = 1\n", "a.toml:1: ray.dashboard: got 1, wanted true or false"),
        ("[learner.training]\nlearning_rate = nan\n",
         "a.toml:2: learner.training.learning_rate: got NaN, wanted a finite number"),
        ("[learner.training]\nlearning_rate = inf\n",
         "a.toml:2: learner.training.learning_rate: got Infinity, wanted a finite number"),
        ("[learner.training]\nlearning_rate = 0\n",
         "a.toml:2: learner.training.learning_rate: got 0, wanted more than 0"),
        ("[learner.training]\nzero_stage = 4\n",
         "a.toml:2: learner.training.zero_stage: got 4, wanted one of 0, 1, 2, 3"),
        ("[learner.training]\nbatch_size = 0\n", "a.toml:2: learner.training.batch_size: got 0, wanted at least 1"),
        ("[learner.training]\nbatch_size = 9\nnum_ranks = 2\n",
         "a.toml:2: learner.training.batch_size: got 9, wanted a multiple of learner.training.num_ranks = 2: "
         "9 = 2 × 4 + 1; 8 would do"),
        (f"[loss]\n{LOSS_KEY} = -1\n", f"a.toml:2: loss.{LOSS_KEY}: got -1, wanted more than 0"),
        ("loss = 3\n", "a.toml:1: loss: got 3, wanted a table"),
        ('[loss]\nkind = "exo"\nsmoothing = 0\n', "a.toml:3: loss.smoothing: got 0, wanted more than 0"),
        ('[loss]\nkind = "rloo"\nimportance_cap = nan\n', "a.toml:3: loss.importance_cap: got NaN, wanted at least 1"),
        ('[loss]\nkind = "rloo"\nimportance_cap = "none"\n',
         'a.toml:3: loss.importance_cap: got "none", wanted a number'),
        ('[loss]\nkind = "bradley_terry"\n',
         'a.toml:2: loss.kind: got "bradley_terry", wanted a loss of a policy: it trains a reward model, which is '
         'reward.kind = "model" beside a loss that learns from scores, such as grpo'),
        ('[reward]\nkind = "model"\n[loss]\nkind = "dpo"\n',
         'a.toml:2: reward.kind: got "model" with loss.kind = "dpo", which learns from no scores of single responses, '
         'wanted loss.kind to be one of grpo, ppo, reinforce_pp, relc, rloo; or "critic"'),
        ('[loss]\nkind = "grpo"\n[reward]\ncritiques = true\n',
         'a.toml:4: reward.critiques: got true with reward.kind = "critic", wanted "model": only that reads them'),
        ('[loss]\nkind = "grpo"\n[reward]\nkind = "model"\n[reward.training]\nbatch_size = 15\nnum_ranks = 2\n',
         "a.toml:6: reward.training.batch_size: got 15, wanted a multiple of reward.training.num_ranks = 2"),
        ('[loss]\nkind = "grpo"\n[objectives]\n[reward]\nkind = "model"\n',
         'a.toml:5: reward.kind: got "model" with a section [objectives], wanted one of the two: both say what a score '
         "is"),
        ('[loss]\nkind = "rloo"\n[reward]\nkind = "model"\ntraining.value_head = false\n',
         "a.toml:5: reward.training.value_head: got false, wanted true: the head's value is the score"),
        ('[loss]\nkind = "forward_correction"\nconfusion = [[0.9, 0.1], [0.1, 0.9]]\n',
         "a.toml:3: loss.confusion: got 2 classes, wanted none: the loop's labels are tokens, and their classes the "
         "whole vocabulary; set loss.noise"),
        ('[loss]\nkind = "ppo"\n',
         'a.toml:2: loss.kind: got "ppo" with learner.training.value_head = false, wanted true: it learns what a '
         "response will score; or use grpo, rloo, reinforce_pp"),
        ('[loss]\nkind = "grpo"\nmax_tokens = 512\n',
         "a.toml:3: loss.max_tokens: got 512, wanted rollouts.sampling.max_tokens = "
         f"{RunConfig().rollouts.sampling.max_tokens}: no response is longer"),
        ('[learner]\nreference = "start_of_update"\n[loss]\nkind = "rloo"\n',
         'a.toml:2: learner.reference: got "start_of_update" with loss.kind = "rloo" and loss.kl_coefficient = 0.03, '
         "wanted \"bootstrap\", or 0: to the weights at an update's start there is no KL to pay for"),
        ('[loss]\nkind = "grpo"\noverlong_buffer_tokens = 49\n',
         "a.toml:3: loss.overlong_buffer_tokens: got 49, wanted at most rollouts.sampling.max_tokens = 48"),
        ('[loss]\nkind = "rloo"\ntemperature = 1.0\n[rollouts.sampling]\ntemperature = 0.7\n',
         "a.toml:3: loss.temperature: got 1, wanted rollouts.sampling.temperature = 0.7: log-probs are taken at that "
         "of the sampling"),
        ('[loss]\nkind = "grpo"\n[loss.kl_control]\nadaptive = true\n',
         'a.toml:4: loss.kl_control.adaptive: got true with learner.reference = "start_of_update", wanted "bootstrap": '
         "the KL is measured at an update's start, where it is 0 to the weights of that moment"),
        ('learner.reference = "bootstrap"\n[loss]\nkind = "grpo"\nform = "dapo"\nkl_control.adaptive = true\n',
         "a.toml:5: loss.kl_control.adaptive: got true with loss.kl_coefficient = 0, wanted more than 0: it is "
         "multiplied"),
        ('[learner.training]\noffload = "cpu"\n',
         'a.toml:2: learner.training.offload: got "cpu" with zero_stage = 0, wanted 1, 2 or 3: what the ranks split is '
         "what they put aside"),
        ('[domain]\nkind = "arithmetics"\n',
         'a.toml:1: domain: got kind = "arithmetics", wanted one of arithmetic; did you mean arithmetic?'),
        ("[domain]\ndigits = [2, 4]\n",
         "a.toml:1: domain.out_of_distribution_digits: got [4], wanted none of digits = [2, 4]: "
         "4 digits would be trained on"),
        ("[domain]\ndigits = [7]\n",
         "a.toml:2: domain.digits: got [7], wanted one or more different numbers of digits, each 1 to 6"),
        ("[bootstrap]\nlearner_share = 0.99\n",
         "a.toml:2: bootstrap.learner_share: got 0.99 beside attacker_share = 0.05, wanted together 1 at most, "
         "not 1.04: the critic's role has the rest"),
        ("[bootstrap]\nsteps = 3\n",
         "a.toml:1: bootstrap.num_chunks: got 20, wanted at most steps = 3: a piece has a step or more"),
        ('[supervision]\nregime = "golden"\n', 'a.toml:2: supervision.regime: got "golden", wanted one of '
         "critic_expert, gold; did you mean gold?"),
        ("[oversight]\nbudget = 1.5\n", "a.toml:2: oversight.budget: got 1.5, wanted at most 1"),
        ("[critic]\nengine.max_model_len = 64\njudging.max_tokens = 96\n",
         "a.toml:3: critic.judging.max_tokens: got 96, wanted less than the context, critic.engine.max_model_len = 64, "
         "which prompt and answer share"),
        ('learner.model = "x"\n', 'a.toml:1: rollouts.engine.model: got "bootstrap", wanted learner.model, "x": '
         "the rollout pool answers with the learner's weights"),
        ("rollouts = { sampling = { temperature = 0 } }\n",
         "a.toml:1: rollouts.sampling.temperature: got 0, wanted more than 0"),
        ("a = \n", "a.toml:1:5: not TOML: invalid value"),
        ("[loop]\niterations = 1\niterations = 2\n", "a.toml:3:15: not TOML: cannot overwrite a value"),
        ('name = "x', "a.toml:1:10: not TOML: unterminated string"),
        ("when = 2026-01-01\n", "a.toml:1: when: unknown key, wanted one of "),
    ],
)  # fmt: skip
def test_a_mistake_is_answered_by_place_found_and_wanted(tmp_path: Path, text: str, message: str) -> None:
    (line,) = problems_of(tmp_path, text)
    assert line.startswith(message) if message.endswith(" ") else line == message


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = "seed = -1\n[loop]\niterations = -1\nepoch = 2\n[base_model]\nhidden_size = 10\nnum_heads = 4\n"
    assert problems_of(tmp_path, text, ("critic.replicas", "many")) == [
        "a.toml:1: seed: got -1, wanted at least 0",
        "a.toml:3: loop.iterations: got -1, wanted at least 0",
        "a.toml:4: loop.epoch: unknown key, did you mean loop.epochs?",
        "a.toml:6: base_model.hidden_size: got 10, wanted a multiple of base_model.num_heads = 4: "
        "10 = 4 × 2 + 2; 8 would do",
        'command line: critic.replicas: got "many", wanted a whole number',
    ]


def test_a_missing_file_and_bad_bytes_are_named(tmp_path: Path) -> None:
    written(tmp_path, "", "quick.toml")
    with pytest.raises(ConfigError, match=r"quik\.toml: no such file, wanted a TOML file; did you mean .*quick\.toml"):
        load_run_config([tmp_path / "quik.toml"])
    (tmp_path / "bad.toml").write_bytes(b"name = '\xff'")
    with pytest.raises(ConfigError, match="byte 8: got 0xff, wanted UTF-8"):
        load_run_config([tmp_path / "bad.toml"])
    with pytest.raises(ConfigError, match="can't be read"):
        load_run_config([tmp_path])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("6", 6), ("1e-4", 1e-4), (".5", 0.5), ("True", True), ("none", None), ("[1, 2]", [1, 2]), ('"6"', "6"),
        ("models/qwen", "models/qwen"), ("", ""), ("1\nseed = 2", "1\nseed = 2"), ("{a = 1}", {"a": 1}),
    ],
)  # fmt: skip
def test_a_flags_text_is_a_toml_value_or_plain_text(text: str, value: Any) -> None:
    assert flag_settings("a.b-c", text).values == {"a": {"b_c": value}}


def test_a_table_of_another_kind_replaces_the_one_below() -> None:
    below = flag_settings("loss", '{kind = "dpo", beta = 0.2}')
    same, other = flag_settings("loss.beta", "0.3"), flag_settings("loss", '{kind = "sft"}')
    assert layered([below, same]).values == {"loss": {"kind": "dpo", "beta": 0.3}}
    assert layered([below, other]).values == {"loss": {"kind": "sft"}}


def test_lines_are_right_behind_everything_that_toml_can_span_lines_with(tmp_path: Path) -> None:
    text = (
        'a = """one\n# not a comment\n[not.a.table] = \\""" \n"""\n'  # lines 1 to 4
        "b = '''\n\"\"\"\n'''\n"  # 5 to 7
        "c = [ # ]\n  1, [2],\n  '[',\n]\n"  # 8 to 11
        'd = { e = 1, "f" = "}" }  # {\n'  # 12
        "\n[x.\"y z\"]  # table\n'k' . l = 1\n[[m]]\nn = 1\n"  # 14, 15, 16, 17
    )
    tomllib.loads(text)
    origins = read_settings(written(tmp_path, text)).origins
    lines = {key: int(place.rsplit(":", 1)[1]) for key, place in origins.items()}
    assert lines == {
        ("a",): 1, ("b",): 5, ("c",): 8, ("d",): 12,
        ("x", "y z"): 14, ("x", "y z", "k", "l"): 15, ("m",): 16, ("m", "n"): 17,
    }  # fmt: skip


def test_a_sections_own_check_is_told_with_the_full_key(tmp_path: Path) -> None:
    (line,) = problems_of(tmp_path, '[learner.training]\ndtype = "bf16"\nzero_stage = 0\n')
    assert line.startswith('a.toml:2: learner.training.dtype: got "bf16" with zero_stage = 0')


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60) | st.text(alphabet="[]{}\"'=.#\\\n ab1-", max_size=60).map(str.encode))
def test_whatever_bytes_a_file_holds_the_answer_is_settings_or_lines(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(data)
    told: tuple[str, ...] = ()
    read = Settings()
    try:
        read = read_settings(path)
    except ConfigError as error:
        told = error.problems
    assert [line for line in told if "\n" in line] == []
    assert {key[0] for key in read.origins} == set(read.values)
