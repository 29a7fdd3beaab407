"""The plan as text: stages, data, batch sizes and rewards, resolved without a model.

chain/plan/resources.py counts memory, GPUs and disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from chain.inputs import code_files, is_on_hub, locate_sets, phase_rows, phase_updates, rows_of
from chain.plan import curations
from chain.plan.resources import Resources
from chain.recipe import STAGE_NAMES, ForeignSet, Recipe, SFTStage, made_between, sources
from chain.stages import STAGES, Stage
from core.strict import Strict
from core.training.config import LearnerConfig, Optim
from corpus.records import DataSource
from rl.config import RewardTerm, RLConfig
from sailvl2_posttrain.names import PACKAGES, ROOT
from sft.config import Phase, SoupConfig


@dataclass(frozen=True)
class StagePlan:
    """One stage of the plan."""

    name: str
    title: str
    parent: str | None
    sets: dict[str, str]
    """Name of each set that the stage reads -> origin of the set, and whether it exists."""
    details: tuple[str, ...]
    """Lines about the stage's work: batches, updates, rewards, learner."""


def plan(
    recipe: Recipe,
    runs_dir: Path = Path("runs"),
    stages: Sequence[Stage] = STAGES,
    resources: Resources | None = None,
) -> list[StagePlan]:
    """The recipe's stages, resolved."""
    states = _Sets(recipe, (runs_dir / recipe.name).resolve())
    plans: list[StagePlan] = []
    for stage in stages:
        config = stage.config(recipe)
        if config is None:
            continue
        parent = plans[-1].name if plans else None
        named = {source.set: states.state(source.set) for _, source in sources(config)}
        details = [*_details(stage, config, recipe, states)]
        details += resources.lines(stage.name) if resources else []
        plans.append(StagePlan(stage.name, stage.title, parent, named, tuple(details)))
    return plans


def text(
    recipe: Recipe,
    plans: Sequence[StagePlan],
    runs_dir: Path = Path("runs"),
    resources: Resources | None = None,
) -> str:
    """The plan as text for the terminal."""
    lines = [f"{recipe.name} (seed {recipe.seed}) -> {runs_dir / recipe.name}"]
    lines += [recipe.about] if recipe.about else []
    if generate := recipe.data.generate:
        lines.append(f"data: {generate.by} makes {', '.join(generate.sets)}")
    lines += curations.lines(recipe)
    for one in plans:
        lines.append(f"\n{one.name}: {one.title}" + (f", from {one.parent}" if one.parent else ""))
        lines += [f"  {detail}" for detail in one.details]
        lines += [f"  set {name}: {state}" for name, state in one.sets.items()]
    if recipe.eval:
        lines.append("\nafter each stage: " + _evaluation(recipe))
    if recipe.servers:
        lines.append(f"servers: {_pool(recipe)}")
    lines += [*_own_code(recipe)]
    lines += resources.summary() if resources else []
    return "\n".join(lines)


def _own_code(recipe: Recipe) -> Iterator[str]:
    """The file of each module that the recipe names and this project does not ship, and files of its name elsewhere."""
    stages = [config for name in STAGE_NAMES if isinstance(config := recipe.stage(name), RLConfig)]
    generate = recipe.data.generate
    named = [recipe.core.build, generate.by if generate else None]
    named += [
        use for config in stages for use in (*(t.use for t in config.rewards), config.watch.second_verifier)
    ]
    for use in dict.fromkeys(named):
        found = [*code_files(use, recipe.folders)] if use and ":" in use else []
        if found and not any(found[0].resolve().is_relative_to(ROOT / package) for package in PACKAGES):
            others = [str(file) for file in dict.fromkeys(found[1:]) if file != found[0]]
            yield f"code {use}: {found[0]}" + (f" (not {', '.join(others)})" if others else "")


def as_json(recipe: Recipe, plans: Sequence[StagePlan], resources: Resources | None = None) -> dict[str, Any]:
    """The plan and the resolved recipe, for JSON."""
    return {
        **({"resources": resources.to_dict()} if resources else {}),
        "name": recipe.name,
        "seed": recipe.seed,
        "curations": curations.to_dict(recipe),
        "stages": [asdict(one) for one in plans],
        "recipe": recipe.model_dump(mode="json"),
    }


