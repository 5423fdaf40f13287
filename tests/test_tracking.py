"""What a run says about itself survives kills and resumes: metrics.jsonl, summary.json, and what trackers are told."""

from __future__ import annotations

import ast
import importlib
import json
import sys
import threading
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cluster.config import Config, ConfigError, plugin_names
from tests.default_loss import LOSS_KEY
from tests.synthetic_run import make_row, make_summary
from trainers import tracking
from trainers.preflight import machine_problems
from trainers.run_config import RunConfig, load_run_config
from trainers.summary import (
    CountedBeforeAfter,
    append_metrics,
    read_metrics,
    read_summary,
    rewind_metrics,
    summarise_agreement,
    summarise_experts,
    summarise_pairs,
    write_summary,
)
from trainers.trackers import TrackedRun
from trainers.trackers.tensorboard import TENSORBOARD_DIR
from trainers.tracking import Trackers, identity_of, scalars, told_settings
from trainers.tracking_config import TRACKERS, TrackingConfig, missing_trackers


def test_metrics_are_read_back_as_written(tmp_path: Path) -> None:
    rows = [make_row(1), make_row(2, live=None)]
    for row in rows:
        append_metrics(tmp_path, row)
    assert read_metrics(tmp_path) == rows


def test_a_line_cut_short_by_a_crash_is_ignored_and_then_overwritten(tmp_path: Path) -> None:
    append_metrics(tmp_path, make_row(1))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    for cut in (1, 40, len(whole) - 1):
        path.write_bytes(whole + whole[:cut])
        assert read_metrics(tmp_path) == [make_row(1)]
    append_metrics(tmp_path, make_row(2))
    assert read_metrics(tmp_path) == [make_row(1), make_row(2)]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    append_metrics(tmp_path, make_row(1))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n' + path.read_bytes())
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        read_metrics(tmp_path)


def test_the_last_row_of_an_iteration_wins_and_rewinding_drops_what_was_not_committed(tmp_path: Path) -> None:
    for row in (make_row(1), make_row(2), make_row(3), make_row(2, probe_accuracy=0.75)):
        append_metrics(tmp_path, row)
    assert [row.probe_accuracy for row in read_metrics(tmp_path)] == [0.5, 0.75, 0.5]
    rewind_metrics(tmp_path, last_iteration=2)
    assert [row.iteration for row in read_metrics(tmp_path)] == [1, 2]
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 2


def test_summary_is_read_back_as_written_and_absent_before(tmp_path: Path) -> None:
    assert read_summary(tmp_path) is None
    summary = make_summary([make_row(1), make_row(2)])
    path = write_summary(tmp_path, summary)
    assert read_summary(tmp_path) == summary
    on_disk = json.loads(path.read_text())
    # 35 items went from wrong to right and 5 from right to wrong.
    assert on_disk["sealed_accuracy"]["gain"] == pytest.approx(0.3)
    assert on_disk["sealed_accuracy"]["ci_low"] > 0.17
    assert on_disk["live_attack_success"] == {"1": 0.4, "2": 0.4}
    assert set(on_disk["gold"]) == {"learner_bootstrap", "critic_bootstrap", "expert", "calibration", "canaries"}
    assert set(on_disk["wall_s"]) == {"bootstrap", "start", "iterations", "total"}


