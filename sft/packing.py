"""Packing: assigns rows to micro-batches so that no padding is needed.

A pack is the rows of one micro-batch of one rank, concatenated to a single row of at most `budget` tokens
(sft/packed_rows.py). Planning needs only the rows' sizes, so it does not read pixels and gives the same result on every
rank. A `Plan` derives each pack from its position in the run. So a resumed run gets the same packs as an uninterrupted
one without saved state.

The rows of an update are chosen in one of two ways:

- by rows: the rows of the padded path, in its order. Packing then changes neither the updates nor their loss, only
  their cost.
- by tokens: a stream. Each update takes rows from a buffer of the next rows: first those that have waited too long,
  then those that fill its packs best.

If a phase lets over-long rows in, they are spread evenly over every n-th update. Each fills a pack alone, which may
then hold more than `budget` tokens.

Either way each row is trained once per epoch, and sft/balance.py balances text and image tokens over the packs of an
update. These are the report's stream packing and visual packing (arXiv:2509.14033, section 5).
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from sft.balance import Pack, PackingError, Sizes, balance, best_fit, exchange, imbalance, placed

SLACK = 0.03
"""Share of a streamed pack's budget that stays unused."""


@dataclass(frozen=True)
class ByRows:
    """Updates of `rows` rows each, in the order of the padded path; an epoch's last update may be smaller."""

    rows: int


@dataclass(frozen=True)
class ByTokens:
    """Updates of at most `tokens` tokens over all ranks, chosen from a buffer of `buffer` rows.

    `tokens` is a multiple of ranks x budget (sft/config.py checks it).
    A row that `max_wait` updates have skipped precedes all others, so no row waits for more than `max_wait` plus
    buffer / (packs per update) updates.
    """

    tokens: int
    buffer: int = 1024
    max_wait: int = 4


@dataclass(frozen=True)
class Overlong:
    """Rows of more than `tokens` tokens are trained in every `every`-th update."""

    tokens: int
    every: int


