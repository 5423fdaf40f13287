"""The command line and what it shows: exit codes, one line per mistake, Ctrl-C, and the table."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import elenchus
from cluster.durable_files import digest_directory
from cluster.store import RunStore
from serve.console import RunConsole
from trainers.base_model import write_base_model
from trainers.driver import Stopped
from trainers.loop_state import STAGES
from trainers.progress import StopSignal
from trainers.run_config import RunConfig
from trainers.summary import AgreementMetrics, IterationMetrics, Summary

ROOT = Path(__file__).resolve().parent.parent


def test_all_of_a_configs_mistakes_are_told_and_the_code_is_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.toml"
    path.write_text("seed = -1\n[critic]\nreplics = 2\n")
    assert elenchus.main(["run", str(path), "--critic.replicas", "0", f"runs_dir={tmp_path}/runs"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        f"✗ {path}:1: seed: got -1, wanted at least 0",
        f"✗ {path}:3: critic.replics: unknown key, did you mean critic.replicas?",
        "✗ command line: critic.replicas: got 0, wanted at least 1",
    ]
    assert not (tmp_path / "runs").exists()


def test_an_unknown_run_is_answered_with_those_that_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("alpha", "beta"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "resolved.json").write_text("{}")
    for command in ("resume", "chat", "report"):
        assert elenchus.main([command, "alhpa", "--runs-dir", str(tmp_path)]) == 2
        assert capsys.readouterr().err == (
            f'✗ run: got "alhpa", which is not in {tmp_path}, wanted one of alpha, beta; did you mean alpha?\n'
        )


@pytest.mark.parametrize("name", ["..", ".", "a/b"])
def test_a_run_name_is_no_path(tmp_path: Path, name: str) -> None:
    (tmp_path / "resolved.json").write_text("{}")
    assert elenchus.main(["report", name, "--runs-dir", str(tmp_path / "runs")]) == 2


def test_help_is_no_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        elenchus.main(["--help"])
    assert ended.value.code == 0
    assert "resume" in capsys.readouterr().out


def test_help_on_run_lists_the_config_keys(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        elenchus.main(["run", "--help"])
    assert "  critic.replicas = 1\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "rest", "flags"),
    [
        ("run a.toml --critic.replicas 6", "run a.toml", [("critic.replicas", "6")]),
        ("run --loss.beta=0.2 a.toml", "run a.toml", [("loss.beta", "0.2")]),
        ("run critic.replicas=6 seed=3", "run", [("critic.replicas", "6"), ("seed", "3")]),
        ("run --ray.dashboard --name x", "run --name x", [("ray.dashboard", "true")]),
        ("run --a.b -1 --seed 2", "run --seed 2", [("a.b", "-1")]),
        ("run --a.b", "run", [("a.b", "true")]),
        ("run x=y=z ./odd=name.toml", "run ./odd=name.toml", [("x", "y=z")]),
    ],
)
def test_config_flags_are_told_from_other_words(words: str, rest: str, flags: list[tuple[str, str]]) -> None:
    assert elenchus.split_flags(words.split()) == (rest.split(), flags)


# ---------------------------------------------------------------------- a sitting


def config_in(folder: Path) -> RunConfig:
    config = RunConfig(name="x", runs_dir=folder)
    config.run_dir.mkdir(parents=True)
    return config


def test_a_clean_stop_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = config_in(tmp_path)
    for iteration in (0, 1, 2):
        folder = config.run_dir / "journal" / f"iteration={iteration:06d}"
        folder.mkdir(parents=True)
        (folder / "COMMIT.json").touch()

    def sit(console: RunConsole, stop: StopSignal) -> Summary:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        raise Stopped(2)

    before = signal.getsignal(signal.SIGINT)
    assert elenchus.watched(config, sit) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert capsys.readouterr().out == "stopped cleanly after iteration 2; continue with `elenchus resume x`\n"


def test_what_the_user_did_is_two_and_what_we_did_is_one_with_a_trace(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_in(tmp_path)

    def holds_another_run(console: RunConsole, stop: StopSignal) -> Summary:
        raise ExceptionGroup("from a task group", [ValueError("run directory: got another run, wanted a new one")])

    def breaks(console: RunConsole, stop: StopSignal) -> Summary:
        raise RuntimeError("the engine\nfell over")

    def library_refuses(console: RunConsole, stop: StopSignal) -> Summary:
        int("x")
        bytes.fromhex("zz")
        raise AssertionError

    assert elenchus.watched(config, holds_another_run) == 2
    assert capsys.readouterr().err == "✗ run directory: got another run, wanted a new one\n"
    assert elenchus.watched(config, breaks) == 1
    log = config.run_dir / "elenchus.log"
    assert capsys.readouterr().err == f"✗ RuntimeError: the engine fell over · the trace is in {log}\n"
    assert "in breaks" in log.read_text()


@pytest.mark.timeout(60)
def test_a_second_interrupt_leaves_at_once_and_says_what_is_saved(tmp_path: Path) -> None:
    program = textwrap.dedent(f"""
        import os, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        from pathlib import Path
        import elenchus
        from trainers.run_config import RunConfig
        config = RunConfig(name="x", runs_dir=Path({str(tmp_path)!r}))
        (config.run_dir / "journal" / "iteration=000003").mkdir(parents=True)
        (config.run_dir / "journal" / "iteration=000003" / "COMMIT.json").touch()
        def sit(console, stop):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("still here")
        sys.exit(elenchus.watched(config, sit))
    """)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ended.returncode == 130
    assert "left at once after iteration 3; continue with `elenchus resume x`" in ended.stderr
    assert "Traceback" not in ended.stderr


# ---------------------------------------------------------------------- the console


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def metrics(iteration: int) -> IterationMetrics:
    agreement = AgreementMetrics(
        balanced_accuracy=0.912, ci_low=0.88, ci_high=0.94, false_pass=0.1, false_fail=0.08, auroc=0.97,
        num_good=60, num_bad=40, num_unjudged=0,
    )  # fmt: skip
    return IterationMetrics(
        iteration=iteration, policy_version=f"v{iteration}", live_attack_success=0.61, num_attacks=192,
        probe_accuracy=0.394, num_probe=240, critic_agreement=agreement, experts_asked=14, num_verdicts=512,
        pairs_trained=100, pairs_dropped={}, proposals={}, cells=(), seconds={}, wall_s=30.0, tokens_per_s={},
        parity_max_abs_diff=3e-7, training={},
    )  # fmt: skip


def test_a_log_gets_plain_lines() -> None:
    stream = io.StringIO()
    with RunConsole(stream) as console:
        console.note("cluster   [local] Ray, 2 CPUs")
        console.stage("queries", done=0, total=4)
        console.stage("queries", done=3, total=4)
        console.stage("queries", done=4, total=4)
        console.row(metrics(1))
        console.row(metrics(2))
    assert "\x1b" not in stream.getvalue()
    assert stream.getvalue().splitlines() == [
        "● cluster   [local] Ray, 2 CPUs",
        "  queries 4 of 4 · 0 s",
        "iter  attack success  probe accuracy  critic agrees  to experts  version",
        "   1            61 %            39 %           91 %      14/512       v1",
        "   2            61 %            39 %           91 %      14/512       v2",
    ]
    assert console.last_iteration == 2


def test_a_terminal_gets_a_bar_that_goes_when_the_stage_ends() -> None:
    stream = Terminal()
    with RunConsole(stream) as console:
        assert console.live
        console.stage("bootstrap", done=1, total=8)
        console.stage("bootstrap", done=8, total=8)
        console.row(metrics(1))
    text = stream.getvalue()
    assert "bootstrap" in text
    assert text.rstrip().endswith("\x1b[?25h") or "14/512" in text.splitlines()[-1]


def test_chat_answers_lines_from_a_pipe_with_the_newest_committed_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = RunConfig(name="x", runs_dir=tmp_path)
    id_columns = {stage: column for stage, (_, column) in STAGES.items()}
    with RunStore.create(config.run_dir, config=config.model_dump(mode="json"), id_columns=id_columns) as store:
        policy = write_base_model(store.policy_dir(0), config.base_model, seed=0)
        store.commit(0, state={}, policy=digest_directory(policy, root=store.path))
    long = "9" * (config.base_model.max_positions + 1)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"12+34=\n\n{long}\n"))
    capsys.readouterr()
    assert elenchus.main(["chat", "x", "--runs-dir", str(tmp_path), "--max-tokens", "4"]) == 0
    told = capsys.readouterr()
    assert told.err.splitlines()[-1] == "● x v0: ask, or end with Ctrl-D"
    answer, _, refusal = told.out.rpartition("(the question has")
    assert len(answer) <= len("1234\n")
    assert "more than the model takes" in refusal
    monkeypatch.setattr(sys, "stdin", io.StringIO("12+34=\n"))
    assert elenchus.main(["chat", "x", "--runs-dir", str(tmp_path), "--version", "v0", "--max-tokens", "4"]) == 0
    assert answer.splitlines()[0] == capsys.readouterr().out.splitlines()[0]


def test_chat_with_a_run_that_has_committed_nothing_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = RunConfig(name="x", runs_dir=tmp_path)
    RunStore.create(config.run_dir, config=config.model_dump(mode="json"), id_columns={}).close()
    assert elenchus.main(["chat", "x", "--runs-dir", str(tmp_path)]) == 2
    assert "got no committed policy" in capsys.readouterr().err
