"""Small tables of preference pairs, with the log-probs that their samples had."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from actors.records import Message, PreferencePair, to_table


def pair_table(*, ages: Sequence[int], shift: float) -> pa.Table:
    """Return one pair for each age; a token's log-prob is minus its place in the response over ten, plus a shift."""
    pairs = []
    for i, age in enumerate(ages):
        chosen, rejected = tuple(range(3, 5 + i)), tuple(range(4, 9 + i))
        pairs.append(
            PreferencePair(
                pair_id=f"p{i}",
                query_id=f"q{i}",
                prompt=(Message(role="user", content="1+1"),),
                chosen="2",
                rejected="3",
                prompt_token_ids=(1, 2),
                chosen_token_ids=chosen,
                rejected_token_ids=rejected,
                margin=0.9,
                weight=1.0 + i,
                noise=0.0,
                source="critic",
                chosen_id=f"c{i}",
                rejected_id=f"r{i}",
                iteration=1,
                age=age,
                chosen_logprobs=tuple(shift - 0.1 * n for n in range(len(chosen))),
                rejected_logprobs=tuple(shift - 0.1 * n for n in range(len(rejected))),
                other_margins=None,
            )
        )
    return to_table(pairs, PreferencePair)
