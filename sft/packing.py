"""Packing: which rows share a micro-batch, so that nothing is padded and every rank carries its share.

A pack is the rows of one micro-batch of one rank, laid end to end as a single row of at most `budget` tokens
(sft/packed_rows.py). Planning needs the rows' sizes alone, so it reads no pixel and runs the same on every
rank. A `Plan` lists the packs of a whole run and derives each from its place in it: a run that is resumed at
some update gets the packs that an unbroken one gets, and there is no state to save.

Two ways to choose the rows of an update:

- by rows: the rows that the padded path would take, in its order. Packing then changes neither the updates
  nor their loss, only what they cost.
- by tokens: a stream. Out of a buffer of the next rows, each update takes those that fill its packs best,
  first what has waited too long.

Either way each row is trained once per epoch, and the packs of an update are balanced in text tokens as well
as in image tokens (the tower's work): the report's stream packing and visual packing (arXiv:2509.14033,
section 5).
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

Sizes = np.ndarray
"""(rows, 2), int64: text tokens and image tokens of each row."""
Pack = list[int]
"""Row numbers of one micro-batch of one rank."""

ENOUGH = 1.02
"""A pack or rank at most this far above the mean needs no further balancing."""
GIVE = 1.05
"""How far evening out the ranks may raise a step's largest pack."""

SLACK = 0.03
"""Share of a streamed pack that is left free."""


class PackingError(ValueError):
    """A row does not fit in a pack."""


@dataclass(frozen=True)
class ByRows:
    """Updates of `rows` rows each, in the order of the padded path; an epoch's last one may be smaller."""

    rows: int


@dataclass(frozen=True)
class ByTokens:
    """Updates of at most `tokens` tokens over all ranks, out of a buffer of `buffer` rows.

    `tokens` is a multiple of ranks x budget (sft/config.py sees to it).
    A row that was passed over in `max_wait` updates goes before all others, so that none waits longer than
    `max_wait` plus buffer / packs per update.
    """

    tokens: int
    buffer: int = 1024
    max_wait: int = 4


@dataclass(frozen=True, eq=False)
class Plan(Sequence[Pack]):
    """The packs of a run: by update, within it by accumulation step, within that by rank.

    `epochs` or `max_updates` says how long the run is. Raises PackingError if a row exceeds `budget`.

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
    _state: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.max_updates is None):
            raise ValueError(f"epochs={self.epochs} and max_updates={self.max_updates}: give one of them")
        if not len(self.sizes):
            raise ValueError("there are no rows to pack")
        tokens = self.sizes.sum(axis=1)
        longest = int(tokens.argmax())
        if tokens[longest] > self.budget:
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
        """Optimizer updates of the run."""
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
        """Micro-batches per update on each rank: the fewest in which every update of the run fits."""
        if isinstance(self.updates_by, ByTokens):
            return self.updates_by.tokens // (self.ranks * self.budget)
        tokens = self.sizes.sum(axis=1)
        most = max(
            len(_best_fit(tokens[rows], self.budget)) for rows in map(self._rows_of, range(self.updates))
        )
        return math.ceil(most / self.ranks)

    @property
    def packs(self) -> int:
        """Micro-batches per update over all ranks."""
        return self.steps * self.ranks

    def order(self, epoch: int) -> np.ndarray:
        """The rows in the order of an epoch: that of the padded path with the same seed.

        That path's is accelerate's SeedableRandomSampler, which transformers' trainer shuffles by.
        """
        import torch

        if self._state.get("epoch") != epoch:
            shuffle = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(len(self.sizes), generator=shuffle).numpy()
            self._state.update(epoch=epoch, order=order)
        return self._state["order"]

    def summary(self, updates: int = 20) -> dict[str, float | int]:
        """Counts of the run, and how even its first `updates` updates are.

        `fill` is the share of the packs' budget that is used. `imbalance` is how far the busiest rank lies
        above the mean, in text or in image tokens, whichever is worse.
        """
        first = min(updates, self.updates)
        loads = np.array([self.sizes[pack].sum(axis=0) for pack in self[: first * self.packs]])
        ranks = loads.reshape(first * self.steps, self.ranks, 2).sum(axis=0)
        return {
            "rows": len(self.sizes),
            "updates": self.updates,
            "micro_batches_per_update": self.packs,
            "micro_batch_tokens": self.budget,
            "fill": round(float(loads.sum() / (len(loads) * self.budget)), 4),
            "imbalance": round(imbalance(ranks), 4),
        }

    def _updates_in(self, epoch: int) -> int:
        if isinstance(self.updates_by, ByRows):
            return math.ceil(len(self.sizes) / self.updates_by.rows)
        lengths = self._state.setdefault("updates_in", {})
        if epoch not in lengths:
            lengths[epoch] = sum(1 for _ in self._stream(epoch))
        return lengths[epoch]

    def _rows_of(self, update: int) -> np.ndarray:
        """The rows of an update, by rows."""
        assert isinstance(self.updates_by, ByRows)
        epoch, place = divmod(update, self._updates_in(0))
        return self.order(epoch)[place * self.updates_by.rows : (place + 1) * self.updates_by.rows]

    def _balanced(self, update: int) -> list[Pack]:
        """The packs of an update by step and rank: even packs first, then even ranks."""
        if isinstance(self.updates_by, ByRows):
            rows, start = self._rows_of(update), None
        else:
            bins = self._streamed(update)
            rows = np.array([row for pack in bins for row in pack])
            start = np.repeat(np.arange(len(bins)), [len(pack) for pack in bins])
        sizes = self.sizes[rows]
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
        return stream(
            self.order(epoch),
            self.sizes.sum(axis=1),
            packs=self.packs,
            # A little room lets `balance` exchange rows of unlike make-up.
            budget=max(int(self.budget * (1 - SLACK)), int(self.sizes.sum(axis=1).max())),
            buffer=by.buffer,
            max_wait=by.max_wait,
        )

    def _streamed(self, update: int) -> list[Pack]:
        """The packs of an update, by tokens: the next of the stream, or replayed from its epoch's start."""
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
) -> Iterator[list[Pack]]:
    """Updates of `packs` packs out of a buffer of at most `buffer` rows of the order; every row comes once.

    Rows that `max_wait` updates have passed over go first, the oldest before all: at least `packs` of them
    fit, so a row waits for at most max_wait + ceil(buffer / packs) updates. The others go by length, longest
    first, each to the fullest pack that takes it. At the end of the order the buffer drains.
    """
    arrivals = iter(np.asarray(order).tolist())
    waiting: deque[tuple[int, int]] = deque()  # (update of arrival, row), oldest first
    update = 0
    while True:
        while len(waiting) < buffer and (row := next(arrivals, None)) is not None:
            waiting.append((update, row))
        if not waiting:
            return
        overdue = [row for arrival, row in waiting if update - arrival >= max_wait]
        held = set(overdue)
        others = [row for _, row in waiting if row not in held]
        others.sort(key=lambda row: -int(tokens[row]))
        bins, rest = _fill(overdue + others, tokens, packs, budget)
        left = set(rest)
        waiting = deque(item for item in waiting if item[1] in left)
        update += 1
        yield bins


