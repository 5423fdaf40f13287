"""Owns where the endpoint may listen; knows neither Ray nor HTTP."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

from serve.auth import own_keys
from trainers.serving_config import ServingConfig

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def check_address(run_dir: Path, config: ServingConfig) -> None:
    """Check where the endpoint is to listen.

    Raises:
        ValueError: beyond loopback without a key, or at a port that is in use.
    """
    problem = next(address_problems(run_dir, config), None)
    if problem is not None:
        raise ValueError(problem)


def address_problems(run_dir: Path, config: ServingConfig) -> Iterator[str]:
    """Yield what stands against listening there, one line each."""
    if config.host not in LOOPBACK and not own_keys(run_dir):
        yield (
            f"host: got {config.host}, which others can reach, and no key, wanted one: make it by "
            f"`elenchus key {run_dir.name} --label WHO`, or leave the host at 127.0.0.1"
        )
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            yield (
                f"port: got {config.port} of {config.host}, which can't be had ({error.strerror}), wanted a free one: "
                "choose another by --port"
            )
