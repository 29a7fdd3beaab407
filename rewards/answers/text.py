"""The kind `exact`: the same text up to case, spaces and a full stop."""

from rewards.answers.kind import GoldError, Kind, Limits, decided
from rewards.answers.plain import plain_text
from rewards.example import Example
from rewards.verdict import Verdict


def _gold(example: Example) -> list[str]:
    others = example.meta.get("answers") or ()
    if isinstance(others, str):
        raise GoldError(f'meta["answers"] is the text {others!r}; write a list of gold answers')
    texts = [plain_text(str(gold)) for gold in (example.answer, *others)]
    if not all(texts):
        raise GoldError(
            f"gold answer {example.answer!r}, or one of meta's answers, is empty after normalisation; correct it"
        )
    return texts


def _judge(answer: str, gold: list[str], example: Example, limits: Limits) -> Verdict:
    return decided(plain_text(answer) in gold, answer)


EXACT = Kind(_gold, _judge, capped=False)
