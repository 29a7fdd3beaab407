"""The resources of a whole chain (stages, rollout servers, disk), and the reasons why the chain cannot run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chain.inputs import locate_sets, rows_of
from chain.placement import check_weights_reach, placement
from chain.plan.hours import Hours, hours_of
from chain.plan.machine import Machine, machine_of
from chain.plan.memory import StageFit, gib
from chain.recipe import STAGE_NAMES, Recipe, SFTStage
from core.model.shape import SHAPES, CoreShape
from core.strict import ConfigError
from core.training.memory import GIB
from rl.config import RLConfig
from rl.rollout.config import PoolConfig

SERVER_WORK = 2.0 * GIB
"""Bytes that a server's largest prefill takes in addition to weights and cache."""


class DoesNotFit(ConfigError):
    """The recipe needs more than the machine has. The message has one line per problem, with the key to change."""


def resources(recipe: Recipe, runs_dir: Path = Path("runs"), gpu_gib: float | None = None) -> Resources:
    """The resources of the recipe on the machine of `machine_of`. A core of unknown shape is not counted."""
    machine = machine_of(recipe, runs_dir, gpu_gib)
    shape = core_shape(recipe, runs_dir / recipe.name)
    fits: dict[str, StageFit] = {}
    server = None
    if shape is not None:
        for name in STAGE_NAMES:
            config = recipe.stage(name)
            if isinstance(config, SFTStage | RLConfig):
                fits[name] = StageFit(name, config, recipe, shape, machine)
        pool = recipe.servers
        if (
            pool
            and machine.gpu_gib is not None
            and (pool.starts_on_gpus or pool.urls)
            and pool.engine == "vllm"
        ):
            server = ServerFit(pool, shape, machine)
    return Resources(recipe, machine, shape, fits, server, _hours(recipe, runs_dir, shape, machine))


def _hours(recipe: Recipe, runs_dir: Path, shape: CoreShape | None, machine: Machine) -> dict[str, Hours]:
    """The time of each training stage on GPUs."""
    if shape is None or machine.gpu_gib is None:
        return {}
    places = locate_sets(recipe, (runs_dir / recipe.name).resolve())
    configs = {name: recipe.stage(name) for name in STAGE_NAMES}
    return {
        name: hours_of(config, recipe, shape, lambda place: rows_of(places[place]))
        for name, config in configs.items()
        if isinstance(config, SFTStage | RLConfig)
    }


def core_folder(recipe: Recipe, run_dir: Path) -> Path | None:
    """The core's checkpoint folder: the recipe's `core.path`, else an earlier run's; None if neither exists."""
    places = [recipe.place(recipe.core.path)] if recipe.core.path else []
    found = (
        place for place in (*places, run_dir / "core" / "checkpoint") if (place / "config.json").is_file()
    )
    return next(found, None)


def core_shape(recipe: Recipe, run_dir: Path) -> CoreShape | None:
    """The core's shape, from its folder or from `core.size`; None if both are missing."""
    if folder := core_folder(recipe, run_dir):
        return CoreShape.read(folder)
    return SHAPES[recipe.core.size] if recipe.core.size else None


