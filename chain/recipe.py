"""The recipe: one typed object over a folder of YAML files. Imports no torch.

A recipe may leave a stage out, or set a stage of an extended recipe to null. Such a stage is not run, and the next
stage starts from the nearest stage before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from chain.places import Placed
from chain.yaml_files import read_folder
from core.strict import ConfigError, KeyPath, Name, Strict, key_path, nearest, parse
from corpus.records import DataSource
from rl.config import Prepare, RLConfig
from rl.eval_config import EvalConfig
from rl.rollout.config import PoolConfig
from sft.config import SFTConfig, SoupConfig

IMPORT_STRING = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"
SHORT = {
    "basic_sft": "sft",
    "longcot_sft": "longcot",
    "rlvr": "rl",
    "think_fusion": "fusion",
    "mixed_rl": "mixed",
}
"""Short names of stages."""
ALIASES = {word: name for name, short in SHORT.items() for word in (short, name.replace("_", "-"))}
"""Alias -> stage name. Aliases are accepted on the command line and as the first key of an override."""


class CoreConfig(Strict):
    """The core that the chain starts from: built here, or a checkpoint folder."""

    build: str | None = Field(default=None, pattern=IMPORT_STRING)
    """`package.module:function`, called `function(out, seed=..., **params)`; leaves a checkpoint in `out`."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `build`."""
    path: str | None = None
    """A checkpoint folder; relative to the recipe's folder, else to the working directory."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of the build."""
    vocabulary: tuple[Name, ...] = ()
    """Sets whose words the tokenizer of the built core must know. They reach `build` as its argument `words`."""
    max_unknown: float = Field(default=0.05, ge=0, le=1)
    """Largest share of the tokens of a set's questions, or of its targets, that the core's tokenizer may not know. Only
    the word-level tokenizers of tiny cores have unknown words; a smaller share is a warning."""
    size: Literal["2b", "8b", "a3b"] | None = None
    """The size that `plan` counts with while the core's folder is missing: SAIL-VL2-2B, -8B or -A3B."""

    @model_validator(mode="after")
    def _one_origin(self) -> CoreConfig:
        if (self.build is None) == (self.path is None):
            raise ValueError(f"build={self.build!r}, path={self.path!r}: give exactly one of the two")
        if self.path is not None and self.params:
            raise ValueError("params are arguments of build; remove them, or replace path by build")
        if self.path is not None and self.vocabulary:
            raise ValueError("vocabulary is for a core that is built; remove it, or replace path by build")
        return self


class GenerateConfig(Strict):
    """Data made before the first stage."""

    by: str = Field(pattern=IMPORT_STRING)
    """`package.module:function`, called `function(out, seed=..., **params)`; writes `<set>.parquet` files."""
    sets: tuple[Name, ...] = Field(min_length=1)
    """Names of the sets that `by` writes. A stage that names an unknown set is refused before anything runs."""
    params: dict[str, Any] = Field(default_factory=dict)
    """Arguments of `by`."""
    threads: int = Field(default=1, ge=1, le=1024)
    """CPU threads of the generator."""


class ForeignSet(Strict):
    """A set whose format is not the record format. The run imports the set into `<run>/imported`."""

    path: str = Field(min_length=1)
    """A .json, .jsonl, .csv, .tsv, .parquet or .tar file, a folder whose files all have one of these types, or a data
    set on the hub: hf://datasets/owner/name[@revision][/folder]."""
    split: Name = "train"
    """Split of a data set on the hub."""
    format: str = "auto"
    """Name of a format (corpus.formats.table), or auto."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Field of a record -> column of the file, for columns whose names do not match a field."""
    images: str | None = None
    """Folder of the pictures, or its address on the hub; None: the folder of the file. A picture's path that leaves the
    folder is refused."""
    system: Literal["keep", "strip", "refuse"] = "keep"
    """System messages. keep: as the row's own; strip: drop them; refuse: reject rows that have one."""
    turns: Literal["keep", "first", "split", "refuse"] = "keep"
    """Conversations of several exchanges. keep: one row, whose history is the earlier ones; first: the first exchange;
    split: a row per exchange, with those before it as history; refuse: reject."""
    strict: bool = False
    """Stop at the first row that cannot be imported. Otherwise such rows go to `<set>.rejected.jsonl`."""


