"""The run's loop: trains and evaluates the stages of a recipe in order, and skips stages that are up to date.

A background thread evaluates a finished stage while the next stage trains, as training and evaluation use different
processors. Work that needs the rollout servers first waits for the evaluation to end (`settle`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chain.bench.curve import look_of
from chain.checks import check, check_rows, room_for
from chain.cluster import MOST_LOSSES, Cluster, NodeLost
from chain.context import Context, Progress
from chain.display import Display, duration
from chain.errors import ERROR, disk_is_full, left
from chain.folder import DATA, RunFolder, Step
from chain.imports import imported
from chain.inputs import foreign_set
from chain.job import DONE, Task
from chain.launch import POLL_S, StageFailed, run_job
from chain.placement import check_one_host, placement
from chain.plan.resources import core_folder
from chain.pool import OpenPool, Pool
from chain.progress import Follower, Outlook
from chain.recipe import ForeignSet, Recipe, made_between
from chain.report import data as report
from chain.report.write import write as write_report
from chain.stages import STAGES, Stage, stage_named
from chain.tracking import StageTrack, Tracker
from core.files import read_json, write_json
from core.manifest import git_commit
from core.processes import remove_leftovers
from core.strict import ConfigError, Strict
from core.training.job import Job
from rl.config import RLConfig
from rl.job import ServedJob
from rl.rollout.weights import weights_folder


class StageIncomplete(RuntimeError):
    """A stage's process exited with success, but a file that the next stage needs is missing."""


def run(
    recipe: Recipe,
    *,
    runs_dir: str | Path = "runs",
    from_: str | None = None,
    until: str | None = None,
    force: bool = False,
    stages: Sequence[Stage] = STAGES,
    open_pool: OpenPool | None = None,
    display: Display | None = None,
    ray: str | None = None,
) -> Path:
    """Bring every stage of the recipe from `from_` to `until` up to date; return the run's folder.

    Finished stages whose inputs and config are unchanged are skipped, unless `force`. Stages before `from_` must be
    finished. `ray`: address of the Ray cluster that runs ranks and servers, or `auto` (chain/cluster.py); None: this
    host runs them.
    Raises ConfigError before anything runs, StageFailed when a stage's process fails, and NodeLost when Ray's nodes are
    lost repeatedly.
    """
    runs_dir = Path(runs_dir)
    check(recipe, model=core_folder(recipe, (runs_dir / recipe.name).resolve()))
    display = display or Display()
    chain = [stage for stage in stages if stage.config(recipe) is not None]
    first, last = _selection(chain, from_, until)
    names = tuple(stage.name for stage in chain)
    folder = RunFolder(recipe, runs_dir, names, display.line)
    cluster = None
    if ray is None:
        check_one_host(recipe, chain)
    else:
        cluster = Cluster(ray, placement(recipe, chain), recipe.servers, folder.path, display)
        open_pool = cluster.open_pool if cluster.addresses else open_pool
    # After a failure the servers stop first. A running evaluation then ends, so that `background` can wait for it.
    with (
        folder.locked(),
        cluster or nullcontext(),
        Background(display) as background,
        Pool(recipe.servers, folder.path / "logs", open_pool, cluster.addresses if cluster else None) as pool,
    ):
        for path in remove_leftovers():
            display.line(f"removed {path}")
        folder.require_finished(names[:first], names[first])
        write_json(folder.path / "recipe.json", recipe)
        loop = Loop(recipe, folder, pool, display, background, cluster)
        loop.data(force and first == 0)
        for stage in chain[first : last + 1]:
            loop.stage(stage, force)
        background.settle()
        write_report(folder.path)
        display.console.print(report.table(report.read(folder.path)))
        display.line(f"report: {folder.path / report.HTML}")
    return folder.path


def data(
    recipe: Recipe, *, runs_dir: Path = Path("runs"), force: bool = False, display: Display | None = None
) -> Path:
    """Generate the recipe's data unless they are up to date; return the folder of the sets."""
    display = display or Display()
    folder = RunFolder(recipe, runs_dir, (), display.line)
    with folder.locked(), Background(display) as background, Pool(None, folder.path) as pool:
        Loop(recipe, folder, pool, display, background).data(force)
    return folder.path / DATA


