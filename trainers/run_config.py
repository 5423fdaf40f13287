"""Owns a run's config: the sections of all parts in one, read from TOML and flags, checked before anything starts.

Every default is one that `make demo` runs. The parts own their sections; none of them sees the whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import Field, model_validator

from actors.adapter import LINEAR_LAYERS, AdapterConfig
from actors.attacker import AttackerConfig
from actors.critic import CriticConfig
from actors.engine_config import EngineConfig
from actors.experts import SimulatedExpertConfig
from actors.oversight import OversightConfig
from actors.refiner import RefinementConfig
from actors.rollout import RolloutConfig
from cluster.config import (
    Config,
    ConfigError,
    Settings,
    flag_settings,
    layered,
    located,
    plugin_config,
    plugin_names,
    plugin_settings,
    read_settings,
    shown,
    validated,
)
from cluster.ray_config import RayConfig
from cluster.scaling import AutoscaleConfig
from cluster.weight_transfer import WeightSyncConfig
from trainers.base_model import BaseModelConfig, BootstrapConfig
from trainers.evaluation import EvaluationConfig
from trainers.feedback.checks import (
    mix_problems,
    objectives_problems,
    oversight_problems,
    panacea_problems,
    refinement_problems,
    rejection_problems,
    selection_problems,
    span_problems,
)
from trainers.feedback.objectives import ObjectivesConfig
from trainers.feedback.preferences import PreferenceConfig
from trainers.feedback.reward_config import LOSS as REWARD_LOSS
from trainers.feedback.reward_config import RewardConfig, reward_problems
from trainers.feedback.selection import SelectionConfig
from trainers.feedback.training_data import CORRECTED, material_of
from trainers.gpu_turns import PlacementConfig, Tenant, colocation_problems
from trainers.loop_config import LoopConfig
from trainers.losses import forward_correction, grpo, load_loss, modpo
from trainers.policy_gradient import PolicyConfig, TokenMeansConfig, as_sampled, kl_price
from trainers.serving_config import ServingConfig
from trainers.tracking_config import TrackingConfig
from trainers.training_config import ReferenceWeights, TrainingConfig

if TYPE_CHECKING:
    from cluster.config import PluginConfig

    Domain: TypeAlias = PluginConfig
    Attack: TypeAlias = PluginConfig
    Loss: TypeAlias = PluginConfig
else:
    Domain = plugin_config("actors.domains", default="arithmetic")
    Attack = plugin_config("actors.attacks", default="quality_diversity")
    Loss = plugin_config("trainers.losses", default="gce")

BOOTSTRAP = "bootstrap"
"""In place of a model directory: the base model that the run trains from scratch, or finds in its cache."""


class SupervisionConfig(Config):
    """Where labels may come from."""

    regime: Literal["critic_expert", "gold"] = "critic_expert"
    """critic_expert: the critic's verdicts and the experts' alone; gold: computable truth may be a label."""


class AttackerSection(Config):
    """The attacker: its pool and how it is sampled."""

    replicas: int = Field(default=1, ge=1)
    """Engines in the attacker's pool."""
    autoscale: AutoscaleConfig = AutoscaleConfig()
    """Whether, and between which bounds, their number follows the pool's queue."""
    engine: EngineConfig = EngineConfig(model=BOOTSTRAP)
    """One engine of the pool; `model` is a Hugging Face directory or "bootstrap"."""
    shares: Literal["rollouts"] | None = None
    """"rollouts": no engines of its own, the base of the rollout pool's; with learner.training.lora or panacea."""
    sampling: AttackerConfig = AttackerConfig()
    """How the attacker's model is sampled."""


class RolloutsSection(Config):
    """The learner's rollouts: the pool that its weights are published to, and how it is sampled."""

    replicas: int = Field(default=1, ge=1)
    """Engines in the rollout pool."""
    autoscale: AutoscaleConfig = AutoscaleConfig()
    """Whether, and between which bounds, their number follows the pool's queue."""
    engine: EngineConfig = EngineConfig(model=BOOTSTRAP)
    """One engine of the pool; `model` must be the learner's."""
    sampling: RolloutConfig = RolloutConfig()
    """How the learner is sampled."""


