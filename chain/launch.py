"""One stage's work in a process of its own: started, followed, and stopped whatever happens.

Training lives in a child so that the runner stays light, one stage's memory is gone before the next begins,
and no stage shares a process with another's patches of transformers.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from chain.job import Task
from core.files import write_json
from core.processes import launcher_variables
from rl.rollout.server import TETHERED

if TYPE_CHECKING:
    from chain.hosts import Cluster

POLL_S = 0.2
PATIENCE_S = 15
"""A child that was asked to end and has not by then is killed. torchrun needs a few seconds for its ranks."""
GRACE_S = 5
"""When the ranks here have failed, so long for other hosts to say that theirs had before."""
LAST_LINES = 40
_TORCHRUN = re.compile(r"^[EW]\d{4} .*torch/distributed/elastic/multiprocessing/api\.py")
_ROOT = Path(__file__).resolve().parents[1]


class StageFailed(RuntimeError):
    """A stage's process ended without finishing its work. The message has the end of its log and its path."""


@dataclass(frozen=True)
class Rendezvous:
    """Where the ranks of several hosts meet."""

    nodes: int
    node: int
    address: str
    """Of the leader."""
    port: int


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

    The task is written to `folder/job.json`, the child's output to `folder/log.txt`. With several processes it
    runs under torchrun, and where there are several hosts each has its share of them. `on_poll` is called a few
    times per second. Raises StageFailed if the child fails, HostLost if a host is gone; on any exception, Ctrl-C
    included, the child and all its descendants are stopped first, here and on the other hosts.
    """
    job_file, log = folder / "job.json", folder / "log.txt"
    write_json(job_file, task)
    hosts = cluster if processes > 1 else None
    ranks = processes // hosts.nodes if hosts else processes
    process: subprocess.Popen | None = None
    try:
        meeting = hosts.start(job_file, ranks, threads) if hosts else None
        process = start(command(job_file, ranks, meeting), threads, log)
        while not _ended(process, POLL_S) and not (hosts and hosts.failed()):
            on_poll()
            if hosts:
                hosts.check()
        on_poll()
        code = process.poll()
        if hosts:
            hosts.wait(GRACE_S if code or hosts.failed() else None)
            hosts.check()
        failures = hosts.failures(folder) if hosts else []
        if code:
            failures.insert(
                0, f"its process ended with exit code {code}; last lines of {log}:\n{last_lines(log)}"
            )
    finally:
        if process:
            stop(process)
        if hosts:
            hosts.stop()
    if failures:
        raise StageFailed(f"{task.stage}: " + "\n".join(failures))


def start(command: Sequence[str], threads: int, log: Path) -> subprocess.Popen:
    """Start a command of `command` as a child that ends with this process."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command,
            env=environment(threads),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the runner alone, which then stops the child in order
        )


def command(job_file: Path, processes: int, meeting: Rendezvous | None = None) -> list[str]:
    """The child's command line. -P: a folder `core` or `rl` where the user stands must not become ours.

    `processes` are this host's. torchrun does not ask to end with its parent, as the worker does: it is tethered.
    """
    python = [sys.executable, "-P", "-m"]
    if processes == 1 and meeting is None:
        return [*python, "chain.worker", str(job_file)]
    where = ["--standalone"]
    if meeting:
        # A static rendezvous: ranks follow the hosts' numbers, so that rank 0, who talks to servers, is the leader's.
        where = [
            *(f"--nnodes={meeting.nodes}", f"--node-rank={meeting.node}"),
            *(f"--master-addr={meeting.address}", f"--master-port={meeting.port}"),
        ]
    torchrun = [*python, "torch.distributed.run", *where, f"--nproc-per-node={processes}"]
    return [*TETHERED, str(os.getpid()), *torchrun, "-m", "chain.worker", str(job_file)]


def environment(threads: int) -> dict[str, str]:
    """The child's environment: this one without what a launcher of ours left there, thread counts, and our packages
    before others of their names."""
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    inherited = dict(os.environ)
    for name in launcher_variables(inherited):
        del inherited[name]
    return {
        # Threads that spin while they wait for one another starve the rollout server beside them: on two busy
        # cores the tiny core's pre-training took 60 CPU-seconds spinning and 15 without.
        "OMP_WAIT_POLICY": "PASSIVE",
        **inherited,
        **counts,
        "PYTHONPATH": path,
        "PYTHONSAFEPATH": "1",  # what -P is to processes that the child starts, torchrun's ranks among them
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def stop(process: subprocess.Popen) -> None:
    """End a child and every process below it; nothing happens if they have ended."""
    import psutil

    try:
        # torchrun gives every rank a session of its own, so killing the child's group would not reach them.
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    except psutil.NoSuchProcess:
        below = []
    _signal_group(process.pid, signal.SIGTERM)
    if not _ended(process, PATIENCE_S):
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()
    for one in below:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            continue


def last_lines(log: Path, count: int = LAST_LINES) -> str:
    """The end of a text file, undecodable bytes replaced, up to where torchrun begins to speak of itself.

    Its own traceback is 40 lines long and says nothing of why a rank failed.
    """
    lines = log.read_text(errors="replace").splitlines()
    torchrun = (place for place, line in enumerate(lines) if _TORCHRUN.search(line))
    return "\n".join(lines[: next(torchrun, None)][-count:])


def _ended(process: subprocess.Popen, patience_s: float) -> bool:
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _signal_group(group: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, number)
