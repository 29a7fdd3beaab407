"""The ranks of one job on this host: started as child processes, watched, and stopped together.

Several ranks are started like a single rank, without torchrun: torchrun's rendezvous store unpickles data from any
client that reaches its port.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core import processes
from core.training.group import MEETING

POLL_S = 0.2
GRACE_S = 5.0
"""After the first failure, the other ranks have this time to end by themselves. A rank that does not end hangs."""
TRACE_S = 1.0
"""Time that a hung rank has to write its stack trace."""


@dataclass(frozen=True)
class Meeting:
    """The rendezvous of a job's ranks."""

    place: str
    """One host: a file in a folder of mode 0700. Several hosts: `tcp://ADDRESS:PORT` of the first one."""
    nodes: int = 1
    node: int = 0


def meeting_here(ranks: int, stack: ExitStack) -> Meeting | None:
    """The rendezvous of the ranks of one host: a file that only this user can open. None for a single rank."""
    if ranks == 1:
        return None
    folder = stack.enter_context(processes.held_folder(Path(tempfile.gettempdir())))
    return Meeting(str(folder / "store"))


class Ranks:
    """The ranks of one job on this host. After one rank fails, the others have GRACE_S to end and are then stopped.

    Args:
        job_file: the task file, which every rank reads.
        count: number of ranks on this host.
        threads: CPU threads per rank.
        meeting: the rendezvous of the ranks; None for a single rank.
    """

    def __init__(self, job_file: Path, count: int, threads: int, meeting: Meeting | None) -> None:
        self._processes: dict[int, Any] = {}
        self._logs: dict[int, Path] = {}
        self._failed: dict[int, str] = {}
        """Rank -> how the rank failed."""
        self._hung: list[int] = []
        self._failed_at = 0.0
        first = count * meeting.node if meeting else 0
        # No process listens on this port. DeepSpeed derives the names of its buffers in shared memory from the port, so
        # each job has its own.
        names_of_buffers = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(processes.free_port())}
        try:
            for local in range(count):
                rank = first + local
                names: dict[str, str] = {}
                if meeting:
                    names |= {
                        **{
                            "RANK": str(rank),
                            "WORLD_SIZE": str(count * meeting.nodes),
                            MEETING: meeting.place,
                        },
                        **{"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(count)},
                        **names_of_buffers,
                    }
                self._logs[rank] = job_file.parent / (f"log-rank{rank}.txt" if rank else "log.txt")
                self._processes[rank] = processes.start(
                    command(job_file), log=self._logs[rank], environment=environment(threads) | names
                )
        except BaseException:
            self.stop()
            raise

    def ended(self, patience_s: float) -> bool:
        """Whether, within `patience_s`, all ranks have ended, or one has failed and the others have been stopped."""
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
        """The failed ranks and how they failed, with the end of the most informative log; None if no rank failed."""
        if not self._failed:
            return None
        # A rank that a signal killed makes the other ranks fail, as their connections to it close. The same holds for
        # the first rank that wrote its error.
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
                f"\nrank {rank} had not ended {GRACE_S:g} s later and was stopped: it hung or waited for another rank. "
                f"Its stack, from {self._logs[rank]}:\n{processes.last_lines(self._logs[rank])}"
            )
        return text

    def stop(self) -> None:
        """End every rank and all its descendants."""
        processes.stop(*self._processes.values())

    def _stop_hung(self, running: list[int]) -> None:
        self._hung = running
        for rank in running:
            processes.ask_for_trace(self._processes[rank])
        time.sleep(TRACE_S)
        self.stop()


def command(job_file: Path) -> list[str]:
    """A rank's command line. -P prevents the import of a folder `core` or `rl` in the working directory."""
    return [sys.executable, "-P", "-m", "chain.worker", str(job_file)]


def environment(threads: int) -> dict[str, str]:
    """The ranks' environment: this process's environment without an outer launcher's variables, with thread counts."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {
        **processes.inherited_environment(),
        **counts,
        "PYTHONUNBUFFERED": "1",
    }
