"""Owns a run's manifests for KubeRay: a RayJob with the ConfigMap of its config, or a RayService of its endpoint.

    config ──► plan: roles, their CPUs, GPUs and memory ──► groups of pods ──► RayJob or RayService as YAML

Ray places replicas and ranks wherever CPUs and GPUs are free, whatever a pod's group is called: a pod asks for the
memory of what its group is for, and may take that of whatever Ray can put there. Runs and models are on one volume of
all pods. Starts nothing.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cluster.machine import gib
from serve.front import front_environment
from trainers.memory_estimate import DRIVER_BYTES, GIB, MIB, RAY_BYTES
from trainers.plan import ENDPOINT, Plan, RolePlan, plan_run
from trainers.run_config import BOOTSTRAP, AttackerSection, CriticSection, RolloutsSection, RunConfig

MOUNT = Path("/data")
"""Where the volume is in every pod; relative paths of a config count from here."""
CONFIG_MOUNT = Path("/etc/elenchus")
CONFIG_NAME = "run.toml"
USER_ID = 1000
"""The user of the images (docker/)."""
SERVE_PORT = 8000
"""Where KubeRay's service of a RayService leads, and what its probes ask."""
HEAD_CPUS = 2
HEAD_EXTRA_BYTES = 2 * GIB
"""Ray's dashboard and the agents of a head beside driver and Ray; not measured."""
GPUS_PER_POD = 8
"""Most GPUs of a pod: what common machines have."""
MAX_NAME_CHARS = 47
"""KubeRay refuses longer names of a RayJob."""
KUBERAY = "1.6"
"""Oldest KubeRay with all that is used here: authOptions, autoscalerOptions.version."""
LOCAL_RAY = ("address", "num_cpus", "dashboard", "dashboard_port", "temp_dir", "token_path", "ship_code")
"""Keys of [ray] that say how a machine's own Ray is started or another one is joined: pods join the RayJob's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PodGroup:
    """Pods that are alike."""

    name: str
    holds: str
    """What one pod is for, in words."""
    cpus: int
    """CPUs that Ray gives out in one."""
    gpus: int
    memory_bytes: int
    """What a pod is for takes: its request."""
    most_memory_bytes: int
    """What Ray may put there takes at most: its limit."""
    min_pods: int
    max_pods: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is to be applied to: an image, a volume, and how far pools may grow."""

    image: str | None = None
    """Name of the container image; None is the one that docker/ builds for the config's devices."""
    volume_claim: str = "elenchus"
    """PersistentVolumeClaim that all pods can write to."""
    max_critics: int | None = None
    """Most critics that there is to be room for; None takes critic.autoscale.max, or else twice those of the start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Pods:
    """What all pods of a manifest have in common."""

    image: str
    volume_claim: str
    store_bytes: int
    """Ray's object store in each."""
    settings: str | None
    """ConfigMap with the run's config, for the head; None when the run has it already."""


def run_manifest(config: RunConfig, *, target: Target) -> str:
    """Return the YAML that begins a run of the config.

    Raises:
        ValueError: something does not fit, or a path is not on the volume; a line for each.
    """
    name = job_name(config.name)
    toml = config_toml(config)
    settings = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name, "labels": _labels(name)},
        "data": {CONFIG_NAME: toml},
    }
    command = ("elenchus", "run", str(CONFIG_MOUNT / CONFIG_NAME))
    return _manifest(config, target=target, command=command, settings=settings)


def resume_manifest(config: RunConfig, *, wanted: Mapping[str, int], target: Target) -> str:
    """Return the YAML that goes on with a run; `wanted` are the replicas that somebody asked for since it began.

    Raises:
        ValueError: as above, or the run's own config says which Ray it joins.
    """
    for key, value in (("address", config.ray.address), ("token_path", config.ray.token_path)):
        if value not in (None, "auto"):
            raise ValueError(
                f'run: got ray.{key} = "{value}" in its config, wanted a run that joins the Ray around it: resume it '
                "where it was, or begin a new run from its config"
            )
    scaled = {
        role: section.model_copy(update={"replicas": wanted[role]})
        for role, section in _sections(config).items()
        if role in wanted
    }
    command = ("elenchus", "resume", config.name, "--runs-dir", str(MOUNT / config.runs_dir))
    return _manifest(config.model_copy(update=scaled), target=target, command=command, settings=None)


