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
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from actors.chat import load_tokenizer
from actors.engine import engine_environment
from actors.engine_config import EngineConfig, gpus_reserved
from actors.model_directory import check_model_directory, context_length
from cluster.commits import committed_policy
from cluster.log import start_log
from serve.address import check_address as check_address
from serve.auth import KeyRing, own_keys
from serve.gateway import Gateway, GatewayConfig
from serve.learner_replica import AncestorReplica, LearnerReplica
from serve.limits import Overloaded
from serve.publisher import Publisher, wanted_version
from serve.wire import AnswerLost, Catalog, Piece, RequestRefused, ServedRequest
from trainers.serving_config import ServingConfig as ServingConfig

logger = logging.getLogger(__name__)

APP = "elenchus"
FIRST_SIGN_S = 20.0
"""Longest silence of a replica that has a request: it says something every two seconds."""
FIRST_SIGN_OF_ANCESTOR_S = 180.0
"""A replica for pinned versions may have to start first, and to wait for its turn."""
NO_ROOM_S = 2
QUIET = {"log_level": "WARNING", "enable_access_log": False}
"""What Ray Serve logs of itself."""


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
        ValueError: the run has committed nothing, the port is in use, the host lies beyond loopback without a key, or
            this Ray has an endpoint already.
        RuntimeError: the deployment failed; the log says how.
    """
    begin = time.monotonic()
    check_address(run_dir, config)
    if APP in ray_serve.status().applications:
        raise ValueError(
            f"{run_dir}: got a Ray that serves a learner already, wanted one endpoint on each: stop that one, or serve "
            "this run on a Ray of its own, without --address"
        )
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        built = build(run_dir, config, engine=engine, parity_bound=parity_bound, log_path=log_path)
        http = {"host": config.host, "port": config.port}
        ray_serve.start(proxy_location="EveryNode", http_options=http, logging_config=QUIET)
        ray_serve.run(built.app, name=APP, route_prefix="/")
    except BaseException:
        # On a cluster it would outlive this process, and stand in the way of the next one.
        take_down(run_dir)
        raise
    host = config.host if ":" not in config.host else f"[{config.host}]"
    return Serving(
        url=f"http://{host}:{config.port}/v1",
        version=built.version,
        publisher=built.publisher,
        start_s=time.monotonic() - begin,
    )


def take_down(run_dir: Path) -> None:
    """Remove what a deployment that failed, or was given up, has left on the Ray that this process is connected to."""
    if not ray.is_initialized():
        return
    if APP in ray_serve.status().applications:
        ray_serve.delete(APP)
    with suppress(ValueError):  # there is none
        ray.kill(ray.get_actor(_publisher_name(run_dir)), no_restart=True)


def _publisher_name(run_dir: Path) -> str:
    return f"publisher-{run_dir.resolve().name}"


class AppArgs(BaseModel):
    """What a config file of Ray Serve tells the application."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run_dir: Path
    """Directory of a run that every node can reach."""


def app_of_run(args: dict[str, str]) -> Application:
    """Return the endpoint of a run, for Ray Serve's own config files, as of a RayService; they say where it listens.

    Args:
        args: fields of AppArgs; Ray Serve (2.60) itself sees no model behind an annotation that is read late.

    Raises:
        ValueError: the run has committed nothing, or has no key made by `elenchus key`; or an argument is wrong.
    """
    from trainers.run_config import read_resolved

    run_dir = AppArgs.model_validate(args).run_dir
    config = read_resolved(run_dir / "resolved.json")
    if not own_keys(run_dir):
        raise ValueError(f"{run_dir}: got no key, wanted one: make it by `elenchus key {run_dir.name} --label WHO`")
    bound, log_path = config.loop.parity_bound, run_dir / "serve.log"
    return build(run_dir, config.serve, engine=config.rollouts.engine, parity_bound=bound, log_path=log_path).app


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An application that is not deployed yet, and the publisher that it follows, which runs."""

    app: Application
    version: str
    publisher: str
    """The actor's name."""


def build(
    run_dir: Path, config: ServingConfig, *, engine: EngineConfig, parity_bound: float, log_path: Path | None
) -> Built:
    """Start the publisher of a run, or find it, and return the application.

    Raises:
        ValueError: the run has committed nothing, or its model says no context length.
    """
    run_dir = run_dir.resolve()
    version = wanted_version(run_dir)
    model = (run_dir / committed_policy(run_dir, version).policy[0].path).parent
    check_model_directory(model)
    context = engine.max_model_len or context_length(model)
    if context is None:
        raise ValueError(
            f"{model}/config.json: got no context length, wanted rollouts.engine.max_model_len in the config"
        )
    publisher_name = _publisher_name(run_dir)
    log = None if log_path is None else str(log_path.resolve())
    publisher: Any = (
        ray.remote(Publisher)
        .options(
            name=publisher_name,
            get_if_exists=True,
            lifetime="detached",
            num_cpus=0,
            max_restarts=-1,
            max_concurrency=1000,
        )
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
    common: dict[str, Any] = {
        "logging_config": QUIET,
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
            "max_replicas": config.most_replicas,
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
        logging_config=QUIET,
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
    return Built(app=gateway, version=version, publisher=publisher_name)


def _deployment(target: type, **settings: Any) -> Any:
    """Return a deployment; Ray's own signature says that this gives a decorator."""
    return ray_serve.deployment(**settings)(target)


def _own_words(error: Exception) -> str:
    """Return what a replica said, without Ray's trace around it."""
    cause = getattr(error, "cause", None)
    return str(cause if isinstance(cause, Exception) else error).strip().splitlines()[-1]
