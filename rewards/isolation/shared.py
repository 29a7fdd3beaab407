"""A user's reward in this process."""

import time
from collections.abc import Sequence
from concurrent.futures import wait
from typing import Any

from rewards.calls import Caller, Reward, failure
from rewards.example import Example
from rewards.isolation.progress import Progress, Result, only, too_late
from rewards.verdict import Verdict


class Shared:
    """A user's reward in this process. After the deadline its threads are abandoned, as threads cannot be killed."""

    def __init__(self, reward: Reward, name: str, deadline_s: float) -> None:
        self._reward, self._name, self._deadline_s = reward, name, deadline_s
        self._caller = Caller()

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._reward, attribute)

    def __call__(self, completion: str, example: Example) -> Verdict:
        return only(self.batch([completion], [example]))

    def batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Result]:
        """A verdict or RewardError per completion."""
        progress = Progress()
        pending = self._caller.start(self._reward, self._name, completions, examples, progress)
        waiting = set(pending.futures)
        try:
            while waiting:
                left_s = progress.late_at(self._deadline_s) - time.monotonic()
                if left_s <= 0:
                    break
                waiting = wait(waiting, left_s).not_done
            if not waiting:
                return pending.results()
        except BaseException:
            pending.cancel()
            raise
        pending.cancel()
        self._caller = Caller()
        late = progress.late(self._deadline_s) or list(range(len(completions)))
        row, results = late[0], dict(progress.results)
        pairs = list(zip(completions, examples, strict=True))
        for other in range(len(pairs)):
            if other not in results:
                after = "" if other in late else f"; row {examples[row].id!r} of its batch blocked it"
                results[other] = failure(self._name, [pairs[other]], too_late(self._deadline_s, after))
        return [results[place] for place in range(len(pairs))]
