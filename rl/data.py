"""Rows for RL: records as prompts with their examples, and the endless shuffled stream that batches draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.prompts import messages
from core.records import DataSource, load_records
from rewards.answer import validate_gold
from rewards.example import Example

Record = Mapping[str, Any]


def load_rows(sources: Sequence[DataSource], sets: Mapping[str, Path], seed: int) -> list[dict[str, Any]]:
    """All records of the named sets, in their order.

    Raises ValueError when an id is in two of the sets, or a gold answer could not be graded against.
    """
    rows: list[dict[str, Any]] = []
    for source in sources:
        rows += load_records(sets[source.set], split=source.split, rows=source.rows, seed=seed)
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(
                f"id {row['id']!r} is in two of the sets {[s.set for s in sources]}; ids must be unique"
            )
        seen.add(row["id"])
        validate_gold(example_of(row))
    return rows


def example_of(record: Record) -> Example:
    """What a reward sees of a record."""
    return Example(
        id=record["id"],
        question=record["question"],
        answer=record["answer"],
        mode=record["mode"],
        verifier=record["verifier"],
        images=tuple(record["images"]),
        chain=record["chain"],
        source=record["source"],
        meta=record["meta"] or {},
    )


def prompt_messages(record: Record) -> list[dict[str, Any]]:
    """The user turn of a record under the prompt contract of its mode."""
    return messages(record)


class PromptStream:
    """Rows in a new random order every epoch, without end; the same order for the same seed.

    One stream feeds a stage's batches and its replacements alike, so that a prompt that dynamic sampling drew is
    not drawn again until all others were.
    """

    def __init__(self, rows: Sequence[Record], seed: int) -> None:
        if not rows:
            raise ValueError("no row to draw prompts from")
        self.rows, self.epoch = rows, 0
        self._rng = random.Random(seed)
        self._order: Iterator[int] = iter(())

    def take(self, count: int) -> list[Record]:
        """The next `count` rows."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Record:
        try:
            return self.rows[next(self._order)]
        except StopIteration:
            order = list(range(len(self.rows)))
            self._rng.shuffle(order)
            self._order = iter(order)
            self.epoch += 1
            return self.rows[next(self._order)]