def in_child(task: Task, out: Path, **options: Any) -> None:
    """`run_job`, with the child's own error message first in StageFailed. Only a bug adds the end of the log."""
    (out / ERROR).unlink(missing_ok=True)
    try:
        run_job(task, out, **options)
    except StageFailed as failed:
        if full := disk_is_full(out):
            raise StageFailed(f"{task.stage}: {full}\n{failed}") from failed
        found = left(out)
        if found is None:
            raise
        words, bug = found
        rest = str(failed) if bug else f"log: {out / 'log.txt'}"
        raise StageFailed(f"{task.stage}: {words}\n{rest}") from failed


class Background:
    """Runs the previous stage's evaluation in a thread."""

    def __init__(self, display: Display) -> None:
        self.display = display
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._work: Future[None] | None = None
        self._text = ""

    def __enter__(self) -> Background:
        return self

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()

    def start(self, work: Callable[..., None], *args: Any) -> None:
        """Start work in the thread. Earlier work must have been settled."""
        assert self._work is None, "settle first"
        self._work = self._thread.submit(work, *args)

    def progress(self, text: str) -> None:
        """Set the progress text of the evaluation. `settle` shows it while it waits."""
        self._text = text

    def raise_early(self) -> None:
        """Re-raise a ConfigError of the work at once: it refuses the recipe, so further training would be wasted."""
        if self._work and self._work.done() and isinstance(self._work.exception(), ConfigError):
            self.settle()

    def settle(self) -> None:
        """Wait for the evaluation to end, and re-raise its exception."""
        if self._work is None:
            return
        with self.display.step("evaluation"):
            while not wait([self._work], POLL_S).done:
                self.display.passing(self._text)
        work, self._work = self._work, None
        work.result()


