"""Runs one stage's work in child processes: starts its ranks, watches them, and stops them in every case.

Training runs in child processes for three reasons: the runner stays small, a stage's memory is freed before the next
stage begins, and no stage shares a process with another stage's patches of transformers.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from chain.hosts import Cluster
from chain.job import Task
from chain.ranks import GRACE_S, POLL_S, Meeting, Ranks
from core.files import write_json
from core.processes import held_folder


class StageFailed(RuntimeError):
    """A stage's process ended without finishing its work. The message has the end and the path of its log."""


def run_job(
    task: Task,
    folder: Path,
    *,
    processes: int = 1,
    threads: int = 1,
    on_poll: Callable[[], None] = lambda: None,
    cluster: Cluster | None = None,
) -> None:
    """Run `chain.worker` on a task; return when it has succeeded.

    The task is written to `folder/job.json`, rank 0's output to `folder/log.txt`, another rank's to
    `folder/log-rank<N>.txt`. Several hosts share the ranks equally. `on_poll` is called a few times per second.
    Raises StageFailed if a rank fails and HostLost if a host is lost. Before any exception leaves this function, Ctrl-C
    included, all ranks and their descendants are stopped on all hosts.
    """
    job_file = folder / "job.json"
    write_json(job_file, task)
    hosts = cluster if processes > 1 else None
    here = processes // hosts.nodes if hosts else processes
    ranks: Ranks | None = None
    with ExitStack() as stack:
        try:
            meeting = hosts.start(job_file, here, threads) if hosts else _meeting(processes, stack)
            ranks = Ranks(job_file, here, threads, meeting)
            while not ranks.ended(POLL_S) and not (hosts and hosts.failed()):
                on_poll()
                if hosts:
                    hosts.check()
            on_poll()
            failures = [failure] if (failure := ranks.failure()) else []
            if hosts:
                hosts.wait(GRACE_S if failure or hosts.failed() else None)
                hosts.check()
                failures += hosts.failures()
        finally:
            if ranks:
                ranks.stop()
            if hosts:
                hosts.stop()
    if failures:
        raise StageFailed(f"{task.stage}: " + "\n".join(failures))


def _meeting(ranks: int, stack: ExitStack) -> Meeting | None:
    """The rendezvous of the ranks of one host: a file that only this user can open."""
    if ranks == 1:
        return None
    folder = stack.enter_context(held_folder(Path(tempfile.gettempdir())))
    return Meeting(str(folder / "store"))
