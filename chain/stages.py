"""The chain's stages in order: what each starts from, what runs it, and what happens around its training.

    core -> basic_sft -> soup -> longcot_sft -> rlvr -> think_fusion -> mixed_rl

A stage that a recipe leaves out is skipped over. `prepare` and `evaluate` run in the runner's process, which
imports no torch; training runs in a child (chain/worker.py).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chain.pool import Pool
from chain.recipe import ALIASES, Recipe
from core.files import append_jsonl
from core.model.pictures import as_rgb
from core.strict import ConfigError, Strict, nearest

Progress = Callable[[str], None]
Scores = dict[str, dict[str, Any]]
"""`{"thinking": {accuracy, n, ci95, format_rate, mean_tokens}, "direct": {...}}`."""


@dataclass(frozen=True)
class Context:
    """What a stage sees of the run."""

    recipe: Recipe
    stage: Stage
    config: Strict
    """The stage's own part of the recipe."""
    model: Path | None
    """Checkpoint folder: before training the one that the stage starts from, after it the stage's own."""
    out: Path
    """Folder to write to: for `prepare` the sets' folder, for `evaluate` the finished stage's."""
    sets: Mapping[str, str]
    """Data set name -> Parquet file, folder or hub id."""
    folders: Mapping[str, Path]
    """Folders of the stages before this one."""
    pool: Pool
    progress: Progress = lambda text: None
    """Takes a word about what is going on, many times a second if need be."""


def prepare_nothing(context: Context) -> dict[str, Any]:
    """For stages that make no data of their own."""
    return {}


def prepare(context: Context) -> dict[str, Any]:
    """Make the sets of the stage's `prepare`; per filter, what it kept and dropped and why."""
    parts = context.config.prepare  # type: ignore[attr-defined]
    if not any(getattr(parts, name) for name in ("hard_cases", "pass_at_k", "harvest")):
        return {}
    from rl import curate
    from rl.data import load_rows

    made: dict[str, Any] = {}
    sets = {name: Path(place) for name, place in context.sets.items()}
    seed = context.recipe.seed

    def progress(what: str) -> Callable[[int, int], None]:
        return lambda done, of: context.progress(f"{what} {done}/{of}")

    if parts.hard_cases:
        earlier = parts.hard_cases.stage
        rows = load_rows(getattr(context.recipe, earlier).data, sets, seed)
        made["hard_cases"] = curate.hard_cases(
            parts.hard_cases, rows, context.folders[earlier] / "record.jsonl", context.out
        )
    for name, filter_rows in (("pass_at_k", curate.pass_at_k), ("harvest", curate.harvest)):
        if part := getattr(parts, name):
            made[name] = filter_rows(
                part,
                context.pool.serve(_model(context)),
                sets,
                context.out,
                seed=seed,
                max_tokens=parts.max_completion_tokens,
                progress=progress(name),
            )
    return made


def evaluate(context: Context, model: Path | None = None, keep_samples: bool = True) -> Scores:
    """Score a checkpoint, the context's unless given, on the held-out sets.

    Leaves held_out.jsonl and samples.jsonl in `context.out` if asked to keep samples.
    """
    from rl.evaluate import evaluate as score

    cfg = context.recipe.eval
    if cfg is None:
        raise ConfigError("eval is missing from the recipe: it names the held-out sets")
    context.progress("rollout servers")
    client = context.pool.serve(model or _model(context))
    sets = {name: Path(place) for name, place in context.sets.items()}
    scores, judged = score(cfg, client, sets, lambda done, of: context.progress(f"evaluation {done}/{of}"))
    if keep_samples:
        write_samples(context.out, [(row.to_dict(), row.record["images"]) for row in judged], cfg.samples)
    return scores


def write_samples(folder: Path, rows: Sequence[tuple[dict[str, Any], Sequence[Any]]], count: int) -> None:
    """Write judged rows (each with its images) to held_out.jsonl, and `count` of them to samples.jsonl.

    A sample's first image is saved beside it, and named by its key `image`.
    """
    images = folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    for name in ("held_out.jsonl", "samples.jsonl"):
        (folder / name).unlink(missing_ok=True)
    for row, _ in rows:
        append_jsonl(folder / "held_out.jsonl", row)
    for number, index in enumerate(spread([row["mode"] for row, _ in rows], count)):
        row, pictures = rows[index]
        file = f"images/{number:03d}.png" if pictures else None
        if file:
            as_rgb(pictures[0]).save(folder / file)
        append_jsonl(folder / "samples.jsonl", {**row, "image": file})