class _Sets:
    """Places and row counts of the named sets."""

    def __init__(self, recipe: Recipe, run_dir: Path) -> None:
        self.places = locate_sets(recipe, run_dir)
        self.imported = {name for name, given in recipe.data.sets.items() if isinstance(given, ForeignSet)}
        self.generated = set(recipe.data.generate.sets if recipe.data.generate else ())
        self.made = {name: stage for stage in STAGE_NAMES for name in made_between(recipe.stage(stage))}

    def state(self, name: str) -> str:
        """Origin of a set, and whether the set exists."""
        place = self.places[name]
        if name in self.made:
            return f"made before {self.made[name]}"
        rows = self.rows(name)
        count = f", {rows} rows" if rows is not None else ""
        if name in self.imported:
            return f"imported (there{count})" if Path(place).exists() else "imported (at the first run)"
        if name in self.generated:
            return f"generated (there{count})" if Path(place).exists() else "generated (at the first run)"
        if is_on_hub(place):
            return f"{place} on the hub"
        return f"{place} (found{count})" if Path(place).exists() else f"{place} (MISSING)"

    def rows(self, name: str) -> int | None:
        """Rows of a local set; None if the set does not exist."""
        return rows_of(self.places[name])


def _details(stage: Stage, config: Strict, recipe: Recipe, states: _Sets) -> list[str]:
    if isinstance(config, SFTStage):
        return [
            *_prepared(config),
            *(_phase(phase, states) for phase in config.phases),
            _packs(config),
            _learner(config.learner),
        ]
    if isinstance(config, RLConfig):
        return [
            *_prepared(config),
            *_rl(config),
            _prefix(config),
            *_watched(config),
            _learner(config.learner),
        ]
    if isinstance(config, SoupConfig) and recipe.basic_sft:
        last = recipe.basic_sft.phases[-1].name
        rates = ", ".join(f"{variant.learning_rate or 'same'}" for variant in config.variants)
        return [
            f"{len(config.variants)} further runs of basic_sft's phase {last} (learning rate: {rates}), "
            f"{config.method} merge of {len(config.variants) + 1}",
            _learner(recipe.basic_sft.learner),
        ]
    core = recipe.core
    built = f"built by {core.build}" + (f", words of {', '.join(core.vocabulary)}" if core.vocabulary else "")
    return [f"checkpoint {recipe.place(core.path)}" if core.path else built]


def _prepared(config: SFTStage | RLConfig) -> list[str]:
    prepare, lines = config.prepare, []
    if hard := prepare.hard_cases:
        lines.append(
            f"first: {hard.into} = prompts that {hard.stage} solved in at most {hard.max_pass_rate:.0%} of its attempts"
        )
    if part := prepare.pass_at_k:
        lines.append(f"first: {part.into} = {_amount(part.source)} filtered by pass@{part.samples}")
    if own := prepare.harvest:
        lines.append(f"first: {own.into} = up to {own.keep} own correct chains on {_amount(own.source)}")
    return lines


def _phase(phase: Phase, states: _Sets) -> str:
    optim = phase.optim
    steps = phase_updates(phase, states.rows)
    updates = f"{steps} updates" if steps is not None else ""
    if optim.epochs:
        rows = phase_rows(phase, states.rows) if updates else None
        epochs = f"{optim.epochs:g} epochs"
        updates = f"{rows} rows x {epochs} = {updates}" if rows is not None else epochs
    mixture = " + ".join(_amount(source) for source in phase.data)
    size = f" of {optim.global_batch_size} rows" if optim.global_batch_size else ""
    return f"phase {phase.name}: {mixture}; {updates}{size}; {_rate(optim)}"


def _rl(config: RLConfig) -> list[str]:
    rollout, algorithm = config.rollout, config.algorithm
    lines = [
        f"data: {' + '.join(_amount(source) for source in config.data)}",
        f"batch: {rollout.prompts_per_batch} prompts x {rollout.group_size} completions of at most "
        f"{rollout.max_completion_tokens} tokens = {config.completions_per_batch} completions"
        + (", sampled one batch ahead" if rollout.overlap else ""),
        f"updates: {config.completions_per_batch // config.mini_batch} mini-batches of {config.mini_batch} x "
        f"{config.passes} passes = {config.updates_per_batch} per batch; {config.batches} batches = "
        f"{config.max_steps} updates; {_rate(config.optim)}",
        f"loss: {algorithm.name}, clip {algorithm.clip_low:g}/{algorithm.clip_high:g}, "
        f"KL {algorithm.kl_beta:g}, "
        f"dynamic sampling up to {config.dynamic_sampling.max_rounds} more rounds",
    ]
    for mode in ("think", "direct"):
        terms = [_term(term) for term in config.rewards if mode in term.modes]
        lines += [f"reward, {mode}: {' + '.join(terms)}"] if terms else []
    return lines


