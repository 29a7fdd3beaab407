"""The table of stages: the function that trains each stage, and the work before and after training.

    core -> basic_sft -> soup -> longcot_sft -> rlvr -> think_fusion -> mixed_rl

A recipe may leave stages out; the next stage then starts from the nearest stage before it. `prepare` and `evaluate` run
in the runner's process, which does not import torch. Training runs in a child process (chain/worker.py). To add a kind
of stage, add a row here and the module that its `train` names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chain import soup
from chain.context import Context, Scores
from chain.evaluate import evaluate
from chain.prepare import prepare, prepare_nothing
from chain.recipe import ALIASES, CoreConfig, Recipe
from core.strict import ConfigError, Strict, nearest
from rl.config import RLConfig
from sft.config import SFTConfig


@dataclass(frozen=True)
class Stage:
    """One stage of the chain."""

    name: str
    train: str
    """`package.module:function`, called `train(cfg, job)` in the stage's process; returns the checkpoint folder."""
    title: str
    needs_pool: bool = False
    """Whether training samples from the rollout servers. The stage's job is then a rl.job.ServedJob."""
    trained_as: str = ""
    """Name of the stage whose learner settings this stage uses; "": its own settings."""
    work: Callable[[Recipe, Mapping[str, Path]], Strict] | None = None
    """Builds the `cfg` of `train` from a recipe and the earlier stages' folders; None: `cfg` is the stage's config."""
    imports_vllm: Callable[[Recipe], bool] = lambda recipe: False
    """Whether the stage's process may import vLLM."""
    prepare: Callable[[Context], dict[str, Any]] = prepare_nothing
    evaluate: Callable[[Context], Scores] = evaluate

    def config(self, recipe: Recipe) -> Strict | None:
        """The stage's config in a recipe; None if the recipe leaves the stage out."""
        return recipe.stage(self.name)

    def learner(self, recipe: Recipe) -> tuple[int, int]:
        """Number of training processes, and CPU threads per process."""
        config = self._trained(recipe)
        if isinstance(config, SFTConfig | RLConfig):
            return config.learner.processes, config.learner.threads
        return 1, config.threads if isinstance(config, CoreConfig) else 1

    def saves(self, recipe: Recipe) -> bool:
        """Whether the stage saves intermediate checkpoints, from which it resumes after an interruption."""
        config = self._trained(recipe)
        return isinstance(config, SFTConfig | RLConfig) and config.save_every is not None

    def _trained(self, recipe: Recipe) -> Strict | None:
        return recipe.stage(self.trained_as or self.name)


def nccl(recipe: Recipe) -> bool:
    """Whether the learner sends weights through vLLM's NCCL communicator."""
    return recipe.servers is not None and not recipe.servers.sends_files


def core_work(recipe: Recipe, folders: Mapping[str, Path]) -> CoreConfig:
    """The core's config with an absolute path."""
    path = recipe.core.path
    return recipe.core.model_copy(update={"path": str(recipe.place(path))}) if path else recipe.core


SFT, RL = "sft.train:train", "rl.train:train"
STAGES = (
    Stage("core", "chain.make:core", "Pre-trained core", work=core_work, imports_vllm=lambda recipe: True),
    Stage("basic_sft", SFT, "Basic SFT", prepare=prepare),
    Stage(
        "soup",
        "chain.soup:train",
        "Model soup",
        needs_pool=True,
        trained_as="basic_sft",
        work=soup.work,
        evaluate=soup.evaluate_with_ingredients,
    ),
    Stage("longcot_sft", SFT, "LongCoT SFT", prepare=prepare),
    Stage("rlvr", RL, "RL with verifiable rewards", needs_pool=True, imports_vllm=nccl, prepare=prepare),
    Stage("think_fusion", SFT, "Think-fusion SFT", prepare=prepare),
    Stage("mixed_rl", RL, "RL with a mixed reward", needs_pool=True, imports_vllm=nccl, prepare=prepare),
)


def stage_named(word: str, stages: Sequence[Stage] = STAGES) -> Stage:
    """The stage with this name or short name (`fusion`). Raises ConfigError naming the nearest names."""
    name = ALIASES.get(word, word)
    for stage in stages:
        if stage.name == name:
            return stage
    raise ConfigError(
        f"stage {word!r}: there is no such stage; {nearest(word, [stage.name for stage in stages])}"
    )
