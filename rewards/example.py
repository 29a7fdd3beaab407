"""The row that a completion is graded against."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MODES = ("think", "direct")
UNGRADED = ("judge", "none")
"""Verifiers of rows that no rule can grade. All other verifiers are rules (rewards.answer)."""


@dataclass(frozen=True)
class Example:
    """A reward's view of a row: the question with its images, the gold answer, and the verifier.

    >>> Example("row-1", "What is 2 + 2?", "4", "think").verifier
    'math'

    Raises ValueError for an unknown mode.
    """

    id: str
    question: str
    """The question without the prompt's format instructions; behind a system message and earlier turns, if any."""
    answer: str
    """Gold."""
    mode: str
    """Either "think" or "direct"."""
    verifier: str = "math"
    """Kind of the answer, one of rewards.answer.KINDS."""
    images: Sequence[Any] = ()
    """PIL pictures, in the order in which the model sees them."""
    chain: str | None = None
    """A reference chain of thought, if the row has one."""
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Further data for graders, such as `answers`, `choices` or a scene."""

    @classmethod
    def of(cls, record: Mapping[str, Any], images: Sequence[Any]) -> "Example":
        """The example of a record (corpus.schema) with these pictures. The pictures may decode lazily."""
        return cls(
            id=record["id"],
            question=_asked(record),
            answer=record["answer"],
            mode=record["mode"],
            verifier=record["verifier"],
            images=images,
            chain=record["chain"],
            source=record["source"],
            meta=record["meta"] or {},
        )

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f'row {self.id!r}: mode={self.mode!r}: it must be "think" or "direct"')


def _asked(record: Mapping[str, Any]) -> str:
    """The question; in a conversation all that was said, turn by turn, so that a judge reads the question in context.

    >>> _asked({"question": "And 3?", "history": [{"user": "2 + 2?", "assistant": "4"}], "system": "Add."})
    'System: Add.\\nUser: 2 + 2?\\nAssistant: 4\\nUser: And 3?'
    """
    system, history = record.get("system"), record.get("history") or ()
    if not system and not history:
        return record["question"]
    said = [f"System: {system}"] if system else []
    for turn in history:
        said += [f"User: {turn['user']}", f"Assistant: {turn['assistant']}"]
    return "\n".join([*said, f"User: {record['question']}"])
