"""Rows for RL: records as prompts with their examples, and the endless shuffled stream that batches draw from."""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.model.pictures import Decoded
from core.model.prompts import messages
from corpus.records import DataSource, Records, load_records
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
    """All records of the named sets, in their order. `askable` leaves out what the servers cannot be asked.

    Raises ValueError when an id is in two of the sets, a set is left without rows, or a gold answer could not be
    graded against and its source does not say to drop such rows; names the file and the row.
    """
    rows: list[dict[str, Any]] = []
    for source in sources:
        records = load_records(sets[source.set], source.split, source.rows, seed)
        rows += _gradable(source, askable(source, records))
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(
                f"id {row['id']!r} is in two of the sets {[s.set for s in sources]}; ids must be unique"
            )
        seen.add(row["id"])
    return rows


def _gradable(source: DataSource, records: Records) -> list[dict[str, Any]]:
    """The records whose gold answers can be graded against."""
    good, bad = [], []
    for index, record in enumerate(records):
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
    """What a reward sees of a record; its pictures decode when the reward looks at them."""
    return Example.of(record, Decoded(record["images"]))


def prompt_messages(record: Record) -> list[dict[str, Any]]:
    """The user turn of a record under the prompt contract of its mode."""
    return messages(record)


class PromptStream:
    """Rows in a new random order every epoch, without end; the same order for the same seed.

    One stream feeds a stage's batches and its replacements alike, so that a prompt that dynamic sampling drew is
    not drawn again until all others were.

    Args:
        rows: what is drawn from.
        seed: of the order.
        passes_over: told a row's id and the epoch; rows for which it is true are left out, but for a share of
            `retry_share`. When that leaves nothing for a whole epoch, they are drawn all the same.
        retry_share: share in [0, 1].
    """

    def __init__(
        self,
        rows: Sequence[Record],
        seed: int,
        passes_over: Callable[[str, int], bool] = lambda id_, epoch: False,
        retry_share: float = 0.0,
    ) -> None:
        if not rows:
            raise ValueError("no row to draw prompts from")
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
        """Where the stream is, for `restore`."""
        generators = self._rng.getstate(), self._retry.getstate()
        return {
            "epoch": self.epoch,
            "passed_over": self.passed_over,
            "order": [*self._order],
            "random": generators,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where another stream over the same rows was."""
        self.epoch, self.passed_over = state["epoch"], state["passed_over"]
        self._order = deque(state["order"])
        for generator, own in zip((self._rng, self._retry), state["random"], strict=True):
            generator.setstate(own)