class DataConfig(Strict):
    """Where the stages' named sets come from."""

    generate: GenerateConfig | None = None
    """Sets that the run generates."""
    sets: dict[Name, str | ForeignSet] = Field(default_factory=dict)
    """Set name -> Parquet file or folder (relative to the recipe's folder, else to the working directory), a data set
    on the hub (hf://datasets/owner/name), or a set in another format, which the run imports."""

    curated: dict[Name, str] = Field(default_factory=dict)
    """Set name -> the curation that makes it, a YAML file (docs/curation.md). `posttrain data curate FILE` runs it
    before the run; `plan` shows its time."""

    @model_validator(mode="after")
    def _curated_sets_are_sets(self) -> DataConfig:
        for name in self.curated:
            if not isinstance(self.sets.get(name), str):
                raise ValueError(f"curated: {name!r} is not a path in data.sets; {nearest(name, self.sets)}")
        return self

    @model_validator(mode="after")
    def _one_origin_per_set(self) -> DataConfig:
        twice = sorted(set(self.sets) & set(self.generate.sets if self.generate else ()))
        if twice:
            raise ValueError(f"both in generate.sets and in sets: {', '.join(twice)}; rename one of the two")
        return self


TrackerName = Literal["wandb", "tensorboard", "mlflow"]


class WandbConfig(Strict):
    """Weights & Biases. WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE and WANDB_DIR in the environment take precedence."""

    project: str = "sailvl2-posttrain"
    entity: str | None = None
    """Team or user; None is the account's default."""
    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if there is an API key (environment or netrc), else offline. W&B never prompts for a key."""
    tags: tuple[str, ...] = ()
    table_rows: int = Field(default=64, ge=0)
    """Most completions, with pictures and verdicts, in one table. Applies to every tracker."""


class HardwareConfig(Strict):
    """The machines that a recipe is written for. `plan` uses these figures if the local machine has no GPU."""

    gpu_gib: float | None = Field(default=None, gt=0)
    """Memory of one GPU; None: the recipe trains on CPUs."""
    gpus_per_node: int | None = Field(default=None, ge=1)
    nodes: int = Field(default=1, ge=1)
    host_gib: float | None = Field(default=None, gt=0)
    """Memory of a node, for offloaded optimizer states; None: not checked."""
    disk_gib: float | None = Field(default=None, gt=0)
    """Room for the run's folder; None: not checked."""
    image_share: float = Field(default=0.75, ge=0, le=1)
    """Largest share of image tokens in a pass. Only image tokens pass through the vision tower."""
    tflops: float = Field(default=989, gt=0)
    """Dense bfloat16 TFLOP/s of a GPU, for `plan`'s hours. Source: NVIDIA's data sheet of the H100 SXM."""
    mfu: float = Field(default=0.4, gt=0, le=1)
    """Share of `tflops` that the learner reaches. Assumed; `make gpu-check` measures it."""
    rollout_tokens_per_s: float = Field(default=2000, gt=0)
    """Completion tokens per second of a server's GPU. Assumed; `rollout/` metrics of a run show it."""
    row_tokens: int = Field(default=1000, ge=1)
    """Mean tokens of an SFT row or of a prompt, images included. The report's stages 2 and 4 average about 1,000."""
    completion_share: float = Field(default=0.5, gt=0, le=1)
    """Mean length of a completion as a share of `max_completion_tokens`. Assumed."""


class SFTStage(SFTConfig):
    """An SFT stage that may first make data with its initial policy (think-fusion's harvest)."""

    prepare: Prepare = Prepare()


class Stages(Strict):
    """The stages in the chain's order. None means that the recipe leaves the stage out."""

    core: CoreConfig
    basic_sft: SFTStage | None = None
    soup: SoupConfig | None = None
    longcot_sft: SFTStage | None = None
    rlvr: RLConfig | None = None
    think_fusion: SFTStage | None = None
    mixed_rl: RLConfig | None = None


