r"""The answer reward: is what the completion answers the row's gold answer?

In thinking mode the one box after the thought is the answer, in direct mode the one box or else the whole
text (rewards.extract). How it is compared is the row's `verifier`:

| kind | right is |
|---|---|
| math | mathematically equal: exact rules, then math-verify in a process that can be killed |
| number | the same number, or one within `tolerance`; 1,000 = 1000.0 |
| exact | the same text but for case, spaces and a full stop; any of meta["answers"] will do |
| choice | the option's letter, or its text if meta["choices"] lists the options (a list, or letter -> text) |
| judge, none | not graded here: unscored |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

from rewards import normal
from rewards.equality import Outcome, is_plain, quick
from rewards.example import Example
from rewards.extract import MAX_BOX_CHARS, parse_direct, parse_thinking
from rewards.mathcheck import SHARED
from rewards.verdict import Status, Verdict


class GoldError(ValueError):
    """A row's gold answer does not make sense under the row's verifier."""


@dataclass(frozen=True)
class AnswerReward:
    r"""1 for the gold answer, 0 for another, unreadable or missing one; None if the row cannot be graded.

    Source: SAIL-VL2 (arXiv:2509.14033), answer reward.

    >>> row = Example("row-1", "What is a half and a half?", "1", "think")
    >>> AnswerReward()(r"<think>0.5 + 0.5</think> \boxed{1.0}", row).score
    1.0
    >>> AnswerReward()(r"<think>\boxed{1}</think> It is 1.", row).status.value
    'no_answer'
    """

    tolerance: float = 0.0
    """Largest absolute difference at which a `number` answer is still right."""
    thought_open: bool = False
    """The chat template has already opened <think>: the completion starts inside the thought."""

    self_test: ClassVar[str] = "answer"

    def __post_init__(self) -> None:
        if not 0 <= self.tolerance < math.inf:
            raise ValueError(f"tolerance={self.tolerance}: a difference is finite and at least 0")

    def __call__(self, completion: str, example: Example) -> Verdict:
        problem = gold_problem(example)
        if problem:
            return Verdict.unscored(problem)
        if example.verifier in UNGRADED:
            return Verdict.unscored(f'verifier "{example.verifier}": no rule grades this row; a judge may')
        if example.mode == "think":
            parsed = parse_thinking(completion, self.thought_open)
        else:
            parsed = parse_direct(completion)
        if parsed.answer is None:
            return Verdict.wrong(reason=parsed.problem, status=parsed.status)
        verdict = _COMPARE[example.verifier](parsed.answer, example, self)
        if len(parsed.answer) > MAX_BOX_CHARS:  # a direct completion may be pages long; a record need not
            verdict = replace(verdict, answer=parsed.answer[:MAX_BOX_CHARS])
        return verdict


def validate_gold(example: Example) -> None:
    """Refuse a row whose gold answer could not be graded against: the cheapest audit of a data set.

    >>> validate_gold(Example("row-1", "Which?", "E", "direct", "choice", meta={"choices": ["red", "blue"]}))
    Traceback (most recent call last):
    rewards.answer.GoldError: row 'row-1': gold answer 'E' names no option (A: red, B: blue); correct it ...

    Raises GoldError naming the row, the rule and a remedy.
    """
    problem = gold_problem(example)
    if problem:
        raise GoldError(f"row {example.id!r}: {problem}")


def gold_problem(example: Example) -> str:
    """What is wrong with a row's gold answer under its verifier, with a remedy; "" if nothing is."""
    if example.verifier not in KINDS:
        return f"verifier={example.verifier!r}: it is one of {', '.join(KINDS)}"
    return "" if example.verifier in UNGRADED else _GOLD_PROBLEM[example.verifier](example)


def _over_limit(text: str) -> str:
    if len(text) > MAX_BOX_CHARS:
        return f"longer than {MAX_BOX_CHARS} characters"
    if normal.too_many_digits(text):
        return f"a number of {normal.MAX_DIGITS} digits or more"
    return ""


def _decided(right: bool, answer: str) -> Verdict:
    return Verdict.correct(answer) if right else Verdict.wrong(answer, "not the gold answer")