@dataclass(frozen=True)
class Resources:
    """A recipe on a machine."""

    recipe: Recipe
    machine: Machine
    shape: CoreShape | None
    fits: dict[str, StageFit]
    """Stage name -> fit; empty if the core's shape is unknown."""
    server: ServerFit | None
    hours: dict[str, Hours]
    """Stage name -> time; empty without a GPU or without a shape."""

    def lines(self, stage: str) -> list[str]:
        """Lines on the resources of one stage."""
        if stage == "soup" and "basic_sft" in self.fits:
            return [
                f"disk: {self._soups} checkpoints, {gib(self._soups * self.fits['basic_sft'].checkpoint)} GiB"
            ]
        times = [self.hours[stage].line()] if stage in self.hours else []
        return [*self.fits[stage].lines(), *times] if stage in self.fits else []

    def summary(self) -> list[str]:
        """Lines on the whole chain: servers, disk, and the machine of the comparison."""
        if self.shape is None:
            return ["memory: not counted, because the core does not exist yet and core.size is not set"]
        lines = [self.server.line()] if self.server else []
        room = f" of {self.machine.disk_gib:.0f}" if self.machine.disk_gib is not None else ""
        lines.append(f"disk for the chain's checkpoints: {gib(self.disk)}{room} GiB")
        total = sum(self.shape.parameters().values())
        size = f"{total / 1e9:.2f}B" if total >= 1e8 else f"{total / 1e6:.1f}M"
        if self.hours:
            hours, used = (
                sum(getattr(one, name) for one in self.hours.values()) for name in ("hours", "gpu_hours")
            )
            parts = " (stages whose sets do not exist count as 1B tokens)" if self._guessed else ""
            lines.append(f"time of all stages: about {hours:,.0f} h, {used:,.0f} GPU-hours{parts}")
        lines.append(f"counted for a core of {size} parameters on {self.machine}")
        return [*lines, *([] if self._misplaced() else self._places())]

    def _places(self) -> list[str]:
        """A line per node of a recipe for several nodes, which run on Ray."""
        return placement(self.recipe).lines() if self.recipe.hardware.nodes > 1 else []

    def _misplaced(self) -> list[str]:
        """Reasons why the recipe cannot be placed on its nodes."""
        if self.recipe.hardware.nodes == 1:
            return []
        try:
            check_weights_reach(self.recipe.servers, placement(self.recipe))
        except ConfigError as error:
            return str(error).splitlines()
        return []

    @property
    def _guessed(self) -> bool:
        return any(one.of.startswith("each") for one in self.hours.values())

    @property
    def _soups(self) -> int:
        return len(self.recipe.soup.variants) + 1 if self.recipe.soup else 0

    @property
    def disk(self) -> float:
        """Bytes of all checkpoints that the chain keeps, plus the largest set of temporary checkpoints."""
        own = sum(fit.disk for fit in self.fits.values())
        own += max((fit.unfinished for fit in self.fits.values()), default=0)
        return own + (self._soups * self.fits["basic_sft"].checkpoint if "basic_sft" in self.fits else 0)

    def saved_by(self, stage: str) -> float:
        """Bytes that a stage writes to disk; 0 if the core's shape is unknown."""
        if stage == "soup" and "basic_sft" in self.fits:
            return self._soups * self.fits["basic_sft"].checkpoint
        fit = self.fits.get(stage)
        return fit.disk + fit.unfinished if fit else 0

    @property
    def problems(self) -> list[str]:
        """All reasons why the recipe cannot run on the machine, each with the key to change."""
        found = [problem for fit in self.fits.values() for problem in fit.problems()]
        found += self.server.problems() if self.server else []
        found += self._misplaced()
        if self.machine.disk_gib is not None and self.disk > self.machine.disk_gib * GIB:
            found.append(
                f"disk: the chain's checkpoints take {gib(self.disk)} GiB of {self.machine.disk_gib:.0f} GiB; choose "
                "another --runs-dir, or leave stages out"
            )
        return list(dict.fromkeys(found))  # every stage reports the servers' problems

    def check(self) -> None:
        """Raise DoesNotFit with every problem, if there is any."""
        if self.problems:
            raise DoesNotFit("\n".join(self.problems))

    def to_dict(self) -> dict[str, Any]:
        """Bytes by stage, for JSON."""
        return {
            "machine": asdict(self.machine),
            "stages": {name: fit.to_dict() for name, fit in self.fits.items()},
            "server": {"weights": self.server.weights, "cache_tokens": self.server.cache_tokens}
            if self.server
            else None,
            "disk": self.disk,
            "hours": {
                name: {**asdict(one), "hours": one.hours, "gpu_hours": one.gpu_hours}
                for name, one in self.hours.items()
            },
            "problems": self.problems,
        }


@dataclass(frozen=True)
class ServerFit:
    """Weights and cache on a rollout server's GPU."""

    pool: PoolConfig
    shape: CoreShape
    machine: Machine

    @property
    def weights(self) -> float:
        """Bytes of weights on one GPU."""
        return sum(self.shape.parameters().values()) * self.pool.dtype_bytes / self.pool.gpus_per_server

    @property
    def cache(self) -> float:
        """Bytes left for keys and values on one GPU."""
        assert self.machine.gpu_gib is not None
        return self.machine.gpu_gib * GIB * self.pool.gpu_memory_utilization - self.weights - SERVER_WORK

    @property
    def cache_tokens(self) -> int:
        """Number of tokens whose keys and values fit into a server's cache."""
        # Tensor-parallel servers split the key-value heads, down to one head per GPU.
        split = min(self.pool.gpus_per_server, self.shape.kv_heads)
        return int(max(0.0, self.cache) / (self.shape.cache_token(self.pool.dtype_bytes) / split))

    def line(self) -> str:
        """A line on weights, cache, and the number of longest sequences that the cache holds."""
        tokens = self.cache_tokens
        return (
            f"GPU memory of a server: weights {gib(self.weights)} GiB, cache {gib(max(0.0, self.cache))} GiB = "
            f"{tokens:,} tokens = {tokens // self.pool.max_model_tokens} sequences of {self.pool.max_model_tokens}"
        )

    def problems(self) -> list[str]:
        """The reason why the servers cannot run; [] if the cache holds at least one longest sequence."""
        if self.cache_tokens >= self.pool.max_model_tokens:
            return []
        return [
            f"servers: a server's cache holds {self.cache_tokens} tokens (weights {gib(self.weights)} GiB on each of "
            f"{self.pool.gpus_per_server} GPUs of {self.machine.gpu_gib:g} GiB), but max_model_tokens="
            f"{self.pool.max_model_tokens}; raise servers.gpus_per_server or gpu_memory_utilization"
        ]