def test_a_file_that_is_no_summary_is_named(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json"):
        read_summary(tmp_path)


def test_summary_refuses_a_share_above_one() -> None:
    with pytest.raises(ValidationError):
        CountedBeforeAfter(before=0.5, after=1.2, n=10)


def test_the_lowest_iterations_agreement_counts_with_its_own_error_rates() -> None:
    # Good answers passed: 90, 80, 96 of 100; bad ones failed: 95 of 100.
    rows = [make_row(1), make_row(2, good_passed=80), make_row(3, good_passed=96)]
    found = summarise_agreement(rows)
    assert found.lowest == pytest.approx((0.80 + 0.95) / 2)
    assert found.false_fail == pytest.approx(0.20)
    assert found.false_pass == pytest.approx(0.05)
    assert found.by_iteration[3] == pytest.approx((0.96 + 0.95) / 2)


def test_experts_and_pairs_add_up_over_iterations() -> None:
    rows = [make_row(1), make_row(2)]
    experts = summarise_experts(rows)
    assert (experts.asked, experts.verdicts, experts.fraction) == (24, 768, 24 / 768)
    pairs = summarise_pairs(rows)
    assert pairs.trained == 120
    assert pairs.dropped == {"all_pass": 40, "all_fail": 11 + 12, "margin": 12}


def test_what_was_not_measured_has_no_point() -> None:
    tags = dict(scalars(make_row(1, live=None)))
    assert "attack/live_success" not in tags
    assert "sample_age/mean" not in tags
    assert tags["cell_fail_share/plus_sign_3_2"] == 0.25
    assert "cell_fail_share/-_3_1" not in tags
    assert tags["experts/fraction"] == 12 / 384
    assert tags["training/grad_norm"] == 1.2


def test_ages_and_losses_are_among_the_figures() -> None:
    tags = dict(scalars(make_row(1).model_copy(update={"sample_ages": {0: 90, 2: 30}, "lost": {"critiques": 2}})))
    assert tags["sample_age/mean"] == 0.5
    assert tags["sample_age/max"] == 2
    assert tags["lost/critiques"] == 2


# --------------------------------------------------------------------------------------------------------- TensorBoard

ALONE = TrackingConfig(kinds=())


def tracked(run_dir: Path, *, last_iteration: int = 0) -> TrackedRun:
    return TrackedRun(
        name="demo",
        identity="0a1b2c3d",
        run_dir=run_dir,
        project="elenchus",
        last_iteration=last_iteration,
        settings={"loss.kind": "dpo", "loss.beta": 0.1},
    )


def unheard(text: str) -> None:
    pytest.fail(f"nobody should have been told: {text}")


def _points(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / TENSORBOARD_DIR))
    events.Reload()
    return [(event.step, round(event.value, 6)) for event in events.Scalars(tag)]


def test_a_logged_iteration_is_on_disk_before_the_trackers_are_closed(tmp_path: Path) -> None:
    with Trackers(ALONE, tracked(tmp_path), note=unheard) as trackers:
        trackers.log(make_row(1, probe_accuracy=0.4))
        assert _points(tmp_path, "probe/accuracy") == [(1, 0.4)]


def test_a_resumed_run_hides_what_was_logged_after_its_last_commit(tmp_path: Path) -> None:
    with Trackers(ALONE, tracked(tmp_path), note=unheard) as first:
        for iteration in (1, 2, 3):
            first.log(make_row(iteration, probe_accuracy=0.1 * iteration))
    # TensorBoard reads event files in the order of their names, which hold the second of their making.
    (made,) = (tmp_path / TENSORBOARD_DIR).iterdir()
    made.rename(made.with_name(made.name.replace("tfevents.", "tfevents.0", 1)))
    with Trackers(ALONE, tracked(tmp_path, last_iteration=2), note=unheard) as second:
        second.log(make_row(3, probe_accuracy=0.9))
    assert _points(tmp_path, "probe/accuracy") == [(1, 0.1), (2, 0.2), (3, 0.9)]


# ------------------------------------------------------------------------------------------------- the other libraries


@dataclass(slots=True)
class Told:
    """What a library's stand-in was told, run by run."""

    begun: list[dict[str, Any]] = field(default_factory=list)
    rows: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    ended: int = 0
    fails_at: int | None = None
    """The step at which it raises."""
    blocks: threading.Event | None = None
    """What its first row waits for."""

    def take(self, step: int, figures: Mapping[str, float]) -> None:
        if self.blocks is not None:
            self.blocks.wait(timeout=30)
        if step == self.fails_at:
            raise ConnectionError("the server is gone\nand more")
        self.rows.append((step, dict(figures)))


