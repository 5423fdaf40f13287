"""Owns how the ranks of a training group meet: addresses, environment, process group. Knows no DeepSpeed."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import psutil
import ray
import torch.distributed as dist


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendezvous:
    """Where the ranks meet."""

    host: str
    port: int
    one_node: bool
    """All ranks share a node: their sockets stay on loopback."""


def meet_by(rendezvous: Rendezvous, *, rank: int, num_ranks: int, on_gpu: bool) -> None:
    """Set the environment by which torch and DeepSpeed know this rank; before either is asked for anything."""
    values = {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_RANK": "0",  # Ray shows a rank its own devices alone
        "MASTER_ADDR": rendezvous.host,
        "MASTER_PORT": str(rendezvous.port),
    }
    if not on_gpu:
        values["DS_ACCELERATOR"] = "cpu"
    if rendezvous.one_node:
        values["GLOO_SOCKET_IFNAME"] = "lo"
    elif "GLOO_SOCKET_IFNAME" not in os.environ:
        # Else gloo takes what this host's name resolves to, which may be loopback.
        values["GLOO_SOCKET_IFNAME"] = interface_of(node_address())
    # LOCAL_SIZE stays unset: with it DeepSpeed 0.19 leaves shared memory behind and hangs after a rank's death.
    os.environ.update(values)


def join(rendezvous: Rendezvous, *, store: Any, rank: int, num_ranks: int, backend: str, timeout_s: float) -> Any:
    """Make the process group and return its store, opened unless this rank hosts it already."""
    if store is None:
        store = tcp_store(rendezvous.host, rendezvous.port, num_ranks=num_ranks, is_master=False, timeout_s=timeout_s)
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    return store


def node_address() -> str:
    address: Callable[[], str] = ray.util.get_node_ip_address
    return address()


def interface_of(address: str) -> str:
    """Return the name of this host's network interface that has an address.

    Raises:
        ValueError: none has it; lists those that there are.
    """
    addresses = {name: [entry.address for entry in entries] for name, entries in psutil.net_if_addrs().items()}
    for name, found in addresses.items():
        if address in found:
            return name
    raise ValueError(
        f"rank: got the node address {address}, wanted that of an interface of this host ({', '.join(addresses)}): "
        "start Ray with --node-ip-address of one of them, or set GLOO_SOCKET_IFNAME"
    )


def tcp_store(host: str, port: int, *, num_ranks: int, is_master: bool, timeout_s: float) -> Any:
    store: Any = dist.TCPStore  # type: ignore[attr-defined] # torch 2.13 leaves it out of what it exports by name
    timeout = timedelta(seconds=timeout_s)
    return store(host, port, num_ranks, is_master=is_master, wait_for_workers=False, timeout=timeout)