@dataclass(frozen=True, eq=False)
class Plan(Sequence[Pack]):
    """The packs of a run, ordered by update, then by accumulation step, then by rank.

    `epochs` or `max_updates` sets the length of the run. Raises PackingError if a row exceeds `budget` and over-long
    rows are not let in.

    >>> plan = Plan(np.array([[5, 0], [3, 4], [2, 4], [6, 0]]), ByRows(4), budget=12, ranks=2, seed=0, epochs=1)
    >>> plan.updates, plan.steps, sorted(sorted(pack) for pack in plan)
    (1, 1, [[0, 1], [2, 3]])
    """

    sizes: Sizes
    updates_by: ByRows | ByTokens
    budget: int
    """Most tokens in a pack."""
    ranks: int
    seed: int
    epochs: float | None = None
    max_updates: int | None = None
    overlong: Overlong | None = None
    """How over-long rows are let in; None: there are none."""
    _state: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.max_updates is None):
            raise ValueError(f"epochs={self.epochs} and max_updates={self.max_updates}: give one of them")
        if not len(self.sizes):
            raise ValueError("there are no rows to pack")
        tokens = self.sizes.sum(axis=1)
        longest = int(tokens.argmax())
        if tokens[longest] > self.budget and not self.overlong:
            raise PackingError(
                f"row {longest} has {tokens[longest]} tokens, a packed micro-batch holds {self.budget}; raise "
                f"packing.micro_batch_tokens to {tokens[longest]} or more, or lower max_tokens"
            )

    def __len__(self) -> int:
        return self.updates * self.packs

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(f"pack {index} of {len(self)}")
        update, place = divmod(index, self.packs)
        if self._state.get("update") != update:
            self._state.update(update=update, packs=self._balanced(update))
        return self._state["packs"][place]

    @cached_property
    def updates(self) -> int:
        """Number of optimizer updates of the run."""
        if self.max_updates is not None:
            return self.max_updates
        assert self.epochs is not None
        if isinstance(self.updates_by, ByRows):
            return math.ceil(self.epochs * self._updates_in(0))
        whole = int(self.epochs)
        updates = sum(self._updates_in(epoch) for epoch in range(whole))
        return (
            updates + math.ceil((self.epochs - whole) * self._updates_in(whole))
            if whole < self.epochs
            else updates
        )

    @cached_property
    def steps(self) -> int:
        """Micro-batches per update on each rank: the smallest number that suffices for every update of the run."""
        if isinstance(self.updates_by, ByTokens):
            return self.updates_by.tokens // (self.ranks * self.budget)
        tokens = self._fitted.sum(axis=1)
        most = max(
            len(best_fit(tokens[rows], self.budget)) for rows in map(self._rows_of, range(self.updates))
        )
        return math.ceil(most / self.ranks)

    @cached_property
    def _fitted(self) -> Sizes:
        """The sizes by which rows are packed: one that exceeds the budget counts as a full pack."""
        share = np.minimum(1.0, self.budget / np.maximum(self.sizes.sum(axis=1), 1))
        images = np.floor(self.sizes[:, 1] * share).astype(np.int64)
        tokens = np.minimum(self.sizes.sum(axis=1), self.budget)
        return np.stack([tokens - images, images], axis=1)

    @cached_property
    def _long(self) -> np.ndarray:
        """Whether each row is over-long, (rows,)."""
        return self.sizes.sum(axis=1) > (self.overlong.tokens if self.overlong else np.inf)

    @property
    def packs(self) -> int:
        """Micro-batches per update over all ranks."""
        return self.steps * self.ranks

    def order(self, epoch: int) -> np.ndarray:
        """The rows in the order of an epoch, which equals the padded path's order with the same seed.

        The padded path uses accelerate's SeedableRandomSampler, by which transformers' trainer shuffles. Over-long rows
        are moved to every n-th update of `ByRows`.
        """
        import torch

        if self._state.get("epoch") != epoch:
            shuffle = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.sizes), generator=shuffle).numpy()
            if self.overlong and isinstance(self.updates_by, ByRows):
                order = spaced(order, self._long, self.updates_by.rows, self.overlong.every)
            self._state.update(epoch=epoch, order=order)
        return self._state["order"]

    def summary(self, updates: int = 20) -> dict[str, float | int]:
        """Counts of the run, and the balance of its first `updates` updates.

        `fill` is the used share of the packs' budget. `imbalance` is the relative excess of the busiest rank over the
        mean, in text or in image tokens, whichever is larger.
        """
        first = min(updates, self.updates)
        loads = np.array([self._fitted[pack].sum(axis=0) for pack in self[: first * self.packs]])
        ranks = loads.reshape(first * self.steps, self.ranks, 2).sum(axis=0)
        return {
            "rows": len(self.sizes),
            "updates": self.updates,
            "micro_batches_per_update": self.packs,
            "micro_batch_tokens": self.budget,
            "fill": round(float(loads.sum() / (len(loads) * self.budget)), 4),
            "imbalance": round(imbalance(ranks), 4),
            **({"overlong_rows": int(self._long.sum())} if self.overlong else {}),
        }

    def _updates_in(self, epoch: int) -> int:
        if isinstance(self.updates_by, ByRows):
            return math.ceil(len(self.sizes) / self.updates_by.rows)
        lengths = self._state.setdefault("updates_in", {})
        if epoch not in lengths:
            lengths[epoch] = sum(1 for _ in self._stream(epoch))
        return lengths[epoch]

    def _rows_of(self, update: int) -> np.ndarray:
        """The rows of an update, for updates by rows."""
        assert isinstance(self.updates_by, ByRows)
        epoch, place = divmod(update, self._updates_in(0))
        return self.order(epoch)[place * self.updates_by.rows : (place + 1) * self.updates_by.rows]

    def _balanced(self, update: int) -> list[Pack]:
        """The packs of an update by step and rank; packs are balanced first, then ranks."""
        if isinstance(self.updates_by, ByRows):
            rows, start = self._rows_of(update), None
        else:
            bins = self._streamed(update)
            rows = np.array([row for pack in bins for row in pack])
            start = np.repeat(np.arange(len(bins)), [len(pack) for pack in bins])
        sizes = self._fitted[rows]
        pack_of = balance(sizes, self.packs, self.budget, start)
        loads = np.stack([np.bincount(pack_of, sizes[:, kind], self.packs) for kind in (0, 1)], axis=1)
        place = placed(loads, self.ranks)
        if self.ranks > 1:
            pack_of = exchange(sizes, pack_of, self.budget, place % self.ranks, place // self.ranks)
        packs: list[Pack] = [[] for _ in range(self.packs)]
        for row, pack in zip(rows.tolist(), place[pack_of].tolist(), strict=True):
            packs[pack].append(row)
        return packs

    def _stream(self, epoch: int) -> Iterator[list[Pack]]:
        by = self.updates_by
        assert isinstance(by, ByTokens)
        tokens = self._fitted.sum(axis=1)
        return stream(
            self.order(epoch),
            tokens,
            packs=self.packs,
            # A little room lets `balance` swap rows with different shares of text and image tokens.
            budget=max(int(self.budget * (1 - SLACK)), int(tokens.max())),
            buffer=by.buffer,
            max_wait=by.max_wait,
            overlong=self._long if self.overlong else None,
            every=self.overlong.every if self.overlong else 1,
        )

    def _streamed(self, update: int) -> list[Pack]:
        """The packs of an update by tokens: the stream's next, or by a replay from the epoch's start."""
        epoch, before = 0, 0
        while update >= before + self._updates_in(epoch):
            before += self._updates_in(epoch)
            epoch += 1
        at = (epoch, update - before)
        state = self._state
        if state.get("stream_epoch") != epoch or state["stream_next"] > at[1]:
            state.update(stream_epoch=epoch, stream_next=0, stream=self._stream(epoch))
        while True:
            bins: list[Pack] = next(state["stream"])
            state["stream_next"] += 1
            if state["stream_next"] > at[1]:
                return bins


def stream(
    order: Sequence[int] | np.ndarray,
    tokens: np.ndarray,
    *,
    packs: int,
    budget: int,
    buffer: int,
    max_wait: int,
    overlong: np.ndarray | None = None,
    every: int = 1,
) -> Iterator[list[Pack]]:
    """Updates of `packs` packs from a buffer of at most `buffer` rows of the order; every row occurs once.

    Rows that `max_wait` updates have skipped come first, the oldest before all others. At least `packs` of them fit, so
    a row waits for at most max_wait + ceil(buffer / packs) updates. The other rows follow from longest to shortest, and
    each goes to the fullest pack with room for it. At the end of the order the buffer is emptied.

    The rows that `overlong` (rows,) marks enter in every `every`-th update, evenly spread over the stream, and when no
    other row waits.
    """
    long = np.zeros(len(tokens), dtype=bool) if overlong is None else overlong
    updates = math.ceil(int(tokens.sum()) / (packs * budget))
    at_once = min(packs, math.ceil(int(long.sum()) / math.ceil(updates / every)))
    arrivals = iter(np.asarray(order).tolist())
    waiting: deque[tuple[int, int]] = deque()  # (update of arrival, row), oldest first
    update = 0
    while True:
        while len(waiting) < buffer and (row := next(arrivals, None)) is not None:
            waiting.append((update, row))
        if not waiting:
            return
        admitted = [row for _, row in waiting if long[row]]
        if len(admitted) < len(waiting):  # else nothing but over-long rows is left
            admitted = admitted[:at_once] if update % every == 0 else []
        overdue = [row for arrival, row in waiting if update - arrival >= max_wait and not long[row]]
        held = set(overdue)
        others = [row for _, row in waiting if row not in held and not long[row]]
        others.sort(key=lambda row: -int(tokens[row]))
        bins, rest = _fill(admitted + overdue + others, tokens, packs, budget)
        left = set(rest) | {row for _, row in waiting if long[row]} - set(admitted)
        waiting = deque(item for item in waiting if item[1] in left)
        update += 1
        yield bins


def spaced(order: np.ndarray, overlong: np.ndarray, rows: int, every: int) -> np.ndarray:
    """The order with its over-long rows evenly in every `every`-th update of `rows` rows.

    Args:
        order: numbers of rows.
        overlong: whether each row is over-long.
        rows: rows per update.
        every: updates from one with over-long rows to the next.

    >>> spaced(np.arange(8), np.array([True] * 3 + [False] * 5), rows=2, every=2).tolist()
    [0, 1, 3, 4, 2, 5, 6, 7]
    """
    plain, long = deque(order[~overlong[order]].tolist()), deque(order[overlong[order]].tolist())
    updates = math.ceil(len(order) / rows)
    share = math.ceil(len(long) / math.ceil(updates / every))
    out: list[int] = []
    for update in range(updates):
        size = min(rows, len(order) - len(out))
        count = min(share, size, len(long)) if update % every == 0 else 0
        count = max(count, size - len(plain))  # plain rows have run out
        out += [long.popleft() for _ in range(count)] + [plain.popleft() for _ in range(size - count)]
    return np.array(out)


def _fill(rows: Sequence[int], tokens: np.ndarray, packs: int, budget: int) -> tuple[list[Pack], list[int]]:
    """The packs after each row, in turn, goes to the fullest pack with room for it; and the rows that fit nowhere."""
    bins: list[Pack] = [[] for _ in range(packs)]
    room = [(budget, pack) for pack in range(packs)]  # sorted by room left
    rest = []
    for row in rows:
        size = int(tokens[row])
        place = bisect_left(room, (size, -1))
        if place == packs:
            rest.append(row)
            continue
        left, pack = room.pop(place)
        bins[pack].append(row)
        insort(room, (left - size, pack))
    return bins, rest
