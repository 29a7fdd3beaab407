"""Rows for RL: records as prompts with their examples, and the endless shuffled stream that batches draw from."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from core.model.prompts import messages, shown
from core.model.videos import Decoded
from corpus.records import DataSource, Records, load_source
from rewards.answer import GoldError, gold_problem
from rewards.example import Example

log = logging.getLogger(__name__)

Record = Mapping[str, Any]


def load_rows(
    sources: Sequence[DataSource],
    sets: Mapping[str, Path],
    seed: int,
    askable: Callable[[DataSource, Records], Records] = lambda source, records: records,
) -> list[dict[str, Any]]:
    """All records of the named sets, in order. `askable` drops the rows beyond the servers' limits.

    Raises ValueError, with file and row, if two sets share an id, if a set has no rows left, or if a verifier cannot
    use a gold answer and the source does not drop such rows.
    """
    rows: list[dict[str, Any]] = []
    for source in sources:
        records = load_source(source, sets, seed)
        rows += gradable(source, askable(source, records))
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(
                f"id {row['id']!r} is in two of the sets {[s.set for s in sources]}; ids must be unique"
            )
        seen.add(row["id"])
    return rows


def gradable(
    source: DataSource, records: Records, changes: Mapping[str, Any] = MappingProxyType({})
) -> list[dict[str, Any]]:
    """The records, with `changes` to their fields, whose gold answers their verifiers can use.

    Raises GoldError for other records, unless the source drops them.
    """
    good, bad = [], []
    for index, stored in enumerate(records):
        record = {**stored, **changes}
        problem = gold_problem(example_of(record))
        if problem:
            bad.append(f"{records.place(index)} ({record['id']!r}): answer: {problem}")
        else:
            good.append(record)
    if bad and (source.on_bad_gold == "raise" or not good):
        more = f"\n... and {len(bad) - 1} more such rows" if len(bad) > 1 else ""
        raise GoldError(
            f"{bad[0]}{more}; or set on_bad_gold: drop for the set {source.set!r} to leave them out"
        )
    if bad:
        log.warning(
            "%s: dropped %d of %d rows whose gold answer cannot be graded against, the first: %s",
            source.set, len(bad), len(bad) + len(good), bad[0],
        )  # fmt: skip
    return good


def example_of(record: Record) -> Example:
    """A record as rewards see it; its pictures decode when a reward accesses them."""
    return Example.of(record, Decoded(shown(record)))


def prompt_messages(record: Record) -> list[dict[str, Any]]:
    """The user turn of a record under the prompt contract of its mode."""
    return messages(record)


class PromptStream:
    """An endless stream of rows in a new random order every epoch; the same seed gives the same order.

    One stream feeds both a stage's batches and their replacements. So a prompt that dynamic sampling drew is drawn
    again only after all others.

    Args:
        rows: the rows to draw from.
        seed: seed of the order.
        passes_over: called with a row's id and the epoch; rows for which it returns True are skipped, except for a
            share of `retry_share`. If it would skip every row of an epoch, none is skipped.
        retry_share: share in [0, 1] of the skipped rows that is drawn nevertheless.
    """

    def __init__(
        self,
        rows: Sequence[Record],
        seed: int,
        passes_over: Callable[[str, int], bool] = lambda id_, epoch: False,
        retry_share: float = 0.0,
    ) -> None:
        if not rows:
            raise ValueError("there are no rows to draw prompts from")
        self.rows, self.epoch, self.passed_over = rows, 0, 0
        self.passes_over, self.retry_share = passes_over, retry_share
        self._rng, self._retry = random.Random(seed), random.Random(f"{seed} retry")
        self._order: deque[int] = deque()

    def take(self, count: int) -> list[Record]:
        """The next `count` rows."""
        return [self._next() for _ in range(count)]

    def _next(self) -> Record:
        for _ in range(len(self.rows)):
            row = self._draw()
            if not self.passes_over(row["id"], self.epoch) or self._retry.random() < self.retry_share:
                return row
            self.passed_over += 1
        return self._draw()

    def _draw(self) -> Record:
        if not self._order:
            order = list(range(len(self.rows)))
            self._rng.shuffle(order)
            self._order = deque(order)
            self.epoch += 1
        return self.rows[self._order.popleft()]

    def state(self) -> dict[str, Any]:
        """The position of the stream, for `restore`."""
        generators = self._rng.getstate(), self._retry.getstate()
        return {
            "epoch": self.epoch,
            "passed_over": self.passed_over,
            "order": [*self._order],
            "random": generators,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at the position of another stream over the same rows."""
        self.epoch, self.passed_over = state["epoch"], state["passed_over"]
        self._order = deque(state["order"])
        for generator, own in zip((self._rng, self._retry), state["random"], strict=True):
            generator.setstate(own)
