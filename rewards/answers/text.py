"""The kind `exact`: the same text up to case, spaces and a full stop."""

from rewards.answers.kind import Kind, Limits, decided
from rewards.answers.plain import plain_text
from rewards.example import Example
from rewards.verdict import Verdict


def _texts(example: Example) -> list[str]:
    return [plain_text(str(gold)) for gold in (example.answer, *(example.meta.get("answers") or ()))]


def _problem(example: Example) -> str:
    if isinstance(example.meta.get("answers") or (), str):
        return f'meta["answers"] is the text {example.meta["answers"]!r}; write a list of gold answers'
    if all(_texts(example)):
        return ""
    return f"gold answer {example.answer!r}, or one of meta's answers, holds nothing to compare; correct it"


def _judge(answer: str, example: Example, limits: Limits) -> Verdict:
    return decided(plain_text(answer) in _texts(example), answer)


EXACT = Kind(_problem, _judge, capped=False)
