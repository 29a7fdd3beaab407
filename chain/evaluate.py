"""Scores a checkpoint on the held-out sets, inside and outside a run."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chain.context import Context, Scores
from core.files import append_jsonl
from core.model.pictures import as_rgb
from core.model.prompts import shown
from core.strict import ConfigError


def evaluate(context: Context, model: Path | None = None, keep_samples: bool = True) -> Scores:
    """Score a checkpoint (by default the context's) on the held-out sets.

    With `keep_samples`, writes held_out.jsonl and samples.jsonl to `context.out`.
    """
    from rl.evaluate import evaluate as score

    cfg = context.recipe.eval
    if cfg is None:
        raise ConfigError("eval is missing from the recipe: it names the held-out sets")
    context.progress("rollout servers")
    client = context.pool.serve(model or context.policy)
    sets = {name: Path(place) for name, place in context.sets.items()}
    scores, judged = score(
        cfg,
        client,
        sets,
        lambda done, of: context.progress(f"evaluation {done}/{of}"),
        lambda source, records, length: context.askable(length)(source, records),
        context.recipe.folders,
    )
    if keep_samples:
        write_samples(context.out, [(row.to_dict(), shown(row.record)) for row in judged], cfg.samples)
    return scores


def write_samples(folder: Path, rows: Sequence[tuple[dict[str, Any], Sequence[Any]]], count: int) -> None:
    """Write judged rows (each with its images) to held_out.jsonl, and `count` of them to samples.jsonl.

    The first image of a sample is saved beside samples.jsonl; the key `image` holds its file name.
    """
    images = folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    for name in ("held_out.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for row, _ in rows:
        append_jsonl(folder / "held_out.jsonl", row)
    for number, index in enumerate(spread([row["set"] for row, _ in rows], count)):
        row, pictures = rows[index]
        file = f"images/{number:03d}.png" if pictures else None
        if file:
            as_rgb(pictures[0]).save(folder / file)
        append_jsonl(folder / "samples.jsonl", {**row, "image": file})


def spread(sets: Sequence[str], count: int) -> list[int]:
    """`count` indices of rows, distributed over the sets and evenly spaced within each set.

    The indices depend only on the sets' names, so that the samples of all stages show the same rows.
    """
    names = list(dict.fromkeys(sets))
    chosen: list[int] = []
    for place, name in enumerate(names):
        rows = [index for index, one in enumerate(sets) if one == name]
        share = min(len(rows), count // len(names) + (place < count % len(names)))
        chosen += [rows[number * len(rows) // share] for number in range(share)]
    return chosen
