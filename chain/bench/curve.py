"""Public benchmarks while an RL stage trains: a recipe's `eval.every`, asked of the policy that the servers hold."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from chain.bench.bench import Options, Run, scored
from chain.bench.harness import Harness, HarnessFailed
from chain.bench.relay import JudgeServer
from chain.bench.suite import Suite, load_suite
from chain.recipe import Recipe
from core.strict import ConfigError
from rl.config import RLConfig
from rl.eval_config import BenchEvery
from rl.job import Look
from rl.rollout.client import RolloutClient

log = logging.getLogger(__name__)


def look_of(recipe: Recipe) -> Look | None:
    """The look of the recipe's RL stages; None without `eval.every`."""
    if recipe.eval is None or recipe.eval.every is None:
        return None
    cfg = _placed(recipe, recipe.eval.every)
    params = {
        "every": cfg.model_dump(mode="json"),
        "max_completion_tokens": recipe.eval.max_completion_tokens,
        "seed": recipe.seed,
    }
    return Look(call=f"{__name__}:look", params=params, batches=cfg.batches)


def problems(recipe: Recipe) -> Iterator[str]:
    """Why the recipe's `eval.every` cannot be asked, a line per problem."""
    if recipe.eval is None or recipe.eval.every is None or recipe.servers is None:
        return
    cfg = _placed(recipe, recipe.eval.every)
    if not any(isinstance(getattr(recipe, name), RLConfig) for name in ("rlvr", "mixed_rl")):
        yield "eval.every: the recipe has no RL stage; only RL stages serve their policy while they train"
    try:
        Harness.at(Path(cfg.harness))
    except ConfigError as error:
        yield f"eval.every.harness: {error}"
    for key, places in (("data", cfg.data.values()), ("include", cfg.include)):
        yield from (f"eval.every.{key}: {one}: no such folder" for one in places if not Path(one).exists())
    if cfg.judge_key_env and not os.environ.get(cfg.judge_key_env):
        yield f"eval.every.judge_key_env: the variable {cfg.judge_key_env} is not set"
    try:
        suite = _suite(cfg)
    except ConfigError as error:
        yield f"eval.every.suite: {error}"
        return
    for name, one in suite.benchmarks.items():
        if one.judge and cfg.judge is None:
            yield f"eval.every.judge: {name} asks a judge; name one, or leave {name} out with `only`"
        if (one.frames or 0) > recipe.servers.max_images:
            yield f"servers.max_images = {recipe.servers.max_images}: {name} has {one.frames} frames; raise it"


def look(client: RolloutClient, out: Path, params: Mapping[str, Any]) -> dict[str, float]:
    """Ask the servers the subset; return the scores in points as metrics `bench/<name>`.

    A benchmark without a score has the metric `bench_failed/<name>` = 1, and its files stay in `out`.
    """
    cfg = BenchEvery(**params["every"])
    key = os.environ.get(cfg.judge_key_env or "", "")
    options = Options(
        modes=(cfg.mode,),
        max_completion_tokens=params["max_completion_tokens"],
        seed=params["seed"],
        limit=cfg.limit,
        judge=JudgeServer(cfg.judge, cfg.judge_model, key) if cfg.judge else None,
        include=tuple(map(Path, cfg.include)),
        data=cfg.data,
    )
    harness = Harness.at(Path(cfg.harness))
    found: dict[str, float] = {}
    for name, one in _suite(cfg).benchmarks.items():
        run = Run(name, one.model_copy(update={"tiles": None}), cfg.mode, blind=False)
        folder = out / name
        try:
            found[f"bench/{run.key}"] = scored(client, None, harness, options, run, folder)["score"]
            shutil.rmtree(folder)
        except (HarnessFailed, ConfigError) as error:
            log.warning("eval.every: %s has no score: %s", run.key, error)
            found[f"bench_failed/{run.key}"] = 1.0
    return found


def _placed(recipe: Recipe, cfg: BenchEvery) -> BenchEvery:
    """The configuration with absolute paths."""
    is_file = cfg.suite.endswith((".yaml", ".yml"))
    return cfg.model_copy(
        update={
            "suite": str(recipe.place(cfg.suite)) if is_file else cfg.suite,
            "data": {name: str(recipe.place(place)) for name, place in cfg.data.items()},
            "include": tuple(str(recipe.place(place)) for place in cfg.include),
            "harness": str(Path(cfg.harness).expanduser().absolute()),
        }
    )


def _suite(cfg: BenchEvery) -> Suite:
    return load_suite(cfg.suite).only(cfg.only)
