"""From TRL's padded batch to packed rows: each prompt once, then its completions.

Axes: B rows of the padded batch, N tokens of a packed row, K hidden states that are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rl.shared_prefix.layout import PrefixGroup, PrefixLayout
from rl.shared_prefix.routing import UNKNOWN

Experts = tuple[np.ndarray, np.ndarray]
"""The experts of a prompt's and of a completion's tokens, each (tokens, layers, experts per token)."""


@dataclass(frozen=True)
class Row:
    """A prompt with one completion, without padding; a masked completion is empty."""

    prompt: tuple[int, ...]
    tiles: tuple[int, ...]
    """Numbers of the prompt's image tiles, in order. An any-resolution image counts as one tile."""
    completion: tuple[int, ...]
    experts: Experts | None = field(default=None, compare=False)
    """Routing replay: those of the prompt's and of the completion's tokens."""

    @property
    def group(self) -> tuple[Any, ...]:
        """Rows with equal values share their prompt."""
        return self.prompt, self.tiles


def rows_of(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_tokens: int,
    tiles: Sequence[Sequence[int]],
    experts: Sequence[Experts] | None = None,
) -> list[Row]:
    """The rows of TRL's padded batch (B, tokens): prompts are padded on the left, completions on the right.

    The last `completion_tokens` columns hold the completions; `tiles` and `experts` have one entry per row.
    """
    parts = slice(None, -completion_tokens), slice(-completion_tokens, None)
    rows = []
    chosen: Sequence[Experts | None] = experts or [None] * len(input_ids)
    for ids, mask, own, theirs in zip(
        input_ids.tolist(), attention_mask.tolist(), tiles, chosen, strict=True
    ):
        prompt, completion = (
            tuple(token for token, kept in zip(ids[part], mask[part], strict=True) if kept) for part in parts
        )
        rows.append(Row(prompt, tuple(own), completion, theirs))
    return rows


