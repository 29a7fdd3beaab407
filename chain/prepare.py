"""Data that a stage makes with its initial policy before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from chain.context import Context
from rl.config import Prepare, RLConfig


def prepare_nothing(context: Context) -> dict[str, Any]:
    """The `prepare` of stages that do not make data."""
    return {}


def prepare(context: Context) -> dict[str, Any]:
    """Make the sets of the stage's `prepare`; return per filter the counts of kept and dropped rows, with reasons."""
    parts: Prepare = context.config.prepare  # type: ignore[attr-defined]
    from rl import curate
    from rl.data import load_rows

    made: dict[str, Any] = {}
    sets = {name: Path(place) for name, place in context.sets.items()}
    seed = context.recipe.seed

    def progress(what: str) -> Callable[[int, int], None]:
        return lambda done, of: context.progress(f"{what} {done}/{of}")

    if parts.hard_cases:
        earlier = parts.hard_cases.stage
        config = context.recipe.stage(earlier)
        assert isinstance(config, RLConfig), "Recipe checks it"
        rows = load_rows(config.data, sets, seed)
        made["hard_cases"] = curate.hard_cases(
            parts.hard_cases, rows, context.folders[earlier] / "record.jsonl", context.out
        )
    for name, filter_rows in (("pass_at_k", curate.pass_at_k), ("harvest", curate.harvest)):
        if part := getattr(parts, name):
            made[name] = filter_rows(
                part,
                context.pool.serve(context.policy),
                sets,
                context.out,
                seed=seed,
                max_tokens=parts.max_completion_tokens,
                progress=progress(name),
                askable=context.askable(parts.max_completion_tokens),
            )
    return made
