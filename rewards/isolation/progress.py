"""The state of a batch: running rows with their start times, and results."""

import time
from collections.abc import Sequence

from rewards.calls import RewardError, Watch
from rewards.verdict import Verdict

Result = Verdict | RewardError


class Progress(Watch):
    """Running rows with their start times, and the results of finished rows."""

    def __init__(self) -> None:
        self.since: dict[int, float] = {}
        """Running row -> start of its call (time.monotonic)."""
        self.results: dict[int, Result] = {}
        self.last = time.monotonic()
        """Time of the last event."""

    def begun(self, rows: Sequence[int]) -> None:
        self.last = time.monotonic()
        self.since |= dict.fromkeys(rows, self.last)

    def ended(self, row: int, result: Result) -> None:
        self.last = time.monotonic()
        self.results[row] = result
        self.since.pop(row, None)

    def late_at(self, deadline_s: float) -> float:
        """The time (time.monotonic) at which the oldest running call, or the start of the next call, is late."""
        return min(list(self.since.values()), default=self.last) + deadline_s

    def late(self, deadline_s: float) -> list[int]:
        """The rows whose calls are late."""
        now = time.monotonic()
        return [row for row, began in list(self.since.items()) if began + deadline_s <= now]


def too_late(deadline_s: float, after: str = "") -> TimeoutError:
    return TimeoutError(f"no verdict within deadline_s={deadline_s:g}{after}")


def only(results: list[Result]) -> Verdict:
    """The verdict of a batch of one. Raises its RewardError."""
    (result,) = results
    if isinstance(result, RewardError):
        raise result
    return result
