"""Runs one stage's work in child processes: starts its ranks, watches them, and stops them in every case.

Training runs in child processes for three reasons: the runner stays small, a stage's memory is freed before the next
stage begins, and no stage shares a process with another stage's patches of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

from chain.job import Task
from chain.ranks import POLL_S, Ranks, meeting_here
from core.files import write_json


class StageFailed(RuntimeError):
    """A stage's process ended without finishing its work. The message has the end and the path of its log."""


class Started(Protocol):
    """The running ranks of one job: chain.ranks.Ranks on this host, chain.cluster.RayRanks on Ray's nodes."""

    def ended(self, patience_s: float) -> bool:
        """Whether all ranks end, or one fails and the others are stopped, within `patience_s` seconds."""
        ...

    def failure(self) -> str | None:
        """How the ranks failed; None if they did not."""
        ...

    def stop(self) -> None:
        """End every rank and all its descendants."""
        ...


Start = Callable[[Path, int, int], Started]
"""(job file, number of ranks, CPU threads of each) -> the running ranks."""


def run_job(
    task: Task,
    folder: Path,
    *,
    processes: int = 1,
    threads: int = 1,
    on_poll: Callable[[], None] = lambda: None,
    start: Start | None = None,
) -> None:
    """Run `chain.worker` on a task; return when it has succeeded.

    The task is written to `folder/job.json`, rank 0's output to `folder/log.txt`, another rank's to
    `folder/log-rank<N>.txt`. `on_poll` is called a few times per second. `start` starts the ranks; default: on this
    host.
    Raises StageFailed if a rank fails. Before any exception leaves this function, Ctrl-C included, all ranks and their
    descendants are stopped.
    """
    job_file = folder / "job.json"
    write_json(job_file, task)
    ranks: Started | None = None
    with ExitStack() as stack:
        try:
            if start is None:
                ranks = Ranks(job_file, processes, threads, meeting_here(processes, stack))
            else:
                ranks = start(job_file, processes, threads)
            while not ranks.ended(POLL_S):
                on_poll()
            on_poll()
            failure = ranks.failure()
        finally:
            if ranks:
                ranks.stop()
    if failure:
        raise StageFailed(f"{task.stage}: {failure}")