STAGE_NAMES = tuple(Stages.model_fields)


class Recipe(Placed, Stages):
    """A whole chain, resolved."""

    renamed: ClassVar[dict[str, str]] = {"rollout": "servers"}

    name: Name
    """Name of the run's folder, `runs/<name>`."""
    about: str = ""
    """One line for `plan` and the report."""
    seed: int = Field(default=0, ge=0)
    """Seed of the data, the core and every stage."""
    data: DataConfig = DataConfig()
    servers: PoolConfig | None = None
    """Rollout servers for RL, for data made between the stages, and for evaluation."""
    eval: EvalConfig | None = None
    """Held-out evaluation after each stage; null turns evaluation off."""
    tracking: tuple[TrackerName, ...] = ("wandb",)
    """Experiment trackers that receive curves and completions; `[]` turns tracking off."""
    wandb: WandbConfig = WandbConfig()
    hardware: HardwareConfig = HardwareConfig()

    def stage(self, name: str) -> Strict | None:
        """A stage's part of the recipe; None if the recipe leaves it out."""
        return getattr(self, name)

    @model_validator(mode="after")
    def _engine_where_needed(self) -> Recipe:
        needs = [name for name in ("eval", "rlvr", "mixed_rl") if getattr(self, name) is not None]
        if self.servers is None and needs:
            raise ValueError(f"servers is missing: {', '.join(needs)} need rollout servers")
        return self

    @model_validator(mode="after")
    def _completions_fit_the_servers(self) -> Recipe:
        limit = self.servers.max_model_tokens if self.servers else None
        lengths = {"eval": self.eval.max_completion_tokens if self.eval else 0}
        for name, one in self.eval.sets.items() if self.eval else ():
            lengths[f"eval.sets.{name}"] = one.max_completion_tokens or 0
        for name in STAGE_NAMES:
            config = getattr(self, name)
            if isinstance(config, RLConfig):
                lengths[f"{name}.rollout"] = config.rollout.max_completion_tokens
            if isinstance(config, RLConfig | SFTStage) and config.prepare.samples:
                lengths[f"{name}.prepare"] = config.prepare.max_completion_tokens
        for key, length in lengths.items():
            if limit is not None and length >= limit:
                raise ValueError(
                    f"{key}.max_completion_tokens={length} leaves no room for a prompt in "
                    f"servers.max_model_tokens={limit}; lower the former or raise the latter"
                )
        return self

    @model_validator(mode="after")
    def _hard_cases_come_from_an_earlier_rl_stage(self) -> Recipe:
        earlier: list[str] = []
        for name in STAGE_NAMES:
            config = self.stage(name)
            hard = config.prepare.hard_cases if isinstance(config, SFTStage | RLConfig) else None
            if hard and hard.stage not in earlier:
                raise ValueError(
                    f"{name}.prepare.hard_cases.stage={hard.stage!r}: no RL stage of this recipe before {name} has "
                    f"that name; {nearest(hard.stage, earlier)}"
                )
            if isinstance(config, RLConfig):
                earlier.append(name)
        return self

    @model_validator(mode="after")
    def _turns_do_not_overlap(self) -> Recipe:
        for name in ("rlvr", "mixed_rl"):
            stage = getattr(self, name)
            if self.servers and self.servers.share_gpus and stage and stage.rollout.overlap:
                raise ValueError(
                    f"{name}.rollout.overlap with servers.share_gpus: the servers sleep while the learner trains, so "
                    "they cannot sample at the same time; turn one of the two off"
                )
        return self

    @model_validator(mode="after")
    def _learners_replay(self) -> Recipe:
        for name in ("rlvr", "mixed_rl"):
            stage = getattr(self, name)
            if self.servers and self.servers.routing_replay and stage and not stage.learner.shares_prefix:
                raise ValueError(
                    f"{name}.learner.prefix=stock with servers.routing_replay: TRL's passes take no experts from the "
                    "servers; use prefix: shared, or leave routing_replay out"
                )
        return self

    @model_validator(mode="after")
    def _soup_has_something_to_vary(self) -> Recipe:
        if self.soup is not None and self.basic_sft is None:
            raise ValueError(
                "soup merges fine-tuned checkpoints of basic_sft, which this recipe leaves out; set soup: null"
            )
        if self.soup is not None and (self.eval is None or self.servers is None):
            raise ValueError("soup scores its ingredients by generating: it needs servers and eval")
        return self


