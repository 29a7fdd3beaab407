"""What a recipe may say: one typed object over a folder of YAML files. Cheap to import: no torch.

A stage that a recipe leaves out (or sets to null over an extended recipe) is not run; the next one starts
from the nearest stage before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from chain.yaml_files import read_folder
from core.strict import ConfigError, KeyPath, Strict, key_path, nearest, parse
from corpus.records import DataSource
from rl.config import EvalConfig, Prepare, RLConfig
from rl.rollout.config import PoolConfig
from sft.config import SFTConfig, SoupConfig

IMPORT_STRING = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
STAGE_NAMES = ("core", "basic_sft", "soup", "longcot_sft", "rlvr", "think_fusion", "mixed_rl")
"""The chain, in order."""
ALIASES = {
    "sft": "basic_sft",
    "basic-sft": "basic_sft",
    "longcot": "longcot_sft",
    "longcot-sft": "longcot_sft",
    "rl": "rlvr",
    "fusion": "think_fusion",
    "think-fusion": "think_fusion",
    "mixed": "mixed_rl",
    "mixed-rl": "mixed_rl",
}
"""Short names of stages, on the command line and as the first key of an override."""


class CoreConfig(Strict):
    """The core that the chain starts from: built here, or a checkpoint folder."""

    build: str | None = Field(default=None, pattern=IMPORT_STRING)
    """`package.module:function`, called `function(out, seed=..., **params)`; leaves a checkpoint in `out`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `build`."""
    path: str | None = None
    """A checkpoint folder; relative to the working directory."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the build."""
    size: Literal["2b", "8b", "a3b"] | None = None
    """What `plan` takes the core for while its folder is not there: SAIL-VL2-2B, -8B or -A3B."""

    @model_validator(mode="after")
    def _one_origin(self) -> CoreConfig:
        if (self.build is None) == (self.path is None):
            raise ValueError(f"build={self.build!r}, path={self.path!r}: give one of the two, not both")
        if self.path is not None and self.params:
            raise ValueError("params are arguments of build; with path there is nothing to pass them to")
        return self


class GenerateConfig(Strict):
    """Data made before the first stage."""

    by: str = Field(pattern=IMPORT_STRING)
    """`package.module:function`, called `function(out, seed=..., **params)`; writes `<set>.parquet` files."""
    sets: tuple[str, ...] = Field(min_length=1)
    """Names of the sets that it writes: a stage that names another is refused before anything runs."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `by`."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the generator."""


class DataConfig(Strict):
    """Where the stages' named sets come from."""

    generate: GenerateConfig | None = None
    """Sets that the run makes itself."""
    sets: dict[str, str] = Field(default_factory=dict)
    """Set name -> Parquet file or folder (relative to the working directory), or hub id `owner/name`."""

    @model_validator(mode="after")
    def _one_origin_per_set(self) -> DataConfig:
        twice = sorted(set(self.sets) & set(self.generate.sets if self.generate else ()))
        if twice:
            raise ValueError(f"both generated and in sets: {', '.join(twice)}; rename one")
        return self


TrackerName = Literal["wandb", "tensorboard", "mlflow"]


class WandbConfig(Strict):
    """Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and WANDB_DIR in the environment win."""

    project: str = "sailvl2-posttrain"
    entity: str | None = None
    """Team or user; None is the account's default."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online with an API key (environment or netrc), else offline. Never asks."""
    tags: tuple[str, ...] = ()
    table_rows: int = Field(default=64, ge=0)
    """Completions with pictures and verdicts in one table, at most; for all trackers."""


class HardwareConfig(Strict):
    """The machines that a recipe is written for. `plan` holds the recipe against them where it finds no GPU."""

    gpu_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU; None: the recipe trains on CPUs."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    nodes: int = Field(default=1, ge=1)
    host_gib: float | None = Field(default=None, gt=0)
    """Memory of a node, for offloaded optimizer states; None: not looked at."""
    disk_gib: float | None = Field(default=None, gt=0)
    """Room for the run's folder; None: not looked at."""
    image_share: float = Field(default=0.75, ge=0, le=1)
    """Share of image tokens in the passes with most of them: the tower works for those alone."""


class SFTStage(SFTConfig):
    """An SFT stage that may first make data with the policy it starts from (think-fusion's harvest)."""

    prepare: Prepare = Prepare()


