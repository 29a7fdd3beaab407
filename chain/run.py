"""The chain: every stage of a recipe in order, each in a folder that is either finished or not there.

A finished folder whose fingerprint (chain/fingerprints.py) is still right is skipped; anything else runs,
in a `.partial` folder that takes its name when all is on disk.
"""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

from pydantic import BaseModel

from chain.display import Display, duration
from chain.fingerprints import Fingerprints, identity, is_current
from chain.hosts import Cluster, follow
from chain.inputs import data_folder, locate_sets, prepared_folder
from chain.job import Task
from chain.launch import POLL_S, run_job
from chain.placement import Placement
from chain.plan.text import check_data, check_names
from chain.pool import OpenPool, Pool
from chain.progress import Follower, Outlook
from chain.recipe import Recipe, made_between
from chain.report import data as report
from chain.stages import STAGES, Context, Progress, Stage, stage_named
from chain.tracking import StageTrack, Tracker
from core.files import atomic_dir, read_json, write_json
from core.manifest import Manifest, git_commit, hash_config, now, versions
from core.strict import ConfigError, Strict
from core.training.job import Job
from rl.job import ServedJob
from rl.rollout.weights import weights_folder

DATA = "data"


class StageIncomplete(RuntimeError):
    """A stage's process succeeded but did not leave what the next stage needs."""


def run(
    recipe: Recipe,
    *,
    runs_dir: Path = Path("runs"),
    from_: str | None = None,
    until: str | None = None,
    force: bool = False,
    stages: Sequence[Stage] = STAGES,
    open_pool: OpenPool | None = None,
    display: Display | None = None,
    place: Placement | None = None,
) -> Path:
    """Bring every stage of the recipe from `from_` to `until` up to date; return the run's folder.

    Finished stages whose inputs and config are unchanged are skipped, unless `force`. Stages before `from_`
    must be finished. With a `place` among several hosts, node 0 does all this, and the others start their share
    of each stage's ranks when it says so (chain/hosts.py).
    Raises ConfigError before anything runs, StageFailed when a stage's process fails, HostLost or LeaderEnded
    when another host is gone.
    """
    check_names(recipe)
    check_data(recipe)
    display = display or Display()
    run_dir = (runs_dir / recipe.name).resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    chain_stages = [stage for stage in stages if stage.config(recipe) is not None]
    first, last = _selection(chain_stages, from_, until)
    if place is not None:
        _check_shares(recipe, chain_stages[first : last + 1], place.nodes)
        facts = _facts(recipe, run_dir, place)
        if place.node > 0:
            follow(place, run_dir, facts, display)
            return run_dir
    # On a failure the servers stop first: an evaluation still under way then ends, and can be waited for.
    with (
        _locked(run_dir),
        Cluster(place, run_dir, facts, display) if place else nullcontext() as cluster,
        ThreadPoolExecutor(1, thread_name_prefix="evaluation") as behind,
        Pool(recipe.servers, run_dir / "logs", open_pool) as pool,
    ):
        chain = Chain(recipe, run_dir, chain_stages, pool, display, behind, cluster)
        chain.require_finished(chain_stages[:first], chain_stages[first].name)
        write_json(run_dir / "recipe.json", recipe)
        chain.data(force and first == 0)
        for stage in chain_stages[first : last + 1]:
            chain.stage(stage, force)
        chain.settle()
        report.write(run_dir)
        display.console.print(report.table(report.read(run_dir)))
        display.line(f"report: {run_dir / report.HTML}")
    return run_dir


def data(
    recipe: Recipe, *, runs_dir: Path = Path("runs"), force: bool = False, display: Display | None = None
) -> Path:
    """Generate the recipe's data, if it is not there yet; return the folder of its sets."""
    run_dir = (runs_dir / recipe.name).resolve()
    run_dir.mkdir(parents=True, exist_ok=True)
    with _locked(run_dir), ThreadPoolExecutor(1) as behind, Pool(None, run_dir) as pool:
        Chain(recipe, run_dir, (), pool, display or Display(), behind).data(force)
    return data_folder(run_dir)