def _unparseable(answer: str, what: str) -> Verdict:
    return Verdict.wrong(answer, f"no {what}", Status.UNPARSEABLE)


def _math(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    limit = _over_limit(answer)
    if limit:
        return Verdict.wrong(answer, limit, Status.OVER_LIMIT)
    outcome = quick(example.answer, answer) or SHARED.compare(example.answer, answer)
    if outcome == Outcome.UNPARSEABLE:
        return _unparseable(answer, "mathematics")
    if outcome == Outcome.OVER_TIME:
        reason = f"comparing it with the gold takes over {SHARED.deadline_s:g} s of computing"
        return Verdict.wrong(answer, reason, Status.TIMEOUT)
    if outcome == Outcome.OVER_MEMORY:
        reason = "comparing it with the gold takes more memory than a worker has"
        return Verdict.wrong(answer, reason, Status.OVER_LIMIT)
    if outcome == Outcome.TIMEOUT:
        return Verdict.unscored("the comparison was not done in time", Status.TIMEOUT, answer)
    if outcome == Outcome.CRASHED:
        return Verdict.unscored("comparing it with the gold ended the worker", Status.CRASHED, answer)
    return _decided(outcome == Outcome.EQUAL, answer)


def _number(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    gold, given = normal.exact_number(example.answer), normal.exact_number(answer)
    if gold and given:
        return _decided(gold.equals(given, Fraction(reward.tolerance)), answer)
    if normal.too_many_digits(answer):
        return Verdict.wrong(answer, _over_limit(answer), Status.OVER_LIMIT)
    return _unparseable(answer, "number")


def _exact(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    return _decided(normal.plain_text(answer) in _texts(example), answer)


def _choice(answer: str, example: Example, reward: AnswerReward) -> Verdict:
    options = _options(example)
    given = normal.option_letter(answer, options)
    if given is None:
        return _unparseable(answer, "single option")
    return _decided(given == normal.option_letter(example.answer, options), answer)


def _math_gold(example: Example) -> str:
    gold = example.answer
    limit = _over_limit(gold)
    if limit:
        return f"gold answer {gold[:40]!r}... is {limit}; shorten it"
    found = Outcome.EQUAL if is_plain(gold) else SHARED.readable(gold)
    if found == Outcome.EQUAL:
        return ""
    remedy = 'correct it, or use verifier "exact"'
    return f"gold answer {gold!r} is not readable as mathematics ({found.value}); {remedy}"


def _number_gold(example: Example) -> str:
    if normal.exact_number(example.answer):
        return ""
    return f'gold answer {example.answer!r} is no number; correct it, or use verifier "exact"'


def _exact_gold(example: Example) -> str:
    if isinstance(example.meta.get("answers", ()), str):
        return f'meta["answers"] is the text {example.meta["answers"]!r}; write a list of gold answers'
    if all(_texts(example)):
        return ""
    return f"gold answer {example.answer!r}, or one of meta's answers, holds nothing to compare; correct it"


def _choice_gold(example: Example) -> str:
    options = _options(example)
    if normal.option_letter(example.answer, options):
        return ""
    known = ", ".join(f"{letter}: {text}" for letter, text in options.items()) or "any single letter"
    return f"gold answer {example.answer!r} names no option ({known}); correct it or meta's choices"


def _texts(example: Example) -> list[str]:
    return [normal.plain_text(str(gold)) for gold in (example.answer, *example.meta.get("answers", ()))]


def _options(example: Example) -> dict[str, str]:
    return normal.options_of(example.meta.get("choices") or ())


_COMPARE: dict[str, Callable[[str, Example, AnswerReward], Verdict]] = {
    "math": _math,
    "exact": _exact,
    "number": _number,
    "choice": _choice,
}
_GOLD_PROBLEM: dict[str, Callable[[Example], str]] = {
    "math": _math_gold,
    "exact": _exact_gold,
    "number": _number_gold,
    "choice": _choice_gold,
}
UNGRADED = ("judge", "none")
KINDS = (*_COMPARE, *UNGRADED)
"""What a row's verifier may be."""
