"""One stage's work in child processes: its ranks are started, followed, and stopped whatever happens.

Training lives in children so that the runner stays light, one stage's memory is gone before the next begins,
and no stage shares a process with another's patches of transformers. Several ranks are started as one is, without
torchrun: its rendezvous store takes pickles from anybody who reaches its port.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chain.job import Task
from core import processes
from core.files import write_json
from core.training.group import MEETING

if TYPE_CHECKING:
    from chain.hosts import Cluster

POLL_S = 0.2
GRACE_S = 5.0
"""After the first rank has failed, the others have this time to fail by themselves; a rank that does not hangs."""
TRACE_S = 1.0
"""A hung rank has this time to write where it is."""
_ROOT = Path(__file__).resolve().parents[1]


class StageFailed(RuntimeError):
    """A stage's process ended without finishing its work. The message has the end of its log and its path."""


@dataclass(frozen=True)
class Meeting:
    """How the ranks of a job find each other."""

    place: str
    """A file in a folder of mode 0700, or `tcp://ADDRESS:PORT` of the leader where there are several hosts."""
    nodes: int = 1
    node: int = 0


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


class Ranks:
    """The ranks of one job on this host. When one has failed, the others have GRACE_S to end, and are then stopped.

    Args:
        job_file: what each rank is told.
        count: ranks on this host.
        threads: CPU threads of each.
        meeting: where the ranks meet; None for a single one.
    """

    def __init__(self, job_file: Path, count: int, threads: int, meeting: Meeting | None) -> None:
        self._processes: dict[int, Any] = {}
        self._logs: dict[int, Path] = {}
        self._failed: dict[int, str] = {}
        """How each rank failed."""
        self._hung: list[int] = []
        self._failed_at = 0.0
        first = count * meeting.node if meeting else 0
        try:
            for local in range(count):
                rank, names = first + local, {}
                if meeting:
                    names |= {
                        **{
                            "RANK": str(rank),
                            "WORLD_SIZE": str(count * meeting.nodes),
                            MEETING: meeting.place,
                        },
                        **{"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(count)},
                    }
                self._logs[rank] = job_file.parent / (f"log-rank{rank}.txt" if rank else "log.txt")
                self._processes[rank] = processes.start(
                    command(job_file), log=self._logs[rank], environment=environment(threads) | names
                )
        except BaseException:
            self.stop()
            raise

    def ended(self, patience_s: float) -> bool:
        """Whether all ranks end within the time, or one has failed and the others have been stopped."""
        deadline = time.monotonic() + patience_s
        while True:
            for rank, process in self._processes.items():
                if process.poll() and rank not in self._failed:
                    self._failed_at = self._failed_at or time.monotonic()
                    self._failed[rank] = processes.how_it_ended(process.returncode)
            running = [rank for rank, process in self._processes.items() if process.returncode is None]
            if not running:
                return True
            if self._failed and time.monotonic() - self._failed_at > GRACE_S:
                self._stop_hung(running)
                return True
            if time.monotonic() >= deadline:
                return False
            processes.ended(self._processes[running[0]], min(POLL_S, deadline - time.monotonic()))

    def failure(self) -> str | None:
        """Which ranks failed and how, with the end of the log of the one that explains most; None if none did."""
        if not self._failed:
            return None
        # A rank that a signal killed makes the others fail, whose connections to it close; so does the first that
        # wrote why it fails.
        first = min(
            self._failed,
            key=lambda rank: ("killed" not in self._failed[rank], self._logs[rank].stat().st_mtime_ns),
        )
        several = len(self._processes) > 1 or first
        name = f"rank {first}" if several else "its process"
        text = f"{name} {self._failed[first]}"
        others = [f"rank {rank} {how}" for rank, how in self._failed.items() if rank != first]
        if others:
            text += f" (then {', '.join(others)})"
        text += f"; last lines of {self._logs[first]}:\n{processes.last_lines(self._logs[first])}"
        for rank in self._hung:
            text += (
                f"\nrank {rank} had not ended {GRACE_S:g} s later and was stopped: it hangs, or waited for another. "
                f"Where it was, from {self._logs[rank]}:\n{processes.last_lines(self._logs[rank])}"
            )
        return text

    def stop(self) -> None:
        """End every rank and what it started."""
        processes.stop(*self._processes.values())

    def _stop_hung(self, running: list[int]) -> None:
        self._hung = running
        for rank in running:
            processes.ask_for_trace(self._processes[rank])
        time.sleep(TRACE_S)
        self.stop()


def _meeting(ranks: int, stack: ExitStack) -> Meeting | None:
    """Where the ranks of one host meet: a file that only this user can open."""
    if ranks == 1:
        return None
    folder = stack.enter_context(processes.held_folder(Path(tempfile.gettempdir())))
    return Meeting(str(folder / "store"))


def command(job_file: Path) -> list[str]:
    """A rank's command line. -P: a folder `core` or `rl` where the user stands must not become ours."""
    return [sys.executable, "-P", "-m", "chain.worker", str(job_file)]


def environment(threads: int) -> dict[str, str]:
    """The ranks' environment: this one without what a launcher of ours left there, thread counts, and our packages
    before others of their names."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {
        **processes.inherited_environment(),
        **counts,
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
    }
