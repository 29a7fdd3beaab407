"""A bench at the recipe's experiment trackers: a run beside those of the stages, with scores and tables of samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from chain.recipe import Recipe
from chain.tracking import Tracker
from core.files import read_json

BENCH = "bench.json"
"""The file of a bench in its folder."""
CHAIN = "chain.json"
"""File in a run's folder with the id of its group of runs."""


def track(
    recipe: Recipe, model: Path, folder: Path, names: Sequence[str], say: Callable[[str], None]
) -> None:
    """Send the scores of these names, and their samples, to the trackers.

    The checkpoint of a run joins the group of that run's stages. `say` takes a line for the user.
    """
    if not names:
        return
    bench = read_json(folder / BENCH)
    run_dir, group = model.parent.parent, f"bench-{model.parent.name}"
    if (run_dir / CHAIN).exists():
        group = read_json(run_dir / CHAIN)["id"]
    else:
        run_dir = folder
    tracker = Tracker(recipe.tracking, recipe.wandb, group, run_dir, {}, say)
    about = {name: bench[name] for name in ("model", "harness", "seed", "suite", "judge")}
    with tracker.stage(f"bench_{model.parent.name}", about) as run:
        run.bench({name: bench["tasks"][name] for name in names}, folder)
