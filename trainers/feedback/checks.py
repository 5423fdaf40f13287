"""Owns what is wrong with a run's settings of mixed and noisy feedback, one line for each problem."""

from __future__ import annotations

from collections.abc import Iterator

from actors.oversight import CONTROLS, OversightConfig
from actors.refiner import RefinementConfig
from cluster.config import Config, plugin_names
from trainers.feedback.mixed_feedback import MixConfig
from trainers.feedback.objectives import ObjectivesConfig
from trainers.feedback.rejection_pairs import RejectionSettings
from trainers.feedback.selection import SelectionConfig
from trainers.feedback.training_data import material_of, reads_spans
from trainers.losses import PairBatch, load_loss
from trainers.losses.modpo import Config as ModpoConfig
from trainers.ranks.panacea_config import PanaceaConfig

DRAWS = ("escalation", "shuffled")
"""Kinds of oversight that put answers drawn at random before experts."""


def oversight_problems(oversight: OversightConfig) -> Iterator[str]:
    """Yield where answers are to be drawn by an oversight that draws none."""
    if oversight.calibration and oversight.kind not in DRAWS:
        yield (
            f'oversight.calibration: got {oversight.calibration:g} with oversight.kind = "{oversight.kind}", wanted 0: '
            f"only {' and '.join(DRAWS)} draw answers for it"
        )
    if oversight.calibration and oversight.budget == 0.0:
        yield (
            f"oversight.calibration: got {oversight.calibration:g} with oversight.budget = 0, wanted a budget above 0: "
            "it is a share of it"
        )


def mix_problems(mix: MixConfig, *, loss: str, oversight: OversightConfig, batch_size: int) -> Iterator[str]:
    """Yield where pairs can't be weighed as asked."""
    if material_of(loss) != "pairs":
        yield f'preferences.mix: got it with loss.kind = "{loss}", wanted a loss of pairs, such as cdpo'
        return
    if mix.noise == "estimated" and not _reads_noise(loss):
        able = ", ".join(name for name in plugin_names("trainers.losses") if _reads_noise(name))
        yield (
            f'preferences.mix.noise: got "estimated" with loss.kind = "{loss}", wanted "none", or one of {able}, which '
            "read it"
        )
    if mix.noise == "estimated" and not oversight.calibration:
        yield (
            'preferences.mix.noise: got "estimated" with oversight.calibration = 0, wanted that above 0, or "none": '
            "without answers drawn at random nothing tells how often the critic errs"
        )
    if mix.noise == "estimated" and oversight.kind == "shuffled":
        yield (
            'preferences.mix.noise: got "estimated" with oversight.kind = "shuffled", wanted "none": permuted labels '
            "say nothing of how often the critic errs"
        )
    if mix.expert_share and batch_size < 2:
        yield (
            f"preferences.mix.expert_share: got {mix.expert_share:g} with learner.training.batch_size = {batch_size}, "
            "wanted a batch of 2 or more: a step of one pair has no share to keep"
        )


def _reads_noise(loss: str) -> bool:
    module = load_loss(loss)
    return module.batch is PairBatch and "noise" in module.Config.model_fields


def span_problems(*, loss: str, oversight: OversightConfig) -> Iterator[str]:
    """Yield where a control would learn from critiques by way of the loss."""
    if oversight.kind in CONTROLS and material_of(loss) is not None and reads_spans(loss):
        yield (
            f'loss.kind: got "{loss}" with oversight.kind = "{oversight.kind}", wanted one that reads no spans: the '
            "control would learn from what the critic wrote"
        )


def selection_problems(
    selection: SelectionConfig, *, loss: str, num_critiques: int, oversight: OversightConfig
) -> Iterator[str]:
    """Yield where labels can't be left out as asked."""
    if selection.min_agreement and oversight.kind in CONTROLS:
        yield (
            f'selection.min_agreement: got {selection.min_agreement:g} with oversight.kind = "{oversight.kind}", '
            "wanted 0: the control would learn from what the critic wrote"
        )
    if selection.min_agreement and num_critiques < 2:
        yield (
            f"selection.min_agreement: got {selection.min_agreement:g} with critic.judging.num_critiques = "
            f"{num_critiques}, wanted 2 or more of them: one always agrees with itself"
        )
    if selection.drop and material_of(loss) == "judged":
        yield (
            f'selection.drop: got {selection.drop:g} with loss.kind = "{loss}", wanted 0, or a loss of pairs or of '
            "tokens: how likely a response is does not tell whether it was called bad by mistake"
        )
    elif selection.drop and material_of(loss) not in ("pairs", "accepted"):
        yield (
            f'selection.drop: got {selection.drop:g} with loss.kind = "{loss}", wanted 0, or a loss of pairs or of '
            "tokens: samples are compared within their group, which must be whole"
        )


