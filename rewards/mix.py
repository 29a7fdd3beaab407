"""The mixed reward: weighted terms per mode, R = sum of weight x score, weights summing to 1.

Source: SAIL-VL2 (arXiv:2509.14033), mixed reward system: R = w_a answer + w_t thinking + w_f format.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from rewards.example import MODES, Example
from rewards.verdict import Verdict, as_verdict

Reward = Callable[[str, Example], Any]
"""(completion, example) -> Verdict, float, bool or None."""
SUM_TOLERANCE = 1e-6


class RewardError(RuntimeError):
    """A reward raised; the message names the reward, the row and the completion, the cause is chained."""


@dataclass(frozen=True)
class Term:
    """One reward of a mixture. Weight 0 only watches: the verdict is kept, the total does not need it."""

    name: str
    reward: Reward
    weight: float
    modes: frozenset[str] = field(default=frozenset(MODES))
    """Modes of the rows that it grades."""

    def __post_init__(self) -> None:
        if not self.modes or not set(self.modes) <= set(MODES):
            raise ValueError(
                f"reward {self.name!r}: modes={sorted(self.modes)}: some of {', '.join(MODES)}, at least one"
            )
        if not 0 <= self.weight <= 1:
            raise ValueError(f"reward {self.name!r}: weight={self.weight}: a weight is in [0, 1]")


@dataclass(frozen=True)
class Graded:
    """A completion's reward and where it came from."""

    total: float | None
    """In [0, 1]; None if a weighted term could not judge the completion: never 0 in its place."""
    verdicts: dict[str, Verdict]
    """By term name, the terms of the row's mode."""


class Mixture:
    """Grades completions with the terms of their row's mode.

    >>> half = Term("half", lambda completion, example: 0.5, 0.5)
    >>> full = Term("full", lambda completion, example: True, 0.5)
    >>> Mixture([half, full]).grade("4", Example("row-1", "2 + 2?", "4", "direct")).total
    0.75

    Raises ValueError if two terms share a name, or a mode's weights do not sum to 1.
    """

    def __init__(self, terms: Iterable[Term]) -> None:
        self.terms = tuple(terms)
        names = [term.name for term in self.terms]
        double = sorted({name for name in names if names.count(name) > 1})
        if double:
            raise ValueError(f"rewards named twice: {', '.join(double)}; every term needs its own name")
        self._of_mode = {mode: tuple(t for t in self.terms if mode in t.modes) for mode in MODES}
        for mode, used in self._of_mode.items():
            total = math.fsum(term.weight for term in used)
            if used and abs(total - 1) > SUM_TOLERANCE:
                listed = ", ".join(f"{term.name} {term.weight:g}" for term in used)
                raise ValueError(f"weights for mode {mode!r} sum to {total:g}, not 1: {listed}")

    def grade(self, completion: str, example: Example) -> Graded:
        """The completion's total and every term's verdict.

        Raises ValueError if no term grades the row's mode, RewardError if a reward raises or returns what is
        no verdict.
        """
        terms = self._of_mode[example.mode]
        if not terms:
            raise ValueError(
                f"row {example.id!r}: no reward grades mode {example.mode!r}; add one, or leave such rows out"
            )
        verdicts = {term.name: _verdict(term, completion, example) for term in terms}
        parts = [(term.weight, verdicts[term.name].score) for term in terms if term.weight > 0]
        scores = [weight * score for weight, score in parts if score is not None]
        return Graded(math.fsum(scores) if len(scores) == len(parts) else None, verdicts)


def _verdict(term: Term, completion: str, example: Example) -> Verdict:
    try:
        return as_verdict(term.reward(completion, example), term.name)
    except Exception as error:
        raise RewardError(
            f"reward {term.name!r} failed on row {example.id!r}: {type(error).__name__}: {error}; "
            f"the completion begins {completion[:200]!r}"
        ) from error