class _FakeRun:
    """A run as W&B and trackio have it."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def log(self, figures: dict[str, float], step: int) -> None:
        self._told.take(step, figures)

    def finish(self) -> None:
        self._told.ended += 1


class _FakeClient:
    """MLflow's client, over one store."""

    def __init__(self, told: Told, tracking_uri: str) -> None:
        self._told = told
        self._uri = tracking_uri

    def get_experiment_by_name(self, name: str) -> None:
        return None

    def create_experiment(self, name: str, artifact_location: str | None = None) -> str:
        return name

    def search_runs(self, experiment_ids: list[str], text: str, max_results: int) -> list[Any]:
        found = [i for i, run in enumerate(self._told.begun) if run["identity"] == text.split("'")[1]]
        return [types.SimpleNamespace(info=types.SimpleNamespace(run_id=str(i))) for i in found]

    def update_run(self, run_id: str, status: str) -> None:
        self._told.begun[int(run_id)]["status"] = status

    def create_run(self, experiment_id: str, run_name: str, tags: dict[str, str]) -> Any:
        begun = {"uri": self._uri, "project": experiment_id, "name": run_name, "identity": next(iter(tags.values()))}
        self._told.begun.append(begun | {"config": {}})
        return types.SimpleNamespace(info=types.SimpleNamespace(run_id=str(len(self._told.begun) - 1)))

    def log_batch(self, run_id: str, metrics: Any = (), params: Any = ()) -> None:
        self._told.begun[int(run_id)]["config"].update(params)
        if metrics:
            self._told.take(metrics[0][3], {name: value for name, value, _, _ in metrics})

    def set_terminated(self, run_id: str) -> None:
        self._told.ended += 1


def _module(name: str, **contents: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = ModuleSpec(name, loader=None, origin=f"{name}/__init__.py")
    vars(module).update(contents)
    return module


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, Told]:
    """Put stand-ins where the libraries would be, in their own signatures, and give what they are told."""
    told = {name: Told() for name in ("wandb", "mlflow", "trackio")}

    def begin(name: str) -> Callable[..., _FakeRun]:
        def init(**settings: Any) -> _FakeRun:
            told[name].begun.append(settings)
            sys.stdout.write(f"* {name} says where it writes\n" if name == "trackio" else "")
            return _FakeRun(told[name])

        return init

    modules = [
        _module("wandb", init=begin("wandb"), Settings=dict),
        _module("trackio", init=begin("trackio")),
        _module("mlflow"),
        _module("mlflow.entities", Metric=lambda *values: values, Param=lambda *values: values),
        _module("mlflow.tracking", MlflowClient=lambda tracking_uri: _FakeClient(told["mlflow"], tracking_uri)),
    ]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY", "TRACKIO_DIR", "WANDB_ERROR_REPORTING"):
        # What the adapters set must not outlive the test.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    return told


