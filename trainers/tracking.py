"""Owns the TensorBoard events of a run: one point per iteration and figure, written from the rows of metrics.jsonl."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from trainers.summary import IterationMetrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

TENSORBOARD_DIR = "tensorboard"


class TensorBoardTracker:
    """Writes the rows of a run as TensorBoard scalars; what `log` returned from survives the death of the process."""

    def __init__(self, run_dir: Path, *, last_iteration: int = 0) -> None:
        """Open the run's event directory.

        Args:
            run_dir: the run's directory; events go to `tensorboard/` in it.
            last_iteration: the last committed iteration of a resumed run; TensorBoard hides what an earlier sitting
                wrote after it. 0 for a new run.
        """
        # 2 s on one core (torch and protobuf), so nobody pays for it who only reads a summary.
        from torch.utils.tensorboard import SummaryWriter

        self._writer: SummaryWriter = SummaryWriter(
            log_dir=str(run_dir / TENSORBOARD_DIR), purge_step=last_iteration + 1 if last_iteration else None
        )

    def log(self, row: IterationMetrics) -> None:
        """Write one iteration's figures and flush them to the file."""
        for tag, value in scalars(row):
            self._writer.add_scalar(tag, value, global_step=row.iteration)
        self._writer.flush()

    def close(self) -> None:
        """Flush and end the writer's thread."""
        self._writer.close()

    def __enter__(self) -> TensorBoardTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def scalars(row: IterationMetrics) -> Iterator[tuple[str, float]]:
    """Yield each figure of a row under its TensorBoard tag; what was not measured is left out, never 0."""
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
        "weight_sync/parity_max_abs_diff": row.parity_max_abs_diff,
        "seconds/iteration": row.wall_s,
    }
    yield from ((tag, float(value)) for tag, value in named.items() if value is not None)
    for group, values in (
        ("pairs_dropped", row.pairs_dropped),
        ("proposals", row.proposals),
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
    """Return a cell's name in the characters that TensorBoard keeps, so that "+" and "*" don't become one tag.

    >>> _tag(("+", "3", "2"))
    'plus_sign_3_2'
    """
    return "_".join(re.sub(r"[^-\w.]", _character_name, facet) for facet in facets)


def _character_name(match: re.Match[str]) -> str:
    character = match[0]
    return unicodedata.name(character, f"u{ord(character):04x}").lower().replace(" ", "_")