def spread(modes: Sequence[str], count: int) -> list[int]:
    """`count` indices, shared out over the modes and evenly spaced within each.

    They depend on the modes alone, so that every stage's samples are of the same rows and can be compared.
    """
    kinds = list(dict.fromkeys(modes))
    chosen: list[int] = []
    for place, kind in enumerate(kinds):
        rows = [index for index, mode in enumerate(modes) if mode == kind]
        share = min(len(rows), count // len(kinds) + (place < count % len(kinds)))
        chosen += [rows[number * len(rows) // share] for number in range(share)]
    return chosen


@dataclass(frozen=True)
class Stage:
    """One stage of the chain."""

    name: str
    train: str
    """`package.module:function`, called `train(cfg, job)` in the stage's process; returns the checkpoint folder."""
    title: str
    needs_pool: bool = False
    """Whether training itself samples from the rollout servers: its job is then a rl.job.ServedJob."""
    trained_as: str = ""
    """Name of the stage whose learner it uses; "": its own."""
    work: Callable[[Recipe, Mapping[str, Path]], Strict] | None = None
    """Makes the `cfg` of `train` from the recipe and the folders of the stages before; None: its part of the recipe."""
    imports_vllm: Callable[[Recipe], bool] = lambda recipe: False
    """Whether its process may import vLLM."""
    prepare: Callable[[Context], dict[str, Any]] = prepare_nothing
    evaluate: Callable[[Context], Scores] = evaluate

    def config(self, recipe: Recipe) -> Strict | None:
        """Its part of a recipe; None if the recipe leaves it out."""
        return getattr(recipe, self.name)

    def learner(self, recipe: Recipe) -> tuple[int, int]:
        """Processes that train it, and CPU threads of each."""
        config = self._trained(recipe)
        learner = getattr(config, "learner", None)
        if learner is None:
            return 1, getattr(config, "threads", 1)
        return learner.processes, learner.threads

    def saves(self, recipe: Recipe) -> bool:
        """Whether it leaves checkpoints on its way, from which it goes on after an interruption."""
        return getattr(self._trained(recipe), "save_every", None) is not None

    def _trained(self, recipe: Recipe) -> Strict | None:
        return getattr(recipe, self.trained_as or self.name)


def soup_work(recipe: Recipe, folders: Mapping[str, Path]) -> Strict:
    """The soup's configuration with what it takes from basic SFT."""
    from chain.soup import work

    return work(recipe, folders)


def nccl(recipe: Recipe) -> bool:
    """Whether a learner sends weights over vLLM's own communicator."""
    return recipe.servers is not None and recipe.servers.weights == "nccl"


def evaluate_soup(context: Context) -> Scores:
    """Held-out scores of the merge, and for the report those of its ingredients."""
    from chain.soup import evaluate_with_ingredients

    return evaluate_with_ingredients(context)


SFT, RL = "sft.train:train", "rl.train:train"
STAGES = (
    Stage("core", "chain.make:core", "Pre-trained core", imports_vllm=lambda recipe: True),
    Stage("basic_sft", SFT, "Basic SFT", prepare=prepare),
    Stage(
        "soup",
        "chain.soup:train",
        "Model soup",
        needs_pool=True,
        trained_as="basic_sft",
        work=soup_work,
        evaluate=evaluate_soup,
    ),
    Stage("longcot_sft", SFT, "LongCoT SFT", prepare=prepare),
    Stage("rlvr", RL, "RL with verifiable rewards", needs_pool=True, imports_vllm=nccl, prepare=prepare),
    Stage("think_fusion", SFT, "Think-fusion SFT", prepare=prepare),
    Stage("mixed_rl", RL, "RL with a mixed reward", needs_pool=True, imports_vllm=nccl, prepare=prepare),
)


def stage_named(word: str, stages: Sequence[Stage] = STAGES) -> Stage:
    """The stage of a name or a short name (`fusion`). Raises ConfigError naming the nearest ones."""
    name = ALIASES.get(word, word)
    for stage in stages:
        if stage.name == name:
            return stage
    raise ConfigError(f"stage {word!r}: no such stage; {nearest(word, [stage.name for stage in stages])}")


def _model(context: Context) -> Path:
    if context.model is None:
        raise ConfigError(
            f"{context.stage.name} starts from no checkpoint, so there is no policy to sample from"
        )
    return context.model
