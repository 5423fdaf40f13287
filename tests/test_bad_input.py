"""The golden message of every kind of bad config and bad command line: exit code 2, one line each, before Ray starts.

Model directories have tests/test_model_directory.py. What is no mistake here: `resume` without a commit begins at
iteration 0 again (tests/test_driver.py). Ctrl-C twice is in tests/test_cli.py, by a process of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import elenchus
from cluster.config import SECRET_KEY, describe, plugin_names
from cluster.durable_files import digest_directory
from cluster.store import RunStore
from tests.default_loss import LOSS_KEY
from trainers.base_model import write_base_model
from trainers.loop_state import STAGES
from trainers.preflight import machine_problems, model_record
from trainers.run_config import RunConfig

ROOT = Path(__file__).resolve().parent.parent
ID_COLUMNS = {stage: column for stage, (_, column) in STAGES.items()}


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let relative paths, and so the messages, be the same on every machine."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """Return the lines that a command ends with, which must be the user's fault and all that it prints."""
    assert elenchus.main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "Traceback" not in told.err
    lines = told.err.splitlines()
    assert all(line.startswith("✗ ") for line in lines)
    return [line.removeprefix("✗ ") for line in lines]


CONFIGS: dict[str, tuple[str, str]] = {
    "TOML syntax: a value": ("seed = \n", "a.toml:1:8: not TOML: invalid value"),
    "TOML syntax: a table": (
        "[critic\nreplicas = 1\n",
        "a.toml:1:8: not TOML: expected ']' at the end of a table declaration",
    ),
    "TOML syntax: twice": ("seed = 1\nseed = 2\n", "a.toml:2:9: not TOML: cannot overwrite a value"),
    "unknown key": (
        "\n[critic]\nreplics = 2\n",
        "a.toml:3: critic.replics: unknown key, did you mean critic.replicas?",
    ),
    "unknown key of another table": ("beta = 0.2\n", "a.toml:1: beta: unknown key, did you mean loss.beta?"),
    "unknown key that is like none": (
        "[loop]\nxyz = 2\n",
        "a.toml:2: loop.xyz: unknown key, wanted one of iterations, queries_per_iteration, epochs, sync_deadline_s, "
        "max_policy_age, importance, kl_budget, parity_bound",
    ),
    "wrong type: number": ('seed = "7"\n', 'a.toml:1: seed: got "7", wanted a whole number'),
    "wrong type: whole number": ("seed = 7.5\n", "a.toml:1: seed: got 7.5, wanted a whole number"),
    "wrong type: table": ("critic = [1]\n", "a.toml:1: critic: got [1], wanted a table"),
    "wrong type: text": ("name = 5\n", "a.toml:1: name: got 5, wanted text"),
    "wrong type: choice": (
        '[learner.training]\noptimizer = "adam"\n',
        'a.toml:2: learner.training.optimizer: got "adam", wanted one of adamw, muon; did you mean adamw?',
    ),
    "rate 0": (
        "[learner.training]\nlearning_rate = 0.0\n",
        "a.toml:2: learner.training.learning_rate: got 0.0, wanted more than 0",
    ),
    "rate below 0": (
        "[bootstrap]\nlearning_rate = -1e-3\n",
        "a.toml:2: bootstrap.learning_rate: got -0.001, wanted more than 0",
    ),
    "rate NaN": (
        "[learner.training]\nlearning_rate = nan\n",
        "a.toml:2: learner.training.learning_rate: got NaN, wanted a finite number",
    ),
    "rate Inf": (
        "[learner.training]\nlearning_rate = inf\n",
        "a.toml:2: learner.training.learning_rate: got Infinity, wanted a finite number",
    ),
    "batch 0": (
        "[learner.training]\nbatch_size = 0\n",
        "a.toml:2: learner.training.batch_size: got 0, wanted at least 1",
    ),
    "batch not divisible": (
        "[learner.training]\nbatch_size = 10\nnum_ranks = 4\ncpus_per_rank = 0.1\n",
        "a.toml:2: learner.training.batch_size: got 10, wanted a multiple of learner.training.num_ranks = 4: "
        "10 = 4 × 2 + 2; 8 would do",
    ),
    "ZeRO stage 4": (
        "[learner.training]\nzero_stage = 4\n",
        "a.toml:2: learner.training.zero_stage: got 4, wanted one of 0, 1, 2, 3",
    ),
    "unknown plug-in: loss": (
        '[loss]\nkind = "dop"\n',
        f'a.toml:1: loss: got kind = "dop", wanted one of {", ".join(plugin_names("trainers.losses"))}; '
        "did you mean dpo?",
    ),
    "unknown plug-in: domain": (
        'domain.kind = "chess"\n',
        'a.toml:1: domain: got kind = "chess", wanted one of arithmetic',
    ),
    "unknown plug-in: attack": (
        '[attack]\nkind = "gcg"\n',
        'a.toml:1: attack: got kind = "gcg", wanted one of quality_diversity',
    ),
    "setting of the loss": (
        f"[loss]\n{LOSS_KEY} = -0.1\n",
        f"a.toml:2: loss.{LOSS_KEY}: got -0.1, wanted more than 0",
    ),
    "more replicas than the cluster has": (
        "[critic]\nreplicas = 50\n[ray]\nnum_cpus = 2\n",
        "a.toml:2: critic.replicas: got 50, and the roles reserve 11.4 CPUs (1 × 0.2 attacker + 1 × 0.2 rollouts + "
        "50 × 0.2 critic + 2 × 0.5 learner), wanted at most the 2 that Ray has here: lower replicas, num_ranks or "
        "cpus_per_rank, or raise ray.num_cpus (then processes take turns)",
    ),
    "more ranks than the cluster has": (
        "[learner.training]\nnum_ranks = 8\n[ray]\nnum_cpus = 2\n",
        "a.toml:2: learner.training.num_ranks: got 8, and the roles reserve 4.6 CPUs (1 × 0.2 attacker + 1 × 0.2 "
        "rollouts + 1 × 0.2 critic + 8 × 0.5 learner), wanted at most the 2 that Ray has here: lower replicas, "
        "num_ranks or cpus_per_rank, or raise ray.num_cpus (then processes take turns)",
    ),
    "max tokens beyond the bootstrap's context": (
        "[rollouts.sampling]\nmax_tokens = 256\n",
        "a.toml:2: rollouts.sampling.max_tokens: got 256, wanted less than the context, "
        "base_model.max_positions = 256, which prompt and answer share",
    ),
    "max tokens beyond the engine's context": (
        "[critic]\nengine.max_model_len = 64\njudging.max_tokens = 96\n",
        "a.toml:3: critic.judging.max_tokens: got 96, wanted less than the context, "
        "critic.engine.max_model_len = 64, which prompt and answer share",
    ),
    "old samples at another temperature": (
        '[loop]\nmax_policy_age = 1\n[rollouts.sampling]\ntemperature = 0.7\n[loss]\nkind = "dpo"\n',
        "a.toml:4: rollouts.sampling.temperature: got 0.7 with loop.max_policy_age = 1, wanted 1: older samples are "
        "weighed by their log-probs, which are then not those of the learner; or set loop.importance.kind = "
        '"none"',
    ),
    "unset variable": (
        'runs_dir = "${NO_SUCH_PLACE}/runs"\n',
        'a.toml:1: runs_dir: got "${NO_SUCH_PLACE}/runs", wanted a variable of the environment, NO_SUCH_PLACE is not '
        "set: export NO_SUCH_PLACE=…, or write the value itself",
    ),
    "inline secret by its key": (
        '[ray]\ntoken = "correct horse battery staple"\n',
        "a.toml:2: ray.token: got a secret written out (not shown), wanted it in a file that a key ending in _path "
        "names, or in the environment: take it out of here, and revoke it if this was shared",
    ),
    "inline secret by its form": (
        '[learner]\nmodel = "https://hf_abcdefghijklmnopqrstuvwxyzABCDEFGH@hub/m"\n',
        "a.toml:2: learner.model: got a secret written out (not shown), wanted it in a file that a key ending in _path "
        "names, or in the environment: take it out of here, and revoke it if this was shared",
    ),
    "threshold > 1": ("[preferences]\nmargin = 1.5\n", "a.toml:2: preferences.margin: got 1.5, wanted at most 1"),
    "share > 1": ("[oversight]\nbudget = 2\n", "a.toml:2: oversight.budget: got 2, wanted at most 1"),
    "exclusive settings": (
        '[ray]\naddress = "10.0.0.1:6379"\nnum_cpus = 8\n',
        'a.toml:3: ray.num_cpus: got 8 beside ray.address = "10.0.0.1:6379", wanted one of the two: '
        "it is for a local Ray",
    ),
    "control characters": (
        'runs_dir = "a\\u0000b"\n',
        "a.toml:1: runs_dir: got text with the control character U+0000, wanted one line of plain text",
    ),
    "a number beyond 64 bits": (
        "seed = 0xffffffffffffffffff\n",
        "a.toml:1: seed: got a whole number beyond 64 bits, wanted a smaller one",
    ),
    "a number beyond Python": (
        f"seed = {'9' * 5000}\n",
        "a.toml: got a number of thousands of digits, wanted one of 64 bits",
    ),
    "deep nesting": (
        f"[loop]\nx = {'[' * 50}{']' * 50}\n",
        "a.toml:2: loop.x: got tables or lists nested 32 deep, wanted a run's settings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_bad_config_is_answered_in_one_line(capsys: pytest.CaptureFixture[str], kind: str) -> None:
    text, message = CONFIGS[kind]
    Path("a.toml").write_text(text)
    assert said(capsys, "run", "a.toml") == [message]
    assert os.listdir() == ["a.toml"]


def test_a_missing_config_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    Path("quick.toml").touch()
    assert said(capsys, "run", "quik.toml") == ["quik.toml: no such file, wanted a TOML file; did you mean quick.toml?"]
    assert said(capsys, "run", "/") == ["/: can't be read (Is a directory), wanted a TOML file"]


def test_all_mistakes_of_all_files_and_flags_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.toml").write_text(f'seed = -1\n[loss]\n{LOSS_KEY} = 0\n[ray]\napi_key = "x"\n')
    Path("b.toml").write_text('name = "${NO_SUCH_NAME}"\n[learner.training]\nbatch_size = 9\n')
    assert said(capsys, "run", "a.toml", "b.toml", "--critic.replicas", "0") == [
        "a.toml:1: seed: got -1, wanted at least 0",
        f"a.toml:3: loss.{LOSS_KEY}: got 0, wanted more than 0",
        "a.toml:5: ray.api_key: got a secret written out (not shown), wanted it in a file that a key ending in _path "
        "names, or in the environment: take it out of here, and revoke it if this was shared",
        'b.toml:1: name: got "${NO_SUCH_NAME}", wanted a variable of the environment, NO_SUCH_NAME is not set: '
        "export NO_SUCH_NAME=…, or write the value itself",
        "b.toml:3: learner.training.batch_size: got 9, wanted a multiple of learner.training.num_ranks = 2: "
        "9 = 2 × 4 + 1; 8 would do",
        "command line: critic.replicas: got 0, wanted at least 1",
    ]


def test_variables_of_the_environment_are_put_in(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NUMBER", "-2")
    monkeypatch.setenv("WHERE", "elsewhere")
    monkeypatch.setenv("KEY", "sk-proj-abcdefghij0123456789")
    Path("a.toml").write_text(
        f'runs_dir = "${{WHERE}}/${{KEY}}"\n[loss]\n{LOSS_KEY} = "${{NUMBER}}"\n[loop]\nepochs = "${{WHERE}}"\n'
    )
    told = said(capsys, "run", "a.toml")
    assert told[0].startswith("a.toml:1: runs_dir: got a secret written out (not shown)")
    assert told[1:] == [
        f"a.toml:3: loss.{LOSS_KEY}: got -2, wanted more than 0",
        'a.toml:5: loop.epochs: got "elsewhere", wanted a whole number',
    ]


def test_no_key_of_ours_is_taken_for_a_secrets() -> None:
    keys = [doc.key.split(".")[-1] for doc in describe(RunConfig)]
    assert [key for key in keys if SECRET_KEY.search(key)] == []


# ---------------------------------------------------------------------------------------------------------- the place


def run_in(folder: Path, *, name: str = "x") -> RunConfig:
    """Return the config of a new run in a folder, that has its directory and the commit of its first iteration."""
    config = RunConfig(name=name, runs_dir=folder)
    with RunStore.create(
        config.run_dir, config=config.model_dump(mode="json"), id_columns=ID_COLUMNS, models=model_record(config)
    ) as store:
        policy = write_base_model(store.policy_dir(0), config.base_model, seed=0)
        store.commit(0, state={}, policy=digest_directory(policy, root=store.path))
    return config


def test_a_directory_that_holds_another_run_is_not_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    config = run_in(Path("runs"))
    before = sorted(path.name for path in config.run_dir.iterdir())
    assert said(capsys, "run", "--name", "x") == [
        "command line: runs_dir: runs/x: got a directory that holds another run, wanted a new or an empty one; "
        "go on with it by `elenchus resume x`, or choose another name"
    ]
    assert sorted(path.name for path in config.run_dir.iterdir()) == before


def test_a_directory_that_holds_other_files_is_not_written_to(capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs/x").mkdir(parents=True)
    Path("runs/x/thesis.tex").touch()
    assert said(capsys, "run", "--name", "x") == [
        "command line: runs_dir: runs/x: got a directory that holds other files (thesis.tex), wanted a new or an empty "
        "one; choose another name"
    ]


def test_a_directory_that_cannot_be_written_to_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("file").touch()
    assert said(capsys, "run", "--name", "x", "runs_dir=file/runs") == [
        "command line: runs_dir: got file/runs/x, which can't be written to (Not a directory), wanted a directory of "
        "yours: set runs_dir to another one"
    ]


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_directory_of_somebody_else_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("theirs").mkdir(mode=0o555)
    (line,) = said(capsys, "run", "runs_dir=theirs/runs")
    assert "which can't be written to (Permission denied)" in line


def test_a_disk_that_is_too_small_is_told_with_both_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    (line,) = said(capsys, "run", "base_model.num_layers=100000000")
    assert re.fullmatch(
        r"disk: an estimated [\d.]+ TiB will be written, wanted at most the [\d.]+ [TGM]iB that are free at runs: "
        "free some, or choose another runs_dir",
        line,
    )


def test_a_port_in_use_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert said(capsys, "run", "ray.dashboard=true", f"ray.dashboard_port={port}") == [
            f"command line: ray.dashboard_port: got {port}, which is not free (Address already in use), wanted a free "
            "port: choose another, or set ray.dashboard = false"
        ]
    assert list(machine_problems(RunConfig(runs_dir=Path("runs")))) == []


def test_looking_leaves_nothing_behind() -> None:
    assert list(machine_problems(RunConfig(runs_dir=Path("a/b/c")))) == []
    assert os.listdir() == []


# ------------------------------------------------------------------------------------------------------ command lines


COMMANDS = ", ".join(elenchus.COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", f"command: got nothing, wanted one of {COMMANDS}"),
        ("rnu", f'command: got "rnu", wanted one of {COMMANDS}; did you mean run?'),
        ("--seed 3", f'command: got "--seed", wanted one of {COMMANDS}'),
        (
            "run --sed 3",
            "elenchus run: unknown flag --sed; did you mean --seed?; a config key is given in full, such as "
            "--critic.replicas 6",
        ),
        (
            "report x --open",
            "elenchus report: unknown flag --open, wanted one of --help, --name, --runs-dir",
        ),
        ("resume x --runs-dri y", "elenchus resume: unknown flag --runs-dri; did you mean --runs-dir?"),
        ("chat x --max_token=3", "elenchus chat: unknown flag --max-token; did you mean --max-tokens?"),
        ("run --critic.replcas 2", "command line: critic.replcas: unknown key, did you mean critic.replicas?"),
        ("run --seed 3 seed=4", "elenchus run: got seed 2 times on the command line, wanted it once"),
        ("demo --name a name=b", "elenchus demo: got name 2 times on the command line, wanted it once"),
        (
            "run critic.replicas=1 --critic.replicas 2",
            "elenchus run: got critic.replicas 2 times on the command line, wanted it once",
        ),
        ("chat", "Missing from elenchus chat: STR The run's name. (required) · see elenchus chat --help"),
        (
            "demo --seed x",
            "Error parsing --seed: invalid literal for int() with base 10: 'x' · see elenchus demo --help",
        ),
        (
            "chat x --max-tokens many",
            "Error parsing --max-tokens: invalid literal for int() with base 10: 'many' · see elenchus chat --help",
        ),
        (
            "resume x",
            'run: got "x", which is not in runs, and there is none yet: make one by `elenchus demo`',
        ),
    ],
)
def test_a_bad_command_line_is_answered_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    assert said(capsys, *arguments.split()) == [message]


def test_a_run_whose_making_was_cut_short_can_not_be_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    run_in(Path("runs"))
    Path("runs/x/store.json").unlink()
    assert said(capsys, "resume", "x") == [
        "runs/x: got no run (store.json is missing), wanted a run's directory; there are no runs beside it"
    ]


def test_chat_before_the_first_commit_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(name="x", runs_dir=Path("runs"))
    RunStore.create(config.run_dir, config=config.model_dump(mode="json"), id_columns=ID_COLUMNS).close()
    assert said(capsys, "chat", "x") == [
        "runs/x: got no committed policy, wanted at least v0; go on by `elenchus resume x`"
    ]
    assert said(capsys, "chat", "x", "--version", "v0") == [
        'runs/x: got version "v0" and no commit yet; go on by `elenchus resume x`'
    ]


def test_a_version_that_is_absent_is_answered_with_those_that_are_there(capsys: pytest.CaptureFixture[str]) -> None:
    run_in(Path("runs"))
    assert said(capsys, "chat", "x", "--version", "v3") == ['runs/x: got version "v3", wanted one of v0']
    assert said(capsys, "chat", "x", "--version", "newest") == ['runs/x: got version "newest", wanted one of v0']


def test_a_version_whose_files_changed_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    config = run_in(Path("runs"))
    (config.run_dir / "policies" / "v000000" / "config.json").write_text("{}")
    (line,) = said(capsys, "chat", "x", "--version", "v0")
    assert re.fullmatch(
        r"runs/x/policies/v000000/config\.json: got SHA-256 [0-9a-f]{64} \(2 bytes\), wanted [0-9a-f]{64}; "
        "restore the file from a copy, or take another version",
        line,
    )


def test_a_run_that_is_active_is_answered_with_who_holds_it(capsys: pytest.CaptureFixture[str]) -> None:
    config = run_in(Path("runs"))
    with RunStore.open(config.run_dir):
        (line,) = said(capsys, "resume", "x")
    assert re.fullmatch(
        rf"runs/x: run already active, held by pid {os.getpid()} on {re.escape(socket.gethostname())} since "
        r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d; stop that driver, or choose another name",
        line,
    )


def test_a_run_of_another_format_or_version_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    config = run_in(Path("runs"))
    manifest = json.loads((config.run_dir / "store.json").read_text())
    (config.run_dir / "store.json").write_text(json.dumps(manifest | {"format": 2}))
    assert said(capsys, "resume", "x") == ["runs/x/store.json: got format 2, wanted 1; use the version that wrote it"]
    resolved = config.run_dir / "resolved.json"
    resolved.write_text(json.dumps(json.loads(resolved.read_text()) | {"sead": 3, "seed": -1}))
    (config.run_dir / "environment.json").write_text('{"commit": "0123456789abcdef"}')
    assert said(capsys, "resume", "x") == [
        "runs/x/resolved.json: sead: unknown key, did you mean seed?",
        "runs/x/resolved.json: seed: got -1, wanted at least 0",
        "runs/x/resolved.json: wanted a config of this version of elenchus: go on with the one that wrote it "
        "(commit 0123456789ab)",
    ]
    resolved.write_text("[1")
    assert said(capsys, "resume", "x") == [
        "runs/x/resolved.json: got no JSON object, wanted the file as it was written: restore it from a copy"
    ]


def test_a_run_under_another_name_is_not_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    run_in(Path("runs")).run_dir.rename("runs/y")
    assert said(capsys, "resume", "y") == [
        'runs/y: got the directory of the run "x", wanted it under that name: rename it back'
    ]


# ------------------------------------------------------------------------------------------------------ changed models


@pytest.fixture
def run_of_a_model() -> RunConfig:
    """Give a run that has begun with a model directory."""
    model = write_base_model(Path("m"), RunConfig().base_model, seed=0)
    flags = {"model": str(model)}
    base = RunConfig(name="x", runs_dir=Path("runs"))
    config = base.model_copy(
        update={
            "learner": base.learner.model_copy(update=flags),
            "rollouts": base.rollouts.model_copy(update={"engine": base.rollouts.engine.model_copy(update=flags)}),
        }
    )
    RunStore.create(
        config.run_dir, config=config.model_dump(mode="json"), id_columns=ID_COLUMNS, models=model_record(config)
    ).close()
    return config


def test_resuming_with_other_weights_names_the_file(
    run_of_a_model: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree("m")
    write_base_model(Path("m"), run_of_a_model.base_model, seed=1)
    (line,) = said(capsys, "resume", "x")
    assert re.fullmatch(
        r'runs/x: got another model than the run began with, m/model\.safetensors \("[0-9a-f]{16}" is now '
        r'"[0-9a-f]{16}"\), wanted the same: put it back, or begin a new run by `elenchus run`',
        line,
    )


def test_resuming_with_another_config_of_the_model_names_the_keys(
    run_of_a_model: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads(Path("m/config.json").read_text())
    Path("m/config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5, "max_position_embeddings": 512}))
    assert said(capsys, "resume", "x") == [
        "runs/x: got another model than the run began with, m/config.json max_position_embeddings (256 is now 512), "
        "m/config.json rms_norm_eps (1e-06 is now 1e-05), wanted the same: put it back, or begin a new run by "
        "`elenchus run`"
    ]


def test_resuming_with_another_bootstrap_names_the_keys(capsys: pytest.CaptureFixture[str]) -> None:
    config = run_in(Path("runs"))
    changed = config.model_dump(mode="json")
    changed["base_model"]["num_layers"] = 3
    changed["bootstrap"]["steps"] = 100
    (config.run_dir / "resolved.json").write_text(json.dumps(changed))
    assert said(capsys, "resume", "x") == [
        "runs/x: got another model than the run began with, base_model.num_layers (2 is now 3), bootstrap.steps (2400 "
        "is now 100), wanted the same: put it back, or begin a new run by `elenchus run`"
    ]


# ---------------------------------------------------------------------------------------------------- Ray's own address


def test_an_address_where_nobody_answers_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert said(capsys, "run", f"ray.address={address}") == [
        f'command line: ray.address: got "{address}", where nothing answers (Connection refused), wanted the address '
        "of a running Ray: start one there by `ray start --head`, or leave the address out for a local one"
    ]
    assert said(capsys, "run", "ray.address=head") == [
        'command line: ray.address: got "head", wanted "host:port", "ray://host:port" or "auto"'
    ]


def test_a_wrong_or_missing_token_is_answered_with_how_to_set_it(
    ray_session: str, short_tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    remedy = (
        "wanted that cluster's: set ray.token_path to a file that holds it, or export RAY_AUTH_TOKEN_PATH or "
        "RAY_AUTH_TOKEN (on its head node `ray get-auth-token` prints it)"
    )
    Path("token").write_text("0" * 64)
    address = f"ray.address={ray_session}"
    assert said(capsys, "run", address, "ray.token_path=token") == [
        f'command line: ray.address: got "{ray_session}" and a token that it does not know, {remedy}'
    ]
    assert said(capsys, "run", address, "ray.token_path=tokn") == [
        "command line: ray.token_path: no file tokn, wanted the one that holds the cluster's token"
    ]
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    assert said(capsys, "run", address) == [f'command line: ray.address: got "{ray_session}" and no token, {remedy}']
    monkeypatch.setenv("RAY_ADDRESS", ray_session)
    assert said(capsys, "run") == [f'RAY_ADDRESS: got "{ray_session}" and no token, {remedy}']


def test_a_cluster_of_another_version_is_named_with_both(ray_session: str, short_tmp_path: Path) -> None:
    import ray
    from ray._common.usage.usage_constants import CLUSTER_METADATA_KEY
    from ray._private.worker import global_worker

    join = f"""
        import sys
        sys.path.insert(0, {str(ROOT)!r})
        from cluster.ray_runtime import RayConfig, start_ray
        try:
            start_ray(RayConfig(address={ray_session!r}))
        except ValueError as error:
            print(error)
    """
    stored = global_worker.gcs_client.internal_kv_get(CLUSTER_METADATA_KEY, b"cluster")
    other = json.dumps(json.loads(stored) | {"ray_version": "2.50.0"}).encode()
    global_worker.gcs_client.internal_kv_put(CLUSTER_METADATA_KEY, other, True, b"cluster")
    try:
        joined = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(join)],
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={**os.environ, "RAY_AUTH_TOKEN_PATH": str(short_tmp_path / "token")},
        )
    finally:
        global_worker.gcs_client.internal_kv_put(CLUSTER_METADATA_KEY, stored, True, b"cluster")
    python = ".".join(map(str, sys.version_info[:3]))
    assert joined.stdout.splitlines()[-1] == (
        f'ray.address: got "{ray_session}", which runs Ray 2.50.0 on Python {python}, wanted Ray {ray.__version__} on '
        f"Python {python} as here: install the same on both sides"
    )


# --------------------------------------------------------------------------------------------------------- how quickly


HEAVY = ("torch", "vllm", "ray", "transformers", "deepspeed", "scipy")


@pytest.mark.parametrize(
    "code",
    [
        "from trainers.run_config import load_run_config; load_run_config([])",
        f"import elenchus; assert elenchus.main(['run', 'loss.{LOSS_KEY}=-1', 'name=x']) == 2",
        "import elenchus; assert elenchus.main(['run', 'critic.replicas=900']) == 2",
        "import elenchus; assert elenchus.main(['run', 'learner.model=m', 'rollouts.engine.model=m']) == 2",
    ],
)
def test_a_bad_config_is_answered_without_what_takes_seconds_to_import(code: str) -> None:
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); {code}; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
