"""Owns the endpoint that a run has of its own: deployed on the run's Ray at its first commit, gone before its end.

    [serve] enabled = true ─► RunEndpoint ─► keep_endpoint, as `elenchus serve` calls it, in a thread

The run does not depend on it: an endpoint that fails is told of, and the run goes on.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ray.exceptions import RayError

from cluster.ray_config import address_to_join
from serve.address import address_problems
from serve.publisher import wanted_version
from serve.serving_commands import keep_endpoint, living_endpoint
from trainers.run_config import RunConfig

logger = logging.getLogger(__name__)

LOOK_S = 0.5
STOP_TIMEOUT_S = 30.0
"""Longest wait for the endpoint to go; what is left of it ends with the run's Ray."""


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
            logger.warning("the endpoint was not down after %g s", STOP_TIMEOUT_S)

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
        except (ValueError, RuntimeError, OSError, RayError) as error:
            logger.exception("the endpoint failed")
            self._note(f"! the endpoint failed, the run goes on: {str(error).strip().splitlines()[0]}")

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
    yield from (
        f"serve.{line.replace('by --port', 'by serve.port')}" for line in address_problems(config.run_dir, config.serve)
    )
    running = living_endpoint(config.run_dir)
    if running is not None:
        yield (
            f"serve.enabled: got true beside an endpoint of the run at {running.url} (pid {running.pid}), wanted one: "
            "stop that one"
        )
