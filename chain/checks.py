"""The checks that `run` and `plan` share: missing files and code, failing rewards, rows beyond the servers' limits."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from chain.bench import curve
from chain.errors import left
from chain.inputs import code_file, foreign_set, is_on_hub, set_place
from chain.plan.curations import curations
from chain.recipe import STAGE_NAMES, ForeignSet, Recipe, SFTStage, made_between, sources
from core.checkpoint.check import ForeignCode, check_code
from core.files import append_jsonl, read_json, require_room
from core.manifest import hash_config
from core.model.shape import SHAPES, CoreShape
from core.strict import ConfigError, KeyPath, key_path
from core.training.job import Job
from corpus.formats.files import files_of, root_of
from corpus.formats.table import known
from corpus.hub import address_hint
from corpus.records import DataSource, RecordError, load_source
from corpus.vocabulary import has_unknown
from rewards.example import Example
from rl.config import RLConfig
from rl.limits import FOUND, Asked, Limits
from rl.limits import check as hold_against_limits

CHECKED = ".checked.jsonl"
"""Cache file in the run's folder: the results of row checks, keyed by a hash of all inputs."""


def check(
    recipe: Recipe, *, model: Path | None = None, online: bool = False, allow_missing: bool = False
) -> list[str]:
    """Raise one ConfigError for everything missing that the recipe names; return what is missing but may be.

    Rewards are loaded with their parameters, and compared with the chat template of the core at `model`. Data sets on
    the hub are not looked up. `online`: every judge must answer and pass its canaries.
    """
    missing = [*_missing_data(recipe)]
    curations(recipe)  # refuses what it cannot read
    problems = [*_missing_code(recipe), *_reward_problems(recipe, online, _thought_open(model))]
    problems += _routing_problems(recipe, model)
    problems += curve.problems(recipe)
    if not allow_missing:
        problems += missing
    if problems:
        raise ConfigError("\n".join(problems))
    return missing


def check_rows(
    recipe: Recipe,
    sets: Mapping[str, str],
    model: Path | None,
    run_dir: Path,
    say: Callable[[str], None],
    only: str = "",
) -> None:
    """Check the existing rows that the servers will sample from against the servers' limits.

    `model` is a checkpoint folder with the tokenizer; without it, only pictures are counted. Results are cached in
    `run_dir` if that folder exists. `only` is the first key of the sets to check, such as `eval`. Raises ConfigError
    with one line per set: file, row and key.
    """
    limits = _limits(recipe, sets, model, only)
    if not (limits.asked or limits.read):
        return
    found = _remembered(limits, sets, model, run_dir)
    for warning in found["warnings"]:
        say(warning)
    for key, counts in found["dropped"].items():
        reasons = ", ".join(f"{kind} {count}" for kind, count in counts.items())
        say(f"{key}: rows beyond the servers' limits are dropped: {reasons}")
    if found["problems"]:
        raise ConfigError("\n".join(found["problems"]))


def asked(recipe: Recipe) -> Iterator[tuple[KeyPath, DataSource, int, int | None]]:
    """Every source whose rows become prompts for the servers: key path, source, longest completion, sampling seed."""
    for name in STAGE_NAMES:
        config = recipe.stage(name)
        if isinstance(config, SFTStage | RLConfig):
            for path, source in sources(config.prepare, (name, "prepare")):
                yield path, source, config.prepare.max_completion_tokens, recipe.seed
        if isinstance(config, RLConfig):
            length = config.rollout.max_completion_tokens
            for index, source in enumerate(config.data):
                yield (name, "data", index), source, length, recipe.seed
            if config.watch.held_out:
                yield (name, "watch", "held_out"), config.watch.held_out, length, recipe.seed
    if recipe.eval:
        for name, source in recipe.eval.sets.items():
            yield ("eval", "sets", name), source, recipe.eval.longest(name), None
        if recipe.soup:
            yield (
                ("soup", "validation"),
                recipe.soup.validation,
                recipe.eval.max_completion_tokens,
                recipe.seed,
            )


def room_for(recipe: Recipe, stage: str, run_dir: Path) -> None:
    """Raise NoRoom unless the disk has room for the bytes that the plan expects the stage to save."""
    from chain.plan.resources import resources

    require_room(run_dir, resources(recipe, run_dir.parent).saved_by(stage), f"what {stage} saves")


def read_by_policy(recipe: Recipe, only: str = "") -> Iterator[DataSource]:
    """Every source of the recipe's stages and evaluation, once per set and split."""
    seen = set()
    for name in (*STAGE_NAMES, "eval"):
        config = recipe.eval if name == "eval" else recipe.stage(name)
        for _, source in sources(config) if config and name == (only or name) else ():
            if (source.set, source.split) not in seen:
                seen.add((source.set, source.split))
                yield source


