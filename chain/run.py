"""The run's loop: every stage of a recipe in order, each trained and evaluated unless that is done already.

A finished stage is evaluated in a thread while the next one trains, unless that one needs the rollout servers too:
training and evaluation use different processors. Work that needs the servers waits for the evaluation first (`settle`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from chain.checks import check, check_rows, check_shares, room_for
from chain.context import Context, Progress
from chain.display import Display, duration
from chain.errors import ERROR, disk_is_full, left
from chain.folder import DATA, RunFolder, facts
from chain.hosts import Cluster, follow
from chain.imports import imported
from chain.job import DONE, Task
from chain.launch import POLL_S, StageFailed, run_job
from chain.placement import Placement
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
from rl.job import ServedJob
from rl.rollout.weights import weights_folder


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
    check(recipe, model=core_folder(recipe, (runs_dir / recipe.name).resolve()))
    display = display or Display()
    chain = [stage for stage in stages if stage.config(recipe) is not None]
    first, last = _selection(chain, from_, until)
    names = tuple(stage.name for stage in chain)
    folder = RunFolder(recipe, runs_dir, names, display.line)
    agreed = {}
    if place is not None:
        check_shares({stage.name: stage.learner(recipe)[0] for stage in chain[first : last + 1]}, place.nodes)
        agreed = facts(recipe, folder.path, place.nodes)
        if place.node > 0:
            follow(place, folder.path, agreed, display)
            return folder.path
    # On a failure the servers stop first: an evaluation still under way then ends, and can be waited for.
    with (
        folder.locked(),
        Cluster(place, folder.path, agreed, display) if place else nullcontext() as cluster,
        Background(display) as background,
        Pool(recipe.servers, folder.path / "logs", open_pool) as pool,
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
    """Generate the recipe's data, if it is not there yet; return the folder of its sets."""
    display = display or Display()
    folder = RunFolder(recipe, runs_dir, (), display.line)
    with folder.locked(), Background(display) as background, Pool(None, folder.path) as pool:
        Loop(recipe, folder, pool, display, background).data(force)
    return folder.path / DATA


def in_child(task: Task, out: Path, **options: Any) -> None:
    """`run_job` with the child's own words first in StageFailed; only a bug is followed by the end of its log."""
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
    """The evaluation of the stage before, in a thread of its own."""

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
        """Begin; what began before must have been settled."""
        assert self._work is None, "settle first"
        self._work = self._thread.submit(work, *args)

    def progress(self, text: str) -> None:
        """Takes how far the evaluation is; shown while somebody waits for it."""
        self._text = text

    def settle(self) -> None:
        """Wait until the evaluation is done; raise what it raised."""
        if self._work is None:
            return
        with self.display.step("evaluation"):
            while not wait([self._work], POLL_S).done:
                self.display.passing(self._text)
        work, self._work = self._work, None
        work.result()


