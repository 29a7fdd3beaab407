"""Pass rates of a stage's prompts, so that dynamic sampling draws few groups without spread."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PRIOR = 2.0
"""Weight of the prior (the mean pass rate of all prompts) in a prompt's estimate, in completions."""
UNKNOWN = 0.5
"""Probability of spread before any group was recorded."""
LEAST = 0.05
"""Lower bound of the probability of spread; below it a round would sample too many prompts."""
LONGEST_REST = 8
"""A prompt rests for at most this many times `rest_epochs`."""


@dataclass
class _Visit:
    correct: float
    of: int
    epoch: int
    uniform: int
    """Number of consecutive groups, including the last, that were all solved or all failed."""


class Ledger:
    """Pass rates of the sampled prompts, kept across epochs.

    Args:
        group_size: completions per prompt.

    >>> ledger = Ledger(group_size=4)
    >>> ledger.record("easy", correct=4, of=4, epoch=1, spread=False)
    >>> ledger.record("hard", correct=1, of=4, epoch=1, spread=True)
    >>> ledger.chance("easy") < ledger.chance("hard")
    True
    >>> ledger.settled("easy", epoch=2, rest_epochs=1), ledger.settled("easy", epoch=3, rest_epochs=1)
    (True, False)
    """

    def __init__(self, group_size: int) -> None:
        self.group_size = group_size
        self._last: dict[str, _Visit] = {}
        self._correct = self._of = 0.0
        self._groups = self._spread = 0

    def record(self, prompt: str, *, correct: float, of: int, epoch: int, spread: bool) -> None:
        """Record a group: `correct` of `of` scored completions, and whether its rewards differ.

        Raises ValueError unless 0 <= correct <= of, because such values would corrupt the mean over all prompts.
        """
        if not 0 <= correct <= of:
            raise ValueError(f"prompt {prompt!r}: {correct} correct of {of} judged completions")
        uniform, before = 0, self._last.get(prompt)
        if not spread and of > 0 and correct in (0, of):
            as_before = before is not None and bool(before.correct) == bool(correct)
            uniform = 1 + (before.uniform if before and as_before else 0)
        self._last[prompt] = _Visit(correct, of, epoch, uniform)
        self._correct += correct
        self._of += of
        self._groups += 1
        self._spread += spread

    def chance(self, prompt: str) -> float:
        """Probability in (0, 1] that a group of this prompt has spread.

        For a prompt with a recorded group it is computed from a beta-binomial whose prior is the mean pass rate of all
        prompts. For any other prompt it is the share of groups with spread so far.
        """
        visit = self._last.get(prompt)
        if visit is None or not visit.of:
            return max(LEAST, (self._spread + UNKNOWN) / (self._groups + 1))
        mean = self._correct / self._of
        right = visit.correct + PRIOR * mean
        wrong = visit.of - visit.correct + PRIOR * (1 - mean)
        return max(
            LEAST,
            1 - _all(right, right + wrong, self.group_size) - _all(wrong, right + wrong, self.group_size),
        )

    def settled(self, prompt: str, *, epoch: int, rest_epochs: int) -> bool:
        """Whether the prompt still rests because its last group was all solved or all failed.

        It rests for `rest_epochs`. The time doubles after each further such group in a row, up to `LONGEST_REST` times.
        """
        visit = self._last.get(prompt)
        if visit is None or not visit.uniform:
            return False
        return epoch - visit.epoch <= rest_epochs * min(LONGEST_REST, 2 ** (visit.uniform - 1))

    def take(self, prompts: Sequence[str], wanted: float) -> int:
        """The smallest n such that the first n prompts are expected to give `wanted` groups with spread."""
        expected = 0.0
        for count, prompt in enumerate(prompts, start=1):
            expected += self.chance(prompt)
            if expected >= wanted - 1e-9:
                return count
        return len(prompts)


def _all(one: float, both: float, count: int) -> float:
    """Probability that a beta-binomial draws `count` successes in a row; `one` of `both` counts successes."""
    return math.prod((one + drawn) / (both + drawn) for drawn in range(count))
