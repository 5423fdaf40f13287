"""Owns the endpoint as Ray Serve runs it: gateway, replicas of the learner, one for pinned versions, the publisher.

    client ─► proxy ─► gateway ─┬─► learner   (min to max replicas, by load)
                  (auth, limits)└─► ancestors (none until a pinned version is asked for)
                                          ▲
                             publisher ───┘ weights, probes, which version

A deployment of our own over our own engine, not `ray.serve.llm`'s: its engine core in the replica's process starts in a
quarter of the time and half of the memory, a killed replica leaves no second process, chat text can't become control
tokens (vLLM's own chat route lets it), and a swap is the pools' path, held back until its probe has passed.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import Field
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from actors.chat import load_tokenizer
from actors.engine import engine_environment
from actors.engine_config import EngineConfig, gpus_reserved
from actors.model_directory import check_model_directory, context_length
from cluster.commits import committed_policy
from cluster.config import Config
from cluster.log import start_log
from serve.auth import KeyRing, read_keys
from serve.gateway import Gateway, GatewayConfig
from serve.learner_replica import AncestorReplica, LearnerReplica
from serve.limits import Overloaded
from serve.publisher import Publisher, wanted_version
from serve.wire import AnswerLost, Catalog, Piece, RequestRefused, ServedRequest

logger = logging.getLogger(__name__)

APP = "elenchus"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
FIRST_SIGN_S = 20.0
"""Longest silence of a replica that has a request: it says something every two seconds."""
FIRST_SIGN_OF_ANCESTOR_S = 180.0
"""A replica for pinned versions may have to start first, and to wait for its turn."""
NO_ROOM_S = 2


class ServingConfig(Config):
    """How the learner is served."""

    host: str = "127.0.0.1"
    """Address that the endpoint listens on; beyond loopback only when a key was made by `elenchus key`."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port that it listens on."""
    min_replicas: int = Field(default=1, ge=1)
    """Replicas of the current version when nothing is asked."""
    max_replicas: int = Field(default=1, ge=1)
    """Most of them; their number follows the requests that are open."""
    target_open: int = Field(default=64, ge=1)
    """Open requests that one replica is to have; more of them call for another replica."""
    max_open_samples: int = Field(default=512, ge=1)
    """Samples that may be open at once, of all keys; beyond it callers are told to come back (503)."""
    num_gateways: int = Field(default=1, ge=1)
    """Gateway replicas; each counts the limits of a key for itself."""
    answer_timeout_s: float = Field(default=300.0, gt=0)
    """Longest time for an answer, in seconds."""
    body_timeout_s: float = Field(default=10.0, gt=0)
    """Longest time for a request's body to arrive, in seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Serving:
    """An endpoint that runs."""

    url: str
    version: str
    publisher: str
    """The actor's name."""
    start_s: float

    def stop(self, *, whole_serve: bool = True) -> None:
        """End it; on a cluster that others use too, without the rest of Ray Serve."""
        if whole_serve:
            ray_serve.shutdown()
        else:
            ray_serve.delete(APP)
        ray.kill(ray.get_actor(self.publisher), no_restart=True)


class GatewayDeployment:
    """The gateway as a deployment: holds the ASGI app, follows the catalog."""

    def __init__(
        self,
        learner: DeploymentHandle[Any],
        ancestors: DeploymentHandle[Any],
        *,
        config: GatewayConfig,
        run_dir: str,
        model: str,
        publisher: str,
        namespace: str,
        log_path: str | None,
    ) -> None:
        if log_path is not None:
            start_log(Path(log_path), console_level=None)
        backend = ServeBackend(
            learner=learner, ancestors=ancestors, publisher=ray.get_actor(publisher, namespace=namespace)
        )
        self._gateway = Gateway(config, backend=backend, keys=KeyRing(Path(run_dir)), tokenizer=load_tokenizer(model))

    async def __serve_build_asgi_app__(self) -> Gateway:
        """Return what Serve hands requests to."""
        return self._gateway


class ServeBackend:
    """Replicas behind Serve's handles, as the gateway sees them."""

    def __init__(self, *, learner: DeploymentHandle[Any], ancestors: DeploymentHandle[Any], publisher: Any) -> None:
        self._learner = learner.options(stream=True)
        self._ancestors = ancestors.options(stream=True)
        self._publisher = publisher
        self._catalog: Catalog | None = None
        self._following: asyncio.Task[None] | None = None

    async def answer(self, request: ServedRequest) -> AsyncGenerator[Sequence[Piece], None]:
        """See `Backend`."""
        pinned = request.version is not None
        silence_s = FIRST_SIGN_OF_ANCESTOR_S if pinned else FIRST_SIGN_S
        response: Any = (self._ancestors if pinned else self._learner).answer.remote(request)
        ended = False
        try:
            while True:
                async with asyncio.timeout(silence_s):
                    pieces = await anext(response, None)
                if pieces is None:
                    ended = True
                    return
                yield pieces
        except TimeoutError:
            raise AnswerLost(f"no sign of the replica for {silence_s:g} s") from None
        except RequestRefused as error:
            ended = True
            raise RequestRefused(_own_words(error)) from None
        except AnswerLost as error:
            ended = True
            raise AnswerLost(_own_words(error)) from None
        except BackPressureError as error:
            raise Overloaded(str(error), retry_after_s=NO_ROOM_S) from None
        except (RayError, RayServeException) as error:
            raise AnswerLost(f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}") from None
        finally:
            if not ended:
                response.cancel()

    async def catalog(self) -> Catalog:
        """See `Backend`."""
        if self._following is None or self._following.done():
            self._catalog = await self._publisher.catalog.remote(None)
            self._following = asyncio.create_task(self._follow())
        assert self._catalog is not None, "it was asked for"
        return self._catalog

    async def _follow(self) -> None:
        while True:
            try:
                self._catalog = await self._publisher.catalog.remote(self._catalog)
            except RayError as error:
                logger.warning("the publisher does not answer: %s", type(error).__name__)
                await asyncio.sleep(1.0)