class Recipe(Strict):
    """A whole chain, resolved."""

    renamed: ClassVar[dict[str, str]] = {"rollout": "servers"}

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]*$")
    """Names the run's folder, `runs/<name>`."""
    about: str = ""
    """One line for `plan` and the report."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data, the core and every stage."""
    data: DataConfig = DataConfig()
    servers: PoolConfig | None = None
    """Rollout servers, for RL, for data made between the stages and for evaluation."""
    eval: EvalConfig | None = None
    """Held-out evaluation after each stage; null leaves it out."""
    tracking: tuple[TrackerName, ...] = ("wandb",)
    """Experiment trackers that get curves and completions; `[]` for none."""
    wandb: WandbConfig = WandbConfig()
    hardware: HardwareConfig = HardwareConfig()
    core: CoreConfig
    basic_sft: SFTStage | None = None
    soup: SoupConfig | None = None
    longcot_sft: SFTStage | None = None
    rlvr: RLConfig | None = None
    think_fusion: SFTStage | None = None
    mixed_rl: RLConfig | None = None

    @model_validator(mode="after")
    def _engine_where_needed(self) -> Recipe:
        needs = [name for name in ("eval", "rlvr", "mixed_rl") if getattr(self, name) is not None]
        if self.servers is None and needs:
            raise ValueError(f"servers is missing: {', '.join(needs)} need rollout servers")
        return self

    @model_validator(mode="after")
    def _turns_do_not_overlap(self) -> Recipe:
        for name in ("rlvr", "mixed_rl"):
            stage = getattr(self, name)
            if self.servers and self.servers.share_gpus and stage and stage.rollout.overlap:
                raise ValueError(
                    f"{name}.rollout.overlap with servers.share_gpus: the servers sleep while the learner trains, so "
                    "nothing can be sampled meanwhile; turn one of the two off"
                )
        return self

    @model_validator(mode="after")
    def _soup_has_something_to_vary(self) -> Recipe:
        if self.soup is not None and self.basic_sft is None:
            raise ValueError(
                "soup merges fine-tunings of basic_sft, which this recipe leaves out; set soup: null"
            )
        if self.soup is not None and (self.eval is None or self.servers is None):
            raise ValueError("soup scores its ingredients by generating: it needs servers and eval")
        return self


def load_recipe(
    path: Path | str, overrides: Iterable[str] = (), seed: int | None = None, name: str | None = None
) -> Recipe:
    """The recipe in a folder, with `a.b.c=value` overrides applied in order.

    Another seed than the recipe's own makes another run: the name gains `-seed<N>`, unless `name` gives one.
    Raises ConfigError with a line per problem: file, key path, value, rule.
    """
    folder = read_folder(Path(path))
    for assignment in overrides:
        folder.override(assignment, ALIASES)
    own_seed = folder.values.get("seed", 0)
    if seed is not None and seed != own_seed:
        folder.merge({"seed": seed, "name": f"{folder.values['name']}-seed{seed}"}, "--seed")
    if name is not None:
        folder.merge({"name": name}, "--name")
    recipe = parse(Recipe, folder.values, folder.where)
    check_sets(recipe, folder.where)
    return recipe


def sources(config: BaseModel, path: KeyPath = ()) -> Iterator[tuple[KeyPath, DataSource]]:
    """Every data source in a configuration, however deep, with its key path."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        items = enumerate(value) if isinstance(value, list | tuple) else [(None, value)]
        for index, item in items:
            here = (*path, name) if index is None else (*path, name, index)
            if isinstance(item, DataSource):
                yield here, item
            elif isinstance(item, BaseModel):
                yield from sources(item, here)


def made_between(config: BaseModel) -> tuple[str, ...]:
    """Names of the sets that a stage makes with the policy it starts from, before it trains."""
    prepare = getattr(config, "prepare", None)
    if prepare is None:
        return ()
    parts = (getattr(prepare, name) for name in type(prepare).model_fields)
    return tuple(part.into for part in parts if hasattr(part, "into"))


def check_sets(recipe: Recipe, where: Callable[[KeyPath], str] = lambda path: "") -> None:
    """Refuse, in one ConfigError, sets that nobody provides and held-out sets that a stage trains on.

    A set is provided by `data.generate.sets`, by `data.sets`, or by `prepare` of this stage or one before it.
    """
    generated = recipe.data.generate.sets if recipe.data.generate else ()
    known = {*generated, *recipe.data.sets}
    held_out = {(source.set, source.split) for _, source in sources(recipe.eval)} if recipe.eval else set()
    problems = []

    def note(path: KeyPath, source: DataSource, rule: str) -> None:
        path = (*path, "set")
        problems.append(f"{where(path)}: {key_path(path)} = {source.set!r}: {rule}".removeprefix(": "))

    for name in STAGE_NAMES:
        config = getattr(recipe, name)
        if config is None:
            continue
        known |= set(made_between(config))
        for path, source in sources(config, (name,)):
            if source.set not in known:
                note(path, source, f"no such set at this stage; {nearest(source.set, known)}")
            if (source.set, source.split) in held_out:
                note(path, source, "this is the held-out set of eval; no stage may see it")
    for path, source in sources(recipe.eval, ("eval",)) if recipe.eval else ():
        if source.set not in known:
            note(path, source, f"no such set; {nearest(source.set, known)}")
    if problems:
        raise ConfigError("\n".join(problems))


def split_import(text: str) -> tuple[str, str]:
    """`package.module:name` in its two parts. Raises ConfigError otherwise."""
    module, colon, attribute = text.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{text!r} is no import string; write package.module:name")
    return module, attribute