def _fill(rows: Sequence[int], tokens: np.ndarray, packs: int, budget: int) -> tuple[list[Pack], list[int]]:
    """Rows, in turn, each into the fullest pack that takes it; and the rows that none takes."""
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


def _best_fit(tokens: np.ndarray, budget: int) -> list[Pack]:
    """As few packs as best-fit decreasing needs for items of these sizes: lists of their places."""
    bins: list[Pack] = []
    room: list[tuple[int, int]] = []
    for place in np.argsort(-tokens, kind="stable").tolist():
        size = int(tokens[place])
        found = bisect_left(room, (size, -1))
        left, pack = room.pop(found) if found < len(room) else (budget, len(bins))
        if pack == len(bins):
            bins.append([])
        bins[pack].append(place)
        insort(room, (left - size, pack))
    return bins


def balance(sizes: Sizes, packs: int, budget: int, start: np.ndarray | None = None) -> np.ndarray:
    """The pack of each item, for `packs` packs of at most `budget` tokens, even in both kinds of tokens.

    Greedy (the largest item to the emptiest pack), or from the packs that `start` gives; then exchanges, see
    `exchange`. Raises PackingError if the items do not fit.
    """
    tokens = sizes.sum(axis=1)
    pack_of = start if start is not None else _spread_out(_weights(sizes, packs), tokens, packs, budget)
    if pack_of is None:  # tight: as best-fit decreasing packs them
        bins = _best_fit(tokens, budget)
        if len(bins) > packs:
            raise PackingError(f"{tokens.sum()} tokens do not fit in {packs} packs of {budget}")
        pack_of = np.empty(len(tokens), dtype=np.int64)
        for pack, items in enumerate(bins):
            pack_of[items] = pack
    return exchange(sizes, pack_of, budget, np.arange(packs))


def _weights(sizes: Sizes, carriers: int) -> np.ndarray:
    """Sizes in fair shares: over all items each kind adds up to the number of carriers."""
    mean = sizes.sum(axis=0) / carriers
    return np.where(mean > 0, sizes / np.maximum(mean, 1e-9), 0.0)


def _spread_out(weights: np.ndarray, tokens: np.ndarray, packs: int, budget: int) -> np.ndarray | None:
    """The pack of each item, largest item first to where it hurts least; None if one finds no room."""
    load, used = np.zeros((packs, 2)), np.zeros(packs, dtype=np.int64)
    pack_of = np.empty(len(tokens), dtype=np.int64)
    for item in np.argsort(-weights.max(axis=1), kind="stable").tolist():
        after = load + weights[item]
        cost = after.max(axis=1) + 1e-3 * after.sum(axis=1)
        cost[used + tokens[item] > budget] = np.inf
        pack = int(cost.argmin())
        if cost[pack] == np.inf:
            return None
        load[pack] = after[pack]
        used[pack] += tokens[item]
        pack_of[item] = pack
    return pack_of


