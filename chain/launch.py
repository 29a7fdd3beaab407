"""One stage's work in child processes: its ranks are started, followed, and stopped whatever happens.

Training lives in children so that the runner stays light, one stage's memory is gone before the next begins,
and no stage shares a process with another's patches of transformers.
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
    """A stage's process ended without finishing its work. The message has the end of its log and its path."""


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
    `folder/log-rank<N>.txt`. Where there are several hosts, each has its share of the ranks. `on_poll` is called a few
    times per second.
    Raises StageFailed if a rank fails, HostLost if a host is gone; on any exception, Ctrl-C included, all ranks and
    their descendants are stopped first, here and on the other hosts.
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
    """Where the ranks of one host meet: a file that only this user can open."""
    if ranks == 1:
        return None
    folder = stack.enter_context(held_folder(Path(tempfile.gettempdir())))
    return Meeting(str(folder / "store"))
