"""What is deployed: Ray's own schema, command line and autoscaler judge the cluster files and the manifest.

Neither a cloud, nor Kubernetes, nor Docker is asked: none of them is here.
"""

from __future__ import annotations

import fnmatch
import json
import math
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray._common.utils import import_attr
from ray._private.ray_constants import DEFAULT_DASHBOARD_AGENT_LISTEN_PORT
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler as DemandSchedulerV1
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import BundleSelector, GangResourceRequest
from ray.core.generated.common_pb2 import Bundle, PlacementStrategy
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.scripts.scripts import start as ray_start
from ray.serve.schema import ServeDeploySchema

import elenchus
from cluster.scaling import write_wanted
from serve.front import front_environment
from serve.learner_app import AppArgs, app_of_run
from serve.manifest import MAX_NAME_CHARS, Target, config_toml, job_name, run_manifest
from tests.tiny_models import write_llama
from trainers.memory_estimate import DRIVER_BYTES, GIB, MIB, RAY_BYTES
from trainers.plan import Plan, plan_run
from trainers.run_config import RunConfig, load_run_config
from trainers.serving_config import ServingConfig

ROOT = Path(__file__).resolve().parent.parent
CLUSTER_FILES = (ROOT / "ray_cluster.yaml", ROOT / "docs" / "examples" / "on_premise.yaml")
DEVICES = ("cpu", "gpu")
Bundles: TypeAlias = Sequence[Mapping[str, float]]


def launched(types: Mapping[str, Any], gangs: Sequence[Bundles]) -> tuple[Counter[str], int]:
    """Return how many pods of each type KubeRay's autoscaler (v2) wants for placement groups, and how many can't be."""
    requests = []
    for bundles in gangs:
        asked = [ResourceRequestUtil.make(dict(bundle)) for bundle in bundles]
        requests.append(GangResourceRequest(requests=asked, bundle_selectors=[BundleSelector(resource_requests=asked)]))
    configs = {
        name: NodeTypeConfig(
            name=name,
            min_worker_nodes=kind["min_workers"],
            max_worker_nodes=kind["max_workers"],
            resources=kind["resources"],
        )
        for name, kind in types.items()
    }
    reply = ResourceDemandScheduler().schedule(
        SchedulingRequest(disable_launch_config_check=True, node_type_configs=configs, gang_resource_requests=requests)
    )
    nodes = Counter({launch.instance_type: launch.count for launch in reply.to_launch})
    return nodes, len(reply.infeasible_gang_resource_requests)


def group(strategy: str, bundles: Bundles) -> PlacementGroupTableData:
    return PlacementGroupTableData(
        state=PlacementGroupTableData.PENDING,
        strategy=PlacementStrategy.Value(strategy),
        bundles=[Bundle(unit_resources=dict(bundle)) for bundle in bundles],
    )


def wanted_by_ray_up(
    config: Mapping[str, Any], groups: Sequence[PlacementGroupTableData]
) -> tuple[Mapping[str, int], int]:
    """Return how many nodes of each type the autoscaler of `ray up` (v1) wants for placement groups, as above."""
    scheduler = DemandSchedulerV1(
        provider=None,
        node_types=config["available_node_types"],
        max_workers=config["max_workers"],
        head_node_type=config["head_node_type"],
        upscaling_speed=1_000,
    )
    nodes, unmet = scheduler.get_nodes_to_launch(
        nodes=[],
        launching_nodes={},
        resource_demands=[],
        unused_resources_by_ip={},
        pending_placement_groups=list(groups),
        max_resources_by_ip={},
        ensure_min_cluster_size=[],
        node_availability_summary=NodeAvailabilitySummary({}),
    )
    return nodes, len(unmet)


def flags_of(command: str) -> set[str]:
    return set(re.findall(r"(?<= )--([a-z-]+)", command))


RAY_START_FLAGS = {option.lstrip("-") for parameter in ray_start.params for option in parameter.opts}


# ------------------------------------------------------------------------------------------------------- cluster files


