"""Owns where a run's rows go besides metrics.jsonl: which trackers there are, what they are told, what if one fails.

row ──► scalars ──┬──► TensorBoard              at once, always
                  ├──► Relay ──► wandb ┐
                  ├──► Relay ──► mlflow├        each in a thread of its own: none holds the loop up,
                  └──► Relay ──► trackio        and one that fails is told of and left out
"""

from __future__ import annotations

import hashlib
import logging
import queue
import re
import threading
import unicodedata
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cluster.config import Config, load_plugin
from trainers.loop_metrics import mean_age
from trainers.summary import IterationMetrics
from trainers.trackers import TrackedRun, Tracker, tensorboard
from trainers.tracking_config import ALWAYS, TRACKERS, TrackingConfig

logger = logging.getLogger(__name__)

CLOSE_S = 30.0
"""Longest time that a run's end waits for a tracker that is still sending."""
OF_THE_MACHINE = ("name", "runs_dir", "ray", "tracking")
"""Sections of a run's config that trackers are not told of."""


def identity_of(run_dir: Path) -> str:
    """Return what tells a run apart from another of its name, from the record of when its directory was made."""
    return hashlib.sha256((run_dir / "store.json").read_bytes()).hexdigest()[:8]


def told_settings(config: Mapping[str, Any]) -> dict[str, str | float | bool]:
    """Return a run's config as trackers are told it: flat, without what it says of the machine.

    >>> told_settings({"name": "demo", "loss": {"kind": "dpo", "beta": 0.1}, "ray": {"token_path": "/x"}, "seed": None})
    {'loss.kind': 'dpo', 'loss.beta': 0.1}
    """
    return dict(_flat({key: value for key, value in config.items() if key not in OF_THE_MACHINE}, prefix=""))


def _flat(table: Mapping[str, Any], *, prefix: str) -> Iterator[tuple[str, str | float | bool]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value, prefix=f"{prefix}{key}.")
        elif value is not None:
            yield f"{prefix}{key}", value if isinstance(value, str | float | int | bool) else str(value)


# ------------------------------------------------------------------------------------------------------------ trackers


class Trackers:
    """All trackers of a run's sitting; a row that `log` returned from is in TensorBoard's files, the others follow."""

    def __init__(self, config: TrackingConfig, run: TrackedRun, *, note: Callable[[str], None]) -> None:
        """Open TensorBoard's events, and begin with the others.

        Args:
            config: which they are.
            run: what they are told of the run.
            note: takes a line for the user; called from other threads.
        """
        sections: Mapping[str, Any] = {"wandb": config.wandb, "mlflow": config.mlflow, "trackio": config.trackio}
        self._tensorboard: Tracker = tensorboard.open_tracker(tensorboard.Config(), run)
        self._relays = []
        for kind in config.chosen():
            if kind != ALWAYS:
                plugin = load_plugin(TRACKERS, kind, where="tracking.kinds")
                self._relays.append(_Relay(kind, _opener(plugin, sections[kind], run), note=note))

    def log(self, row: IterationMetrics) -> None:
        """Write one committed iteration to TensorBoard, and hand it to the others."""
        figures = dict(scalars(row))
        self._tensorboard.log(row.iteration, figures)
        for relay in self._relays:
            relay.put(row.iteration, figures)

    def close(self) -> None:
        """End all of them; one that is still sending is waited for, but not for ever."""
        self._tensorboard.close()
        for relay in self._relays:
            relay.end()
        for relay in self._relays:
            relay.wait(timeout_s=CLOSE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _opener(plugin: Any, config: Config, run: TrackedRun) -> Callable[[], Tracker]:
    return lambda: plugin.open_tracker(config, run)


class _Relay:
    """A tracker in a thread of its own, where its network and its disk hold nobody up."""

    def __init__(self, kind: str, opened: Callable[[], Tracker], *, note: Callable[[str], None]) -> None:
        self._kind = kind
        self._open = opened
        self._note = note
        self._rows: queue.SimpleQueue[tuple[int, Mapping[str, float]] | None] = queue.SimpleQueue()
        # A daemon: a server that does not answer can't keep the process alive.
        self._thread = threading.Thread(target=self._run, name=f"tracker {kind}", daemon=True)
        self._thread.start()

    def put(self, iteration: int, figures: Mapping[str, float]) -> None:
        """Take in a row, and return at once."""
        self._rows.put((iteration, figures))

    def end(self) -> None:
        """Say that no row follows."""
        self._rows.put(None)

    def wait(self, *, timeout_s: float) -> None:
        """Return when the tracker has ended, or when that takes too long."""
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            self._note(f"tracking: {self._kind} was still sending after {timeout_s:g} s; metrics.jsonl has every row")

    def _run(self) -> None:
        try:
            tracker = self._open()
            while (row := self._rows.get()) is not None:
                tracker.log(*row)
            tracker.close()
        except Exception as error:
            # Whatever another's library raises, over whichever network: hours of training don't end for it.
            logger.exception("tracker %s failed", self._kind)
            first = (str(error).strip().splitlines() or [""])[0]
            self._note(
                f"tracking: {self._kind} failed ({type(error).__name__}: {first}), the run goes on without it; "
                "metrics.jsonl has every row"
            )


# ------------------------------------------------------------------------------------------------------------- figures


def scalars(row: IterationMetrics) -> Iterator[tuple[str, float]]:
    """Yield each figure of a row under its tag; what was not measured is left out, never 0."""
    agreement = row.critic_agreement
    named: dict[str, float | None] = {
        "probe/accuracy": row.probe_accuracy,
        "attack/live_success": row.live_attack_success,
        "attack/num_attacks": row.num_attacks,
        "critic/balanced_accuracy": agreement.balanced_accuracy,
        "critic/false_pass": agreement.false_pass,
        "critic/false_fail": agreement.false_fail,
        "critic/auroc": agreement.auroc,
        "critic/num_unjudged": agreement.num_unjudged,
        "experts/asked": row.experts_asked,
        "experts/fraction": row.experts_asked / row.num_verdicts if row.num_verdicts else None,
        "pairs/trained": row.pairs_trained,
        "sample_age/mean": mean_age(row.sample_ages),
        "sample_age/max": max(row.sample_ages, default=None),
        "weight_sync/parity_max_abs_diff": row.parity_max_abs_diff,
        "seconds/iteration": row.wall_s,
    }
    yield from ((tag, float(value)) for tag, value in named.items() if value is not None)
    for group, values in (
        ("pairs_dropped", row.pairs_dropped),
        ("refinement", row.refinement),
        ("proposals", row.proposals),
        ("lost", row.lost),
        ("seconds", row.seconds),
        ("tokens_per_s", row.tokens_per_s),
        ("training", row.training),
    ):
        yield from ((f"{group}/{name}", float(value)) for name, value in values.items())
    for cell in row.cells:
        judged = cell.num_pass + cell.num_fail
        if judged:
            yield f"cell_fail_share/{_tag(cell.facets)}", cell.num_fail / judged


def _tag(facets: tuple[str, ...]) -> str:
    """Return a cell's name in the characters that trackers keep, so that "+" and "*" don't become one tag.

    >>> _tag(("+", "3", "2"))
    'plus_sign_3_2'
    """
    return "_".join(re.sub(r"[^-\w.]", _character_name, facet) for facet in facets)


def _character_name(match: re.Match[str]) -> str:
    character = match[0]
    return unicodedata.name(character, f"u{ord(character):04x}").lower().replace(" ", "_")
