"""A class: its fields are the recipe's params, checked when the recipe is read."""

from dataclasses import dataclass
from typing import ClassVar

from sailvl2_posttrain import Example


@dataclass(frozen=True)
class WordBudget:
    """1 up to `words` words of thought, falling to 0 at twice as many."""

    words: int = 50

    self_test: ClassVar[str] = "runs"

    def __post_init__(self) -> None:
        if self.words < 1:
            raise ValueError(f"words={self.words}: a budget is at least 1")

    def __call__(self, completion: str, example: Example) -> float:
        used = len(completion.partition("</think>")[0].split())
        return min(max(2 - used / self.words, 0.0), 1.0)