@pytest.mark.parametrize("path", CLUSTER_FILES, ids=lambda path: path.name)
def test_a_cluster_file_passes_rays_schema_and_rays_own_checks(path: Path) -> None:
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_bytes())
    config = yaml.safe_load(path.read_text())
    jsonschema.validate(config, schema)
    with pytest.raises(jsonschema.ValidationError, match="idle_minutes"):
        jsonschema.validate(config | {"idle_minutes": 5}, schema)
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["docker"]["image"] == f"registry.example.com/elenchus:{version()}-gpu"
    if config["provider"]["type"] == "local":
        (kind,) = prepared["available_node_types"].values()
        assert kind["min_workers"] == kind["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("path", CLUSTER_FILES, ids=lambda path: path.name)
def test_every_node_starts_ray_with_the_token_alone(path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    (folder,) = config["file_mounts"]
    assert f"--env RAY_AUTH_TOKEN_PATH={folder}/auth_token" in config["docker"]["run_options"]
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in config[key] if "ray start" in command]
        before, _, rest = start.partition("ray start")
        # From /data: relative paths of a config mean the same in every process.
        assert before.startswith(f"export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={folder}/auth_token;")
        assert "chmod 600 $RAY_AUTH_TOKEN_PATH && cd /data &&" in before
        assert flags_of(rest) <= RAY_START_FLAGS, flags_of(rest) - RAY_START_FLAGS
        assert ("--dashboard-host=127.0.0.1" in rest) == (key == "head_start_ray_commands")
    assert "--volume /mnt/shared:/data" in config["docker"]["run_options"]


def test_the_critics_type_alone_grows_and_by_itself() -> None:
    config = yaml.safe_load(CLUSTER_FILES[0].read_text())
    types = config["available_node_types"]
    assert [name for name, kind in types.items() if kind["max_workers"] > kind["min_workers"]] == ["critic"]
    # What the code asks for: CPUs and GPUs, nothing of a name.
    assert {resource for kind in types.values() for resource in kind["resources"]} == {"CPU", "GPU"}
    # As the file's first lines say: an attacker, a rollout engine, critics, four ranks.
    engine, ranks = group("STRICT_PACK", [{"CPU": 0.2, "GPU": 0.9}]), group("PACK", [{"CPU": 1, "GPU": 1}] * 4)
    fixed = {"head": 1, "attacker_rollouts": 2, "learner": 1}
    for num_critics in (1, 2, 8):
        assert wanted_by_ray_up(config, [engine, engine, ranks, *[engine] * num_critics]) == (
            fixed | {"critic": num_critics},
            0,
        )
    assert wanted_by_ray_up(config, [engine, engine, ranks, *[engine] * 9]) == (fixed | {"critic": 8}, 1)
    assert config["max_workers"] == sum(kind["max_workers"] for kind in types.values())


def test_replicas_stay_off_the_head_of_the_cloud() -> None:
    config = yaml.safe_load(CLUSTER_FILES[0].read_text())
    head = config["available_node_types"][config["head_node_type"]]
    assert (head["resources"], head["max_workers"]) == ({"CPU": 0, "GPU": 0}, 0)
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--num-cpus=0" in start


# -------------------------------------------------------------------------------------------------------------- images


def version() -> str:
    return str(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"])


def instructions(device: str) -> list[tuple[str, str]]:
    """Return a Dockerfile's instructions and what they say, continued lines joined."""
    lines = (ROOT / "docker" / f"Dockerfile.{device}").read_text().splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in text.splitlines() if line.strip()]


def said(device: str, name: str) -> list[str]:
    return [value for instruction, value in instructions(device) if instruction == name]


def let_through(device: str, path: str) -> bool:
    """Whether the build is given a file: the last line of .dockerignore that matches it or a folder of it decides."""
    given = True
    for line in (ROOT / "docker" / f"Dockerfile.{device}.dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        parts = Path(path).parts
        above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
        names = parts if pattern.startswith("**/") else above
        if any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for name in names):
            given = line.startswith("!")
    return given


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_is_built_on_the_python_that_the_project_is_tested_with(device: str) -> None:
    (base,) = said(device, "FROM")
    found = re.fullmatch(r"python:(3\.\d+)-slim-[a-z]+", base)
    assert found
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert found[1] == project["tool"]["mypy"]["python_version"]
    assert f"Programming Language :: Python :: {found[1]}" in project["project"]["classifiers"]


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_holds_the_pinned_environment_and_the_code_and_no_more(device: str) -> None:
    pins = f"requirements/{device}.txt"
    copied = [source for value in said(device, "COPY") for source in value.split()[:-1]]
    packages = {f"{path.parent.name}/" for path in ROOT.glob("*/__init__.py")}
    assert set(copied) == {pins, "pyproject.toml", "README.md", "LICENSE", "elenchus.py", *packages}
    assert not said(device, "ADD")
    for source in copied:
        assert (ROOT / source).exists()
        assert let_through(device, source.rstrip("/"))
    assert let_through(device, "trainers/recipes/qwen2.5-1.5b-1gpu.toml")
    for kept_out in (
        ".git/config",
        ".venv/bin/ray",
        "runs/demo/labels",
        "serve/__pycache__/a.pyc",
        ".env",
        "auth_token",
    ):
        assert not let_through(device, kept_out)
    installs = [value for value in said(device, "RUN") if "pip install" in value]
    commands = [part for value in installs for part in re.split(r"&&", value) if "pip install" in part]
    assert all("--no-cache-dir" in command and "--no-deps" in command for command in commands)
    assert f"-r {pins}" in commands[2]
    # What is picked out of the pins by name is there, once, and without a marker.
    for name in re.findall(r"grep '(\^[a-z]+==)' " + re.escape(pins), installs[0]):
        (line,) = [line for line in (ROOT / pins).read_text().splitlines() if re.match(name, line)]
        assert ";" not in line
    (apt,) = [value for value in said(device, "RUN") if "apt-get" in value]
    assert "--no-install-recommends" in apt
    assert apt.endswith("rm -rf /var/lib/apt/lists/*")


@pytest.mark.parametrize("device", DEVICES)
def test_an_image_runs_as_nobody_special_is_closed_and_tells_its_health(device: str) -> None:
    arguments = dict(value.split("=") for value in said(device, "ARG"))
    user = re.sub(r"\$\{(\w+)\}", lambda name: arguments[name[1]], said(device, "USER")[-1])
    assert user == "1000"
    last_root = max(i for i, (name, _) in enumerate(instructions(device)) if name == "RUN")
    assert last_root < [name for name, _ in instructions(device)].index("USER")
    environment = dict(pair.split("=", 1) for pair in said(device, "ENV")[0].split())
    assert environment["RAY_AUTH_MODE"] == "token"
    secret = re.compile("TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)
    assert not [name for name in {**environment, **arguments} if secret.search(name)]
    (health,) = said(device, "HEALTHCHECK")
    command = json.loads(health[health.index("[") :])
    # The port that every Ray node's agent listens on, and a program that the image has.
    assert command[-1] == f"http://127.0.0.1:{DEFAULT_DASHBOARD_AGENT_LISTEN_PORT}/api/healthz"
    (apt,) = [value for value in said(device, "RUN") if "apt-get" in value]
    assert command[0] in apt.split()
    assert re.search(r"--interval=\d+s --timeout=\d+s --start-period=\d+s --retries=\d", health)


def test_the_two_images_differ_in_their_device_alone() -> None:
    for name in ("FROM", "COPY", "ARG", "USER", "WORKDIR", "HEALTHCHECK", "CMD"):
        assert [value.replace("cpu.txt", "gpu.txt") for value in said("cpu", name)] == said("gpu", name)
    ignored = [(ROOT / "docker" / f"Dockerfile.{device}.dockerignore").read_text() for device in DEVICES]
    assert ignored[0].replace("/cpu.txt", "/gpu.txt") == ignored[1]


def test_compose_is_a_head_and_two_workers_that_share_a_token_and_open_nothing() -> None:
    text = (ROOT / "docker" / "compose.yaml").read_text()
    compose = yaml.safe_load(text)
    head, worker = compose["services"]["head"], compose["services"]["worker"]
    assert sorted(compose["services"]) == ["head", "worker"]
    assert worker["deploy"] == {"replicas": 2}
    assert worker["depends_on"] == {"head": {"condition": "service_healthy"}}
    assert "ray start --address=head:6379" in worker["command"]
    for service in (head, worker):
        assert flags_of(service["command"]) <= RAY_START_FLAGS
        assert service["command"].split()[-1] == "--block"
        assert service["environment"] == {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"/run/secrets/{service['secrets'][0]}",
        }
        assert "ports" not in service
        assert service["cap_drop"] == ["ALL"]
        build = service["build"]
        assert (ROOT / "docker" / build["context"]).resolve() == ROOT
        for device in DEVICES:
            assert (ROOT / build["dockerfile"].replace("${DEVICE:-cpu}", device)).is_file()
        assert build["args"].keys() <= {value.split("=")[0] for value in said("cpu", "ARG")}
        assert service["image"] == f"elenchus:{version()}-${{DEVICE:-cpu}}"
        assert service["volumes"] == ["data:/data"]
    assert "--dashboard-host=127.0.0.1" in head["command"]
    # A file that the user names; nothing of it is in the repository.
    (secret,) = compose["secrets"].values()
    assert secret["file"].startswith("${RAY_AUTH_TOKEN_PATH:?")


def test_the_demo_fits_onto_composes_workers(tmp_path: Path) -> None:
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    (each,) = re.findall(r"--num-cpus=(\d+)", compose["services"]["worker"]["command"])
    plan = planned(tmp_path)
    assert plan.cpus <= int(each) * compose["services"]["worker"]["deploy"]["replicas"]
    assert "--num-cpus=0" in compose["services"]["head"]["command"]


# ------------------------------------------------------------------------------------------------------------ manifest


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def config_of(*flags: str) -> RunConfig:
    return load_run_config([], flags=[(key, value) for key, _, value in (flag.partition("=") for flag in flags)])


def planned(folder: Path, *flags: str) -> Plan:
    return plan_run(config_of(*flags), machine=None)


def documents(config: RunConfig, target: Target | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    settings, job = yaml.safe_load_all(run_manifest(config, target=target or Target()))
    return settings, job


def groups_of(job: Mapping[str, Any]) -> dict[str, tuple[int, int, int, int]]:
    """Return pods at least and at most, Ray CPUs and GPUs of one, by group."""
    return {
        group["groupName"]: (
            group["minReplicas"],
            group["maxReplicas"],
            int(group["rayStartParams"]["num-cpus"]),
            container_of(group)["resources"]["limits"].get("nvidia.com/gpu", 0),
        )
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    }


def container_of(group: Mapping[str, Any]) -> dict[str, Any]:
    (container,) = group["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def pods_of(job: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    yield cluster["headGroupSpec"]
    yield from cluster["workerGroupSpecs"]


def mebibytes(size_bytes: float) -> str:
    return f"{math.ceil(size_bytes / MIB)}Mi"


def types_of(job: Mapping[str, Any]) -> dict[str, Any]:
    """Return the node types that Ray's autoscaler in the head pod makes of the cluster."""
    cluster = {"metadata": {"name": "c", "namespace": "n"}, "spec": job["spec"]["rayClusterSpec"]}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    found = dict(config["available_node_types"])
    assert found.pop(config["head_node_type"])["resources"]["CPU"] == 0
    return found


def gangs_of(plan: Plan, **more: int) -> list[list[dict[str, float]]]:
    """Return the placement groups that a session asks for, with more replicas of some roles."""
    gangs: list[list[dict[str, float]]] = []
    for role in plan.roles:
        if role.unit == "rank":
            gangs.append([{"CPU": role.cpus, **({"GPU": role.gpus[0]} if role.gpus else {})}] * role.count)
        else:
            # STRICT_PACK: Ray asks the autoscaler for one bundle that holds all.
            bundle = {"CPU": role.cpus, **({"GPU": sum(role.gpus)} if role.gpus else {})}
            gangs += [[bundle]] * (role.count + more.get(role.role, 0))
    return gangs


def on_gpus(folder: Path, *flags: str) -> list[str]:
    """Return flags of a run whose engines and ranks are on GPUs."""
    write_llama(folder / "models" / "m")
    models = [f"{key}=models/m" for key in ("learner.model", *(f"{role}.engine.model" for role in ENGINES))]
    devices = [f"{role}.engine.device=cuda" for role in ENGINES]
    return [*models, *devices, "learner.training.gpus_per_rank=1", "learner.training.cpus_per_rank=1", *flags]


ENGINES = ("attacker", "rollouts", "critic")


def test_the_demo_becomes_one_pod_and_another_for_critics(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    settings, job = documents(config_of("name=demo"), Target(max_critics=7))
    # 3 engines x 0.2 and 2 ranks x 0.5 CPUs; six more critics, five of which fill a CPU.
    assert plan.cpus == pytest.approx(3 * 0.2 + 2 * 0.5)
    assert groups_of(job) == {"shared": (1, 1, 2, 0), "critic": (0, 2, 1, 0)}
    roles = {role.role: sum(role.memory.values()) for role in plan.roles}
    beside = RAY_BYTES + GIB
    shared, critic = (container_of(group)["resources"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"])
    together = sum(roles[role] for role in ENGINES) + 2 * roles["learner"]
    assert shared["requests"] == {"cpu": "2", "memory": mebibytes(together + beside)}
    assert critic["requests"] == {"cpu": "1", "memory": mebibytes(5 * roles["critic"] + beside)}
    # Two CPUs have room for all nine engines that there can be (1.8) and 0.2 / 0.5 of a rank.
    most = 2 * roles["attacker"] + 7 * roles["critic"] + 0.4 * roles["learner"]
    assert roles["attacker"] == roles["rollouts"] == roles["critic"] > roles["learner"]
    assert shared["limits"] == {"memory": mebibytes(most + beside)}
    head = container_of(job["spec"]["rayClusterSpec"]["headGroupSpec"])["resources"]
    assert head["limits"] == {"memory": mebibytes(DRIVER_BYTES + RAY_BYTES + GIB + 2 * GIB)}
    assert settings["metadata"]["name"] == job["metadata"]["name"] == "elenchus-demo"
    assert job["spec"]["entrypoint"] == "env --chdir=/data elenchus run /etc/elenchus/run.toml"


def check_cluster(job: Mapping[str, Any]) -> None:
    """Check what KubeRay and our images want of a cluster and its pods."""
    cluster = job["spec"]["rayClusterSpec"]
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "requirements" / "cpu.txt").read_text(), re.MULTILINE)
    assert cluster["rayVersion"] == pinned
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    for pod in pods_of(job):
        # KubeRay refuses other values than texts, and another restart policy beside its second autoscaler.
        assert all(isinstance(value, str) for value in pod["rayStartParams"].values())
        assert pod["rayStartParams"].keys() <= RAY_START_FLAGS
        spec, container = pod["template"]["spec"], container_of(pod)
        assert spec["restartPolicy"] == "Never"
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == int(dict(v.split("=") for v in said("cpu", "ARG"))["USER_ID"])
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container["workingDir"] == "/data"
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in spec["volumes"]}
        assert {"name": "data", "persistentVolumeClaim": {"claimName": "elenchus"}} in spec["volumes"]


def test_the_job_is_one_that_kuberay_takes() -> None:
    _, job = documents(config_of())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert {key: job["spec"][key] for key in ("submissionMode", "backoffLimit", "shutdownAfterJobFinishes")} == {
        "submissionMode": "K8sJobMode",
        "backoffLimit": 0,
        "shutdownAfterJobFinishes": True,
    }
    check_cluster(job)
    assert all("env" not in container_of(pod) for pod in pods_of(job))
    cluster = job["spec"]["rayClusterSpec"]
    head_mounts = {mount["mountPath"] for mount in container_of(cluster["headGroupSpec"])["volumeMounts"]}
    assert head_mounts == {"/data", "/dev/shm", "/etc/elenchus"}


def test_rays_autoscaler_fits_the_demo_into_its_pods_and_adds_critics(tmp_path: Path) -> None:
    plan = planned(tmp_path)
    _, job = documents(config_of(), Target(max_critics=8))
    types = types_of(job)
    assert launched(types, gangs_of(plan)) == ({"shared": 1}, 0)
    # 0.4 CPUs are left in the shared pod: two more critics need none.
    assert launched(types, gangs_of(plan, critic=2)) == ({"shared": 1}, 0)
    assert launched(types, gangs_of(plan, critic=3)) == ({"shared": 1, "critic": 1}, 0)


def test_roles_on_whole_gpus_have_pods_of_their_own_and_the_critics_grow(tmp_path: Path) -> None:
    flags = on_gpus(
        tmp_path,
        "critic.replicas=2",
        "critic.engine.tensor_parallel_size=2",
        "rollouts.replicas=3",
        "learner.training.num_ranks=8",
    )
    plan, (_, job) = planned(tmp_path, *flags), documents(config_of(*flags))
    # Replicas reserve 0.2 CPUs, ranks one each; twice the critics of the start.
    assert groups_of(job) == {
        "attacker": (1, 1, 1, 1),
        "rollouts": (3, 3, 1, 1),
        "critic": (2, 4, 1, 2),
        "learner": (1, 1, 8, 8),
    }
    types = types_of(job)
    start = Counter({"attacker": 1, "rollouts": 3, "critic": 2, "learner": 1})
    assert launched(types, gangs_of(plan)) == (start, 0)
    assert launched(types, gangs_of(plan, critic=2)) == (start + Counter(critic=2), 0)
    assert launched(types, gangs_of(plan, critic=3)) == (start + Counter(critic=2), 1)
    assert container_of(job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0])["image"] == f"elenchus:{version()}-gpu"
    # On each GPU of any pod Ray may put what takes most host memory for one: a rank of the learner, up to all eight.
    rank = sum(next(role for role in plan.roles if role.role == "learner").memory.values())
    engine = sum(next(role for role in plan.roles if role.role == "attacker").memory.values())
    critics = next(
        group for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"] if group["groupName"] == "critic"
    )
    per_gpu = max(rank, engine / 0.9)
    assert container_of(critics)["resources"]["limits"] == {
        "memory": mebibytes(2 * per_gpu + RAY_BYTES + GIB),
        "nvidia.com/gpu": 2,
    }
    assert container_of(critics)["resources"]["requests"]["memory"] == mebibytes(engine + RAY_BYTES + GIB)


@pytest.mark.parametrize(("num_ranks", "pods"), [(8, (1, 8)), (12, (2, 6)), (16, (2, 8)), (3, (1, 3))])
def test_ranks_share_as_few_pods_as_hold_them(tmp_path: Path, num_ranks: int, pods: tuple[int, int]) -> None:
    flags = on_gpus(tmp_path, f"learner.training.num_ranks={num_ranks}", f"learner.training.batch_size={4 * num_ranks}")
    _, job = documents(config_of(*flags))
    num_pods, gpus = pods
    assert groups_of(job)["learner"] == (num_pods, num_pods, gpus, gpus)


def test_shares_of_a_gpu_are_packed_as_a_plan_packs_them(tmp_path: Path) -> None:
    # The recipe for one GPU: three engines of 0.15 and a learner of a half.
    shares = [f"{role}.engine.gpu_memory_utilization=0.15" for role in ENGINES]
    flags = on_gpus(
        tmp_path,
        *shares,
        "learner.training.num_ranks=1",
        "learner.training.cpus_per_rank=0.5",
        "critic.autoscale.max=9",
    )
    flags = [flag.replace("gpus_per_rank=1", "gpus_per_rank=0.5") for flag in flags]
    plan, (_, job) = planned(tmp_path, *flags), documents(config_of(*flags))
    assert plan.gpus == pytest.approx(0.95)
    # Six critics fill a GPU: eight more than the first take two.
    assert groups_of(job) == {"shared": (1, 1, 2, 1), "critic": (0, 2, 2, 1)}
    assert launched(types_of(job), gangs_of(plan)) == ({"shared": 1}, 0)
    assert launched(types_of(job), gangs_of(plan, critic=8)) == ({"shared": 1, "critic": 2}, 0)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("name=x", "seed=7", "critic.replicas=3", "domain.digits=[2]", "learner.training.learning_rate=1e-6"),
        ("attack.kind=quality_diversity", "learner.training.betas=[0.8,0.99]", "experts.max_difficulty=0.5"),
        ("ray.address=10.0.0.1:6379", "ray.object_store_gb=2.5"),
    ],
)
def test_the_pods_read_the_config_that_was_given(tmp_path: Path, flags: tuple[str, ...]) -> None:
    config = config_of(*flags)
    settings, job = documents(config)
    path = tmp_path / "run.toml"
    path.write_text(settings["data"]["run.toml"])
    # But for the Ray that is joined: the one around the pods, by RAY_ADDRESS.
    assert load_run_config([path]) == config.model_copy(
        update={"ray": type(config.ray)(object_store_gb=config.ray.object_store_gb)}
    )
    store = int(config.ray.object_store_gb * GIB)
    assert {pod["rayStartParams"]["object-store-memory"] for pod in pods_of(job)} == {str(store)}


def test_no_default_is_lost_by_leaving_out_what_is_none() -> None:
    # A key whose default is a value, and that may be None, would come back as its default.
    written = {line.split(" = ")[0] for line in config_toml(RunConfig()).splitlines()}
    values = tomllib.loads(config_toml(RunConfig()))
    assert len(written) > 80
    assert RunConfig.model_validate(values) == RunConfig()


@pytest.mark.parametrize("run", ["a", "Demo", "demo", "qwen2.5_7b", "9lives", "x" * 64, "x" * 63 + "y", "a.-"])
def test_every_run_has_a_name_that_kubernetes_takes(run: str) -> None:
    name = job_name(RunConfig(name=run).name)
    assert len(name) <= MAX_NAME_CHARS
    assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name)


