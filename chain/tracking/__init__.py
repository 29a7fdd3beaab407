"""Experiment trackers: W&B, TensorBoard and MLflow, one run per stage. A tracker cannot end or delay training.

If a tracker raises an exception, the user is told once, and the tracker receives no more data for that run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from chain.recipe import TrackerName, WandbConfig
from chain.tracking.content import (
    PictureIndex,
    Table,
    bench_pictures,
    bench_rows,
    held_out_pictures,
    table_of,
    with_advantages,
)
from chain.tracking.mlflow_run import open_mlflow
from chain.tracking.tensorboard_run import open_tensorboard
from chain.tracking.wandb_run import open_wandb
from core.files import read_jsonl

Say = Callable[[str], None]


class StageRun(Protocol):
    """One stage's run at one tracker. Every method may raise any exception."""

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Add one line of metrics.jsonl to the curves."""

    def table(self, name: str, table: Table, step: int) -> None:
        """Add completions with their pictures."""

    def summary(self, values: Mapping[str, float]) -> None:
        """Add figures of the finished stage."""

    def alert(self, title: str, text: str) -> None:
        """Send an alert to the followers of the run."""

    def finish(self, exit_code: int) -> None:
        """End the run; 0 is success."""


class Tracker:
    """Opens the runs of one stage after another.

    Args:
        names: the recipe's `tracking`.
        wandb: the recipe's `wandb`.
        group: the chain's id.
        run_dir: the run's folder; the trackers' own files go there.
        sets: data set name -> place, for the pictures of sampled rows.
        say: takes a line for the user.
    """

    def __init__(
        self,
        names: Sequence[TrackerName],
        wandb: WandbConfig,
        group: str,
        run_dir: Path,
        sets: Mapping[str, str],
        say: Say,
    ) -> None:
        self.names, self.wandb, self.group, self.run_dir, self.sets = names, wandb, group, run_dir, sets
        self.say = say
        self._failed: set[str] = set()

    @contextmanager
    def stage(self, name: str, config: Mapping[str, Any]) -> Iterator[StageTrack]:
        """Open the runs of one stage for the duration of the block. If the block raises, the runs end as failed."""
        rows, algorithm = self.wandb.table_rows, config.get("algorithm") or {}
        track = StageTrack(self._open(name, config), self._index(config), rows, algorithm, self.complain)
        try:
            yield track
        except BaseException:
            track.finish(1)
            raise
        track.finish(0)

    def complain(self, name: str, error: Exception) -> None:
        """Tell the user once that a tracker does not work."""
        if name not in self._failed:
            self._failed.add(name)
            self.say(f"{name}: {type(error).__name__}: {error}; the chain runs on without it")

    def _open(self, stage: str, config: Mapping[str, Any]) -> dict[str, StageRun]:
        found: dict[str, StageRun] = {}
        for name in self.names:
            try:
                run = self._opened(name, stage, config)
            except Exception as error:  # no exception of a tracker may stop training
                self.complain(name, error)
                continue
            if run is not None:
                found[name] = run
        return found

    def _opened(self, name: TrackerName, stage: str, config: Mapping[str, Any]) -> StageRun | None:
        if name == "wandb":
            return open_wandb(self.wandb, self.group, stage, config, self.run_dir)
        if name == "tensorboard":
            return open_tensorboard(stage, config, self.run_dir)
        return open_mlflow(self.wandb.project, self.group, stage, config, self.run_dir)

    def _index(self, config: Mapping[str, Any]) -> PictureIndex:
        """The pictures of the sets that the stage trains on."""
        names = [source["set"] for source in config.get("data") or () if "set" in source]
        return PictureIndex([self.sets[name] for name in names if name in self.sets])


class StageTrack:
    """One stage's runs at all trackers. No call raises, even without a tracker."""

    def __init__(
        self,
        runs: Mapping[str, StageRun],
        pictures: PictureIndex,
        table_rows: int,
        algorithm: Mapping[str, Any],
        complain: Callable[[str, Exception], None],
    ) -> None:
        self._runs, self._pictures, self._rows, self._complain = dict(runs), pictures, table_rows, complain
        self._algorithm = algorithm
        self._live = set(runs)
        self._step = 0
        self._waiting: list[dict[str, Any]] = []

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one line of metrics.jsonl to the curves.

        A stage that resumes writes its last steps again. Each step goes to the trackers once.
        """
        step = record.get("step", self._step + 1)
        if step > self._step:
            self._step = step
            self._each(lambda run: run.log(record, step))

    def completions(self, rows: Sequence[dict[str, Any]]) -> None:
        """Take lines of completions.jsonl. A batch is sent as a table when the next batch begins or the stage ends."""
        for row in rows:
            if self._waiting and self._waiting[-1].get("batch") != row.get("batch"):
                self._flush()
            self._waiting.append(row)

    def alert(self, title: str, text: str) -> None:
        """Send an alert to the followers of the stage's runs."""
        self._each(lambda run: run.alert(title, text))

    def results(self, scores: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Add a finished stage's held-out scores, and a table of its completions."""
        self._flush()
        values = {
            f"eval/{mode}/{name}": float(value)
            for mode, found in scores.items()
            for name, value in found.items()
            if isinstance(value, int | float)
        }
        values |= {
            f"eval/{mode}/ci95_{end}": float(value)
            for mode, found in scores.items()
            for end, value in zip(("low", "high"), found.get("ci95", ()), strict=False)
        }
        self._each(lambda run: run.summary(values))
        self._table(
            "held_out",
            lambda: read_jsonl(folder / "samples.jsonl"),
            lambda rows: held_out_pictures(rows, folder),
        )

    def bench(self, tasks: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Add the scores of benchmarks, in points, and a table of each one's samples with pictures from `folder`."""
        self._each(lambda run: run.summary({f"bench/{name}": task["score"] for name, task in tasks.items()}))
        for name, task in tasks.items():
            self._table(
                f"bench_samples/{name}",  # a table under the score's name would replace it in W&B's summary
                lambda task=task: bench_rows(task),  # type: ignore[misc]
                lambda rows: bench_pictures(rows, folder),
            )

    def finish(self, exit_code: int) -> None:
        """End all runs, including runs of trackers that have failed."""
        self._flush()
        for name, run in self._runs.items():
            try:
                run.finish(exit_code)
            except Exception as error:
                self._complain(name, error)
        self._runs, self._live = {}, set()

    def _flush(self) -> None:
        rows, self._waiting = self._waiting, []
        if rows:
            self._table(
                "rollouts",
                lambda: with_advantages(rows, self._algorithm),
                lambda shown: self._pictures.of([row["id"] for row in shown]),
            )

    def _table(
        self,
        name: str,
        read: Callable[[], Sequence[Mapping[str, Any]]],
        pictures: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Any]],
    ) -> None:
        if not self._live or not self._rows:
            return
        try:
            rows = read()[: self._rows]
            table = table_of(rows, pictures(rows))
        except Exception as error:  # a malformed row or a missing set
            self._complain(f"table {name}", error)
            return
        if table.rows:
            self._each(lambda run: run.table(name, table, self._step))

    def _each(self, do: Callable[[StageRun], None]) -> None:
        for name in sorted(self._live):
            try:
                do(self._runs[name])
            except (
                Exception
            ) as error:  # a fault of the network, the disk or the tracker must not stop training
                self._live.discard(name)
                self._complain(name, error)
