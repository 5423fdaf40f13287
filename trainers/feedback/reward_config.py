"""Owns the settings of what responses are scored by; apart from the reward model, so that a config imports no part."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from actors.oversight import CONTROLS
from cluster.config import Config, plugin_names
from trainers.feedback.training_data import material_of
from trainers.losses.bradley_terry import Config as BradleyTerryConfig
from trainers.training_config import TrainingConfig

LOSS = "bradley_terry"
"""What a reward model is trained on; no loss of a policy."""


class RewardTrainingConfig(TrainingConfig):
    """How a reward model is trained: as a role's weights are, from other defaults."""

    num_ranks: int = Field(default=1, ge=1)
    """Ranks: processes that share the batch, and from ZeRO 1 on the optimizer's state."""
    batch_size: int = Field(default=16, ge=1)
    """Pairs per optimizer step, over all ranks."""
    value_head: bool = True
    """Its value at the last token is the score: it can't be without."""
    learning_rate: float = Field(default=1e-4, gt=0.0)
    """Greatest learning rate of AdamW."""
    cpus_per_rank: float = Field(default=0.2, ge=0.0)
    """Ray CPUs that a rank reserves."""


class RewardConfig(Config):
    """What responses are scored by, where the loss learns from scores."""

    kind: Literal["critic", "model"] = "critic"
    """critic: by their verdicts, P(good); model: by a reward model that learns from each iteration's pairs first."""
    critiques: bool = False
    """The reward model reads the critique after the response, when it learns and when it scores (Ye et al. 2024)."""
    held_out: float = Field(default=0.2, ge=0.0, lt=1.0)
    """Share of an iteration's queries whose pairs measure the reward model and never train it."""
    epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's pairs; a second one usually overfits."""
    graded_margins: bool = False
    """The wanted gap of two scores is the pair's gap in P(good), 0 to 1; without it any gap will do."""
    soft_targets: bool = False
    """A pair counts as far as its two verdicts are sure of it; without it every label counts whole."""
    loss: BradleyTerryConfig = BradleyTerryConfig(centring=0.01)
    """Settings of the Bradley-Terry loss."""
    training: RewardTrainingConfig = RewardTrainingConfig()
    """The reward model's ranks, apart from the learner's; it begins with the learner's first weights."""


def reward_problems(config: RewardConfig, *, loss: str, oversight: str, objectives: bool = False) -> Iterator[str]:
    """Yield what stands against scoring responses as asked; each line begins with the key to change.

    Args:
        config: the run's.
        loss: the name of the learner's.
        oversight: its kind.
        objectives: responses are scored by objectives of the run's config.
    """
    if config.kind == "critic":
        if config.critiques:
            yield 'reward.critiques: got true with reward.kind = "critic", wanted "model": only that reads them'
        return
    if material_of(loss) not in (None, "samples"):
        able = [name for name in plugin_names("trainers.losses") if material_of(name) == "samples"]
        yield (
            f'reward.kind: got "model" with loss.kind = "{loss}", which learns from no scores of single responses, '
            f'wanted loss.kind to be one of {", ".join(able)}; or "critic"'
        )
    if config.critiques and oversight in CONTROLS:
        yield (
            f'reward.critiques: got true with oversight.kind = "{oversight}", wanted false: the control would learn '
            "from what the critic wrote"
        )
    if objectives:
        yield 'reward.kind: got "model" with a section [objectives], wanted one of the two: both say what a score is'
    if not config.training.value_head:
        yield "reward.training.value_head: got false, wanted true: the head's value is the score"
    if config.training.batch_size % config.training.num_ranks:
        yield (
            f"reward.training.batch_size: got {config.training.batch_size}, wanted a multiple of "
            f"reward.training.num_ranks = {config.training.num_ranks}"
        )