def test_runs_whose_names_look_alike_to_kubernetes_are_told_apart() -> None:
    runs = ["demo", "Demo", "demo.", "de.mo", "de-mo", "x" * 63, "x" * 64]
    assert len({job_name(run) for run in runs}) == len(runs)


# -------------------------------------------------------------------------------------------------------- command line


def begun(name: str, *flags: str) -> None:
    """Write what the command reads of a run that has begun."""
    folder = Path("runs") / name
    folder.mkdir(parents=True)
    config = config_of(f"name={name}", *flags)
    (folder / "resolved.json").write_text(json.dumps(config.model_dump(mode="json")))


def test_a_run_that_has_begun_goes_on_with_the_replicas_it_was_scaled_to(capsys: pytest.CaptureFixture[str]) -> None:
    begun("safe")
    write_wanted(Path("runs/safe"), "critic", 12)
    assert (
        elenchus.main(["manifest", "safe", "--kuberay", "--image", "host/elenchus:1", "--volume-claim", "shared-runs"])
        == 0
    )
    (job,) = yaml.safe_load_all(capsys.readouterr().out)
    assert job["spec"]["entrypoint"] == "env --chdir=/data elenchus resume safe --runs-dir /data/runs"
    # 14 engines x 0.2 and 2 ranks x 0.5 are 3.8 CPUs; as many critics again, five to a pod.
    assert groups_of(job) == {"shared": (1, 1, 4, 0), "critic": (0, 3, 1, 0)}
    for pod in pods_of(job):
        assert container_of(pod)["image"] == "host/elenchus:1"
        assert pod["template"]["spec"]["volumes"][0]["persistentVolumeClaim"] == {"claimName": "shared-runs"}
        assert "/etc/elenchus" not in {mount["mountPath"] for mount in container_of(pod)["volumeMounts"]}