def service_manifest(config: RunConfig, *, target: Target) -> str:
    """Return the YAML of a RayService that serves a run's learner, whatever else becomes of the run.

    Raises:
        ValueError: something does not fit, or the run's directory is not on the volume; a line for each.
    """
    config = config.model_copy(update={"serve": config.serve.model_copy(update={"enabled": True})})
    plan, pods = _checked(config, target=target, settings=None)
    served = [role for role in plan.roles if role.role == ENDPOINT]
    plan = replace(plan, roles=tuple(served))
    groups = pod_groups(plan, most=_most(config, target), store_bytes=pods.store_bytes)
    name = job_name(config.name)
    front = [{"name": key, "value": value} for key, value in front_environment(config.serve).items()]
    service = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name, "labels": _labels(name), "annotations": {"elenchus/run": config.name}},
        "spec": {
            "serveConfigV2": yaml.dump(serve_config(config), Dumper=_Dumper, sort_keys=False),
            "rayClusterConfig": _cluster(groups, pods=pods, environment=front),
        },
    }
    needs = (f"a key beyond that of one machine: elenchus key {config.name} --label WHO, where the volume is",)
    return _header(plan, groups=groups, pods=pods, what=f"The learner of run {config.name}", needs=needs) + yaml.dump(
        service, Dumper=_Dumper, sort_keys=False, width=1_000, explicit_start=True, allow_unicode=True
    )


def serve_config(config: RunConfig) -> dict[str, Any]:
    """Return what Ray Serve is told; the run's directory has the rest."""
    return {
        "proxy_location": "EveryNode",
        # Within the pod's network; keys are asked for, and an ingress that ends TLS belongs before it.
        "http_options": {"host": "0.0.0.0", "port": SERVE_PORT},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [
            {
                "name": "elenchus",
                "route_prefix": "/",
                "import_path": "serve.learner_app:app_of_run",
                "args": {"run_dir": str(MOUNT / config.runs_dir / config.name)},
            }
        ],
    }


def job_name(run: str) -> str:
    """Return what Kubernetes calls a run: a DNS label that tells runs apart.

    >>> job_name("safe-7b"), job_name("Qwen2.5")
    ('elenchus-safe-7b', 'elenchus-qwen2-5-4655fb')
    """
    plain = re.sub(r"[^a-z0-9-]", "-", run.lower()).strip("-")
    name = f"elenchus-{plain}"
    if plain == run and len(name) <= MAX_NAME_CHARS:
        return name
    # Runs that differ in what had to go still have two names.
    digest = hashlib.sha256(run.encode()).hexdigest()[:6]
    return f"{name[: MAX_NAME_CHARS - 7].rstrip('-')}-{digest}"


def config_toml(config: RunConfig) -> str:
    """Return a config as TOML with every key, less what is for a Ray of one machine; None is told by absence."""
    lines = _toml_lines(config.model_dump(mode="json"), prefix="")
    local = tuple(f"ray.{key} = " for key in LOCAL_RAY)
    return "".join(f"{line}\n" for line in lines if not line.startswith(local))


def _toml_lines(values: Mapping[str, Any], *, prefix: str) -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _toml_lines(value, prefix=f"{prefix}{key}.")
        elif value is not None:
            # JSON's texts, numbers and lists are TOML's.
            yield f"{prefix}{key} = {json.dumps(value, ensure_ascii=False)}"


# -------------------------------------------------------------------------------------------------------------- groups


def pod_groups(plan: Plan, *, most: Mapping[str, int], store_bytes: int) -> list[PodGroup]:
    """Return the pods that hold a plan, and those by which its pools may grow.

    A role whose replica or rank takes a whole GPU has pods of its own. What takes shares of a GPU, or CPUs alone,
    shares pods: Ray packs it as `elenchus plan` counts it.

    Args:
        most: greatest number of replicas by role.
        store_bytes: Ray's object store in each pod.
    """
    own = [role for role in plan.roles if _takes_whole_gpus(role)]
    shared = [role for role in plan.roles if not _takes_whole_gpus(role)]
    groups = [_shared_group(shared)] if shared else []
    groups += [_own_group(role, most=most.get(role.role, role.count)) for role in own]
    groups += [
        _growth_group(role, num_more=most[role.role] - role.count)
        for role in shared
        if most.get(role.role, role.count) > role.count
    ]
    beside = RAY_BYTES + store_bytes
    return [
        PodGroup(
            name=group.name,
            holds=group.holds,
            cpus=group.cpus,
            gpus=group.gpus,
            memory_bytes=beside + group.memory_bytes,
            most_memory_bytes=beside + max(group.memory_bytes, _most_memory(plan.roles, group, most=most)),
            min_pods=group.min_pods,
            max_pods=group.max_pods,
        )
        for group in groups
    ]