class CriticSection(Config):
    """The critic: its pool and how it is asked."""

    replicas: int = Field(default=1, ge=1)
    """Engines in the critic's pool."""
    autoscale: AutoscaleConfig = AutoscaleConfig()
    """Whether, and between which bounds, their number follows the pool's queue."""
    engine: EngineConfig = EngineConfig(model=BOOTSTRAP)
    """One engine of the pool; `model` is a Hugging Face directory or "bootstrap"."""
    shares: Literal["rollouts"] | None = None
    """"rollouts": no engines of its own, the base of the rollout pool's; with learner.training.lora or panacea."""
    judging: CriticConfig = CriticConfig()
    """How the critic is asked."""


class LearnerSection(Config):
    """The learner: the model that is trained, and its group of ranks."""

    model: str = BOOTSTRAP
    """A Hugging Face directory or "bootstrap"."""
    training: TrainingConfig = TrainingConfig(batch_size=16, learning_rate=1e-4, cpus_per_rank=0.5)
    """Ranks, optimizer and schedule."""
    reference: ReferenceWeights | None = None
    """Weights that a loss compares the learner with: "start_of_update", or "bootstrap", the run's first ones. Unset:
    "bootstrap" where the KL is a price on the reward, which else were 0; "start_of_update" for all others."""


class RunConfig(Config):
    """Everything that a run is told."""

    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """The run's name, and that of its directory."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Fixes every draw of the run; evaluation has its own."""
    runs_dir: Path = Path("runs")
    """Where run directories are made."""
    supervision: SupervisionConfig = SupervisionConfig()
    """Where labels may come from."""
    domain: Domain = plugin_settings("actors.domains", "arithmetic")
    """The world that queries live in: `kind` names a file of actors/domains."""
    base_model: BaseModelConfig = BaseModelConfig()
    """Shape of the model that "bootstrap" stands for."""
    bootstrap: BootstrapConfig = BootstrapConfig()
    """How that model is trained."""
    attack: Attack = plugin_settings("actors.attacks", "quality_diversity")
    """Where the attacker looks next: `kind` names a file of actors/attacks."""
    attacker: AttackerSection = AttackerSection()
    """The attacker's pool."""
    rollouts: RolloutsSection = RolloutsSection()
    """The learner's rollout pool."""
    critic: CriticSection = CriticSection()
    """The critic's pool."""
    oversight: OversightConfig = OversightConfig()
    """How critiques become verdicts, and what experts may be asked."""
    experts: SimulatedExpertConfig = SimulatedExpertConfig()
    """The simulated expert."""
    preferences: PreferenceConfig = PreferenceConfig()
    """How pairs are chosen."""
    refinement: RefinementConfig | None = None
    """How failed answers are mended, to be preferred to what they were; without the section none is."""
    selection: SelectionConfig = SelectionConfig()
    """Which labels are left out as probably wrong."""
    objectives: ObjectivesConfig | None = None
    """What responses are scored by besides the verdict; without the section by that alone."""
    loss: Loss = plugin_settings("trainers.losses", "gce")
    """What the learner is trained on: `kind` names a file of trainers/losses."""
    reward: RewardConfig = RewardConfig()
    """What responses are scored by, where the loss learns from scores: verdicts, or a reward model of one's own."""
    learner: LearnerSection = LearnerSection()
    """The model that is trained."""
    weight_sync: WeightSyncConfig = WeightSyncConfig()
    """Which way new weights go from the ranks to the rollout pool."""
    placement: PlacementConfig = PlacementConfig()
    """Which pools share the learner's GPUs."""
    loop: LoopConfig = LoopConfig()
    """Iterations, queries, epochs."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Sizes of the evaluation sets."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the rows of metrics.jsonl go besides."""
    serve: ServingConfig = ServingConfig()
    """The learner behind an OpenAI endpoint, while the run goes on."""
    ray: RayConfig = RayConfig()
    """The cluster."""

    @property
    def run_dir(self) -> Path:
        """The run's directory."""
        return self.runs_dir / self.name

    @property
    def reference_weights(self) -> ReferenceWeights:
        """The weights that the loss compares the learner with."""
        if self.learner.reference is not None:
            return self.learner.reference
        priced = isinstance(self.loss, PolicyConfig) and self.loss.kl_in_reward and kl_price(self.loss) > 0.0
        return "bootstrap" if priced else "start_of_update"

    @property
    def loss_as_sampled(self) -> Config:
        """The loss's settings, with the sampling's temperature and lengths where they do not say otherwise."""
        sampling = self.rollouts.sampling
        return as_sampled(self.loss, temperature=sampling.temperature, max_tokens=sampling.max_tokens)

    @model_validator(mode="after")
    def _agree(self) -> RunConfig:
        checks = (_contexts, _models, _divisions, _exclusions, _ages, _gpus, _learning, _feedback)
        problems = [line for check in checks for line in check(self)]
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @model_validator(mode="after")
    def _fill_weights(self) -> RunConfig:
        """Give modpo, where it is told none, the objectives' weights."""
        if isinstance(self.loss, modpo.Config) and self.loss.weights is None and self.objectives is not None:
            filled = self.loss.model_copy(update={"weights": self.objectives.weights})
            object.__setattr__(self, "loss", filled)  # it is frozen, and this is still its making
        return self


