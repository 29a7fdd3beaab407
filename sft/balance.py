"""Balances the rows of one update over packs and ranks, so that ranks do not wait for one another.

It balances two kinds of tokens: text tokens (the language model's work) and image tokens (the tower's work).
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

Sizes = np.ndarray
"""(rows, 2), int64: text tokens and image tokens of each row."""
Pack = list[int]
"""Row numbers of one micro-batch of one rank."""

ENOUGH = 1.02
"""Relative excess over the mean up to which a pack or rank counts as balanced."""
GIVE = 1.05
"""Factor by which balancing the ranks may raise a step's largest pack."""


class PackingError(ValueError):
    """A row does not fit in a pack."""


def best_fit(tokens: np.ndarray, budget: int) -> list[Pack]:
    """The packs that best-fit decreasing makes of items with these sizes, as lists of item indices."""
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
    """The pack of each item (items,), for `packs` packs of at most `budget` tokens, balanced in both kinds of tokens.

    It starts from a greedy assignment (the largest item to the emptiest pack) or from `start`, and then improves it by
    `exchange`. Raises PackingError if the items do not fit.
    """
    tokens = sizes.sum(axis=1)
    pack_of = start if start is not None else _spread_out(_weights(sizes, packs), tokens, packs, budget)
    if pack_of is None:  # little room: use best-fit decreasing
        bins = best_fit(tokens, budget)
        if len(bins) > packs:
            raise PackingError(f"{tokens.sum()} tokens do not fit in {packs} packs of {budget}")
        pack_of = np.empty(len(tokens), dtype=np.int64)
        for pack, items in enumerate(bins):
            pack_of[items] = pack
    return exchange(sizes, pack_of, budget, np.arange(packs))


def _weights(sizes: Sizes, carriers: int) -> np.ndarray:
    """Sizes (items, kinds), scaled so that each kind sums to the number of carriers."""
    mean = sizes.sum(axis=0) / carriers
    return np.where(mean > 0, sizes / np.maximum(mean, 1e-9), 0.0)


def _spread_out(weights: np.ndarray, tokens: np.ndarray, packs: int, budget: int) -> np.ndarray | None:
    """The pack of each item, the largest first, each to the least loaded pack; None if one does not fit."""
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
    """The pack of each item after swaps of two items, or moves of one, that lower the load of the busiest carriers.

    A carrier is a pack, or a rank with its packs; `carrier_of` (packs,) maps packs to them. A round chooses the swap
    with the busiest carrier that minimises the larger load of the two carriers; there are at most as many rounds as
    packs. A carrier that no swap improves is skipped. With `step_of`, packs swap only within their step, where ranks
    wait for one another, and no pack grows beyond GIVE times the largest of its step.
    """
    packs, carriers = len(carrier_of), int(carrier_of.max()) + 1
    # Each pack gets an empty item, so that a move is a swap with it.
    weights = np.vstack([_weights(sizes, carriers), np.zeros((packs, 2))])
    tokens = np.concatenate([sizes.sum(axis=1), np.zeros(packs, dtype=np.int64)])
    pack_of = np.concatenate([pack_of, np.arange(packs)])
    filled = np.stack([np.bincount(pack_of, weights[:, kind], packs) for kind in (0, 1)], axis=1)
    load = np.stack([np.bincount(carrier_of, filled[:, kind], carriers) for kind in (0, 1)], axis=1)
    used = np.bincount(pack_of, tokens, packs).astype(np.int64)
    ceiling = np.full((packs, 2), np.inf)
    for step in range(0 if step_of is None else int(step_of.max()) + 1):
        ceiling[step_of == step] = filled[step_of == step].max(axis=0) * GIVE
    step_of = np.zeros(packs, dtype=np.int64) if step_of is None else step_of
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
    """The position of each pack, step x ranks + rank, for loads (packs, 2).

    Packs of similar size share a step, because ranks wait for one another in it. Within a step, the largest pack goes
    to the rank with the least load so far.
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
    """Largest relative excess of loads (carriers, kinds) over the mean of their kind: 0.05 is 5%.

    >>> imbalance(np.array([[100, 3], [110, 1]]))
    0.5
    """
    mean = loads.mean(axis=0)
    kinds = mean > 0
    return float((loads.max(axis=0)[kinds] / mean[kinds]).max() - 1) if kinds.any() else 0.0
