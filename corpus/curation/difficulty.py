"""The rule that keeps questions which the current policy can learn from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from core.strict import Name
from corpus.curation.base import Dropped, Outcome, RowOperator, Tools
from corpus.schema import Record

ALWAYS, NEVER = "always solved", "never solved"


def unlearnable(rate: float, mode: str, always: bool = True, never: bool = True) -> str | None:
    """The reason why a prompt with this pass rate teaches nothing, or None.

    Source: SAIL-VL2 (arXiv:2509.14033), section 4, RL data: tasks that need no reasoning (mode "direct") lose only the
    always-solved prompts; reasoning tasks lose the always-solved and the never-solved ones.
    """
    if rate == 1 and always:
        return ALWAYS
    return NEVER if rate == 0 and never and mode == "think" else None


class PassAtK(RowOperator):
    """Drop prompts that the policy always solves, and reasoning prompts that it never solves.

    Source: SAIL-VL2 (arXiv:2509.14033), section 4, RL data, step 2: pass@4 with the previous stage's model. In a chain,
    `prepare.pass_at_k` of an RL stage does the same with the run's own policy (rl/curate.py), by the same rule. The
    row's meta keeps the pass rate.
    """

    op: Literal["pass_at_k"]
    model: Name
    """The policy: a model of the curation."""
    samples: int = Field(default=4, ge=1)
    """Completions of each prompt."""
    max_completion_tokens: int = Field(default=4096, ge=1)
    temperature: float = Field(default=1.0, gt=0)

    def __call__(self, rows: Sequence[Record], tools: Tools) -> list[Outcome]:
        scores = tools.sample(self.model, rows, self.samples, self.max_completion_tokens, self.temperature)
        return [self._one(row, found) for row, found in zip(rows, scores, strict=True)]

    def _one(self, row: Record, scores: Sequence[float | None]) -> Outcome:
        known = [score for score in scores if score is not None]
        if not known:
            return Dropped("the gold answer cannot be graded")
        rate = sum(known) / len(known)
        reason = unlearnable(rate, row["mode"])
        return Dropped(reason) if reason else {**row, "meta": {**row["meta"], "pass_rate": rate}}