def exchange(
    sizes: Sizes,
    pack_of: np.ndarray,
    budget: int,
    carrier_of: np.ndarray,
    step_of: np.ndarray | None = None,
) -> np.ndarray:
    """The pack of each item after exchanges of two, or moves of one, that bring the busiest carriers down.

    A carrier is what must not be busier than others: a pack, or a rank with its packs; `carrier_of` names the
    one of each pack. Each round, of which there are at most as many as packs, takes the exchange with the
    busiest carrier after which the busier of the two is least busy; a carrier that no exchange helps is left
    alone from then on. With `step_of`, packs exchange with packs of the same step only, and none grows beyond
    GIVE times the largest of its step: there the ranks wait for one another.
    """
    packs, carriers = len(carrier_of), int(carrier_of.max()) + 1
    # A phantom item of no size in each pack makes a move an exchange with it.
    weights = np.vstack([_weights(sizes, carriers), np.zeros((packs, 2))])
    tokens = np.concatenate([sizes.sum(axis=1), np.zeros(packs, dtype=np.int64)])
    pack_of = np.concatenate([pack_of, np.arange(packs)])
    filled = np.stack([np.bincount(pack_of, weights[:, kind], packs) for kind in (0, 1)], axis=1)
    load = np.stack([np.bincount(carrier_of, filled[:, kind], carriers) for kind in (0, 1)], axis=1)
    used = np.bincount(pack_of, tokens, packs).astype(np.int64)
    ceiling = np.full((packs, 2), np.inf)
    if step_of is None:
        step_of = np.zeros(packs, dtype=np.int64)
    else:
        for step in range(int(step_of.max()) + 1):
            ceiling[step_of == step] = filled[step_of == step].max(axis=0) * GIVE
    settled = np.zeros(carriers, dtype=bool)
    for _ in range(packs):
        busy = np.where(settled, 0.0, load.max(axis=1))
        worst = int(busy.argmax())
        if busy[worst] <= ENOUGH:
            break
        least, pair = busy[worst] - 1e-9, None
        for pack in np.flatnonzero(carrier_of == worst).tolist():
            partners = (step_of == step_of[pack]) & (carrier_of != worst)
            mine, others = np.flatnonzero(pack_of == pack), np.flatnonzero(partners[pack_of])
            if not len(others):
                continue
            home = pack_of[others]
            gain = weights[others][None] - weights[mine][:, None]  # (mine, others, 2): this pack's
            grow = tokens[others][None] - tokens[mine][:, None]
            score = np.maximum((load[worst] + gain).max(axis=2), (load[carrier_of[home]] - gain).max(axis=2))
            over = (filled[pack] + gain > ceiling[pack]) | (filled[home] - gain > ceiling[home])
            score[over.any(axis=2) | (used[pack] + grow > budget) | (used[home] - grow > budget)] = np.inf
            if score.min() < least:
                here, there = divmod(int(score.argmin()), len(others))
                least, pair = score[here, there], (int(mine[here]), int(others[there]))
        if pair is None:
            settled[worst] = True
            continue
        one, other = pair
        pack, partner = pack_of[one], pack_of[other]
        for kind, change in ((filled, weights), (used, tokens)):
            kind[pack] += change[other] - change[one]
            kind[partner] -= change[other] - change[one]
        load[worst] += weights[other] - weights[one]
        load[carrier_of[partner]] -= weights[other] - weights[one]
        pack_of[one], pack_of[other] = partner, pack
    return pack_of[:-packs]


def placed(loads: np.ndarray, ranks: int) -> np.ndarray:
    """The place of each pack, step x ranks + rank, for loads (packs, 2).

    Packs of like size share a step, where the ranks wait for one another; within it the largest goes to the
    rank that has had least so far.
    """
    loads = loads / np.maximum(loads.mean(axis=0), 1e-9)
    order = np.argsort(-loads.sum(axis=1), kind="stable")
    total, places = np.zeros((ranks, 2)), np.empty(len(loads), dtype=np.int64)
    for first in range(0, len(loads), ranks):
        free = list(range(ranks))
        for pack in order[first : first + ranks].tolist():
            rank = min(free, key=lambda rank: (float((total[rank] + loads[pack]).max()), rank))
            free.remove(rank)
            total[rank] += loads[pack]
            places[pack] = first + rank
    return places


def imbalance(loads: np.ndarray) -> float:
    """How far the busiest of (carriers, kinds) loads lies above the mean of its kind: 0.05 is 5%.

    >>> imbalance(np.array([[100, 3], [110, 1]]))
    0.5
    """
    mean = loads.mean(axis=0)
    kinds = mean > 0
    return float((loads.max(axis=0)[kinds] / mean[kinds]).max() - 1) if kinds.any() else 0.0