@dataclass
class Loop:
    """Brings one stage after another up to date."""

    recipe: Recipe
    folder: RunFolder
    pool: Pool
    display: Display
    background: Background
    cluster: Cluster | None = None
    """The Ray cluster; None on this host alone."""

    def __post_init__(self) -> None:
        folder = self.folder
        self._rows_are_checked = False
        recipe, say = self.recipe, self.display.line
        self.outlook = Outlook(recipe, folder.path, folder.stages)
        self.tracker = Tracker(recipe.tracking, recipe.wandb, folder.id, folder.path, folder.sets, say)

    def data(self, force: bool = False) -> None:
        """Import and generate the recipe's own sets, unless they exist and are unchanged."""
        for step in self.folder.imports():
            if step.current and not force:
                self.display.line(f"import {step.name}: exists, unchanged — skipped")
                continue
            with self.folder.making(step) as partial, self.display.step(f"import {step.name}"):
                given = foreign_set(self.recipe, cast(ForeignSet, step.config))
                for line in imported(given, partial / f"{step.name}.parquet"):
                    self.display.line(line)
        made, config = self.folder.data(), self.recipe.data.generate
        if made is None or config is None:
            return
        if made.current and not force:
            self.display.line(f"{DATA}: exists, unchanged — skipped")
            return
        with self.folder.making(made) as partial, self.display.step(DATA):
            job = Job(stage=DATA, out=partial, seed=self.recipe.seed, folders=self.recipe.folders)
            in_child(Task.of("chain.make:generate", config, job, vllm=True), partial, threads=config.threads)
            missing = [name for name in config.sets if not (partial / f"{name}.parquet").exists()]
            if missing:
                raise StageIncomplete(
                    f"data.generate: {config.by} did not write the sets {', '.join(missing)}"
                )

    def stage(self, stage: Stage, force: bool = False) -> None:
        """Bring one stage up to date: prepare its data, train it, start its evaluation."""
        self.check_rows(self.folder.start(stage.name))
        checkpoint = self.folder.stage(stage.name) / "checkpoint"
        if self.folder.training(stage.name).current and not force:
            self.display.line(f"{stage.name}: finished, inputs and config unchanged — skipped")
            self.background.settle()
            self.check_rows(checkpoint)
            self.evaluate(stage, self.folder.evaluation(stage.name))
            return
        with ExitStack() as tracking:
            track = tracking.enter_context(self.tracker.stage(stage.name, self._tracked(stage)))
            try:
                self.train(stage, track)
            except Exception as error:
                self._note_failure(stage, error)
                raise
            self.background.settle()
            if self.recipe.eval is not None:
                self.pool.start(checkpoint)
            evaluation = self.folder.evaluation(stage.name)
            unchecked, self._rows_are_checked = not self._rows_are_checked, True
            self.background.start(self._finish, stage, evaluation, track, tracking.pop_all(), unchecked)

    def _note_failure(self, stage: Stage, error: Exception) -> None:
        """Put the stage's error into the report. A second error, as of a full disk, must not hide the first."""
        try:
            report.note_failure(self.folder.path, stage.name, error)
            write_report(self.folder.path)
        except Exception as second:
            self.display.line(f"the report was not written: {type(second).__name__}: {second}")

    def check_rows(self, model: Path | None) -> None:
        """Refuse rows beyond the servers' limits, as soon as a checkpoint with the tokenizer exists."""
        if model and not self._rows_are_checked:
            self._rows_are_checked = True
            self._check_rows(model)

    def _check_rows(self, model: Path) -> None:
        check_rows(self.recipe, self.folder.sets, model, self.folder.path, self.display.line)

    def prepare(self, stage: Stage) -> Preparation:
        """Make the sets that the stage filters or harvests with its initial policy, unless they are up to date."""
        step = self.folder.preparation(stage.name)
        if step is None:
            return Preparation({}, 0.0)
        if not step.current:
            self.background.settle()
            with self.folder.making(step) as partial, self.display.step(f"{stage.name}: data"):
                # One filter may read the set of the filter before it. Until all sets are made, they are in `partial`.
                made = {name: str(partial / f"{name}.parquet") for name in made_between(self._config(stage))}
                model = self.folder.start(stage.name)
                context = self.context(stage, model, partial, self.display.passing, made)
                write_json(partial / "kept.json", stage.prepare(context))
        kept = read_json(step.folder / "kept.json")
        for name, counts in kept.items():
            self.display.line(f"{stage.name}: {name} {counts_text(counts)}")
        manifest = step.manifest
        return Preparation(kept, manifest.seconds if manifest else 0.0)

    def train(self, stage: Stage, track: StageTrack) -> None:
        """Run the stage's training in a child process. The stage's folder appears only after it is complete."""
        preparation = self.prepare(stage)
        if stage.needs_pool or self.pool.share_gpus:
            self.background.settle()
        step = self.folder.training(stage.name, stage.saves(self.recipe))
        room_for(self.recipe, stage.name, self.folder.path)
        with (
            self.folder.making(step, preparation.seconds) as partial,
            self.display.step(self.outlook.label(stage.name)),
        ):
            (partial / report.FAILED).unlink(missing_ok=True)
            if preparation.kept:
                write_json(partial / "prepare.json", preparation.kept)
            if not (partial / DONE).exists():
                follower = Follower(stage.name, partial, self.display, track, self.outlook)
                self._run_to_the_end(stage, step, follower)
            if not (partial / "checkpoint" / "config.json").exists():
                raise StageIncomplete(
                    f"{stage.name}: its process did not write a checkpoint to {partial / 'checkpoint'}"
                )
        if stage.needs_pool:
            self.pool.weights_changed()

    def _run_to_the_end(self, stage: Stage, step: Step, follower: Follower) -> None:
        """Run the stage's training; run it again on other nodes if Ray loses one, from the last checkpoint if any."""
        for losses in range(MOST_LOSSES + 1):
            try:
                self._run_child(stage, step.partial, follower)
                return
            except NodeLost as lost:
                if losses == MOST_LOSSES:
                    raise
                self.display.line(f"{stage.name}: {lost}; it starts again on the nodes that Ray has")
            if not step.saves:
                self.folder.empty(step)

    def _run_child(self, stage: Stage, out: Path, follower: Follower) -> None:
        processes, threads = stage.learner(self.recipe)
        model = self.folder.start(stage.name)
        self.pool.rest(model)
        (out / report.FAILED).unlink(missing_ok=True)

        def on_poll() -> None:
            follower.look()
            self.background.raise_early()

        with self.task(stage, out) as task:
            in_child(
                task,
                out,
                processes=processes,
                threads=threads,
                on_poll=on_poll,
                start=self.cluster.start if self.cluster else None,
            )

    @contextmanager
    def task(self, stage: Stage, out: Path) -> Iterator[Task]:
        """The function call that the stage's process makes.

        The runner creates and removes the folder for weights in transit to the servers, because a killed learner could
        not remove it.
        """
        model, pool = self.folder.start(stage.name), self.recipe.servers
        sets = {name: Path(place) for name, place in self.folder.sets.items()}
        job = Job(
            stage=stage.name,
            model=model,
            out=out,
            seed=self.recipe.seed,
            sets=sets,
            folders=self.recipe.folders,
        )
        work = stage.work(self.recipe, self.folder.before(stage.name)) if stage.work else self._config(stage)
        vllm = stage.imports_vllm(self.recipe)
        if not stage.needs_pool:
            yield Task.of(stage.train, work, job, vllm)
            return
        assert pool, "Recipe checks it"
        assert model, f"{stage.name} starts from a checkpoint"
        with weights_folder(pool.weights_dir) as weights:
            served = ServedJob(
                **dict(job),
                pool=pool,
                urls=tuple(self.pool.urls(model)),
                addresses=self.pool.addresses,
                weights=weights,
                look=look_of(self.recipe) if isinstance(work, RLConfig) else None,
            )
            yield Task.of(stage.train, work, served, vllm)

    def evaluate(self, stage: Stage, fingerprint: str) -> dict[str, Any]:
        """Held-out scores of a finished stage, measured unless eval.json is up to date; {} without `eval`."""
        if self.recipe.eval is None:
            return {}
        folder = self.folder.stage(stage.name)
        if (folder / "eval.json").exists():
            known = read_json(folder / "eval.json")
            if known["fingerprint"] == fingerprint:
                return known["scores"]
        started = time.monotonic()
        scores = stage.evaluate(self.context(stage, folder / "checkpoint", folder, self.background.progress))
        seconds = time.monotonic() - started
        sets = {
            name: self._near(self.folder.sets[one.set], folder) for name, one in self.recipe.eval.sets.items()
        }
        found = {"scores": scores, "seconds": seconds, "fingerprint": fingerprint, "sets": sets}
        write_json(folder / "eval.json", found)
        self.display.line(f"{stage.name}: {report.scores_text(scores)}  ({duration(seconds)})")
        return scores

    def _near(self, place: str, folder: Path) -> str:
        """A set's place; within the run's folder it is relative to `folder`, so that a moved run finds it."""
        inside = Path(place).is_relative_to(self.folder.path)
        return os.path.relpath(place, folder) if inside else place

    def context(
        self,
        stage: Stage,
        model: Path | None,
        out: Path,
        progress: Progress,
        made: dict[str, str] | None = None,
    ) -> Context:
        """The context of a stage's `prepare` and `evaluate`; `made` are the sets that `prepare` is making."""
        return Context(
            recipe=self.recipe,
            stage=stage.name,
            config=self._config(stage),
            model=model,
            out=out,
            sets={**self.folder.sets, **(made or {})},
            folders=self.folder.before(stage.name),
            pool=self.pool,
            progress=progress,
        )

    def _finish(
        self, stage: Stage, evaluation: str, track: StageTrack, tracking: ExitStack, unchecked: bool
    ) -> None:
        """Evaluate a trained stage, write the report with it, and end its W&B run.

        `unchecked`: the stage made the run's first tokenizer, so the rows are checked with it first.
        """
        with tracking:
            if unchecked:
                self._check_rows(self.folder.stage(stage.name) / "checkpoint")
            scores = self.evaluate(stage, evaluation)
            track.results(scores, self.folder.stage(stage.name))
            write_report(self.folder.path)

    def _config(self, stage: Stage) -> Strict:
        return self.folder.config(stage.name)

    def _tracked(self, stage: Stage) -> dict[str, Any]:
        return {
            "stage": stage.name,
            "parent": self.folder.parent(stage.name),
            "recipe": self.recipe.name,
            "seed": self.recipe.seed,
            "commit": git_commit(),
            **self._config(stage).model_dump(mode="json"),
        }


@dataclass(frozen=True)
class Preparation:
    """Data made before a stage: counts of kept and dropped rows per filter, and the seconds that the work took."""

    kept: dict[str, Any]
    seconds: float


def counts_text(counts: dict[str, Any]) -> str:
    """`kept 812, dropped 1188 (never solved 1185, always solved 3)`."""
    dropped = counts.get("dropped", {})
    reasons = ", ".join(f"{why} {count}" for why, count in sorted(dropped.items(), key=lambda pair: -pair[1]))
    text = f"kept {counts.get('kept')}, dropped {sum(dropped.values())}"
    return f"{text} ({reasons})" if reasons else text


def _selection(stages: Sequence[Stage], from_: str | None, until: str | None) -> tuple[int, int]:
    """Indices of the first and the last stage to run."""
    first = stages.index(stage_named(from_, stages)) if from_ else 0
    last = stages.index(stage_named(until, stages)) if until else len(stages) - 1
    if first > last:
        raise ConfigError(
            f"--from {from_} comes after --until {until}; the order is "
            + ", ".join(stage.name for stage in stages)
        )
    return first, last
