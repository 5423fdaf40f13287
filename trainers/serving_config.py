"""Owns the settings of the endpoint; apart from it, so that reading a config does not import Ray Serve."""

from __future__ import annotations

from pydantic import Field

from cluster.config import Config


class ServingConfig(Config):
    """How the learner is served to OpenAI clients."""

    enabled: bool = False
    """Whether a run serves its learner itself, from its first commit to its end; `elenchus serve` does in any case."""
    host: str = "127.0.0.1"
    """Address that the endpoint listens on; beyond loopback only when a key was made by `elenchus key`."""
    port: int = Field(default=8000, ge=1, le=65535)
    """Port that it listens on."""
    min_replicas: int = Field(default=1, ge=1)
    """Replicas of the current version when nothing is asked."""
    max_replicas: int = Field(default=1, ge=1)
    """Most of them, if more than min_replicas; their number follows the requests that are open."""
    target_open: int = Field(default=64, ge=1)
    """Open requests that one replica is to have; more of them call for another replica."""
    max_open_samples: int = Field(default=512, ge=1)
    """Samples that may be open at once, of all keys; beyond it callers are told to come back (503)."""
    num_gateways: int = Field(default=1, ge=1)
    """Gateway replicas; each counts the limits of a key for itself."""
    answer_timeout_s: float = Field(default=300.0, gt=0)
    """Longest time for an answer, in seconds."""
    headers_timeout_s: float = Field(default=10.0, gt=0)
    """Longest time for a request's headers to arrive, in seconds."""
    body_timeout_s: float = Field(default=10.0, gt=0)
    """Longest time for a request's body to arrive, in seconds."""

    @property
    def most_replicas(self) -> int:
        """Most replicas of the current version."""
        return max(self.min_replicas, self.max_replicas)
