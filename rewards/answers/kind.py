"""The interface of a kind of answer: check the gold, and compare an answer with it."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Protocol

from rewards.answers.outcome import Outcome
from rewards.answers.plain import MAX_DIGITS, too_many_digits
from rewards.example import Example
from rewards.extract import MAX_BOX_CHARS
from rewards.verdict import Status, Verdict


class Limits(Protocol):
    """The parameters of the answer reward that a kind may ask for."""

    @property
    def graded(self) -> bool:
        """Whether a `box` earns its mean overlap."""

    def limit(self, name: str, example: Example) -> Fraction:
        """The number of that name: the row's meta overrides the reward's parameter."""


@dataclass(frozen=True)
class Kind:
    """One kind of answer."""

    problem: Callable[[Example], str]
    """What is wrong with a row's gold, with a remedy; "" if nothing is."""
    judge: Callable[[str, Example, Limits], Verdict]
    """The verdict on an answer whose gold has no problem."""
    capped: bool = True
    """Whether the caps on length and digits apply to gold and answer."""

    def gold_problem(self, example: Example) -> str:
        """What is wrong with a row's gold under this kind, with a remedy; "" if nothing is."""
        limit = over_limit(example.answer) if self.capped else ""
        if limit:
            return f"gold answer {example.answer[:40]!r}... is {limit}; shorten it"
        return self.problem(example)

    def compare(self, answer: str, example: Example, limits: Limits) -> Verdict:
        """The verdict on an answer."""
        limit = over_limit(answer) if self.capped else ""
        if limit:
            return Verdict.wrong(answer, limit, Status.OVER_LIMIT)
        return self.judge(answer, example, limits)


def over_limit(text: str) -> str:
    """Which cap a text breaks; "" if none."""
    if len(text) > MAX_BOX_CHARS:
        return f"longer than {MAX_BOX_CHARS} characters"
    if too_many_digits(text):
        return f"a number of {MAX_DIGITS} digits or more"
    return ""


def decided(right: bool, answer: str) -> Verdict:
    """1 or 0 for an answer that could be compared."""
    return Verdict.correct(answer) if right else Verdict.wrong(answer, "not the gold answer")


def unparseable(answer: str, what: str) -> Verdict:
    """0 for an answer that is not of its kind."""
    return Verdict.wrong(answer, f"no {what}", Status.UNPARSEABLE)


def verdict_of(outcome: Outcome, answer: str, what: str = "mathematics") -> Verdict:
    """The verdict that a comparison's outcome means."""
    if outcome == Outcome.UNPARSEABLE:
        return unparseable(answer, what)
    if outcome == Outcome.OVER_TIME:
        return Verdict.wrong(answer, "its comparison with the gold takes too much computing", Status.TIMEOUT)
    if outcome == Outcome.OVER_MEMORY:
        return Verdict.wrong(answer, "its comparison with the gold takes too much memory", Status.OVER_LIMIT)
    if outcome == Outcome.TIMEOUT:
        return Verdict.unscored("the comparison was not done in time", Status.TIMEOUT, answer)
    if outcome == Outcome.CRASHED:
        return Verdict.unscored("its comparison with the gold ended the worker", Status.CRASHED, answer)
    if outcome == Outcome.BAD_GOLD:
        return Verdict.unscored("the gold answer does not parse", answer=answer)
    return decided(outcome == Outcome.EQUAL, answer)
