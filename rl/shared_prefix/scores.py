"""The scores that passes compute for TRL, and functions that cut and join batches and scores."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid


class Scores(NamedTuple):
    """The results of TRL's `_get_per_token_logps_and_entropies`."""

    logps: torch.Tensor
    """(rows, completion tokens), 0 at positions that are not scored."""
    entropies: torch.Tensor | None
    aux_loss: torch.Tensor | None
    """The router's balancing loss of a mixture of experts."""

    def detached(self) -> Scores:
        """The same values without their autograd graph."""
        entropies, aux = self.entropies, self.aux_loss
        return Scores(
            self.logps.detach(),
            None if entropies is None else entropies.detach(),
            None if aux is None else aux.detach(),
        )


def joined_scores(parts: Sequence[Scores]) -> Scores:
    """The scores of all packs' rows; the router's loss is the mean over rows."""
    if len(parts) == 1:
        return parts[0]
    rows = sum(len(part.logps) for part in parts)
    entropies = [part.entropies for part in parts if part.entropies is not None]
    shares = [part.aux_loss * len(part.logps) / rows for part in parts if part.aux_loss is not None]
    return Scores(
        torch.cat([part.logps for part in parts]),
        torch.cat(entropies) if entropies else None,
        torch.stack(shares).sum() if shares else None,
    )


def taken(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """The given rows of TRL's batch; scalars are unchanged, pixels are selected row by row."""
    by_row = split_pixel_values_by_grid(batch)
    some: dict[str, Any] = {}
    for name, value in by_row.items():
        if isinstance(value, list):
            some[name] = [value[row] for row in rows]
        elif isinstance(value, torch.Tensor) and value.ndim:
            some[name] = value[list(rows)]
        else:
            some[name] = value
    return unsplit_pixel_values_by_grid(some)
