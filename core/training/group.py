"""The process group over which the ranks of a learner exchange gradients, without a door for the neighbours.

PyTorch's default rendezvous is a TCP store that anybody may read and overwrite who reaches its port, on every
interface. Ranks on one host meet in a file instead, which only their user can open, and gloo and NCCL listen on
loopback. Ranks of several hosts need the TCP store: it listens on the leader's address alone (docs/security.md).
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
"""Environment variable: the file, or `tcp://ADDRESS:PORT`, where the ranks meet. Whoever starts them sets it."""
TIMEOUT = "POSTTRAIN_RANK_TIMEOUT_S"
"""Environment variable: a rank that waits for another for this many seconds fails, so that a hung rank ends the stage.
The rollouts of one batch have to take less."""
TIMEOUT_S = 3600.0
"""Where the variable is not set."""


def form_group() -> None:
    """Join the ranks that the environment names (RANK, WORLD_SIZE and MEETING), or form a group of one.

    Ranks that torchrun or accelerate started, without MEETING, meet where these say. Does nothing if there is a group.
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
    if backend == "gloo":  # its threads abort a process that ends with the group (seen once in ten)
        atexit.register(_leave)


def _leave() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _store(distributed: Any, ranks: int, rank: int, timeout: timedelta) -> Any:
    """Where the ranks tell each other their addresses; None: where the launcher's variables say."""
    place = os.environ.get(MEETING, "")
    if place.startswith("tcp://"):
        host, port = urlsplit(place).hostname or "", urlsplit(place).port or 0
        # PyTorch would listen on every interface; a socket that listens already it takes as it is.
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
