"""Limits on the requests to one server: a pause after several failures in a row, and a bound on concurrency."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

_TRIP_AFTER, _COOL_DOWN_S = 5, 15.0


class Breaker:
    """A circuit breaker: closed while the server answers, open after several failures in a row, then probing.

    While it probes, it admits one question at a time. It belongs to one event loop. `now` is a clock in seconds.
    """

    def __init__(self, trip_after: int = _TRIP_AFTER, cool_down_s: float = _COOL_DOWN_S, now: Any = None):
        self.trip_after, self.cool_down_s = trip_after, cool_down_s
        self._now = now or time.monotonic
        self._in_a_row = 0
        self._opened: float | None = None
        self._probe: asyncio.Event | None = None

    async def admit(self) -> str:
        """ "pass", "probe" (the caller must report the outcome) or "refuse". Waits while another question probes."""
        while self._probe is not None:
            await self._probe.wait()
        if self._opened is None:
            return "pass"
        if self._now() - self._opened < self.cool_down_s:
            return "refuse"
        self._probe = asyncio.Event()
        return "probe"

    def succeeded(self) -> None:
        """The server has answered, with any content."""
        self._in_a_row, self._opened = 0, None
        self._probed()

    def failed(self, probe: bool = False) -> None:
        """A question has failed after all retries."""
        self._in_a_row += 1
        if probe or (self._opened is None and self._in_a_row >= self.trip_after):
            self.trip()
        if probe:
            self._probed()

    def trip(self) -> None:
        """Open."""
        self._opened = self._now()

    def _probed(self) -> None:
        if self._probe is not None:
            self._probe.set()
            self._probe = None


class Slots:
    """Slots for concurrent requests to one server, first come first served. Each request names its own limit."""

    def __init__(self) -> None:
        self._used = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, limit: int) -> AsyncIterator[None]:
        if self._waiting or self._used >= limit:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.append((limit, turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._used -= 1
                self._wake()
                raise
        else:
            self._used += 1
        try:
            yield
        finally:
            self._used -= 1
            self._wake()

    def _wake(self) -> None:
        while self._waiting:
            limit, turn = self._waiting[0]
            if not turn.done() and self._used >= limit:
                return
            self._waiting.popleft()
            if not turn.done():
                self._used += 1
                turn.set_result(None)
