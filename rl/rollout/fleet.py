"""The state of a pool's servers: serving or lost. A lost server stays out until it has the current weights."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence

LONGEST_PAUSE_S = 60.0
"""Seconds between two checks of a lost server while others serve; a check of a hanging server takes seconds."""


class Fleet:
    """The servers of one client, serving or lost. Safe to use from many threads.

    Args:
        urls: every server of the pool.
        max_returns: how often a lost server may come back.
        warn: called with a readable line about every loss and return.
    """

    def __init__(self, urls: Sequence[str], max_returns: int, warn: Callable[[str], None]) -> None:
        self.urls, self.max_returns, self.warn = tuple(urls), max_returns, warn
        self.losses = 0
        """Number of losses so far; a server that was lost twice counts twice."""
        self.moved = 0
        """Number of requests that were sent again to another server, or to the same one after its return."""
        self._lost: dict[str, str] = {}
        self._looks: Counter[str] = Counter()
        self._next_look: dict[str, float] = {}
        self._returns: Counter[str] = Counter()
        self._lock = threading.Lock()

    @property
    def serving(self) -> list[str]:
        """Servers that receive requests, in the pool's order."""
        with self._lock:
            return [url for url in self.urls if url not in self._lost]

    @property
    def awaited(self) -> list[str]:
        """Lost servers that may still come back."""
        with self._lock:
            return [url for url in self._lost if self._returns[url] < self.max_returns]

    @property
    def due(self) -> list[str]:
        """Lost servers that may come back and whose next check is due."""
        return [url for url in self.awaited if time.monotonic() >= self._next_look.get(url, 0.0)]

    def put_off(self, url: str) -> None:
        """Note a failed check of a lost server; each failure doubles the time to the next check."""
        self._next_look[url] = time.monotonic() + min(LONGEST_PAUSE_S, 2.0 ** self._looks[url])
        self._looks[url] += 1

    def lose(self, url: str, why: str) -> None:
        """Send this server no requests until it is readmitted."""
        with self._lock:
            if url in self._lost:
                return
            self._lost[url] = why
            self._looks[url], self._next_look[url] = 0, 0.0
            self.losses += 1
            left = len(self.urls) - len(self._lost)
            last = self._returns[url] >= self.max_returns
        stays = f"; it was back {self.max_returns} times and now stays out" if last else ""
        self.warn(f"rollout server {url} is lost ({left} of {len(self.urls)} left): {why}{stays}")

    def relocate(self, old: str, new: str) -> None:
        """Give a server that was started again elsewhere its new URL. It is lost until it is readmitted."""
        self.lose(old, f"it was started again, as {new}")
        with self._lock:
            self.urls = tuple(new if url == old else url for url in self.urls)
            self._lost[new] = self._lost.pop(old)
            self._returns[new] = self._returns.pop(old, 0)
            self._looks[new], self._next_look[new] = 0, 0.0

    def readmit(self, url: str) -> None:
        """Let the server, which has the current weights, receive requests again."""
        with self._lock:
            del self._lost[url]
            self._returns[url] += 1
            serving = len(self.urls) - len(self._lost)
        self.warn(f"rollout server {url} is back with the current weights ({serving} of {len(self.urls)})")

    def refuse(self, url: str, why: str) -> None:
        """Keep out a server that came back but failed the gate; this counts as a return."""
        with self._lock:
            self._lost[url] = why
            self._returns[url] += 1
        self.warn(f"rollout server {url} came back but stays out for now: {why}")

    def move(self) -> None:
        """Count a request that must be sent again to another server."""
        with self._lock:
            self.moved += 1

    def figures(self) -> dict[str, float]:
        """Metrics: serving servers, and losses and moved requests since the start."""
        return {
            "rollout/servers": len(self.serving),
            "rollout/servers_lost": self.losses,
            "rollout/requests_moved": self.moved,
        }

    def __str__(self) -> str:
        """The lost servers with the reasons, one a line."""
        with self._lock:
            return "\n".join(f"  {url}: {why}" for url, why in self._lost.items())