def start_serving(
    run_dir: Path,
    config: ServingConfig,
    *,
    engine: EngineConfig,
    parity_bound: float,
    log_path: Path | None = None,
) -> Serving:
    """Deploy the endpoint of a run on the Ray that this process is connected to, and return when it answers.

    Raises:
        ValueError: the run has committed nothing, the port is in use, or the host lies beyond loopback without a key.
        RuntimeError: the deployment failed; the log says how.
    """
    begin = time.monotonic()
    check_address(run_dir, config)
    run_dir = run_dir.resolve()
    version = wanted_version(run_dir)
    model = (run_dir / committed_policy(run_dir, version).policy[0].path).parent
    check_model_directory(model)
    context = engine.max_model_len or context_length(model)
    if context is None:
        raise ValueError(
            f"{model}/config.json: got no context length, wanted rollouts.engine.max_model_len in the config"
        )
    publisher_name = f"publisher-{run_dir.name}"
    log = None if log_path is None else str(log_path.resolve())
    publisher: Any = (
        ray.remote(Publisher)
        .options(name=publisher_name, lifetime="detached", num_cpus=0, max_restarts=-1, max_concurrency=1000)
        .remote(str(run_dir), parity_bound=parity_bound, log_path=log)
    )
    namespace = ray.get_runtime_context().namespace
    asked = {"run_dir": str(run_dir), "publisher": publisher_name, "namespace": namespace, "log_path": log}
    version = str(ray.get(publisher.start.remote()))
    resources = {
        "num_cpus": engine.num_cpus,
        "num_gpus": gpus_reserved(engine),
        "runtime_env": {"env_vars": engine_environment(engine)},
    }
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    common: dict[str, Any] = {
        "logging_config": quiet,
        "ray_actor_options": resources,
        "max_ongoing_requests": 4 * config.target_open,
        "health_check_period_s": 5.0,
        "health_check_timeout_s": 15.0,
        "graceful_shutdown_timeout_s": 5.0,
        "graceful_shutdown_wait_loop_s": 0.2,
    }
    learner = _deployment(
        LearnerReplica,
        name="learner",
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "initial_replicas": config.min_replicas,
            "max_replicas": max(config.min_replicas, config.max_replicas),
            "target_ongoing_requests": config.target_open,
            "upscale_delay_s": 5.0,
            "downscale_delay_s": 120.0,
        },
        **common,
    ).bind(engine, **asked)
    ancestors = _deployment(
        AncestorReplica,
        name="ancestors",
        autoscaling_config={
            "min_replicas": 0,
            "initial_replicas": 0,
            "max_replicas": 1,
            "target_ongoing_requests": config.target_open,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 300.0,
        },
        **common,
    ).bind(engine, **asked)
    gateway = _deployment(
        ray_serve.ingress()(GatewayDeployment),
        name="gateway",
        num_replicas=config.num_gateways,
        logging_config=quiet,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=10_000,
        health_check_period_s=5.0,
        graceful_shutdown_timeout_s=5.0,
    ).bind(
        learner,
        ancestors,
        config=GatewayConfig(
            body_timeout_s=config.body_timeout_s,
            answer_timeout_s=config.answer_timeout_s,
            max_open_samples=config.max_open_samples,
            max_model_len=context,
        ),
        model=str(model),
        **asked,
    )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray_serve.start(
        proxy_location="EveryNode", http_options={"host": config.host, "port": config.port}, logging_config=quiet
    )
    ray_serve.run(gateway, name=APP, route_prefix="/")
    host = config.host if ":" not in config.host else f"[{config.host}]"
    return Serving(
        url=f"http://{host}:{config.port}/v1",
        version=version,
        publisher=publisher_name,
        start_s=time.monotonic() - begin,
    )


def _deployment(target: type, **settings: Any) -> Any:
    """Return a deployment; Ray's own signature says that this gives a decorator."""
    return ray_serve.deployment(**settings)(target)


def check_address(run_dir: Path, config: ServingConfig) -> None:
    """Check where the endpoint is to listen.

    Raises:
        ValueError: beyond loopback without a key, or at a port that is in use.
    """
    own = [key for key in read_keys(run_dir) if not key.revoked and key.label != "this machine"]
    if config.host not in LOOPBACK and not own:
        raise ValueError(
            f"host: got {config.host}, which others can reach, and no key, wanted one: make it by "
            f"`elenchus key {run_dir.name} --label WHO`, or leave the host at 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ValueError(
                f"port: got {config.port} of {config.host}, which can't be had ({error.strerror}), wanted a free one: "
                "choose another by --port"
            ) from None


def _own_words(error: Exception) -> str:
    """Return what a replica said, without Ray's trace around it."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, Exception) else error).strip().splitlines()[-1]
