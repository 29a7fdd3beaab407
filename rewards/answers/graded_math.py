"""The kind `math`: an answer that a worker settles against a gold by the rules of rewards.answers.math."""

from rewards.answers import checker
from rewards.answers.kind import Kind, Limits, verdict_of
from rewards.answers.math import decide, readable, restates
from rewards.answers.outcome import Outcome
from rewards.example import Example
from rewards.verdict import Verdict


def _problem(example: Example) -> str:
    return gold_problem(example.answer)


def gold_problem(gold: str) -> str:
    """What is wrong with a gold answer as mathematics; "" if nothing is."""
    found = checker.SHARED.settle(readable(gold))
    if found == Outcome.EQUAL:
        return ""
    return f'gold answer {gold!r} is not readable as mathematics ({found.value}); correct it, or use verifier "exact"'


def _judge(answer: str, example: Example, limits: Limits) -> Verdict:
    if restates(example.question, example.answer, answer):
        return Verdict.wrong(answer, "the question's own expression")
    return verdict_of(checker.SHARED.settle(decide(example.answer, answer, example.question)), answer)


MATH = Kind(_problem, _judge)
