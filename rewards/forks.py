"""State that belongs to one process: threads, connections, locks. A forked child makes its own state.

Other libraries fork: worker processes of `datasets` and of torch's data loaders, and processes of a user's reward. A
child must neither use nor close the values of its parent. For example, closing a socket in the child removes it from
the event loop's epoll, which both processes share. So the parent's values are never released in the child.
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
    """Makes a value at its first use in a process, and returns the same value afterwards.

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

    def drop(self, only: T | None = None) -> T | None:
        """Forget and return the value; None if there is no value, or another than `only`. The next call makes one."""
        with self._lock:
            wanted = self._values and only in (None, self._values[0])
            return self._values.pop() if wanted else None

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._values: list[T] = []


def _after_fork_in_child() -> None:
    for one in list(_all):
        # An extra reference keeps the parent's value alive even at the interpreter's exit.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(one._values))
        one._start_afresh()


os.register_at_fork(after_in_child=_after_fork_in_child)
