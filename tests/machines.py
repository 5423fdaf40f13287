"""Machines that no test runs on, for what a plan says of them."""

from __future__ import annotations

from cluster.machine import Machine
from trainers.memory_estimate import GIB

TWO_CORES = Machine(
    system="Linux x86_64",
    num_cpus=2,
    memory_bytes=24 * GIB,
    free_memory_bytes=20 * GIB,
    gpus=(),
    shm_bytes=12 * GIB,
)
