"""Owns the way from a doubtful verdict to an expert's label: ask through the durable queue, read what is answered.

A simulated expert answers in the same iteration. People may answer through the same queue; a label that comes after
the iteration of its case is kept there, and no later iteration takes it up yet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from actors.experts import ExpertItem, ExpertQueue, SimulatedExpert
from actors.oversight import Judged
from actors.records import ExpertLabel, LabelKind


class ExpertDesk:
    """Puts cases before the experts of a run."""

    def __init__(self, queue: ExpertQueue, simulated: SimulatedExpert | None) -> None:
        """Use a queue; without a simulated expert its items wait for people."""
        self._queue = queue
        self._simulated = simulated

    def ask(self, cases: Sequence[Judged]) -> Mapping[str, ExpertLabel]:
        """Put responses before the experts; return the labels that are there now, by response id."""
        self._queue.ask([_item(case) for case in cases])
        if self._simulated is not None:
            self._simulated.answer_pending(self._queue)
        asked = {case.response.response_id for case in cases}
        labels: dict[str, ExpertLabel] = {}
        for label in self._queue.labels_since(0).labels:
            # The first decision counts; an abstention leaves the case to the next expert.
            if label.item_id in asked and (label.item_id not in labels or labels[label.item_id].label is None):
                labels[label.item_id] = label
        return labels

    def num_from_truth(self) -> int:
        """Return how many labels the simulated expert has drawn from truth, over all sittings of the run."""
        if self._simulated is None:
            return 0
        labels = self._queue.labels_since(0).labels
        return sum(label.expert == self._simulated.name and label.label is not None for label in labels)


def _item(case: Judged) -> ExpertItem:
    readable = case.readable
    score = case.critic_verdict.score
    return ExpertItem(
        item_id=case.response.response_id,
        kind=LabelKind.RESPONSE,
        query=case.query.messages[-1].content,
        responses=(case.response.text,),
        critique=readable[0].text if readable else None,
        why="no readable critique" if score is None else f"P(good) {score:.2f}",
    )
