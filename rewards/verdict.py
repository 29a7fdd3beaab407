"""A reward's verdict on one completion: a score or None, a status, the extracted answer, a reason.

Only a judgement of the model's answer becomes a number. If grading itself fails (a judge is down, a gold answer is
unreadable, a worker died), the score is None: the row is left out and never punished with 0.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from numbers import Real
from typing import Any, Self


class Status(StrEnum):
    """The reason for a completion's score."""

    CORRECT = "correct"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    """The completion has no answer under the format contract."""
    UNPARSEABLE = "unparseable"
    """There is an answer, but not one of the row's kind."""
    OVER_LIMIT = "over_limit"
    """The answer is longer or more deeply nested than any honest answer."""
    TIMEOUT = "timeout"
    """Grading did not end by its deadline. The score is 0 if the completion itself used the time up, else None."""
    CRASHED = "crashed"
    """Unscored: the grading process died."""
    UNSCORABLE = "unscorable"
    """Unscored: the gold answer is missing or unusable, or grading failed."""


UNSCORED = frozenset({Status.TIMEOUT, Status.CRASHED, Status.UNSCORABLE})
"""Statuses whose score may be None. Of these, only a timeout may also have a number."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One reward's verdict on one completion.

    >>> Verdict.correct("4")
    Verdict(score=1.0, status=<Status.CORRECT: 'correct'>, answer='4', reason='')
    >>> Verdict.unscored("the judge is down").score is None
    True

    Raises ValueError unless the score is in [0, 1], or None where the status allows it (UNSCORED).
    """

    score: float | None
    """In [0, 1]; None if the completion could not be judged."""
    status: Status
    answer: str | None = None
    """The text that counts as the model's answer."""
    reason: str = ""
    """A short explanation for people. It helps to detect reward hacking."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "status", Status(self.status))
        either = self.status == Status.TIMEOUT
        if not either and (self.score is None) != (self.status in UNSCORED):
            raise ValueError(
                f"score={self.score} with status {self.status.value!r}: the score must be None for "
                f"{', '.join(sorted(UNSCORED))}, and a number for every other status (timeout may have either)"
            )
        if self.score is None:
            return
        score = float(self.score)
        if not (math.isfinite(score) and 0 <= score <= 1):
            raise ValueError(f"score={score}: a verdict's score must be in [0, 1]; scale it, or return None")
        object.__setattr__(self, "score", score)

    @classmethod
    def correct(cls, answer: str | None = None, reason: str = "") -> Self:
        """Full marks."""
        return cls(1.0, Status.CORRECT, answer, reason)

    @classmethod
    def wrong(cls, answer: str | None = None, reason: str = "", status: Status = Status.WRONG) -> Self:
        """Score 0: the completion is at fault."""
        return cls(0.0, status, answer, reason)

    @classmethod
    def unscored(cls, reason: str, status: Status = Status.UNSCORABLE, answer: str | None = None) -> Self:
        """No score: the completion is not at fault."""
        return cls(None, status, answer, reason)

    def to_dict(self) -> dict[str, Any]:
        """The verdict as written to completions.jsonl: score, status, answer, reason."""
        return {
            "score": self.score,
            "status": self.status.value,
            "answer": self.answer,
            "reason": self.reason,
        }


def as_verdict(value: Any, name: str = "reward") -> Verdict:
    """Convert a reward's return value to a Verdict: a float or bool is a score, None is unscored.

    >>> as_verdict(True).status.value, as_verdict(0.25).status.value, as_verdict(None).score
    ('correct', 'wrong', None)

    Raises TypeError for a value of another type and ValueError for a number outside [0, 1]. Both name the reward.
    """
    if isinstance(value, Verdict):
        return value
    if value is None:
        return Verdict.unscored(f"{name} returned None")
    if not isinstance(value, Real):  # bool and numpy's floats are Real too
        raise TypeError(
            f"reward {name!r} returned {type(value).__name__} {value!r:.80}: "
            "return a Verdict, a float in [0, 1], a bool, or None for a row that cannot be graded"
        )
    score = float(value)
    if not 0 <= score <= 1:
        raise ValueError(f"reward {name!r} returned {score}: a score must be in [0, 1]; scale it")
    return Verdict(score, Status.CORRECT if score == 1 else Status.WRONG)
