"""Owns the endpoint that a run has of its own: deployed on the run's Ray at its first commit, gone before its end.

    [serve] enabled = true ─► RunEndpoint ─► keep_endpoint, as `elenchus serve` calls it, in a thread

The run does not depend on it: an endpoint that fails is told of, and the run goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from cluster.ray_config import address_to_join
from serve.address import LOOPBACK, address_problems
from serve.publisher import wanted_version
from serve.serving_commands import keep_endpoint, living_endpoint
from trainers.run_config import RunConfig

logger = logging.getLogger(__name__)

LOOK_S = 0.5
STOP_TIMEOUT_S = 30.0
"""Longest wait for the endpoint to go before it is removed, in the middle of its deployment if need be."""


class RunEndpoint:
    """A `trainers.session.Companion`."""

    def __init__(
        self, config: RunConfig, *, note: Callable[[str], None], keep: Callable[..., None] = keep_endpoint
    ) -> None:
        self._config = config
        self._note = note
        self._keep = keep
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="endpoint", daemon=True)

    def start(self) -> None:
        """Serve from the first commit on; returns at once."""
        self._thread.start()

    def stop(self) -> None:
        """Take the endpoint down and return when it has gone."""
        self._is_stopped.set()
        self._thread.join(STOP_TIMEOUT_S)
        if self._thread.is_alive():
            from serve.learner_app import take_down

            logger.warning("the endpoint was not down after %g s: it is removed", STOP_TIMEOUT_S)
            take_down(self._config.run_dir)
            self._thread.join(STOP_TIMEOUT_S)

    def _serve(self) -> None:
        config = self._config
        if not self._is_committed(config.run_dir):
            return
        try:
            self._keep(
                config.run_dir,
                config.serve,
                engine=config.rollouts.engine,
                parity_bound=config.loop.parity_bound,
                whole_serve=address_to_join(config.ray) is None,
                is_stopped=self._is_stopped.is_set,
                tell=lambda text: self._note(text.removeprefix("● ")),
                tells_versions=False,  # the run's own table does
            )
        except Exception as error:  # whatever it is: the run goes on without it
            logger.exception("the endpoint failed")
            if not self._is_stopped.is_set():
                first = (str(error).strip().splitlines() or [type(error).__name__])[0]
                self._note(f"! the endpoint failed, the run goes on: {first}")

    def _is_committed(self, run_dir: Path) -> bool:
        """Wait for the run's first commit; return False when the run ended before."""
        while not self._is_stopped.is_set():
            try:
                wanted_version(run_dir)
            except ValueError:
                self._is_stopped.wait(LOOK_S)
            else:
                return True
        return False


def serving_problems(config: RunConfig) -> Iterator[str]:
    """Yield what stands against a run's serving itself, one line each."""
    if not config.serve.enabled:
        return
    if config.serve.host not in LOOPBACK and not (config.run_dir / "resolved.json").is_file():
        yield (
            f"serve.host: got {config.serve.host}, which others can reach, wanted 127.0.0.1: a new run has no key yet; "
            f"once it goes on, `elenchus key {config.name} --label WHO`, then `elenchus serve {config.name} --host "
            f"{config.serve.host}`"
        )
        return
    yield from (
        f"serve.{line.replace('by --port', 'by serve.port')}" for line in address_problems(config.run_dir, config.serve)
    )
    running = living_endpoint(config.run_dir)
    if running is not None:
        yield (
            f"serve.enabled: got true beside an endpoint of the run at {running.url} (pid {running.pid}), wanted one: "
            "stop that one"
        )