def objectives_problems(
    objectives: ObjectivesConfig | None, *, loss: str, loss_config: Config, oversight: OversightConfig
) -> Iterator[str]:
    """Yield where a loss does not go with the objectives, or lacks them."""
    if objectives is None:
        if loss == "modpo":
            yield (
                'loss.kind: got "modpo" without objectives, wanted a section [objectives], whose first is '
                "the pairs' own: it trades that against the others"
            )
        return
    if "steps" in objectives.names and oversight.kind in CONTROLS:
        yield (
            f'objectives.names: got "steps" with oversight.kind = "{oversight.kind}", wanted others: it reads the '
            "critiques as they are, so that the control would learn from what the critic wrote"
        )
    if isinstance(loss_config, ModpoConfig):
        if objectives.names[0] != "verdict":
            yield (
                f'objectives.names: got "{objectives.names[0]}" first with loss.kind = "modpo", wanted "verdict": its '
                "pairs are preferences by that"
            )
        if objectives.weights[0] == 0:
            yield (
                f'objectives.weights: got {list(objectives.weights)} with loss.kind = "modpo", wanted the first above '
                "0: its pairs are preferences by that"
            )
        if loss_config.weights is not None and objectives.weights != loss_config.weights:
            yield (
                f"loss.weights: got {list(loss_config.weights)}, wanted those of objectives.weights, "
                f"{list(objectives.weights)}, or none: they are then these"
            )
    elif material_of(loss) != "samples":
        yield (
            f'objectives: got the section with loss.kind = "{loss}", wanted modpo or a loss that learns from scores, '
            "such as grpo: others know of one objective alone"
        )


def panacea_problems(
    panacea: PanaceaConfig, *, objectives: ObjectivesConfig | None, loss: str, max_policy_age: int
) -> Iterator[str]:
    """Yield where one learner can't be trained for all trade-offs as asked."""
    key = "learner.training.panacea"
    if objectives is None:
        yield f"{key}: got it without objectives, wanted a section [objectives]: it is trained for their trade-offs"
        return
    if panacea.num_objectives != len(objectives.names):
        yield (
            f"{key}.num_objectives: got {panacea.num_objectives}, wanted {len(objectives.names)}, as many as "
            "objectives.names"
        )
    if loss == "modpo":
        yield (
            f'{key}: got it with loss.kind = "modpo", wanted a loss that learns from scores, such as grpo: the weights '
            "of modpo are the loss's own, and do not follow those that an iteration draws"
        )
    if max_policy_age:
        yield (
            f"{key}: got it with loop.max_policy_age = {max_policy_age}, wanted 0: samples that one trade-off made do "
            "not train another"
        )


def refinement_problems(
    refinement: RefinementConfig | None, *, loss: str, oversight: OversightConfig, objectives: bool
) -> Iterator[str]:
    """Yield where failed answers can't be mended as asked."""
    if refinement is None:
        return
    if material_of(loss) != "pairs":
        yield f'refinement.kind: got "{refinement.kind}" with loss.kind = "{loss}", wanted a loss of pairs, such as dpo'
    if oversight.kind in CONTROLS:
        yield (
            f'refinement.kind: got "{refinement.kind}" with oversight.kind = "{oversight.kind}", wanted escalation or '
            "single: the fixes are the critic's, so that the control would learn from what the critic wrote"
        )
    if objectives:
        yield (
            f'refinement.kind: got "{refinement.kind}" with a section [objectives], wanted one of the two: the '
            "objectives score the learner's answers, not mended ones"
        )


def rejection_problems(
    loss_config: Config, *, loss: str, num_samples: int, refinement: RefinementConfig | None
) -> Iterator[str]:
    """Yield where a loss can't draw its pairs by rejection sampling as asked."""
    if not isinstance(loss_config, RejectionSettings):
        return
    if loss_config.num_accepted is not None and loss_config.num_accepted > num_samples:
        yield (
            f"loss.num_accepted: got {loss_config.num_accepted}, wanted at most rollouts.sampling.num_samples = "
            f"{num_samples}: no query has more answers to be accepted"
        )
    if refinement is not None:
        yield (
            f'refinement.kind: got "{refinement.kind}" with loss.kind = "{loss}", wanted a loss that draws no pairs of '
            "its own, such as dpo: mended answers are no samples of the learner's, so that none can be accepted"
        )