def _takes_whole_gpus(role: RolePlan) -> bool:
    """Whether no second unit of the role fits onto its GPUs."""
    return any(share > 0.5 for share in role.gpus)


def _own_group(role: RolePlan, *, most: int) -> PodGroup:
    gpus = math.ceil(sum(role.gpus) - 1e-9)
    per_pod = 1
    if role.unit == "rank":
        # Ranks talk all the time: as few pods as there can be, alike.
        num_pods = math.ceil(role.count / max(1, GPUS_PER_POD // gpus))
        per_pod = math.ceil(role.count / num_pods)
    return _group(role.role, role, per_pod=per_pod, gpus=per_pod * gpus, num=(role.count, most))


def _growth_group(role: RolePlan, *, num_more: int) -> PodGroup:
    """Return pods for more replicas of a role that begins in shared ones, filled as far as a GPU, or a CPU, goes."""
    share = max(role.gpus, default=role.cpus)
    per_pod = min(num_more, max(1, math.floor(1 / share + 1e-9)))
    return _group(role.role, role, per_pod=per_pod, gpus=1 if role.gpus else 0, num=(0, num_more))


def _group(name: str, role: RolePlan, *, per_pod: int, gpus: int, num: tuple[int, int]) -> PodGroup:
    fewest, most = num
    return PodGroup(
        name=name,
        holds=f"{per_pod} {role.unit}{'s' if per_pod > 1 else ''} of {role.role}",
        cpus=_whole(per_pod * role.cpus),
        gpus=gpus,
        memory_bytes=per_pod * sum(role.memory.values()),
        most_memory_bytes=0,
        min_pods=math.ceil(fewest / per_pod),
        max_pods=math.ceil(most / per_pod),
    )


def _shared_group(roles: Sequence[RolePlan]) -> PodGroup:
    """Return the pods that hold all of several roles: one, or one for each GPU that their shares fill."""
    shares = sorted((share for role in roles for share in role.gpus * role.count), reverse=True)
    num_pods = max(1, _num_bins(shares))
    memory = sum(role.memory_bytes for role in roles)
    return PodGroup(
        name="shared",
        holds=", ".join(f"{role.count} {role.unit}{'s' if role.count > 1 else ''} of {role.role}" for role in roles),
        cpus=_whole(sum(role.count * role.cpus for role in roles)),
        gpus=1 if shares else 0,
        memory_bytes=math.ceil(memory / num_pods),
        most_memory_bytes=0,
        min_pods=num_pods,
        max_pods=num_pods,
    )


def _num_bins(shares: Sequence[float]) -> int:
    """Return how many GPUs hold shares, greatest first, each share whole; first fit, as a plan counts."""
    free: list[float] = []
    for share in shares:
        place = next((i for i, left in enumerate(free) if left + 1e-9 >= share), None)
        if place is None:
            free.append(1.0 - share)
        else:
            free[place] -= share
    return len(free)


def _most_memory(roles: Sequence[RolePlan], group: PodGroup, *, most: Mapping[str, int]) -> int:
    """Return an upper bound of the host memory of what Ray finds room for in one pod of a group.

    The units with most memory for their share come first, as many as there can be; the last one may be a part of one.
    """
    total = 0.0
    for on_gpus, room in ((True, float(group.gpus)), (False, float(group.cpus))):
        shares = [(sum(role.gpus) if on_gpus else role.cpus, role) for role in roles if bool(role.gpus) == on_gpus]
        for share, role in sorted(shares, key=lambda one: sum(one[1].memory.values()) / one[0], reverse=True):
            count = min(most.get(role.role, role.count), room / share)
            total += count * sum(role.memory.values())
            room -= count * share
    return math.ceil(total)


def _whole(cpus: float) -> int:
    """Return CPUs as Ray counts them, in ten-thousandths, rounded up to whole ones."""
    return max(1, math.ceil(round(cpus, 4)))


# ---------------------------------------------------------------------------------------------------------------- YAML


def _manifest(config: RunConfig, *, target: Target, command: Sequence[str], settings: Mapping[str, Any] | None) -> str:
    plan, pods = _checked(config, target=target, settings=None if settings is None else job_name(config.name))
    groups = pod_groups(plan, most=_most(config, target), store_bytes=pods.store_bytes)
    job = _ray_job(config, groups=groups, pods=pods, command=command)
    documents = [job] if settings is None else [settings, job]
    return _header(plan, groups=groups, pods=pods, what=f"Run {plan.name}") + yaml.dump_all(
        documents, Dumper=_Dumper, sort_keys=False, width=1_000, explicit_start=True, allow_unicode=True
    )


def _checked(config: RunConfig, *, target: Target, settings: str | None) -> tuple[Plan, _Pods]:
    """Return a config's plan and what all its pods have in common.

    Raises:
        ValueError: something does not fit; a line for each.
    """
    problems = [*_path_problems(config), *_target_problems(config, target)]
    if problems:
        raise ValueError("\n".join(problems))
    plan = plan_run(_in_pods(config), machine=None)
    # The pods' disk is the volume: this machine's says nothing of it.
    problems = [line for line in plan.problems if not line.startswith("disk:")]
    if problems:
        raise ValueError("\n".join(problems))
    return plan, _Pods(
        image=target.image or _own_image(plan),
        volume_claim=target.volume_claim,
        store_bytes=int(config.ray.object_store_gb * GIB),
        settings=settings,
    )


def _path_problems(config: RunConfig) -> Iterator[str]:
    """Yield what pods would not find: absolute paths that are not on the volume."""
    paths = {"runs_dir": str(config.runs_dir)}
    models = {
        "learner.model": config.learner.model,
        "attacker.engine.model": config.attacker.engine.model,
        "critic.engine.model": config.critic.engine.model,
    }
    for key, path in {**paths, **{key: model for key, model in models.items() if model != BOOTSTRAP}}.items():
        in_pods = MOUNT / path
        if ".." in in_pods.parts or not in_pods.is_relative_to(MOUNT):
            yield (
                f"{key}: got {path}, wanted a path on the volume that is {MOUNT} in every pod: give one below {MOUNT}, "
                "or a relative one, which counts from there"
            )
        elif shlex.quote(path) != path:
            yield f"{key}: got {path!r}, wanted a path without blanks and quotes: it becomes part of a command"


def _target_problems(config: RunConfig, target: Target) -> Iterator[str]:
    if config.placement.colocate:
        yield (
            f"placement.colocate: got {', '.join(config.placement.colocate)}, wanted none: GPUs that pools share with "
            "the learner have no group of pods of their own yet; run it on nodes that Ray has joined"
        )
    most = target.max_critics
    if most is not None and most < config.critic.replicas:
        yield f"--max-critics: got {most}, wanted at least critic.replicas = {config.critic.replicas}"
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", target.volume_claim):
        yield f'--volume-claim: got "{target.volume_claim}", wanted the name of a PersistentVolumeClaim'
    if target.image is not None and not re.fullmatch(r"[\w][\w./:@-]*", target.image, re.ASCII):
        yield f'--image: got "{target.image}", wanted the name of a container image, such as host/elenchus:0.1.0-gpu'


def _in_pods(config: RunConfig) -> RunConfig:
    """Return the config less what is for a Ray of one machine."""
    fresh = type(config.ray)(namespace=config.ray.namespace, object_store_gb=config.ray.object_store_gb)
    return config.model_copy(update={"ray": fresh})


def _sections(config: RunConfig) -> dict[str, AttackerSection | RolloutsSection | CriticSection]:
    return {"attacker": config.attacker, "rollouts": config.rollouts, "critic": config.critic}


def _most(config: RunConfig, target: Target) -> dict[str, int]:
    most = {role: max(section.replicas, section.autoscale.max) for role, section in _sections(config).items()}
    if target.max_critics is not None:
        most["critic"] = target.max_critics
    elif config.critic.autoscale.max == 0:
        most["critic"] = 2 * config.critic.replicas
    if config.serve.enabled:
        most[ENDPOINT] = config.serve.most_replicas + 1  # the one for pinned versions
    return most


def _own_image(plan: Plan) -> str:
    device = "gpu" if any(role.gpus for role in plan.roles) else "cpu"
    return f"elenchus:{importlib.metadata.version('elenchus')}-{device}"


def _ray_job(config: RunConfig, *, groups: Sequence[PodGroup], pods: _Pods, command: Sequence[str]) -> dict[str, Any]:
    name = job_name(config.name)
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": _labels(name), "annotations": {"elenchus/run": config.name}},
        "spec": {
            "entrypoint": shlex.join(("env", f"--chdir={MOUNT}", *command)),
            "submissionMode": "K8sJobMode",
            # A second attempt would have to be a resume: that is another manifest.
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": _cluster(groups, pods=pods),
        },
    }


def _cluster(
    groups: Sequence[PodGroup], *, pods: _Pods, environment: Sequence[Mapping[str, str]] = ()
) -> dict[str, Any]:
    """Return the Ray cluster of the groups and a head; `environment` is what its containers are told."""
    head_bytes = DRIVER_BYTES + RAY_BYTES + pods.store_bytes + HEAD_EXTRA_BYTES
    head = PodGroup(
        name="head",
        holds="Ray's own services and the driver",
        cpus=HEAD_CPUS,
        gpus=0,
        memory_bytes=head_bytes,
        most_memory_bytes=head_bytes,
        min_pods=1,
        max_pods=1,
    )
    store = {"object-store-memory": str(pods.store_bytes)}
    return {
        "rayVersion": importlib.metadata.version("ray"),
        "authOptions": {"mode": "token"},
        "enableInTreeAutoscaling": True,
        "autoscalerOptions": {"version": "v2", "upscalingMode": "Default", "idleTimeoutSeconds": 300},
        "headGroupSpec": {
            # No CPUs: replicas and ranks stay off the head.
            "rayStartParams": {"num-cpus": "0", **store},
            "template": _pod(head, pods=pods, environment=environment),
        },
        "workerGroupSpecs": [
            {
                "groupName": group.name,
                "replicas": group.min_pods,
                "minReplicas": group.min_pods,
                "maxReplicas": group.max_pods,
                "rayStartParams": {"num-cpus": str(group.cpus), **store},
                "template": _pod(group, pods=pods, environment=environment),
            }
            for group in groups
        ],
    }


def _labels(name: str) -> dict[str, str]:
    return {"app.kubernetes.io/name": "elenchus", "app.kubernetes.io/instance": name}


def _pod(group: PodGroup, *, pods: _Pods, environment: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """Return the template of a pod: one container without privileges, the volume, and shared memory."""
    gpus = {"nvidia.com/gpu": group.gpus} if group.gpus else {}
    is_head = group.name == "head"
    mounts = [{"name": "data", "mountPath": str(MOUNT)}, {"name": "shm", "mountPath": "/dev/shm"}]
    volumes: list[dict[str, Any]] = [
        {"name": "data", "persistentVolumeClaim": {"claimName": pods.volume_claim}},
        # Kubernetes gives 64 MiB otherwise. Half as much again: engines of several processes meet there too.
        {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": _mebibytes(pods.store_bytes * 3 // 2)}},
    ]
    if is_head and pods.settings is not None:
        mounts.append({"name": "config", "mountPath": str(CONFIG_MOUNT)})
        volumes.append({"name": "config", "configMap": {"name": pods.settings}})
    spec: dict[str, Any] = {
        # The autoscaler wants a new pod in the place of one that failed, not the same one again.
        "restartPolicy": "Never",
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "runAsGroup": USER_ID,
            "fsGroup": USER_ID,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": "ray-head" if is_head else "ray-worker",
                "image": pods.image,
                # Every process resolves a config's relative paths alike.
                "workingDir": str(MOUNT),
                **({"env": list(environment)} if environment else {}),
                "resources": {
                    "requests": {"cpu": str(group.cpus), "memory": _mebibytes(group.memory_bytes), **gpus},
                    "limits": {"memory": _mebibytes(group.most_memory_bytes), **gpus},
                },
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }
    if group.gpus:
        spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    return {"spec": spec}


def _mebibytes(size_bytes: int) -> str:
    return f"{math.ceil(size_bytes / MIB)}Mi"


def _header(plan: Plan, *, groups: Sequence[PodGroup], pods: _Pods, what: str, needs: Sequence[str] = ()) -> str:
    """Return comments: what is needed beforehand, and what the numbers come from."""
    models = sorted({role.model for role in plan.roles} - {BOOTSTRAP})
    needed = [
        f"KubeRay {KUBERAY} or newer",
        f"{pods.image}: an image that the nodes can pull (docker/)",
        f"{pods.volume_claim}: a PersistentVolumeClaim that all pods can write to (ReadWriteMany), at {MOUNT}",
        *(f"{MOUNT / model}: a model directory on that volume" for model in models),
        *needs,
    ]
    rows = [
        f"{group.name:<9} pods: {_range(group)}, each for {group.holds}: {group.cpus} CPUs, {group.gpus} GPUs, "
        f"{gib(group.memory_bytes)}, at most {gib(group.most_memory_bytes)}"
        for group in groups
    ]
    lines = [
        f"{what} on Kubernetes. It needs:",
        *(f"  {line}" for line in needed),
        f"The roles reserve {plan.cpus:g} CPUs and {plan.gpus:g} GPUs, as `elenchus plan` says; memory is an estimate:",
        *(f"  {line}" for line in rows),
    ]
    return "".join(f"# {line}\n" for line in lines)


def _range(group: PodGroup) -> str:
    return str(group.min_pods) if group.min_pods == group.max_pods else f"{group.min_pods} to {group.max_pods}"


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as they are."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)