@dataclass
class Loop:
    """What is done with one stage after another."""

    recipe: Recipe
    folder: RunFolder
    pool: Pool
    display: Display
    background: Background
    cluster: Cluster | None = None
    """The other hosts, where there are any."""

    def __post_init__(self) -> None:
        folder = self.folder
        self._rows_are_checked = False
        recipe, say = self.recipe, self.display.line
        self.outlook = Outlook(recipe, folder.path, folder.stages)
        self.tracker = Tracker(recipe.tracking, recipe.wandb, folder.id, folder.path, folder.sets, say)

    def data(self, force: bool = False) -> None:
        """Import and generate the recipe's own sets, unless they are there and unchanged."""
        for step in self.folder.imports():
            if step.current and not force:
                self.display.line(f"import {step.name}: there already, unchanged — skipped")
                continue
            with self.folder.making(step) as partial, self.display.step(f"import {step.name}"):
                for line in imported(cast(ForeignSet, step.config), partial / f"{step.name}.parquet"):
                    self.display.line(line)
        made, config = self.folder.data(), self.recipe.data.generate
        if made is None or config is None:
            return
        if made.current and not force:
            self.display.line(f"{DATA}: there already, unchanged — skipped")
            return
        with self.folder.making(made) as partial, self.display.step(DATA):
            job = Job(stage=DATA, out=partial, seed=self.recipe.seed)
            in_child(Task.of("chain.make:generate", config, job, vllm=True), partial, threads=config.threads)
            missing = [name for name in config.sets if not (partial / f"{name}.parquet").exists()]
            if missing:
                raise StageIncomplete(f"data.generate: {config.by} wrote no set {', '.join(missing)}")

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
                report.note_failure(self.folder.path, stage.name, error)
                write_report(self.folder.path)
                raise
            self.background.settle()
            self.check_rows(checkpoint)
            if self.recipe.eval is not None:
                self.pool.start(checkpoint)
            evaluation = self.folder.evaluation(stage.name)
            self.background.start(self._finish, stage, evaluation, track, tracking.pop_all())

    def check_rows(self, model: Path | None) -> None:
        """Refuse rows that the servers cannot be asked, once a checkpoint with the tokenizer is there."""
        if model is None or self._rows_are_checked:
            return
        check_rows(self.recipe, self.folder.sets, model, self.folder.path, self.display.line)
        self._rows_are_checked = True

    def prepare(self, stage: Stage) -> Preparation:
        """Make the sets that the stage filters or harvests with its start's policy, unless they are there."""
        step = self.folder.preparation(stage.name)
        if step is None:
            return Preparation({}, 0.0)
        if not step.current:
            self.background.settle()
            with self.folder.making(step) as partial, self.display.step(f"{stage.name}: data"):
                # One filter's set may be the next one's source: until they are all made, they lie here.
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
        """Run the stage's training in a child; its folder appears only when everything is in it."""
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
                self._run_child(
                    stage, partial, Follower(stage.name, partial, self.display, track, self.outlook)
                )
            if not (partial / "checkpoint" / "config.json").exists():
                raise StageIncomplete(
                    f"{stage.name}: its process left no checkpoint in {partial / 'checkpoint'}"
                )
        if stage.needs_pool:
            self.pool.weights_changed()

    def _run_child(self, stage: Stage, out: Path, follower: Follower) -> None:
        processes, threads = stage.learner(self.recipe)
        model = self.folder.start(stage.name)
        self.pool.rest(model)
        (out / report.FAILED).unlink(missing_ok=True)
        with self.task(stage, out) as task:
            in_child(
                task,
                out,
                processes=processes,
                threads=threads,
                on_poll=follower.look,
                cluster=self.cluster,
            )

    @contextmanager
    def task(self, stage: Stage, out: Path) -> Iterator[Task]:
        """The call that the stage's process makes.

        The folder for weights on their way to the servers is made and removed here, as a learner may be killed.
        """
        model, pool = self.folder.start(stage.name), self.recipe.servers
        sets = {name: Path(place) for name, place in self.folder.sets.items()}
        job = Job(stage=stage.name, model=model, out=out, seed=self.recipe.seed, sets=sets)
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
                weights=weights,
                folders=(Path.cwd(),),
            )
            yield Task.of(stage.train, work, served, vllm)

    def evaluate(self, stage: Stage, fingerprint: str) -> dict[str, Any]:
        """Held-out scores of a finished stage, measured unless they are there; {} without `eval`."""
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
        write_json(folder / "eval.json", {"scores": scores, "seconds": seconds, "fingerprint": fingerprint})
        self.display.line(f"{stage.name}: {report.scores_text(scores)}  ({duration(seconds)})")
        return scores

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

    def _finish(self, stage: Stage, evaluation: str, track: StageTrack, tracking: ExitStack) -> None:
        """Evaluate a trained stage, write the report with it, and end its W&B run."""
        with tracking:
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