def _limits(recipe: Recipe, sets: Mapping[str, str], model: Path | None, only: str) -> Limits:
    """The servers' limits, and the sets on this machine to check against them and against the tokenizer."""
    made = {name for stage in STAGE_NAMES for name in made_between(recipe.stage(stage))}

    def is_here(source: DataSource) -> bool:
        place = sets[source.set]
        return source.set not in made and (is_on_hub(place) or Path(place).exists())

    here = tuple(
        Asked(key=key_path(path), source=source, max_completion_tokens=length, seed=seed)
        for path, source, length, seed in asked(recipe)
        if path[0] == (only or path[0]) and is_here(source)
    )
    pool = recipe.servers
    # A built core learns the words of its vocabulary. An earlier core in the run's folder may not know them yet.
    learned = set(recipe.core.vocabulary)
    read = [one for one in read_by_policy(recipe, only) if is_here(one) and one.set not in learned]
    return Limits(
        max_images=pool.max_images if pool else 0,
        max_model_tokens=pool.max_model_tokens if pool else 0,
        asked=here if pool else (),
        read=tuple(read) if model and has_unknown(model) else (),
        max_unknown=recipe.core.max_unknown,
    )


def _remembered(limits: Limits, sets: Mapping[str, str], model: Path | None, run_dir: Path) -> dict[str, Any]:
    from chain.fingerprints import Hashes, read_cache

    hashes = Hashes(run_dir / ".hashes.jsonl") if run_dir.is_dir() else None
    key = ""
    if hashes:
        names = sorted({source.set for source in (*limits.read, *(one.source for one in limits.asked))})
        facts = {name: hashes.of(sets[name]) for name in names}
        files = sorted(model.glob("*token*")) + sorted(model.glob("*processor*")) if model else []
        facts |= {file.name: hashes.of(str(file)) for file in files}
        key = hash_config({"limits": limits, "facts": facts})
        for line in read_cache(run_dir / CHECKED):
            if line["key"] == key:
                return line["found"]
    found = _look(limits, sets, model)
    if hashes:
        append_jsonl(run_dir / CHECKED, {"key": key, "found": found})
    return found


def _look(limits: Limits, sets: Mapping[str, str], model: Path | None) -> dict[str, Any]:
    """Check the rows. A check with a tokenizer runs in a child process, because transformers imports torch."""
    from chain.job import Task
    from chain.launch import StageFailed, run_job

    with tempfile.TemporaryDirectory(prefix="posttrain-check-") as folder:
        out = Path(folder)
        job = Job(
            stage="rows", model=model, out=out, sets={name: Path(place) for name, place in sets.items()}
        )
        try:
            if model is None:
                hold_against_limits(limits, job)
            else:
                run_job(Task.of("rl.limits:check", limits, job), out)
        except RecordError as error:
            raise ConfigError(str(error)) from error
        except StageFailed as failed:
            words, bug = left(out) or ("", True)
            if bug:
                raise
            raise ConfigError(words) from failed
        return read_json(out / FOUND)


def _missing_code(recipe: Recipe) -> Iterator[str]:
    generate = recipe.data.generate
    for key, name in (("data.generate.by", generate and generate.by), ("core.build", recipe.core.build)):
        if name and code_file(name, recipe.folders) is None:
            yield f"{key} = {name!r}: there is no such module; {recipe.looked()}"


def _missing_data(recipe: Recipe) -> Iterator[str]:
    used = {source.set for source in read_by_policy(recipe)} | {*recipe.core.vocabulary}
    for name, place in recipe.data.sets.items():
        if name not in used:
            continue
        if isinstance(place, ForeignSet):
            try:
                found, images = foreign_set(recipe, place).path, foreign_set(recipe, place).images
                if not is_on_hub(found):  # a plan sends no requests to the hub
                    files_of(found)
                if images and not is_on_hub(images):
                    root_of(found, (), images)
                if place.format != "auto":
                    known(place.format)
            except ConfigError as error:
                yield f"data.sets.{name}: {error}"
        elif not is_on_hub(found := set_place(recipe, place)) and not Path(found).exists():
            made = recipe.data.curated.get(name)
            remedy = f"; make it: posttrain data curate {recipe.place(made)}" if made else address_hint(place)
            said = f"there is no such file or folder; {recipe.looked()}{remedy}"
            yield f"data.sets.{name} = {place!r}: {said}"
        elif not is_on_hub(found) and not _is_parquet(Path(found)):
            remedy = f"to import another format, name it as `{name}: {{path: {place}}}`"
            yield f"data.sets.{name} = {place!r}: {found} is not a Parquet file; {remedy}"
    core = recipe.core.path
    if core is not None and not (recipe.place(core) / "config.json").is_file():
        yield f"core.path = {core!r}: this is not a checkpoint folder: config.json is missing; {recipe.looked()}"
    elif core is not None:
        try:
            check_code(recipe.place(core))
        except ForeignCode as error:
            yield f"core.path: {error}"


