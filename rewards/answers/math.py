"""The kind `math`: is an answer mathematically equal to its gold?"""

import re
from functools import lru_cache

from rewards.answers import checker
from rewards.answers.compare import decide, readable
from rewards.answers.kind import GoldError, Kind, Limits, verdict_of
from rewards.answers.number import plain_number
from rewards.answers.outcome import Outcome
from rewards.answers.plain import plain_latex
from rewards.example import Example
from rewards.verdict import Verdict


def restates(question: str, gold: str, answer: str) -> bool:
    r"""Whether an answer copies an expression that the question asks to evaluate.

    >>> restates(r"Expand $(x-1)(x+1)$.", "x^2-1", "(x-1)(x+1)"), restates("Factor x^2-1.", "x^2-1", "x^2-1")
    (True, False)

    An expression is an offered option, not a copy, if the gold also occurs in the question: "which of x+1 and x-1 ...".
    """
    asked, given = _dense(question), _dense(answer)
    if len(given) < 2 or given not in asked or _dense(gold) in asked:
        return False
    worked_out = plain_number(plain_latex(answer)) or re.fullmatch(r"[-+]?\\?[A-Za-z]+", given)
    return not worked_out and re.search(r"[-+*/^(!]|\\[A-Za-z]", given.lstrip("+-")) is not None


@lru_cache(maxsize=1024)
def _dense(text: str) -> str:
    return plain_latex(text).replace(" ", "")


def checked(gold: str) -> str:
    """The gold answer itself. Raises GoldError if it is not readable as mathematics."""
    found = checker.SHARED.settle(readable(gold))
    if found != Outcome.EQUAL:
        raise GoldError(
            f"gold answer {gold!r} is not readable as mathematics ({found.value}); "
            'correct it, or use verifier "exact"'
        )
    return gold


def _judge(answer: str, gold: str, example: Example, limits: Limits) -> Verdict:
    if restates(example.question, gold, answer):
        return Verdict.wrong(answer, "the question's own expression")
    return verdict_of(checker.SHARED.settle(decide(gold, answer, example.question)), answer)


MATH = Kind(lambda example: checked(example.answer), _judge)