def groups_of(rows: Sequence[Row]) -> dict[Any, list[int]]:
    """Numbers of the rows that share a prompt, by `Row.group`, in the order of their first rows."""
    groups: dict[Any, list[int]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(row.group, []).append(number)
    return groups


@dataclass(frozen=True)
class Packed:
    """Rows in one packed row of N tokens, of which K hidden states are scored.

    A completion's last token predicts nothing, so it is omitted, unless the router's balance is measured.
    """

    input_ids: torch.Tensor
    """(1, N)"""
    position_ids: torch.Tensor
    """(1, N); completions continue after their prompt."""
    weights: torch.Tensor
    """(1, N): the number of rows that a token stands for."""
    layout: PrefixLayout
    keep: torch.Tensor
    """(K,) positions that predict a completion token; a prompt's last one appears once per completion."""
    labels: torch.Tensor
    """(1, K)"""
    places: tuple[torch.Tensor, torch.Tensor]
    """Row and column of every scored token in the padded batch."""
    rows: int
    """B of that batch."""
    tiles: list[int]
    """Tile numbers in the order of their tokens."""
    experts: torch.Tensor | None = None
    """Routing replay: (1, N, layers, experts per token), rl.shared_prefix.routing.UNKNOWN where none is known."""

    def unpacked(self, values: torch.Tensor, completion_tokens: int) -> torch.Tensor:
        """`values` (1, K) as (B, completion tokens), with 0 at positions that are not scored."""
        scored = values[0, : len(self.places[0])]
        padded = values.new_zeros((self.rows, completion_tokens)).index_put(self.places, scored)
        return padded if len(scored) else padded + 0 * values.sum()  # keeps a gradient, which is zero


def pack(rows: Sequence[Row], device: torch.device, *, whole: bool = False) -> Packed:
    """Pack rows: completions of the same prompt and images follow one copy of that prompt.

    Rows with a masked completion are omitted. With `whole` the packed row holds every token that TRL's pass computes,
    including last tokens and the prompts of masked rows.

    >>> two = [Row((7, 8), (), (1, 2)), Row((7, 8), (), (3,))]
    >>> packed = pack(two, torch.device("cpu"))
    >>> packed.input_ids.tolist(), packed.keep.tolist(), packed.labels.tolist()
    ([[7, 8, 1]], [1, 2, 1], [[1, 2, 3]])
    """
    draft = _Draft(rows, whole)
    # If no token is scored, one prompt stays: ranks run in step, and TRL needs a gradient.
    taken = [number for number, row in enumerate(rows) if row.completion or whole] or [0]
    for members in groups_of([rows[number] for number in taken]).values():
        draft.add([taken[member] for member in members])
    return draft.packed(device)


@dataclass
class _Draft:
    """A packed row under construction."""

    rows: Sequence[Row]
    whole: bool
    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    weights: list[int] = field(default_factory=list)
    keep: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    places: list[tuple[int, int]] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    layout: list[PrefixGroup] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)

    def add(self, members: Sequence[int]) -> None:
        """Append a group: the prompt of its rows, then their completions."""
        prompt = self.rows[members[0]].prompt
        self.ids += prompt
        self.positions += range(len(prompt))
        self.weights += [len(members)] * len(prompt)
        self.tiles += self.rows[members[0]].tiles
        last, lengths = len(self.ids) - 1, []
        self._note_experts(members[0], 0, len(prompt))
        for number in members:
            completion = self.rows[number].completion
            if not completion:
                continue
            read = completion if self.whole else completion[:-1]
            self.keep += [last, *range(len(self.ids), len(self.ids) + len(completion) - 1)]
            self.labels += completion
            self.places += [(number, column) for column in range(len(completion))]
            self.ids += read
            self.positions += range(len(prompt), len(prompt) + len(read))
            self.weights += [1] * len(read)
            lengths.append(len(read))
            self._note_experts(number, 1, len(read))
        self.layout.append(PrefixGroup(len(prompt), tuple(lengths)))

    def _note_experts(self, number: int, part: int, tokens: int) -> None:
        """Append the experts of a row's prompt (part 0) or completion (part 1)."""
        if (experts := self.rows[number].experts) is not None:
            known = experts[part][:tokens]
            missing = ((0, tokens - len(known)), (0, 0), (0, 0))
            self.experts.append(np.pad(known, missing, constant_values=UNKNOWN))

    def packed(self, device: torch.device) -> Packed:
        def tensor(values: Sequence[int]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        return Packed(
            input_ids=tensor(self.ids)[None],
            position_ids=tensor(self.positions)[None],
            weights=tensor(self.weights)[None],
            layout=PrefixLayout(tuple(self.layout)),
            keep=tensor(self.keep or [0]),
            labels=tensor(self.labels or [0])[None],
            places=(tensor([row for row, _ in self.places]), tensor([column for _, column in self.places])),
            rows=len(self.rows),
            tiles=self.tiles,
            experts=torch.from_numpy(np.concatenate(self.experts))[None].to(device) if self.experts else None,
        )


def fitting(rows: Sequence[Row], budget: int) -> int:
    """The number of leading rows that fit in a packed row of `budget` tokens: at least one; whole groups if any fits.

    >>> rows = [Row((1, 2, 3), (), (4, 5))] * 2 + [Row((6, 7), (), (8, 9))] * 2
    >>> [fitting(rows, budget) for budget in (4, 6, 7, 11, 13)]
    [1, 1, 2, 2, 4]
    """
    tokens, seen, boundary = 0, set(), 0
    for index, row in enumerate(rows):
        if index and row.group != rows[index - 1].group:
            boundary = index
        if row.completion:
            tokens += len(row.completion) + (0 if row.group in seen else len(row.prompt))
            seen.add(row.group)
        if tokens > budget and index:
            return boundary or index
    return len(rows)
