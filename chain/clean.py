"""Removes what killed runs left in shared memory: weights on their way to servers, buffers and semaphores of engines.

A process that is killed removes nothing, and shared memory is the machine's memory. Files count as left when they are
ours, look like those that our processes make, and no process has them open or mapped.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rl.rollout.weights import remove_left

SHARED_MEMORY = Path("/dev/shm")
_OURS = re.compile(r"(?:psm_|sem\.|torch_|nccl-|deepspeed_|shm_name_)")
"""multiprocessing, its and DeepSpeed's semaphores, torch's and NCCL's buffers."""
_SETTLED_S = 60.0
"""A younger file may be between its making and its first use."""


def clean(folder: Path = SHARED_MEMORY) -> list[str]:
    """Remove what is left in shared memory; a line for each thing removed."""
    if not folder.is_dir():
        return []
    removed = [f"removed {path}" for path in remove_left(folder)]
    candidates = [path for path in folder.iterdir() if _may_be_left(path)]
    used = set(_in_use()) if candidates else set()
    for path in candidates:
        if str(path) not in used:
            with suppress(OSError):
                size = path.stat().st_size
                path.unlink()
                removed.append(f"removed {path} ({size / 2**20:.1f} MiB)")
    return removed


def _may_be_left(path: Path) -> bool:
    with suppress(OSError):
        facts = path.lstat()
        old = time.time() - max(facts.st_mtime, facts.st_ctime) > _SETTLED_S
        return bool(_OURS.match(path.name)) and path.is_file() and facts.st_uid == os.getuid() and old
    return False


def _in_use() -> Iterator[str]:
    """Files that processes have open or mapped, as far as this user may look."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            for line in (process / "maps").read_text(errors="replace").splitlines():
                yield line[line.find("/") :] if "/" in line else ""
        with suppress(OSError):
            for handle in (process / "fd").iterdir():
                with suppress(OSError):
                    yield os.readlink(handle)
