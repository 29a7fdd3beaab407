"""The soup stage: trains the variants, scores every ingredient on the validation split, and merges.

sft/soup.py merges and measures. This file supplies its inputs from the chain: basic SFT's last phase and initial
checkpoint, and the rollout pool, which scores a checkpoint by its greedy answers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from chain.context import Context, Scores
from chain.evaluate import evaluate
from chain.recipe import Recipe
from core.files import read_json, write_json
from core.strict import Strict
from core.training.job import Job
from rl.job import ServedJob
from sft.config import SFTConfig, SoupConfig

RECORD = "soup.json"
"""File in the stage's folder: the measurements of sft.soup.soup, with the names of the ingredients."""
HELD_OUT = "ingredients_eval.json"
"""File in the stage's folder: the ingredients' held-out scores, which only the report uses."""


class SoupWork(Strict):
    """The soup's configuration with its inputs from other parts of the recipe."""

    soup: SoupConfig
    basic_sft: SFTConfig
    """Configuration of basic SFT, whose last phase is trained again for each variant."""
    basic_sft_folder: Path
    """Folder of the finished basic SFT; its checkpoint is the first ingredient."""
    core: Path
    """The initial checkpoint of basic SFT."""
    max_completion_tokens: int
    """Longest greedy answer for the score of an ingredient, tokens."""


def work(recipe: Recipe, folders: Mapping[str, Path]) -> SoupWork:
    """The soup of a recipe. `folders` maps the stages before the soup to their folders."""
    assert recipe.soup, "a recipe without a soup has no such stage"
    assert recipe.basic_sft, "Recipe checks it"
    assert recipe.eval, "Recipe checks it"
    basic = SFTConfig(**{name: getattr(recipe.basic_sft, name) for name in SFTConfig.model_fields})
    return SoupWork(
        soup=recipe.soup,
        basic_sft=basic,
        basic_sft_folder=folders["basic_sft"],
        core=folders["core"] / "checkpoint",
        max_completion_tokens=recipe.eval.max_completion_tokens,
    )


def train(cfg: SoupWork, job: ServedJob) -> Path:
    """Train the variants, score and merge; writes checkpoint/, variants/<number>/ and soup.json to `job.out`."""
    from sft.soup import soup
    from sft.train import train as fine_tune
    from sft.train import variant_of, variant_start

    start = variant_start(cfg.basic_sft, cfg.basic_sft_folder, cfg.core)
    out, named = job.out, {"basic_sft": cfg.basic_sft_folder / "checkpoint"}
    for number, variant in enumerate(cfg.soup.variants, start=1):
        folder, seed = out / "variants" / str(number), job.seed + variant.seed_offset
        one = Job(stage=job.stage, model=start, out=folder, seed=seed, sets=job.sets)
        named[f"variant {number}"] = fine_tune(variant_of(cfg.basic_sft, variant), one)
    if os.environ.get("RANK", "0") != "0":
        return out / "checkpoint"
    score = _scorer(cfg, job, start)
    record = soup(cfg.soup, list(named.values()), out / "checkpoint", score=score, start=start)
    record["ingredients"] = [
        # The partial folder is renamed later, which invalidates paths. Names stay valid.
        {"name": name, **{key: value for key, value in ingredient.items() if key != "path"}}
        for name, ingredient in zip(named, record["ingredients"], strict=True)
    ]
    write_json(out / RECORD, record)
    return out / "checkpoint"


def evaluate_with_ingredients(context: Context) -> Scores:
    """Held-out scores of the merge. The scores of its ingredients go to a separate file."""
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


def _scorer(cfg: SoupWork, job: ServedJob, start: Path) -> Callable[[Path], float]:
    """A function from a checkpoint folder to its greedy accuracy on the validation rows, in [0, 1]."""
    from corpus.records import load_source
    from rl.evaluate import accuracy
    from rl.limits import askable
    from rl.rollout.client import RolloutClient

    source = cfg.soup.validation
    records = load_source(source, job.sets, job.seed)
    rows = askable(records, source, job.pool, start, cfg.max_completion_tokens)
    client = RolloutClient.of_pool(job.pool, job.urls, start, addresses=job.addresses)

    def score(checkpoint: Path) -> float:
        client.load_checkpoint(checkpoint)
        return accuracy(rows, client, cfg.max_completion_tokens)

    return score
