"""Owns the settings of the connection to Ray; apart from it, so that reading a config does not import Ray."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field

from cluster.config import Config


class RayConfig(Config):
    """Where Ray runs and what it may take."""

    address: str | None = None
    """Address of a running cluster ("10.0.0.1:6379", "auto"); without it RAY_ADDRESS counts, and without that a local
    Ray is started."""
    namespace: str = "elenchus"
    """Ray namespace of the run's actors."""
    num_cpus: int | None = Field(default=None, ge=1)
    """Logical cores of the local Ray; by default those that this process may use."""
    object_store_gb: float = Field(default=1.0, gt=0.0)
    """Size of the local object store in GiB; it lives in shared memory."""
    dashboard: bool = False
    """Serve Ray's dashboard, on loopback."""
    dashboard_port: int = Field(default=8265, ge=1, le=65535)
    """Port of the dashboard."""
    temp_dir: Path | None = None
    """Parent of the local Ray's session directory; the system's temporary directory by default. Must be short."""
    token_path: Path | None = None
    """File of the authentication token; by default RAY_AUTH_TOKEN_PATH, and without that ~/.ray/auth_token."""
    ship_code: bool = False
    """When joining a cluster: send the packages of this project to its nodes."""


def address_to_join(config: RayConfig) -> str | None:
    """Return the address of the cluster that is to be joined; None when a local Ray is to be started."""
    address = config.address or os.environ.get("RAY_ADDRESS")
    return None if address in (None, "", "local") else address
