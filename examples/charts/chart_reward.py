r"""The rewards of this recipe: ChartQA's relaxed accuracy with units, a check of a chain's readings, and a control.

A completion is untrusted text. `parse` finds its answer by the prompt contract and never guesses; the patterns below
match a whole short text, cannot backtrack far, and take ASCII digits alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from random import Random
from threading import Lock
from typing import ClassVar

from sailvl2_posttrain import Example, Status, Verdict, load_reward, parse

MAX_ANSWER_CHARS = 40
MAX_STATEMENTS = 32
_QUANTITY = re.compile(
    r"(?P<number>-?(?:[0-9]{1,3}(?:,[0-9]{3}){1,3}|[0-9]{1,12})(?:\.[0-9]{1,9})?) ?(?P<unit>[A-Za-z%]{0,8})"
)
_READING = re.compile(r"([A-Za-z]{1,12})=([0-9]{1,6})")


@dataclass(frozen=True)
class RelaxedAccuracy:
    r"""1 for a number within `tolerance` of the gold number and in the same unit, or for the gold text; else 0.

    >>> row = Example("r", "What is the sum of Mar and Apr?", "110 mm", "think")
    >>> RelaxedAccuracy()(r"<think>40+70=110</think>\boxed{108mm}", row).score
    1.0
    >>> RelaxedAccuracy()(r"<think>40+70=110</think>\boxed{110 cm}", row).reason
    "the unit is 'cm', not 'mm'"

    Source: Masry et al., ChartQA (arXiv:2203.10244), section 5.1: 5% for numbers, an exact match for the rest. Its
    code ignores units; here a missing or different unit is wrong. Texts are compared without regard to case.
    """

    tolerance: float = 0.05
    """Largest relative error of a number."""

    self_test: ClassVar[str] = "answer"

    def __call__(self, completion: str, example: Example) -> Verdict:
        parsed = parse(completion, example.mode)
        if parsed.answer is None:
            return Verdict.wrong(reason=parsed.problem, status=parsed.status)
        answer = parsed.answer
        if len(answer) > MAX_ANSWER_CHARS:
            reason = f"{len(answer)} characters, at most {MAX_ANSWER_CHARS} are read"
            return Verdict.wrong(reason=reason, status=Status.OVER_LIMIT)
        gold = _quantity(example.answer)
        if gold is None:
            same = answer.casefold() == example.answer.casefold()
            return Verdict.correct(answer) if same else Verdict.wrong(answer, "not the gold text")
        given = _quantity(answer)
        if given is None:
            return Verdict.wrong(answer, "not a number with a unit", Status.UNPARSEABLE)
        if given[1] != gold[1]:
            return Verdict.wrong(answer, f"the unit is {given[1]!r}, not {gold[1]!r}")
        if abs(given[0] - gold[0]) > Fraction(str(self.tolerance)) * abs(gold[0]):
            return Verdict.wrong(answer, f"more than {self.tolerance:.0%} from {example.answer}")
        return Verdict.correct(answer)


@dataclass(frozen=True)
class Readings:
    r"""The share of a thought's readings, `Mar=40`, that the chart shows; 0 for a thought without readings.

    >>> row = Example("r", "?", "110 mm", "think", meta={"values": {"Mar": 40, "Apr": 70}})
    >>> Readings()(r"<think>Mar=40;Apr=60;40+60=100</think>\boxed{100mm}", row).score
    0.5
    """

    self_test: ClassVar[str] = "runs"

    def __call__(self, completion: str, example: Example) -> Verdict:
        thought = parse(completion, "think").thought
        if not thought:
            return Verdict.wrong(reason="no thought", status=Status.NO_ANSWER)
        statements = thought.split(";", MAX_STATEMENTS)
        read = [match.groups() for one in statements if (match := _READING.fullmatch(one.strip()))]
        if not read:
            return Verdict.wrong(reason="no reading")
        values = example.meta["values"]
        wrong = [f"{label}={value}" for label, value in read if str(values.get(label)) != value]
        score = 1 - len(wrong) / len(read)
        status = Status.WRONG if wrong else Status.CORRECT
        return Verdict(score, status, reason=f"not in the chart: {', '.join(wrong)}" if wrong else "")


class Shuffled:
    """The control: a completion gets the score of a random earlier completion, so the score says nothing about it.

    Args:
        of: name of the reward whose scores are shuffled; it returns verdicts.
    """

    self_test: ClassVar[str] = "runs"

    def __init__(self, of: str) -> None:
        self._reward = load_reward(of)
        self._scores: list[float] = []
        self._random, self._lock = Random(0), Lock()

    def __call__(self, completion: str, example: Example) -> Verdict:
        score = self._reward(completion, example).score
        with self._lock:
            self._scores.append(score or 0.0)
            return Verdict(self._random.choice(self._scores), Status.CORRECT)


def _quantity(text: str) -> tuple[Fraction, str] | None:
    """Number and unit of a short text; None if it is something else."""
    match = _QUANTITY.fullmatch(text.strip())
    return (Fraction(match["number"].replace(",", "")), match["unit"]) if match else None