def load_recipe(
    path: Path | str, overrides: Iterable[str] = (), seed: int | None = None, name: str | None = None
) -> Recipe:
    """The recipe in a folder, with `a.b.c=value` overrides applied in order.

    A seed that differs from the recipe's seed makes a separate run: the name gains `-seed<N>`, unless `name` is given.
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
    recipe.read_from((folder.path, *folder.extended))
    check_sets(recipe, folder.where)
    return recipe


def sources(config: BaseModel, path: KeyPath = ()) -> Iterator[tuple[KeyPath, DataSource]]:
    """Every data source at any depth of a configuration, with its key path."""
    for name in type(config).model_fields:
        value = getattr(config, name)
        items: Iterable[tuple[Any, Any]] = [(None, value)]
        if isinstance(value, list | tuple):
            items = enumerate(value)
        elif isinstance(value, dict):
            items = value.items()
        for index, item in items:
            here = (*path, name) if index is None else (*path, name, index)
            if isinstance(item, DataSource):
                yield here, item
            elif isinstance(item, BaseModel):
                yield from sources(item, here)


def made_between(config: BaseModel | None) -> tuple[str, ...]:
    """Names of the sets that a stage makes with its initial policy before training."""
    if not isinstance(config, SFTStage | RLConfig):
        return ()
    parts = (config.prepare.pass_at_k, config.prepare.harvest, config.prepare.hard_cases)
    return tuple(part.into for part in parts if part)


def check_sets(recipe: Recipe, where: Callable[[KeyPath], str] = lambda path: "") -> None:
    """Raise one ConfigError for all unknown sets and for all held-out sets that a stage trains on.

    `data.generate.sets`, `data.sets`, and `prepare` of this stage or an earlier stage define the known sets.
    """
    generated = recipe.data.generate.sets if recipe.data.generate else ()
    known = {*generated, *recipe.data.sets}
    held_out = {(source.set, source.split) for _, source in sources(recipe.eval)} if recipe.eval else set()
    problems = []

    def note(path: KeyPath, source: DataSource, rule: str) -> None:
        path = (*path, "set")
        problems.append(f"{where(path)}: {key_path(path)} = {source.set!r}: {rule}".removeprefix(": "))

    for name in STAGE_NAMES:
        config = recipe.stage(name)
        if config is None:
            continue
        known |= set(made_between(config))
        for path, source in sources(config, (name,)):
            if source.set not in known:
                note(path, source, f"no such set at this stage; {nearest(source.set, known)}")
            if (source.set, source.split) in held_out:
                note(path, source, "this is the held-out set of eval; no stage may see it")
    for index, name in enumerate(recipe.core.vocabulary):
        if name not in (*generated, *recipe.data.sets):
            rule = f"no such set before the first stage; {nearest(name, [*generated, *recipe.data.sets])}"
            path = ("core", "vocabulary", index)
            problems.append(f"{where(path)}: {key_path(path)} = {name!r}: {rule}".removeprefix(": "))
    for path, source in sources(recipe.eval, ("eval",)) if recipe.eval else ():
        if source.set not in known:
            note(path, source, f"no such set; {nearest(source.set, known)}")
    if problems:
        raise ConfigError("\n".join(problems))


def split_import(text: str) -> tuple[str, str]:
    """Split `package.module:name` into module and attribute. Raises ConfigError for any other text."""
    module, colon, attribute = text.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"{text!r} is not an import string; write package.module:name")
    return module, attribute
