"""The interface of a kind of answer: read the gold, and compare an answer with it."""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

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


class GoldError(ValueError):
    """A gold answer is invalid under its row's verifier. The message gives the rule and a remedy."""


class LimitError(ValueError):
    """An answer breaks a cap."""


@dataclass(frozen=True)
class Kind:
    """One kind of answer."""

    read: Callable[[Example], Any]
    """A row's gold in the form that `judge` takes. Raises GoldError."""
    judge: Callable[[str, Any, Example, Limits], Verdict]
    """The verdict on an answer, given the gold that `read` returned. Raises LimitError for an answer over a cap."""
    capped: bool = True
    """Whether the caps on length and digits apply to gold and answer."""

    def gold(self, example: Example) -> Any:
        """A row's gold as this kind reads it. Raises GoldError."""
        limit = over_limit(example.answer) if self.capped else ""
        if limit:
            raise GoldError(f"gold answer {example.answer[:40]!r}... is {limit}; shorten it")
        return self.read(example)

    def compare(self, answer: str, gold: Any, example: Example, limits: Limits) -> Verdict:
        """The verdict on an answer, given the gold that `gold` returned."""
        limit = over_limit(answer) if self.capped else ""
        try:
            if limit:
                raise LimitError(limit)
            return self.judge(answer, gold, example, limits)
        except LimitError as error:
            return Verdict.wrong(answer, str(error), Status.OVER_LIMIT)


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
        return Verdict.wrong(
            answer, "its comparison with the gold takes too much computing time", Status.TIMEOUT
        )
    if outcome == Outcome.OVER_MEMORY:
        return Verdict.wrong(answer, "its comparison with the gold takes too much memory", Status.OVER_LIMIT)
    if outcome == Outcome.TIMEOUT:
        return Verdict.unscored("the comparison was not done in time", Status.TIMEOUT, answer)
    if outcome == Outcome.CRASHED:
        return Verdict.unscored("its comparison with the gold ended the worker", Status.CRASHED, answer)
    if outcome == Outcome.BAD_GOLD:
        return Verdict.unscored("the gold answer does not parse", answer=answer)
    return decided(outcome == Outcome.EQUAL, answer)