def test_every_installed_library_gets_every_row_under_its_iteration(
    tmp_path: Path, libraries: dict[str, Told], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [make_row(1), make_row(2, live=None)]
    with Trackers(TrackingConfig(), tracked(tmp_path), note=unheard) as trackers:
        for row in rows:
            trackers.log(row)
    for name, told in libraries.items():
        assert told.rows == [(row.iteration, dict(scalars(row))) for row in rows], name
        assert told.ended == 1
        (begun,) = told.begun
        assert begun["project"] == "elenchus"
        assert begun["name"].startswith("demo")
        assert {key: str(value) for key, value in begun["config"].items()} == {"loss.kind": "dpo", "loss.beta": "0.1"}
    assert _points(tmp_path, "probe/accuracy") == [(1, 0.5), (2, 0.5)]
    assert capsys.readouterr().out == "", "the terminal has the live table"


def test_nothing_leaves_the_machine_unless_it_is_asked_for(tmp_path: Path, libraries: dict[str, Told]) -> None:
    run_dir = tmp_path / "runs" / "demo"
    run_dir.mkdir(parents=True)
    Trackers(TrackingConfig(), tracked(run_dir), note=unheard).close()
    assert libraries["wandb"].begun[0]["mode"] == "offline"
    assert libraries["wandb"].begun[0]["dir"] == str(run_dir)
    assert libraries["mlflow"].begun[0]["uri"] == f"sqlite:///{tmp_path / 'runs' / '.trackers' / 'mlflow.db'}"
    assert libraries["trackio"].begun[0]["space_id"] is None


def test_where_figures_go_is_the_configs_to_say(tmp_path: Path, libraries: dict[str, Told]) -> None:
    flags = [
        ("tracking.wandb.online", "true"),
        ("tracking.mlflow.uri", "https://mlflow.lab"),
        ("tracking.trackio.space", "lab/runs"),
        ("tracking.project", "arithmetic"),
    ]
    Trackers(load_run_config([], flags=flags).tracking, tracked(tmp_path), note=unheard).close()
    assert libraries["wandb"].begun[0]["mode"] == "online"
    assert libraries["mlflow"].begun[0]["uri"] == "https://mlflow.lab"
    assert libraries["trackio"].begun[0]["space_id"] == "lab/runs"


def test_mlflows_own_variable_counts_where_the_config_says_nothing(
    tmp_path: Path, libraries: dict[str, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://other.lab")
    Trackers(TrackingConfig(kinds=("mlflow",)), tracked(tmp_path), note=unheard).close()
    assert libraries["mlflow"].begun[0]["uri"] == "https://other.lab"


def test_a_resumed_run_goes_on_in_the_same_run_of_each_tracker(tmp_path: Path, libraries: dict[str, Told]) -> None:
    for last_iteration in (0, 1):
        with Trackers(TrackingConfig(), tracked(tmp_path, last_iteration=last_iteration), note=unheard) as trackers:
            trackers.log(make_row(last_iteration + 1))
    for told in libraries.values():
        assert [step for step, _ in told.rows] == [1, 2]
    first, second = libraries["wandb"].begun
    assert (first["id"], first["resume"]) == (second["id"], second["resume"]) == ("0a1b2c3d", "allow")
    first, second = libraries["trackio"].begun
    assert (first["name"], first["resume"]) == (second["name"], second["resume"]) == ("demo-0a1b2c3d", "allow")
    (only,) = libraries["mlflow"].begun
    assert only["status"] == "RUNNING"


def test_a_tracker_that_fails_is_told_of_and_left_out(tmp_path: Path, libraries: dict[str, Told]) -> None:
    libraries["mlflow"].fails_at = 2
    notes: list[str] = []
    with Trackers(TrackingConfig(), tracked(tmp_path), note=notes.append) as trackers:
        for iteration in (1, 2, 3):
            trackers.log(make_row(iteration))
    assert notes == [
        "tracking: mlflow failed (ConnectionError: the server is gone), the run goes on without it; "
        "metrics.jsonl has every row"
    ]
    assert [step for step, _ in libraries["mlflow"].rows] == [1]
    for name in ("wandb", "trackio"):
        assert [step for step, _ in libraries[name].rows] == [1, 2, 3]
    assert [step for step, _ in _points(tmp_path, "probe/accuracy")] == [1, 2, 3]


def test_a_tracker_that_can_not_be_opened_is_told_of_and_left_out(tmp_path: Path, libraries: dict[str, Told]) -> None:
    del sys.modules["mlflow.entities"]
    notes: list[str] = []
    with Trackers(TrackingConfig(kinds=("mlflow",)), tracked(tmp_path), note=notes.append) as trackers:
        trackers.log(make_row(1))
    (note,) = notes
    assert note.startswith("tracking: mlflow failed (ModuleNotFoundError: ")


def test_a_slow_tracker_holds_up_neither_the_loop_nor_for_ever_the_end(
    tmp_path: Path, libraries: dict[str, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "CLOSE_S", 0.1)
    libraries["wandb"].blocks = threading.Event()
    notes: list[str] = []
    try:
        with Trackers(TrackingConfig(), tracked(tmp_path), note=notes.append) as trackers:
            for iteration in (1, 2):
                trackers.log(make_row(iteration))
            assert libraries["wandb"].rows == []
        assert notes == ["tracking: wandb was still sending after 0.1 s; metrics.jsonl has every row"]
        assert [step for step, _ in libraries["mlflow"].rows] == [1, 2]
    finally:
        libraries["wandb"].blocks.set()
        for thread in [thread for thread in threading.enumerate() if thread.name == "tracker wandb"]:
            thread.join(timeout=30)
    assert [step for step, _ in libraries["wandb"].rows] == [1, 2], "what was handed over is not thrown away"


def test_keys_reach_neither_the_runs_files_nor_what_trackers_are_told(
    tmp_path: Path, libraries: dict[str, Told], monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "0123456789abcdef0123456789abcdef01234567"
    for variable in ("WANDB_API_KEY", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(variable, secret)
    config = load_run_config([], flags=[("ray.token_path", "/home/somebody/token"), ("runs_dir", str(tmp_path))])
    settings = told_settings(config.model_dump(mode="json"))
    assert settings[f"loss.{LOSS_KEY}"] == RunConfig().loss.model_dump()[LOSS_KEY]
    assert not [key for key in settings if key.startswith(("ray.", "tracking.", "runs_dir"))]
    run = TrackedRun(name="demo", identity="0a", run_dir=tmp_path, project="elenchus", settings=settings)
    with Trackers(config.tracking, run, note=unheard) as trackers:
        trackers.log(make_row(1))
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    assert not [path for path in written if secret.encode() in path.read_bytes()]
    for told in libraries.values():
        assert secret not in repr(told)
        assert "/home/somebody" not in repr(told)
        assert str(tmp_path) not in repr(told.begun[0]["config"])


# ---------------------------------------------------------------------------------------------------------- the config


def test_every_tracker_has_what_a_tracker_needs_and_imports_its_library_only_when_opened() -> None:
    assert plugin_names(TRACKERS) == ["mlflow", "tensorboard", "trackio", "wandb"]
    for name in plugin_names(TRACKERS):
        module = importlib.import_module(f"{TRACKERS}.{name}")
        assert issubclass(module.Config, Config)
        assert callable(module.open_tracker)
        at_once = [node for node in ast.parse(Path(module.__file__ or "").read_text()).body if _imports(node)]
        names = {alias.name for node in at_once if isinstance(node, ast.Import) for alias in node.names}
        names |= {node.module or "" for node in at_once if isinstance(node, ast.ImportFrom)}
        assert not [found for found in names if found.split(".")[0] in (module.PACKAGE, "torch")]


def _imports(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have none of the libraries found, whatever this machine has; but the folders that they leave where they ran."""
    for name in ("wandb", "mlflow", "trackio"):
        (tmp_path / "here" / name).mkdir(parents=True)
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "here"), *(p for p in sys.path if "site-packages" not in p)])
    importlib.invalidate_caches()


@pytest.mark.usefixtures("nothing_installed")
def test_auto_takes_no_library_that_is_not_there() -> None:
    assert TrackingConfig().chosen() == ["tensorboard"]


@pytest.mark.usefixtures("libraries")
def test_auto_takes_every_library_that_is_there() -> None:
    assert TrackingConfig().chosen() == ["mlflow", "tensorboard", "trackio", "wandb"]
    assert TrackingConfig(kinds=("trackio",)).chosen() == ["tensorboard", "trackio"]
    assert TrackingConfig(kinds=()).chosen() == ["tensorboard"]
    assert list(missing_trackers(TrackingConfig(kinds=("trackio", "wandb", "auto")))) == []


@pytest.mark.usefixtures("nothing_installed")
def test_a_named_tracker_that_is_not_installed_is_refused_before_anything_starts(tmp_path: Path) -> None:
    flags = [("tracking.kinds", '["auto", "wandb", "trackio"]'), ("runs_dir", str(tmp_path / "runs"))]
    config = load_run_config([], flags=flags)
    assert [line for line in machine_problems(config) if line.startswith("tracking")] == [
        'tracking.kinds: got "wandb", whose library is not installed, wanted it beside elenchus: pip install wandb',
        'tracking.kinds: got "trackio", whose library is not installed, wanted it beside elenchus: pip install trackio',
    ]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("kinds", '["wandbb"]', 'got "wandbb", wanted some of auto, mlflow, tensorboard, trackio, wandb'),
        ("kinds", '"wandb"', 'got "wandb", wanted a list'),
        ("mlflow.uri", "https://me:hush@mlflow.lab", "got an address with a password in it (not shown), wanted it "
         "without: export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("wandb.api_key", "0123456789abcdef", "got a secret written out (not shown), wanted it in a file that a key "
         "ending in _path names, or in the environment: take it out of here, and revoke it if this was shared"),
        ("wandb.entity", "lab", "unknown key, wanted one of online"),
    ],
)  # fmt: skip
def test_what_the_section_can_not_hold_is_refused(key: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_run_config([], flags=[(f"tracking.{key}", value)])
    assert str(caught.value) == f"command line: tracking.{key}: {message}"


def test_runs_of_one_name_have_identities_of_their_own_that_stay(tmp_path: Path) -> None:
    for name, created in (("first", 1.0), ("second", 2.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "store.json").write_text(json.dumps({"format": 1, "created": created}))
    assert identity_of(tmp_path / "first") == identity_of(tmp_path / "first")
    assert identity_of(tmp_path / "first") != identity_of(tmp_path / "second")
