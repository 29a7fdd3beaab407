"""The soup stage: train the further fine-tunings, score every ingredient on the validation split, merge.

sft/soup.py merges and measures; this file brings it what a chain has: basic SFT's last phase and its start,
and the rollout pool, which scores a checkpoint by its greedy answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chain.recipe import Recipe
from chain.stages import Context, Scores, evaluate
from core.files import read_json, write_json
from core.strict import ConfigError, parse

RECORD = "soup.json"
"""In the stage's folder: what sft.soup.soup measured, each ingredient with its name."""
HELD_OUT = "ingredients_eval.json"
"""In the stage's folder: the ingredients' held-out scores, for the report alone."""


def cook(job: Mapping[str, Any]) -> None:
    """The soup's process: leaves checkpoint/, variants/<number>/ and soup.json in the job's `out`."""
    from sft.soup import soup
    from sft.train import train, variant_of, variant_start

    recipe = parse(Recipe, job["recipe"], "recipe")
    assert recipe.soup, "a soup job is made for recipes with a soup"
    assert recipe.basic_sft, "which have basic_sft: Recipe checks it"
    out, sets = Path(job["out"]), {name: Path(place) for name, place in job["sets"].items()}
    folders = {name: Path(folder) for name, folder in job["stages"].items()}
    start = variant_start(recipe.basic_sft, folders["basic_sft"], folders["core"] / "checkpoint")
    named = {"basic_sft": folders["basic_sft"] / "checkpoint"}
    for number, variant in enumerate(recipe.soup.variants, start=1):
        train(
            variant_of(recipe.basic_sft, variant),
            model=start,
            out=out / "variants" / str(number),
            seed=job["seed"] + variant.seed_offset,
            sets=sets,
        )
        named[f"variant {number}"] = out / "variants" / str(number) / "checkpoint"
    if os.environ.get("RANK", "0") != "0":
        return
    score = _scorer(recipe, start, job["urls"], sets)
    record = soup(recipe.soup, list(named.values()), out / "checkpoint", score=score, start=start)
    record["ingredients"] = [
        # Paths in a folder that is still being written would be wrong in a minute; names stay.
        {"name": name, **{key: value for key, value in ingredient.items() if key != "path"}}
        for name, ingredient in zip(named, record["ingredients"], strict=True)
    ]
    write_json(out / RECORD, record)


def evaluate_with_ingredients(context: Context) -> Scores:
    """Held-out scores of the merge; those of its ingredients go to a file of their own."""
    scores = evaluate(context)
    basic = context.folders["basic_sft"]
    found: dict[str, Any] = {}
    if (basic / "eval.json").exists():
        found["basic_sft"] = read_json(basic / "eval.json")["scores"]
    for folder in sorted((context.out / "variants").iterdir(), key=lambda folder: int(folder.name)):
        found[f"variant {folder.name}"] = evaluate(context, folder / "checkpoint", keep_samples=False)
    write_json(context.out / HELD_OUT, found)
    return scores


def record(folder: Path) -> dict[str, Any] | None:
    """The finished soup's record with held-out scores under `eval`; None if there is no soup."""
    if not (folder / RECORD).exists():
        return None
    found = read_json(folder / RECORD)
    held_out = read_json(folder / HELD_OUT) if (folder / HELD_OUT).exists() else {}
    merged = read_json(folder / "eval.json")["scores"] if (folder / "eval.json").exists() else {}
    ingredients = [{**one, "eval": held_out.get(one["name"], {})} for one in found["ingredients"]]
    return {**found, "ingredients": ingredients, "merged": {**found["merged"], "eval": merged}}


def _scorer(recipe: Recipe, core: Path, urls: list[str], sets: Mapping[str, Path]) -> Callable[[Path], float]:
    """A function from a checkpoint folder to the share of validation rows that it answers right, greedily."""
    from corpus.records import load_records
    from rl.evaluate import judge
    from rl.rollout.client import RolloutClient

    if recipe.eval is None or recipe.rollout is None or recipe.soup is None:
        raise ConfigError("soup scores its ingredients by generating: the recipe needs rollout and eval")
    source, max_tokens = recipe.soup.validation, recipe.eval.max_completion_tokens
    rows = load_records(sets[source.set], split=source.split, rows=source.rows, seed=recipe.seed)
    client = RolloutClient.of_pool(recipe.rollout, urls, core)

    def score(checkpoint: Path) -> float:
        client.load_checkpoint(checkpoint)
        return sum(row.correct for row in judge(rows, client, max_tokens)) / len(rows)

    return score