def load_run_config(
    paths: Sequence[Path],
    *,
    flags: Sequence[tuple[str, str]] = (),
    base: RunConfig | None = None,
    check: Callable[[RunConfig], Iterable[str]] = lambda _: (),
) -> RunConfig:
    """Return the config that files and then flags, `("critic.replicas", "6")`, make of a base or of the defaults.

    Args:
        check: yields what else is wrong with a config that is sound in itself, each line beginning with its key.

    Raises:
        ConfigError: with every problem there is, one line each.
    """
    problems: list[str] = []
    read: list[Settings] = []
    for path in paths:
        try:
            read.append(read_settings(path))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    # The base lies below as values: a section's default holds for the keys that a file leaves out of that section.
    start = base or RunConfig()
    below = start.model_dump(mode="json")
    # Of the loss what was set and nothing else: some of its defaults hang on its other keys, which a file may set.
    below["loss"] = {"kind": start.loss.kind, **start.loss.model_dump(mode="json", exclude_unset=True)}
    settings = layered([Settings(values=below), *read, *(flag_settings(key, text) for key, text in flags)])
    config = validated(RunConfig, settings)
    problems = located(check(config), settings=settings)
    if problems:
        raise ConfigError(problems)
    return config


def read_resolved(path: Path) -> RunConfig:
    """Return the config that a run was started with, from its resolved.json.

    Raises:
        ConfigError: the file is missing or is no resolved config of this version; with every problem there is.
    """
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError([f"{path}: no such file, wanted the resolved config of a run"]) from None
    except (OSError, ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise ConfigError([f"{path}: got no JSON object, wanted the file as it was written: restore it from a copy"])
    settings = Settings(values=values, origins={(str(key),): str(path) for key in values})
    try:
        return validated(RunConfig, settings)
    except ConfigError as error:
        remedy = f"{path}: wanted a config of this version of elenchus: go on with the one that wrote it{_writer(path)}"
        raise ConfigError([*error.problems, remedy]) from None


def _writer(path: Path) -> str:
    """Return which version wrote a run, from its environment.json, as an ending of a sentence."""
    try:
        found = json.loads((path.parent / "environment.json").read_bytes())
        return f" (commit {found['commit'][:12]})"
    except (OSError, ValueError, TypeError, KeyError):
        return ""


def _contexts(config: RunConfig) -> Iterator[str]:
    """Yield where a sample is allowed to fill the model's whole context, so that no prompt fits."""
    rows = (
        ("attacker.sampling", config.attacker.sampling.max_tokens, "attacker", config.attacker.engine),
        ("rollouts.sampling", config.rollouts.sampling.max_tokens, "rollouts", config.rollouts.engine),
        ("critic.judging", config.critic.judging.max_tokens, "critic", config.critic.engine),
    )
    for section, max_tokens, role, engine in rows:
        context = engine.max_model_len
        source = f"{role}.engine.max_model_len"
        if context is None and engine.model == BOOTSTRAP:
            context, source = config.base_model.max_positions, "base_model.max_positions"
        if context is not None and max_tokens >= context:
            yield (
                f"{section}.max_tokens: got {max_tokens}, wanted less than the context, {source} = {context}, "
                "which prompt and answer share"
            )


def _models(config: RunConfig) -> Iterator[str]:
    """Yield where roles that must have the same model have two, or a window is longer than the model's."""
    yield from _adapters(config)
    if config.rollouts.engine.model != config.learner.model:
        yield (
            f"rollouts.engine.model: got {shown(config.rollouts.engine.model)}, wanted learner.model, "
            f"{shown(config.learner.model)}: the rollout pool answers with the learner's weights"
        )
    engines = {"attacker": config.attacker.engine, "rollouts": config.rollouts.engine, "critic": config.critic.engine}
    longest = config.base_model.max_positions
    for role, engine in engines.items():
        if engine.model == BOOTSTRAP and engine.max_model_len is not None and engine.max_model_len > longest:
            yield (
                f"{role}.engine.max_model_len: got {engine.max_model_len}, wanted at most "
                f"base_model.max_positions = {longest}"
            )


def _adapters(config: RunConfig) -> Iterator[str]:
    """Yield where an adapter has nothing to be one of, or a role shares engines that are not what it asks for."""
    for role in sharing(config):
        yield from _sharing_problems(config, role)
    kind = "lora" if config.learner.training.panacea is None else "panacea"
    if config.learner.training.adapter is not None and config.rollouts.engine.load_format == "dummy":
        yield (
            f'rollouts.engine.load_format: got "dummy" with learner.training.{kind}, wanted "auto": the base, which an '
            "update does not bring, is read from the directory"
        )
    for key, adapter in adapters(config).items():
        absent = [name for name in adapter.targets if name not in LINEAR_LAYERS]
        if config.learner.model == BOOTSTRAP and absent:
            yield (
                f"{key}.targets: got {', '.join(absent)}, wanted layers of the base model's blocks: "
                f"{', '.join(LINEAR_LAYERS)}"
            )


def adapters(config: RunConfig) -> dict[str, AdapterConfig]:
    """Return the adapters that are trained, by the key of their section; the learner's model is the base of each."""
    learner = config.learner.training
    reward = config.reward.training.lora if config.reward.kind == "model" else None
    sections = {
        "learner.training.lora": learner.lora,
        "learner.training.panacea": None if learner.panacea is None else learner.panacea.adapter,
        "reward.training.lora": reward,
    }
    return {key: adapter for key, adapter in sections.items() if adapter is not None}


def sharing(config: RunConfig) -> tuple[Literal["attacker", "critic"], ...]:
    """Return the roles that ask the rollout pool's engines, whose base answers them."""
    roles: list[Literal["attacker", "critic"]] = []
    if config.attacker.shares is not None:
        roles.append("attacker")
    if config.critic.shares is not None:
        roles.append("critic")
    return tuple(roles)


def _sharing_problems(config: RunConfig, role: Literal["attacker", "critic"]) -> Iterator[str]:
    section: AttackerSection | CriticSection = config.attacker if role == "attacker" else config.critic
    if config.learner.training.adapter is None:
        yield (
            f'{role}.shares: got "rollouts" without learner.training.lora or learner.training.panacea, wanted one of '
            "them: with all weights trained the rollout pool's engines are the learner's alone"
        )
    wanted = config.rollouts.engine.model_dump()
    for key, value in section.engine.model_dump().items():
        if value != wanted[key]:
            yield (
                f'{role}.engine.{key}: got {shown(value)} with {role}.shares = "rollouts", wanted rollouts.engine.{key}'
                f" = {shown(wanted[key])}: they are the same engines"
            )
    for key, number, default in (("replicas", section.replicas, 1), ("autoscale.max", section.autoscale.max, 0)):
        if number != default:
            yield (
                f'{role}.{key}: got {number} with {role}.shares = "rollouts", wanted none: it has no engines of its '
                f"own; set rollouts.{key}"
            )
    if role in config.placement.colocate:
        yield f'placement.colocate: got {role} with {role}.shares = "rollouts", wanted rollouts alone: {role} has none'


def _divisions(config: RunConfig) -> Iterator[str]:
    """Yield what does not divide, with the arithmetic."""
    rows = (
        (
            "base_model.hidden_size",
            config.base_model.hidden_size,
            "base_model.num_heads",
            config.base_model.num_heads,
        ),
        (
            "learner.training.batch_size",
            config.learner.training.batch_size,
            "learner.training.num_ranks",
            config.learner.training.num_ranks,
        ),
    )
    for key, number, by, divisor in rows:
        times, rest = divmod(number, divisor)
        if rest:
            nearest = max(times, 1) * divisor
            yield (
                f"{key}: got {number}, wanted a multiple of {by} = {divisor}: {number} = {divisor} × {times} + {rest}; "
                f"{nearest} would do"
            )


def tenants(config: RunConfig) -> dict[str, Tenant]:
    """Return the pools that stand on the learner's GPUs, in the config's order."""
    sections: dict[str, AttackerSection | RolloutsSection | CriticSection] = {
        "attacker": config.attacker,
        "rollouts": config.rollouts,
        "critic": config.critic,
    }
    return {
        name: Tenant(
            engine=sections[name].engine,
            replicas=sections[name].replicas,
            most_replicas=max(sections[name].replicas, sections[name].autoscale.max),
        )
        for name in config.placement.colocate
    }


def _ages(config: RunConfig) -> Iterator[str]:
    """Yield where samples of older weights are to be corrected for by log-probs that can't be compared."""
    if material_of(config.loss.kind) not in CORRECTED:
        return  # accepted answers are not corrected; samples are at the sampling's temperature, by the loss's settings
    temperature = config.rollouts.sampling.temperature
    if config.loop.max_policy_age and config.loop.importance.kind != "none" and temperature != 1.0:
        yield (
            f"rollouts.sampling.temperature: got {temperature:g} with loop.max_policy_age = "
            f"{config.loop.max_policy_age}, wanted 1: older samples are weighed by their log-probs, which are then not "
            'those of the learner; or set loop.importance.kind = "none"'
        )


def _learning(config: RunConfig) -> Iterator[str]:
    """Yield where the loss takes what no iteration makes, or what the learner or the sampling does not give it."""
    kind: str = config.loss.kind
    if kind == REWARD_LOSS:
        yield (
            f'loss.kind: got "{kind}", wanted a loss of a policy: it trains a reward model, which is '
            'reward.kind = "model" beside a loss that learns from scores, such as grpo'
        )
        return
    yield from reward_problems(
        config.reward, loss=kind, oversight=config.oversight.kind, objectives=config.objectives is not None
    )
    if material_of(kind) is None:
        able = [name for name in plugin_names("trainers.losses") if material_of(name) is not None]
        yield (
            f'loss.kind: got "{kind}", wanted one of {", ".join(able)}: {kind} takes a '
            f"{load_loss(kind).batch.__name__}, which no iteration makes"
        )
    if isinstance(config.loss, forward_correction.Config) and config.loss.confusion is not None:
        yield (
            f"loss.confusion: got {len(config.loss.confusion)} classes, wanted none: the loop's labels are tokens, and "
            "their classes the whole vocabulary; set loss.noise"
        )
    if not isinstance(config.loss, PolicyConfig):
        return
    if config.loss.kl_control.adaptive:
        yield from _kl_control(config.loss, reference=config.reference_weights)
    if config.reference_weights == "start_of_update" and config.loss.kl_in_reward and kl_price(config.loss) > 0.0:
        yield (
            f'learner.reference: got "start_of_update" with loss.kind = "{kind}" and loss.kl_coefficient = '
            f'{kl_price(config.loss):g}, wanted "bootstrap", or 0: to the weights at an update\'s start there is no KL '
            "to pay for"
        )
    if config.loss.needs_values and not config.learner.training.value_head:
        yield (
            f'loss.kind: got "{kind}" with learner.training.value_head = false, wanted true: it learns what a response '
            "will score; or use grpo, rloo, reinforce_pp"
        )
    longest = config.loss.max_tokens if isinstance(config.loss, TokenMeansConfig) else None
    most = config.rollouts.sampling.max_tokens
    if longest is not None and longest != most:
        yield f"loss.max_tokens: got {longest}, wanted rollouts.sampling.max_tokens = {most}: no response is longer"
    if isinstance(config.loss, grpo.Config) and longest is None and config.loss.overlong > most:
        yield (
            f"loss.overlong_buffer_tokens: got {config.loss.overlong}, wanted at most rollouts.sampling.max_tokens = "
            f"{most}"
        )
    temperature = config.rollouts.sampling.temperature
    if config.loss.temperature not in (None, temperature):
        yield (
            f"loss.temperature: got {config.loss.temperature:g}, wanted rollouts.sampling.temperature = "
            f"{temperature:g}: log-probs are taken at that of the sampling"
        )


def _feedback(config: RunConfig) -> Iterator[str]:
    """Yield where mixed or noisy feedback is not to be had as asked."""
    kind, mix = config.loss.kind, config.preferences.mix
    if material_of(kind) is None:
        return  # `_learning` says what is wrong
    yield from oversight_problems(config.oversight)
    yield from span_problems(loss=kind, oversight=config.oversight)
    if mix is not None:
        batch_size = config.learner.training.batch_size
        yield from mix_problems(mix, loss=kind, oversight=config.oversight, batch_size=batch_size)
    yield from selection_problems(
        config.selection,
        loss=kind,
        num_critiques=config.critic.judging.num_critiques,
        oversight=config.oversight,
    )
    yield from refinement_problems(
        config.refinement, loss=kind, oversight=config.oversight, objectives=config.objectives is not None
    )
    yield from rejection_problems(
        config.loss, loss=kind, num_samples=config.rollouts.sampling.num_samples, refinement=config.refinement
    )
    yield from objectives_problems(config.objectives, loss=kind, loss_config=config.loss, oversight=config.oversight)
    if config.learner.training.panacea is not None:
        yield from panacea_problems(
            config.learner.training.panacea,
            objectives=config.objectives,
            loss=kind,
            max_policy_age=config.loop.max_policy_age,
        )


def _kl_control(loss: PolicyConfig, *, reference: str) -> Iterator[str]:
    """Yield where a price that is to follow the KL has nothing to follow."""
    if reference != "bootstrap":
        yield (
            f'loss.kl_control.adaptive: got true with learner.reference = "{reference}", wanted "bootstrap": the KL is '
            "measured at an update's start, where it is 0 to the weights of that moment"
        )
    if kl_price(loss) == 0.0:
        yield "loss.kl_control.adaptive: got true with loss.kl_coefficient = 0, wanted more than 0: it is multiplied"


def _gpus(config: RunConfig) -> Iterator[str]:
    """Yield where roles can't share GPUs as asked, or can't agree on a type of numbers."""
    training = config.learner.training
    yield from colocation_problems(config.placement, tenants=tenants(config), training=training)
    if config.placement.colocate and config.learner.model == BOOTSTRAP:
        yield 'placement.colocate: got it with learner.model = "bootstrap", wanted a model directory: it is for GPUs'
    if training.dtype == "bf16" and config.rollouts.engine.dtype == "float16":
        yield (
            'rollouts.engine.dtype: got "float16" beside learner.training.dtype = "bf16", wanted "bfloat16": float16 '
            "has not its range, so weights may become infinite on their way"
        )


def _exclusions(config: RunConfig) -> Iterator[str]:
    """Yield settings of a local Ray beside the address of a cluster, which has its own."""
    if config.ray.address in (None, "local"):
        return
    for key, value in (("num_cpus", config.ray.num_cpus), ("dashboard", config.ray.dashboard or None)):
        if value is not None:
            yield (
                f"ray.{key}: got {str(value).lower()} beside ray.address = {shown(config.ray.address)}, wanted one of "
                "the two: it is for a local Ray"
            )