def test_the_command_prints_yaml_that_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    Path("a.toml").write_text("[critic]\nreplicas = 2\n")
    assert elenchus.main(["manifest", "a.toml", "--kuberay", "--name", "Mine", "loop.iterations=3"]) == 0
    printed = capsys.readouterr().out
    settings, job = yaml.safe_load_all(printed)
    values = tomllib.loads(settings["data"]["run.toml"])
    assert (values["name"], values["critic"]["replicas"], values["loop"]["iterations"]) == ("Mine", 2, 3)
    assert job["metadata"]["annotations"] == {"elenchus/run": "Mine"}
    comments = [line for line in printed.splitlines() if line.startswith("#")]
    assert comments[0] == "# Run Mine on Kubernetes. It needs:"
    assert "# The roles reserve 1.8 CPUs and 0 GPUs, as `elenchus plan` says; memory is an estimate:" in comments
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ("", ["elenchus manifest: got no --kuberay, wanted it: say for what, and that is the one there is"]),
        (
            "saef --kuberay",
            ['run: got "saef", which is not in runs, wanted one of far, safe; did you mean safe?'],
        ),
        ("a.toml --kuberay", ["a.toml: no such file, wanted a TOML file"]),
        (
            "safe --kuberay critic.replicas=2",
            [
                "elenchus manifest: got critic.replicas beside the run safe, wanted the name alone: a run that has "
                "begun goes on with its own config"
            ],
        ),
        (
            "far --kuberay",
            [
                'run: got ray.address = "10.0.0.1:6379" in its config, wanted a run that joins the Ray around it: '
                "resume it where it was, or begin a new run from its config"
            ],
        ),
        (
            "--kuberay runs_dir=/home/me --max-critics 0 --volume-claim No_claim --image :x",
            [
                "runs_dir: got /home/me, wanted a path on the volume that is /data in every pod: give one below /data, "
                "or a relative one, which counts from there",
                "--max-critics: got 0, wanted at least critic.replicas = 1",
                '--volume-claim: got "No_claim", wanted the name of a PersistentVolumeClaim',
                '--image: got ":x", wanted the name of a container image, such as host/elenchus:0.1.0-gpu',
            ],
        ),
        (
            "--kuberay runs_dir=../x",
            [
                "runs_dir: got ../x, wanted a path on the volume that is /data in every pod: give one below /data, or "
                "a relative one, which counts from there"
            ],
        ),
        (
            "--kuberay critic.engine.kv_cache_gb=0.0001",
            [
                "critic.engine.kv_cache_gb: got 0.0001, wanted room for one sequence of 256 tokens, 512 KiB: raise it, "
                "or lower critic.engine.max_model_len"
            ],
        ),
    ],
)
def test_what_can_not_become_a_manifest_is_told_in_lines_and_nothing_is_printed(
    capsys: pytest.CaptureFixture[str], arguments: str, lines: list[str]
) -> None:
    begun("safe")
    begun("far", "ray.address=10.0.0.1:6379")
    assert elenchus.main(["manifest", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.splitlines() == [f"✗ {line}" for line in lines]


# ------------------------------------------------------------------------------------------------------------- service


def service_of(name: str, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what the command prints for a run's endpoint, and its cluster in the place that a job has it in."""
    assert elenchus.main(["manifest", name, "--kuberay", "--endpoint"]) == 0
    (service,) = yaml.safe_load_all(capsys.readouterr().out)
    return service, {"spec": {"rayClusterSpec": service["spec"]["rayClusterConfig"]}}


def test_the_service_is_one_that_kuberay_and_ray_serve_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun("safe", "serve.max_open_samples=9")
    service, cluster = service_of("safe", capsys)
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert service["metadata"]["name"] == "elenchus-safe"
    assert service["spec"].keys() == {"serveConfigV2", "rayClusterConfig"}
    check_cluster(cluster)
    for pod in pods_of(cluster):
        told = {one["name"]: one["value"] for one in container_of(pod)["env"]}
        assert told == front_environment(ServingConfig(max_open_samples=9))
    schema = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert schema.proxy_location == "EveryNode"
    # KubeRay's own service and its probes expect the port.
    assert (schema.http_options.host, schema.http_options.port) == ("0.0.0.0", 8000)
    (app,) = schema.applications
    assert (app.name, app.route_prefix) == ("elenchus", "/")
    assert import_attr(app.import_path) is app_of_run
    assert AppArgs.model_validate(app.args).run_dir == Path("/data/runs/safe")


def test_a_service_has_room_for_the_endpoint_alone_and_grows_with_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun("safe", "serve.min_replicas=2", "serve.max_replicas=6")
    _, cluster = service_of("safe", capsys)
    # Two replicas of 0.2 CPUs; four more and one for pinned versions fill a CPU.
    assert groups_of(cluster) == {"shared": (1, 1, 1, 0), "endpoint": (0, 1, 1, 0)}
    types = types_of(cluster)
    assert launched(types, [[{"CPU": 0.2}]] * 2) == ({"shared": 1}, 0)
    assert launched(types, [[{"CPU": 0.2}]] * 7) == ({"shared": 1, "endpoint": 1}, 0)
    models = on_gpus(tmp_path, "serve.max_replicas=3")
    begun("large", *models)
    _, cluster = service_of("large", capsys)
    assert groups_of(cluster) == {"endpoint": (1, 4, 1, 1)}


def test_an_application_of_a_run_without_a_key_is_refused(tmp_path: Path) -> None:
    begun("safe")
    with pytest.raises(ValueError, match=r"got no key, wanted one: make it by `elenchus key safe --label WHO`"):
        app_of_run({"run_dir": "runs/safe"})


def test_an_endpoint_without_a_run_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert elenchus.main(["manifest", "--kuberay", "--endpoint"]) == 2
    assert "got --endpoint and no name of a run" in capsys.readouterr().err
