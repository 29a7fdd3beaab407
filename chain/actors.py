"""The parts of a run that live on the nodes of a Ray cluster. chain/cluster.py starts them as Ray actors.

An actor's process starts ranks or a server as child processes, exactly as a run on one host does. Children end with the
actor, whatever ends it (core/processes.py).
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from chain.ranks import Meeting, Ranks, meeting_here
from core.manifest import git_commit, versions
from core.processes import free_port
from core.strict import ConfigError
from rl.rollout.config import PoolConfig
from rl.rollout.server import starting_pool

SHOWS_S = 30.0
"""Network file systems show a file to the other hosts within this time."""


class RanksOfNode:
    """One node's ranks of one job.

    Args:
        environment: the driver's environment; the node's own variables take precedence.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        adopt(environment)
        self._stack = ExitStack()
        self._ranks: Ranks | None = None

    def meeting_place(self) -> str:
        """A free `tcp://ADDRESS:PORT` on this node's Ray address, for ranks on several nodes."""
        address = own_address()
        return f"tcp://{address}:{free_port(address)}"

    def start(self, job_file: Path, count: int, threads: int, meeting: Meeting | None) -> None:
        """Start `count` ranks. `meeting`: the rendezvous of several nodes; None: all ranks are on this node.

        Raises ConfigError if the job file does not appear on this node.
        """
        _wait_for(job_file)
        meeting = meeting or meeting_here(count, self._stack)
        self._ranks = Ranks(job_file, count, threads, meeting)

    def look(self) -> tuple[bool, str | None]:
        """Whether the ranks have ended, and how they failed."""
        assert self._ranks is not None, "start first"
        return self._ranks.ended(0), self._ranks.failure()

    def stop(self) -> None:
        """End the ranks."""
        if self._ranks is not None:
            self._ranks.stop()
        self._stack.close()


class ServerOfNode:
    """One rollout server. Its process is restarted in place; Ray starts the actor again if the actor or its node ends.

    Args:
        cfg: the pool's configuration.
        model: checkpoint folder that the server loads first.
        logs: folder for the server's output.
        slot: the server's number among the servers of its node.
        environment: the driver's environment, with the servers' token.
    """

    def __init__(
        self, cfg: PoolConfig, model: Path, logs: Path, slot: int, environment: Mapping[str, str]
    ) -> None:
        adopt(environment)
        # Ray shows a server its own GPUs. Servers that share the learner's GPUs have none of their own for Ray.
        first = cfg.first_gpu + slot * cfg.gpus_per_server if cfg.share_gpus else 0
        if cfg.share_gpus:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        own = cfg.model_copy(
            update={"count": 1, "first_gpu": first, "host": own_address(), "first_port": None}
        )
        self._stack = ExitStack()
        self._wait = self._stack.enter_context(starting_pool(own, model, logs))

    def url(self) -> str:
        """The URL of the healthy server. Raises ServerFailed once its restarts are used up."""
        return self._wait()[0]

    def stop(self) -> None:
        """End the server."""
        self._stack.close()


def node_facts(folder: Path) -> dict[str, Any]:
    """Facts about a node that the driver compares with its own: code, packages, and whether it sees `folder`."""
    return {"host": socket.gethostname(), "sees": folder.exists(), **agreed()}


def agreed() -> dict[str, Any]:
    """Facts that must be equal on all nodes of a run."""
    return {"the code's commit": git_commit(), "the installed packages": versions()}


def adopt(environment: Mapping[str, str]) -> None:
    """Take over variables that this process does not have, and let gloo and NCCL use the interface of Ray's address."""
    import psutil

    for name, value in environment.items():
        os.environ.setdefault(name, value)
    address = own_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(one.family == socket.AF_INET and one.address == address for one in addresses):
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                os.environ.setdefault(name, interface)


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + SHOWS_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"{file}: the driver has written this file, but it did not appear on {socket.gethostname()} within "
                f"{SHOWS_S:g} s"
            )
        time.sleep(0.2)


def own_address() -> str:
    """This node's address in Ray: the interface that its user named (`ray start --node-ip-address`)."""
    import ray

    return ray.util.get_node_ip_address()
