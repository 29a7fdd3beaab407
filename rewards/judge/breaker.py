"""A circuit breaker: a pause in the requests to one server after several failures in a row."""

import asyncio
import time
from typing import Any

_TRIP_AFTER, _COOL_DOWN_S = 5, 15.0


class Breaker:
    """Closed while the server answers, open after several failures in a row, then probing.

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