def _is_parquet(place: Path) -> bool:
    """Whether the place is a folder, or a file that starts as Parquet files do."""
    if place.is_dir():
        return True
    with place.open("rb") as file:
        return file.read(4) == b"PAR1"


def _routing_problems(recipe: Recipe, model: Path | None) -> Iterator[str]:
    """Routing replay with a dense core; a core that is built by this run is checked when its servers start."""
    if recipe.servers and recipe.servers.routing_replay:
        size = recipe.core.size
        shape = CoreShape.read(model) if model else SHAPES[size] if size else None
        if shape and not shape.experts:
            yield "servers.routing_replay: the core is dense; routing replay is for mixtures of experts, remove it"


def _thought_open(model: Path | None) -> bool | None:
    """Whether the core's chat template opens the thought; None if there is no core yet."""
    from core.training.model import opens_thought

    try:
        return None if model is None else opens_thought(model)
    except ForeignCode:  # `_missing_data` says so
        return None


def _reward_problems(recipe: Recipe, online: bool, thought_open: bool | None) -> Iterator[str]:
    for stage in STAGE_NAMES:
        config = recipe.stage(stage)
        if not isinstance(config, RLConfig):
            continue
        for index, term in enumerate(config.rewards):
            expected = thought_open if "think" in term.modes else None
            rows = partial(_examples, recipe, config.data)
            problem = _reward_problem(recipe, term.use, term.params, online, expected, rows)
            if problem:
                yield f"{stage}.rewards[{index}].use = {term.use!r}: {problem}"
        watch = config.watch
        if watch.second_verifier and (
            problem := _reward_problem(
                recipe, watch.second_verifier, watch.second_params, online, thought_open
            )
        ):
            yield f"{stage}.watch.second_verifier = {watch.second_verifier!r}: {problem}"
    for name, one in recipe.eval.sets.items() if recipe.eval else ():
        expected = thought_open if one.mode == "think" else None
        if one.use and (problem := _reward_problem(recipe, one.use, one.params, online, expected)):
            yield f"eval.sets.{name}.use = {one.use!r}: {problem}"


def _examples(recipe: Recipe, data: Sequence[DataSource]) -> list[Example] | None:
    """The rows of these sources without their pictures; None if a source does not exist yet."""
    places = [recipe.data.sets.get(source.set) for source in data]
    there = [found for place in places if isinstance(place, str) and (found := recipe.place(place)).exists()]
    if len(there) < len(places):
        return None
    return [
        Example.of(record, ())
        for source, place in zip(data, there, strict=True)
        for record in load_source(source, {source.set: place}, recipe.seed)
    ]


def _reward_problem(
    recipe: Recipe,
    use: str,
    params: Mapping[str, Any],
    online: bool,
    thought_open: bool | None,
    examples: Callable[[], Sequence[Example] | None] = lambda: None,
) -> str | None:
    """A one-line error of a reward, or None. A user's own reward is loaded in a separate process.

    `thought_open`: whether the chat template opens the thought, if that is known. `examples`: the rows that it will
    grade, for a reward that needs columns of their meta.
    """
    from rewards.adapters import check_columns
    from rewards.isolation import Isolated, load_limited
    from rewards.judge.canaries import JudgeRefused
    from rewards.judge.judges import Judge
    from rewards.selftest import thought_problem

    if ":" in use and code_file(use, recipe.folders) is None:
        return f"there is no such module or file; {recipe.looked()}"
    try:
        reward = load_limited(use, params, recipe.folders)
        rows = examples() if getattr(reward, "needs", ()) else None
        if rows is not None:
            check_columns(reward, use, rows)
    except Exception as error:  # a user's module may raise anything while it is imported
        return " ".join(str(error).split())
    if isinstance(reward, Isolated):
        reward.close()
    if thought_open is not None and (problem := thought_problem(reward, thought_open)):
        return problem
    if online and isinstance(reward, Judge):
        try:
            report = reward.check_canaries()
        except JudgeRefused as error:
            return " ".join(str(error).split())
        if not report.complete:
            return f"the judge does not answer: {report.unanswered}"
    return None
