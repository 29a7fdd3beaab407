"""The process group over which the ranks of a learner exchange gradients, closed to other users of the machine.

PyTorch's default rendezvous is a TCP store on every interface. Anyone who reaches its port can read and overwrite it.
So ranks on one host meet in a file that only their user can open, and gloo and NCCL listen on loopback. Ranks of
several hosts need the TCP store: it listens only on the first host's address in Ray (docs/security.md).
"""

from __future__ import annotations

import atexit
import os
import socket
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from core.processes import LOOPBACK

MEETING = "POSTTRAIN_MEETING"
"""Environment variable with the file, or `tcp://ADDRESS:PORT`, where the ranks meet. Their launcher sets it."""
TIMEOUT = "POSTTRAIN_RANK_TIMEOUT_S"
"""Environment variable with the seconds after which a rank that waits for another fails, so that a hung rank ends the
stage. The rollouts of one batch must take less."""
TIMEOUT_S = 3600.0
"""Seconds if the variable is not set."""


def form_group() -> None:
    """Join the ranks that the environment names (RANK, WORLD_SIZE and MEETING), or form a group of one.

    Ranks of torchrun or accelerate, without MEETING, use the launcher's rendezvous. Does nothing if a group exists.
    """
    import torch

    if torch.distributed.is_initialized():
        return
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    timeout = timedelta(seconds=float(os.environ.get(TIMEOUT, TIMEOUT_S)))
    store = _store(torch.distributed, ranks, rank, timeout)
    where = {"store": store, "rank": rank, "world_size": ranks} if store is not None else {}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, timeout=timeout, **where)
    if backend == "gloo":  # its threads can abort a process that exits while the group exists
        atexit.register(_leave)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _store(distributed: Any, ranks: int, rank: int, timeout: timedelta) -> Any:
    """The store in which the ranks exchange addresses; None if the launcher's variables name one."""
    place = os.environ.get(MEETING, "")
    if place.startswith("tcp://"):
        host, port = urlsplit(place).hostname or "", urlsplit(place).port or 0
        # PyTorch would listen on every interface, but it accepts a socket that already listens.
        listener = socket.create_server((host, port), backlog=ranks) if rank == 0 else None
        return distributed.TCPStore(
            host,
            port,
            ranks,
            is_master=rank == 0,
            timeout=timeout,
            master_listen_fd=listener.detach() if listener else None,
            use_libuv=False,
        )
    if not place and ranks > 1:
        return None
    if LOOPBACK:
        for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            os.environ.setdefault(name, LOOPBACK)
    return distributed.FileStore(place, ranks) if place else distributed.HashStore()
