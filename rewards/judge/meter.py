"""The limits on the cost of judging, and the cost so far."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rewards.judge.questions import Failure


@dataclass(frozen=True)
class Limits:
    """Limits of a batch; None means no limit. Limits on the run apply over the life of this process."""

    timeout_s: float = 30.0
    max_retries: int = 2
    max_concurrency: int = 8
    budget_s: float = 120.0
    step_calls: int | None = None
    step_tokens: int | None = None
    run_s: float | None = None
    run_calls: int | None = None
    run_tokens: int | None = None


@dataclass
class Meter:
    """The cost of one judge in this process, for metrics and for limits on the run."""

    calls: int = 0
    """HTTP requests sent, including failed ones."""
    cache_hits: int = 0
    retries: int = 0
    tokens: int = 0
    """Tokens as reported by the server. Without a report, a quarter of the characters, pictures not counted."""
    seconds: float = 0.0
    """Seconds during which at least one batch was waiting."""
    failures: Counter[str] = field(default_factory=Counter)
    """Questions without a reply, by cause."""
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _waiting: int = 0
    _since: float = 0.0

    def add(self, *, calls: int = 0, cache_hits: int = 0, retries: int = 0, tokens: int = 0) -> None:
        """Add to the counts. Any thread may call this."""
        with self._lock:
            self.calls += calls
            self.cache_hits += cache_hits
            self.retries += retries
            self.tokens += tokens

    def fail(self, failures: Sequence[Failure]) -> None:
        """Count failures by cause."""
        with self._lock:
            self.failures.update(failure.cause for failure in failures)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of a batch."""
        with self._lock:
            if not self._waiting:
                self._since = time.monotonic()
            self._waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._waiting -= 1
                if not self._waiting:
                    self.seconds += time.monotonic() - self._since

    def to_dict(self) -> dict[str, float]:
        """Counts so far: calls, cache_hits, retries, tokens, seconds, failed, and failed/<cause>."""
        with self._lock:
            waiting = time.monotonic() - self._since if self._waiting else 0.0
            counts: dict[str, float] = {
                "calls": self.calls,
                "cache_hits": self.cache_hits,
                "retries": self.retries,
                "tokens": self.tokens,
                "seconds": self.seconds + waiting,
                "failed": self.failures.total(),
            }
            return counts | {f"failed/{cause}": count for cause, count in sorted(self.failures.items())}
