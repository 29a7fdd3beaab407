"""A time limit for untrusted programs that run in our process: chat templates, and patterns from a file."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LIMIT_S = 10.0
"""Time limit in seconds. Honest work of this kind takes milliseconds."""


class TooSlow(ValueError):
    """Untrusted work exceeded its time limit; the message names the work."""


@contextmanager
def deadline(what: str) -> Iterator[None]:
    """Raise TooSlow, naming `what`, if the block takes longer than LIMIT_S. Costs microseconds.

    It interrupts Python code and regular expressions, which check for signals while they match. Signals reach only the
    main thread: in other threads there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: Any) -> None:
        raise TooSlow(f"{what}: not done after {LIMIT_S:g} s, so it was stopped")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