@dataclass
class Chain:
    """One recipe's run on disk, and what is needed to continue it.

    A finished stage is evaluated in the thread of `behind` while the next one trains, as long as that one leaves
    the rollout servers alone: the two need different processors. Whoever needs the servers settles first.
    """

    recipe: Recipe
    run_dir: Path
    stages: Sequence[Stage]
    pool: Pool
    display: Display
    behind: ThreadPoolExecutor
    cluster: Cluster | None = None
    """The other hosts, where there are any."""

    def __post_init__(self) -> None:
        self._evaluation: Future[None] | None = None
        self._evaluating = ""
        self.sets = locate_sets(self.recipe, self.run_dir)
        self.outlook = Outlook(self.recipe, self.run_dir, [stage.name for stage in self.stages])
        self.prints = Fingerprints(self.recipe.seed, self.sets, self.run_dir / ".hashes.jsonl")
        self.id = _chain_id(self.run_dir, self.recipe.name)
        recipe = self.recipe
        self.tracker = Tracker(
            recipe.tracking, recipe.wandb, self.id, self.run_dir, self.sets, self.display.line
        )

    def folder(self, stage: Stage) -> Path:
        """Where the stage's results are, once it is finished."""
        return self.run_dir / stage.name

    def parent(self, stage: Stage) -> Stage | None:
        """The stage whose checkpoint this one starts from."""
        place = self.stages.index(stage)
        return self.stages[place - 1] if place else None

    def require_finished(self, before: Sequence[Stage], first: str) -> None:
        """Refuse to start at a stage whose predecessors are not finished; tell of those out of date."""
        missing = [stage.name for stage in before if Manifest.read(self.folder(stage)) is None]
        if missing:
            raise ConfigError(
                f"--from {first}: not finished: {', '.join(missing)} (in {self.run_dir}); "
                f"start from {missing[0]}, or leave --from out to run whatever is missing"
            )
        for stage in before:
            if self.manifest(stage).fingerprint != self.fingerprint(stage):
                self.display.line(
                    f"{stage.name}: its config or inputs have changed since it ran; "
                    f"--from {first} takes it as it is"
                )

    def manifest(self, stage: Stage) -> Manifest:
        """The manifest of a finished stage. Raises ConfigError if it is not finished."""
        manifest = Manifest.read(self.folder(stage))
        if manifest is None:
            raise ConfigError(f"{stage.name} is not finished: no manifest in {self.folder(stage)}")
        return manifest

    def inputs(self, stage: Stage, config: BaseModel) -> dict[str, str]:
        """Hash of everything that the stage, or one part of its config, reads, by name."""
        found = self.prints.of_sources(config, without=made_between(self.config(stage)))
        if parent := self.parent(stage):
            found[f"stage:{parent.name}"] = identity(self.manifest(parent))
        return found | self.prints.of_files(config)

    def fingerprint(self, stage: Stage) -> str:
        """Hash of what determines the stage's result."""
        config = self.config(stage)
        return self.prints.fingerprint(stage.name, config, self.inputs(stage, config))

    def config(self, stage: Stage) -> Strict:
        """The stage's part of the recipe."""
        config = stage.config(self.recipe)
        assert config is not None, f"{stage.name} is not in this chain"
        return config

    def data(self, force: bool = False) -> None:
        """Generate the recipe's own sets, unless they are there and what makes them is unchanged."""
        config = self.recipe.data.generate
        if config is None:
            return
        folder, inputs = data_folder(self.run_dir), self.prints.of_files(config)
        fingerprint = self.prints.fingerprint(DATA, config, inputs)
        if not force and is_current(folder, fingerprint):
            self.display.line(f"{DATA}: there already, unchanged — skipped")
            return
        with (
            self._making(DATA, folder, config, fingerprint, inputs, None) as partial,
            self.display.step(DATA),
        ):
            job = Job(stage=DATA, out=partial, seed=self.recipe.seed)
            run_job(Task.of("chain.make:generate", config, job, vllm=True), partial, threads=config.threads)
            missing = [name for name in config.sets if not (partial / f"{name}.parquet").exists()]
            if missing:
                raise StageIncomplete(f"data.generate: {config.by} wrote no set {', '.join(missing)}")

    def stage(self, stage: Stage, force: bool = False) -> None:
        """Bring one stage up to date: train it, evaluate it, and write the report with it."""
        fingerprint = self.fingerprint(stage)
        if not force and is_current(self.folder(stage), fingerprint):
            self.display.line(f"{stage.name}: finished, inputs and config unchanged — skipped")
            self.settle()
            self.evaluate(stage, self.evaluation(stage))
            return
        with ExitStack() as tracking:
            track = tracking.enter_context(self.tracker.stage(stage.name, self._tracked(stage)))
            try:
                self.train(stage, fingerprint, track)
            except Exception as error:
                report.note_failure(self.run_dir, stage.name, error)
                report.write(self.run_dir)
                raise
            self.settle()
            if self.recipe.eval is not None:
                self.pool.start(self.folder(stage) / "checkpoint")
            evaluation = self.evaluation(stage)
            self._evaluation = self.behind.submit(self._finish, stage, evaluation, track, tracking.pop_all())

    def settle(self) -> None:
        """Wait until the stage before is evaluated; raise what its evaluation raised."""
        if self._evaluation is None:
            return
        with self.display.step("evaluation"):
            while not wait([self._evaluation], POLL_S).done:
                self.display.passing(self._evaluating)
        evaluation, self._evaluation = self._evaluation, None
        evaluation.result()

    def _finish(self, stage: Stage, evaluation: str, track: StageTrack, tracking: ExitStack) -> None:
        """Evaluate a trained stage, write the report with it, and end its W&B run."""
        with tracking:
            scores = self.evaluate(stage, evaluation)
            track.results(scores, self.folder(stage))
            report.write(self.run_dir)

    def train(self, stage: Stage, fingerprint: str, track: StageTrack) -> None:
        """Run the stage's training in a child; its folder appears only when everything is in it."""
        config, parent = self.config(stage), self.parent(stage)
        preparation = self.prepare(stage)
        if stage.needs_pool or self.pool.share_gpus:
            self.settle()
        inputs = self.inputs(stage, config)
        finished = self._making(
            stage.name,
            self.folder(stage),
            config,
            fingerprint,
            inputs,
            parent,
            preparation.seconds,
            saves=stage.saves(self.recipe),
        )
        with finished as partial, self.display.step(self.outlook.label(stage.name)):
            if preparation.kept:
                write_json(partial / "prepare.json", preparation.kept)
            follower = Follower(stage.name, partial, self.display, track, self.outlook)
            processes, threads = stage.learner(self.recipe)
            self.pool.rest(self.start(stage))
            with self.task(stage, config, partial) as task:
                run_job(
                    task,
                    partial,
                    processes=processes,
                    threads=threads,
                    on_poll=follower.look,
                    cluster=self.cluster,
                )
            if not (partial / "checkpoint" / "config.json").exists():
                raise StageIncomplete(
                    f"{stage.name}: its process left no checkpoint in {partial / 'checkpoint'}"
                )
        if stage.needs_pool:
            self.pool.weights_changed()

    def start(self, stage: Stage) -> Path | None:
        """The checkpoint folder that the stage starts from."""
        parent = self.parent(stage)
        return self.folder(parent) / "checkpoint" if parent else None

    @contextmanager
    def task(self, stage: Stage, config: Strict, out: Path) -> Iterator[Task]:
        """What the stage's process is to do.

        The folder for weights on their way to the servers is made and removed here, as a learner may be killed.
        """
        model, pool = self.start(stage), self.recipe.servers
        job = Job(stage=stage.name, model=model, out=out, seed=self.recipe.seed, sets=self.sets)
        cfg = stage.work(self.recipe, self._before(stage)) if stage.work else config
        vllm = stage.imports_vllm(self.recipe)
        if not stage.needs_pool:
            yield Task.of(stage.train, cfg, job, vllm)
            return
        assert pool, "Recipe checks it"
        assert model, f"{stage.name} starts from a checkpoint"
        with weights_folder(pool.weights_dir) as weights:
            served = {
                "pool": pool,
                "urls": self.pool.urls(model),
                "weights": weights,
                "folders": [Path.cwd()],
            }
            yield Task.of(stage.train, cfg, ServedJob(**dict(job), **served), vllm)

    def prepare(self, stage: Stage) -> Preparation:
        """Make the sets that the stage filters or harvests with its start's policy, unless they are there."""
        config, parent = self.config(stage), self.parent(stage)
        part = getattr(config, "prepare", None)
        if parent is None or part is None or not made_between(config):
            return Preparation({}, 0.0)
        inputs = self.inputs(stage, part)
        fingerprint = self.prints.fingerprint(f"prepare {stage.name}", part, inputs)
        folder = prepared_folder(self.run_dir, stage.name)
        if not is_current(folder, fingerprint):
            self.settle()
            label = f"{stage.name}: data"
            with (
                self._making(stage.name, folder, part, fingerprint, inputs, parent) as partial,
                self.display.step(label),
            ):
                # What one filter makes may be the next one's source; until they all are done it lies here.
                made = {name: str(partial / f"{name}.parquet") for name in made_between(config)}
                model = self.folder(parent) / "checkpoint"
                context = self.context(stage, model, partial, self.display.passing)
                context = replace(context, sets={**self.sets, **made})
                write_json(partial / "kept.json", stage.prepare(context))
        kept = read_json(folder / "kept.json")
        for name, counts in kept.items():
            self.display.line(f"{stage.name}: {name} {counts_text(counts)}")
        manifest = Manifest.read(folder)
        return Preparation(kept, manifest.seconds if manifest else 0.0)

    def evaluation(self, stage: Stage) -> str:
        """Hash of what determines a finished stage's held-out scores; "" without `eval`."""
        cfg = self.recipe.eval
        if cfg is None:
            return ""
        inputs = {**self.prints.of_sources(cfg), "stage": identity(self.manifest(stage))}
        return self.prints.fingerprint("eval", cfg, inputs)

    def evaluate(self, stage: Stage, fingerprint: str) -> dict[str, Any]:
        """Held-out scores of a finished stage, measured unless they are there; {} without `eval`."""
        folder = self.folder(stage)
        if self.recipe.eval is None:
            return {}
        if (folder / "eval.json").exists():
            known = read_json(folder / "eval.json")
            if known["fingerprint"] == fingerprint:
                return known["scores"]
        started = time.monotonic()
        scores = stage.evaluate(self.context(stage, folder / "checkpoint", folder, self._show_evaluating))
        seconds = time.monotonic() - started
        write_json(folder / "eval.json", {"scores": scores, "seconds": seconds, "fingerprint": fingerprint})
        self.display.line(f"{stage.name}: {report.scores_text(scores)}  ({duration(seconds)})")
        return scores

    def _show_evaluating(self, text: str) -> None:
        self._evaluating = text

    def context(self, stage: Stage, model: Path, out: Path, progress: Progress) -> Context:
        """What a stage's `prepare` and `evaluate` see."""
        return Context(
            recipe=self.recipe,
            stage=stage,
            config=self.config(stage),
            model=model,
            out=out,
            sets=self.sets,
            folders=self._before(stage),
            pool=self.pool,
            progress=progress,
        )

    @contextmanager
    def _making(
        self,
        name: str,
        folder: Path,
        config: BaseModel,
        fingerprint: str,
        inputs: dict[str, str],
        parent: Stage | None,
        seconds_before: float = 0.0,
        *,
        saves: bool = False,
    ) -> Iterator[Path]:
        """The folder to fill, with its config and, at the end, its manifest; then it takes its final name.

        What an interruption left there stays if the stage `saves` and its fingerprint is still the same.
        """
        started, clock = now(), time.monotonic()
        dump = config.model_dump(mode="json")
        with atomic_dir(folder, same=fingerprint if saves else None) as partial:
            if (partial / "config.json").exists():
                self.display.line(f"{name}: goes on where an interrupted run left off")
            (partial / report.FAILED).unlink(missing_ok=True)
            write_json(partial / "config.json", dump)
            yield partial
            seconds = time.monotonic() - clock
            Manifest(
                stage=name,
                fingerprint=fingerprint,
                config_hash=hash_config(dump),
                inputs=inputs,
                versions=versions(),
                seed=self.recipe.seed,
                parent=parent.name if parent else None,
                commit=git_commit(),
                started=started,
                finished=now(),
                seconds=seconds + seconds_before,
            ).write(partial)
        self.display.line(f"{folder.relative_to(self.run_dir)}: done in {duration(seconds)}")

    def _before(self, stage: Stage) -> dict[str, Path]:
        return {one.name: self.folder(one) for one in self.stages[: self.stages.index(stage)]}

    def _tracked(self, stage: Stage) -> dict[str, Any]:
        parent = self.parent(stage)
        return {
            "stage": stage.name,
            "parent": parent.name if parent else None,
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "commit": git_commit(),
            **self.config(stage).model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Preparation:
    """Data made before a stage: per filter what it kept and dropped, and how long it took."""

    kept: dict[str, Any]
    seconds: float


def counts_text(counts: dict[str, Any]) -> str:
    """`kept 812, dropped 1188 (never solved 1185, always solved 3)`."""
    dropped = counts.get("dropped", {})
    reasons = ", ".join(f"{why} {count}" for why, count in sorted(dropped.items(), key=lambda pair: -pair[1]))
    text = f"kept {counts.get('kept')}, dropped {sum(dropped.values())}"
    return f"{text} ({reasons})" if reasons else text


def _selection(stages: Sequence[Stage], from_: str | None, until: str | None) -> tuple[int, int]:
    """Places of the first and the last stage to run."""
    first = stages.index(stage_named(from_, stages)) if from_ else 0
    last = stages.index(stage_named(until, stages)) if until else len(stages) - 1
    if first > last:
        raise ConfigError(
            f"--from {from_} comes after --until {until}; the order is "
            + ", ".join(stage.name for stage in stages)
        )
    return first, last


def _check_shares(recipe: Recipe, stages: Sequence[Stage], nodes: int) -> None:
    """Refuse hosts among which a stage's ranks cannot be shared out, or for which no stage has any."""
    ranks = {stage.name: stage.learner(recipe)[0] for stage in stages}
    problems = [
        f"{name}: learner.processes={count} is not a multiple of the {nodes} hosts; it counts the ranks of all of them"
        for name, count in ranks.items()
        if count > 1 and count % nodes
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    if all(count == 1 for count in ranks.values()):
        raise ConfigError(
            f"{nodes} hosts, but every stage has one rank: set learner.processes, the ranks of all hosts together, to "
            f"a multiple of {nodes}, or start on one host (--nnodes 1)"
        )


def _facts(recipe: Recipe, run_dir: Path, place: Placement) -> dict[str, Any]:
    """What every host must agree on before it takes part."""
    return {
        "--nnodes": place.nodes,
        "the run's folder": str(run_dir),
        "the recipe (hash, with its overrides)": hash_config(recipe.model_dump(mode="json")),
        "the code's commit": git_commit(),
        "the installed packages": versions(),
    }


def _chain_id(run_dir: Path, name: str) -> str:
    """The id under which W&B groups this chain's stages, made once per run folder."""
    file = run_dir / "chain.json"
    if not file.exists():
        write_json(file, {"id": f"{name}-{uuid4().hex[:8]}", "started": now()})
    return read_json(file)["id"]


@contextmanager
def _locked(run_dir: Path) -> Iterator[None]:
    """Hold the run's folder: two chains in one folder would take each other's stages for their own."""
    with (run_dir / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{run_dir} is in use by another posttrain; wait for it, or choose --name"
            ) from None
        yield
