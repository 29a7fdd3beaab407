"""The positions of prompts and completions in a packed row, and which tokens attend to which."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PrefixGroup:
    """One prompt and its completions, lengths in tokens."""

    prompt: int
    completions: tuple[int, ...]


@dataclass(frozen=True)
class PrefixLayout:
    """The groups of a packed row, in order: [prompt, its completions, next prompt, its completions, ...].

    >>> layout = PrefixLayout((PrefixGroup(5, (2, 3)), PrefixGroup(4, (1,))))
    >>> layout.tokens, list(layout.segments()), list(layout.shared())
    (15, [(0, 5), (5, 7), (7, 10), (10, 15)], [(0, 5, 10)])
    """

    groups: tuple[PrefixGroup, ...]

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return sum(group.prompt + sum(group.completions) for group in self.groups)

    def segments(self) -> Iterator[tuple[int, int]]:
        """(start, end) of every part that is causal within itself: a prompt or a completion.

        A prompt and its only completion form one part.
        """
        start = 0
        for group in self.groups:
            lengths = [length for length in group.completions if length]
            parts = [group.prompt + sum(lengths)] if len(lengths) == 1 else [group.prompt, *lengths]
            for length in parts:
                yield start, start + length
                start += length

    def shared(self) -> Iterator[tuple[int, int, int]]:
        """(prompt start, prompt end, end of its last completion) of every group of several completions."""
        start = 0
        for group in self.groups:
            middle = start + group.prompt
            end = middle + sum(group.completions)
            if sum(length > 0 for length in group.completions) > 1:
                yield start, middle, end
            start = end

    def sees(self, device: torch.device | str) -> Callable[..., torch.Tensor]:
        """Flex attention's `mask_mod`: whether the query at one position sees the key at another."""
        lengths = [length for group in self.groups for length in (group.prompt, *group.completions)]
        # Per token: the number of its group, and 0 in a prompt, else the number of its completion.
        group = [number for number, one in enumerate(self.groups) for _ in (0, *one.completions)]
        own = [number for one in self.groups for number in range(len(one.completions) + 1)]

        def per_token(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, device=device).repeat_interleave(torch.tensor(lengths, device=device))

        groups, segments = per_token(group), per_token(own)

        def mask(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            within = (segments[key] == 0) | (segments[key] == segments[query])
            return (key <= query) & (groups[key] == groups[query]) & within

        return mask
