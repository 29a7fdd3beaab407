"""State that belongs to one process: threads, connections, locks. A forked child makes its own.

Forks come from libraries around us: worker processes of `datasets` and of torch's data loaders, and whatever a
user's reward starts. The child must neither use nor close what its parent holds: closing a socket there takes it
off the event loop's epoll, which both share. So the parent's values are never released in the child.
"""

import ctypes
import os
import threading
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")
_all: "weakref.WeakSet[PerProcess[Any]]" = weakref.WeakSet()


class PerProcess(Generic[T]):
    """Makes a value at its first use in a process, and returns it from then on.

    >>> numbers = PerProcess(list)
    >>> numbers().append(1)
    >>> numbers()
    [1]
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._start_afresh()
        _all.add(self)

    def __call__(self) -> T:
        with self._lock:
            if not self._values:
                self._values.append(self._make())
            return self._values[0]

    def drop(self) -> T | None:
        """The value, if there is one; the next call makes another."""
        with self._lock:
            return self._values.pop() if self._values else None

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._values: list[T] = []


def _after_fork_in_child() -> None:
    for one in list(_all):
        # An extra reference keeps the parent's value alive even when the interpreter ends.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one._values))
        one._start_afresh()


os.register_at_fork(after_in_child=_after_fork_in_child)
