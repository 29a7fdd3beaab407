r"""A second, stricter answer reward: only the gold answer as written counts."""

from dataclasses import dataclass

from rewards.answers.number import exact_number
from rewards.answers.plain import plain_text, unwrapped
from rewards.example import Example
from rewards.extract import parse
from rewards.verdict import Verdict


@dataclass(frozen=True)
class LiteralAnswer:
    r"""1 if the answer is the gold as written, or the same plain number; without algebra, tolerances and options.

    This reward is too strict for training: it refuses `x+1` for `1+x`. A fault of the answer reward shows among the
    answers that the answer reward credits and this reward refuses (rl.watch).

    >>> row = Example("row-1", "What is a half?", r"\frac{1}{2}", "think")
    >>> [LiteralAnswer()(rf"<think>1 / 2</think> \boxed{{{a}}}", row).score for a in ("0.5", r"\dfrac12", r"\sin 30")]
    [1.0, 1.0, 0.0]
    """

    thought_open: bool = False
    """Whether the chat template has already opened <think>, so that the completion starts inside the thought."""

    def __call__(self, completion: str, example: Example) -> Verdict:
        parsed = parse(completion, example.mode, self.thought_open)
        if parsed.answer is None:
            return Verdict.wrong(reason=parsed.problem, status=parsed.status)
        golds = [example.answer, *map(str, example.meta.get("answers") or ())]
        if any(_same(gold, parsed.answer) for gold in golds):
            return Verdict.correct(parsed.answer)
        return Verdict.wrong(parsed.answer, "not the gold as written")


def _same(gold: str, answer: str) -> bool:
    number, given = exact_number(gold), exact_number(answer)
    if number and given:
        return number.equals(given)
    return unwrapped(gold) == unwrapped(answer) or plain_text(gold) == plain_text(answer)