def _term(term: RewardTerm) -> str:
    limits = [f"graded {term.graded[0]} only"] if len(term.graded) == 1 else []
    limits += [f"if {term.gate}"] if term.gate else []
    return f"{term.weight:g} {term.name} ({', '.join([term.use, *limits])})"


def _packs(config: SFTStage) -> str:
    rows = " or ".join(str(most) for most in sorted(set(map(config.row_tokens, config.phases))))
    if not config.packing:
        return f"packing: off; rows of at most {rows} tokens"
    budgets = {config.micro_batch_tokens(phase) for phase in config.phases}
    sizes = " or ".join(str(budget) for budget in sorted(budgets))
    by = f", updates of {config.packing.update_tokens} tokens" if config.packing.update_tokens else ""
    return f"packing: passes of at most {sizes} tokens, rows of at most {rows}{by}{_overlong(config)}"


def _overlong(config: SFTStage) -> str:
    if config.overlong != "periodic":
        return ""
    longest = max(map(config.longest_row, config.phases))
    return f"; rows of up to {longest} every {config.periodic.every} updates"


def _prefix(config: RLConfig) -> str:
    learner = config.learner
    if not learner.shares_prefix:
        return f"prefix: stock, {config.optim.micro_batch_size} padded rows a pass"
    size = (
        f"{learner.token_budget} tokens"
        if learner.token_budget
        else (f"as many tokens as {config.optim.micro_batch_size} padded rows")
    )
    return f"prefix: {learner.prefix}, passes of {size}"


def _watched(config: RLConfig) -> list[str]:
    watch = config.watch
    looks = [f"stop on {', '.join(watch.stop_on)}"] if watch.stop_on else []
    looks += [f"second verifier {watch.second_verifier}"] if watch.second_verifier else []
    if watch.held_out:
        looks.append(f"{_amount(watch.held_out)} every {watch.every} batches")
    return [f"watch: {'; '.join(looks)}"] if looks else []


def _learner(learner: LearnerConfig) -> str:
    deepspeed = learner.deepspeed
    engine = f"DeepSpeed ZeRO-{deepspeed.zero_stage}" if deepspeed else "plain PyTorch"
    offload = ", CPU offload" if deepspeed and deepspeed.offloads else ""
    how = f"LoRA r={learner.lora.r}" if learner.lora else "all parameters"
    frozen = f", {', '.join(learner.freeze)} frozen" if learner.freeze else ""
    ranks = f"{learner.processes} process{'es' if learner.processes > 1 else ''} x {learner.threads} threads"
    again = ", gradient checkpointing" if learner.gradient_checkpointing else ""
    return f"learner: {engine}{offload}, {ranks}, {learner.dtype}, {how}{frozen}{again}"


def _rate(optim: Optim) -> str:
    warm = f", warm-up {optim.warmup_ratio:g}" if optim.warmup_ratio else ""
    return f"learning rate {optim.learning_rate:g} {optim.schedule}{warm}"


def _amount(source: DataSource) -> str:
    return f"{source.rows} of {source.set}" if source.rows is not None else f"all of {source.set}"


def _evaluation(recipe: Recipe) -> str:
    cfg = recipe.eval
    assert cfg is not None
    parts = []
    for name, one in cfg.sets.items():
        drawn = f" + {one.draws} samples" if one.draws else ""
        parts.append(f"{name} on {_amount(one)}, greedy{drawn}, at most {cfg.longest(name)} tokens")
    blind = "; each also with blanked images" if cfg.blind else ""
    every = cfg.every
    looks = ""
    if every:
        names = ", ".join(every.only) or "all benchmarks"
        looks = (
            f"; every {every.batches} batches of RL the first {every.limit} of {names} of suite {every.suite}"
        )
    return "; ".join(parts) + blind + looks


def _pool(recipe: Recipe) -> str:
    pool = recipe.servers
    assert pool is not None
    if pool.urls:
        return f"{pool.engine} at {', '.join(pool.urls)}"
    return f"{pool.count} {pool.engine} server{'s' if pool.count > 1 else ''} on {pool.device}, {pool.dtype}"
