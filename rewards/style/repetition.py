"""The repetition reward: a completion that repeats itself loses score."""

import re
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

from rewards.example import Example
from rewards.verdict import Status, Verdict

# Ideographs, kana and hangul count one by one, as their words have no spaces between them. Longer words count in
# pieces of 16 characters: a loop without spaces is one long word.
_TOKEN = re.compile(
    r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]|\w{1,16}|[^\w\s]"
)


@dataclass(frozen=True)
class Repetition:
    """1 while few n-grams are repeated; falls to 0 as their share grows from `allowed` to `worst`.

    Source: Demystifying Long Chain-of-Thought Reasoning (arXiv:2502.03373), n-gram repetition penalty, here as the
    share of n-grams that occurred before. Differs from it: this is a score per completion and not a penalty per token,
    and texts with few repetitions lose nothing.

    >>> row = Example("row-1", "What is 2 + 2?", "4", "direct")
    >>> Repetition()("Two and two are four, as one can count on the fingers.", row).score
    1.0
    >>> Repetition()("Wait, let me think again about this. " * 50, row).score
    0.0
    >>> Repetition(ngram=2)("等等，让我再想一想。" * 50, row).reason
    '98% of the 2-grams occurred before'

    Raises ValueError unless ngram >= 1 and 0 <= allowed < worst <= 1.
    """

    ngram: int = 4
    """Words, or characters of scripts without spaces, in one n-gram."""
    allowed: float = 0.2
    """Share of repeated n-grams that costs nothing."""
    worst: float = 0.6
    """Share at which the score reaches 0."""

    self_test: ClassVar[str] = "runs"

    def __post_init__(self) -> None:
        if self.ngram < 1:
            raise ValueError(f"ngram={self.ngram}: it must be at least 1")
        if not 0 <= self.allowed < self.worst <= 1:
            raise ValueError(
                f"allowed={self.allowed}, worst={self.worst}: they must be shares, 0 <= allowed < worst <= 1"
            )

    def __call__(self, completion: str, example: Example) -> Verdict:
        tokens = [found[0].lower() for found in _TOKEN.finditer(completion)]
        if not tokens:
            return Verdict.wrong(reason="empty", status=Status.NO_ANSWER)
        columns = [islice(tokens, start, None) for start in range(self.ngram)]
        # Hashes instead of n-grams: a completion of megabytes must not take gigabytes of memory.
        seen = {hash(gram) for gram in zip(*columns, strict=False)}
        count = max(len(tokens) - self.ngram + 1, 0)
        share = 1 - len(seen) / count if count else 0.0
        score = min(max((self.worst - share) / (self.worst - self.allowed), 0.0), 1.0)
        reason = f"{share:.0%} of the {self.ngram}-grams occurred before"
        return Verdict(score, Status.CORRECT if score == 1 else Status.WRONG, None, reason)
