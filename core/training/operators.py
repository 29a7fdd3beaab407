"""DeepSpeed's compiled operators: builds run one at a time, and a killed build does not stop the next one.

torch marks a running build by a file. The file outlives a killed process, and torch then waits for its removal forever.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
from collections.abc import Callable
from typing import Any

from core.processes import extensions_folder


def guard_builds() -> None:
    """Put a lock of the kernel, which ends with its process, around each build of this process. Repeatable."""
    from deepspeed.ops.op_builder.builder import OpBuilder

    if not hasattr(OpBuilder.jit_load, "__wrapped__"):
        OpBuilder.jit_load = _guarded(OpBuilder.jit_load)


def _guarded(jit_load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(jit_load)
    def one_at_a_time(builder: Any, *arguments: Any, **options: Any) -> Any:
        folder = extensions_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{builder.name}.in-use").open("wb") as lock:
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
                (folder / builder.name / "lock").unlink(missing_ok=True)
            return jit_load(builder, *arguments, **options)

    return one_at_a_time
