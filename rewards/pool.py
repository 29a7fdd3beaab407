"""Worker processes for work that may hang, exhaust memory or crash. Each job ends in a result or in an Ending.

pebble runs the processes, kills a job's worker at the deadline, and distinguishes a dead worker from a failed job. This
module adds:

- Workers are forked from a server that has imported only one module. It does not import the program's main module, nor
  a user's folder that has the name of one of our packages. A new worker starts within 20 ms.
- A worker has a limited address space. A job may compute for CPU_SHARE of the deadline. A job that uses up its
  computing time ends as OVER_TIME; a job that reaches the deadline before that ends as TIMEOUT.
- A job that loses its worker to an outside cause, such as an out-of-memory killer, is tried once more.
- A forked child starts its own processes (rewards.forks).
"""

import contextlib
import io
import os
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, TimeoutError, wait
from concurrent.futures.process import BrokenProcessPool
from enum import Enum
from multiprocessing import context, forkserver, popen_forkserver, process, reduction, util
from pathlib import Path
from typing import Any

from rewards.forks import PerProcess

MEMORY_BYTES = 2 << 30
"""Bytes of a worker's address space; honest comparisons need a tenth of it."""
WORN_OUT_KB = 512 << 10
"""A worker whose peak memory exceeds this is replaced, so that its caches do not use up a later job's memory."""
CPU_SHARE = 0.7
"""Computing time as a share of the deadline: 1.4 s of 2 s. The slowest honest comparison measured takes 0.93 s."""
POLL_S = 0.01
"""Interval at which pebble checks deadlines and dead workers."""
SERVER_VARIABLE = "POSTTRAIN_POOL_SERVER"
"""Environment variable that is set while the server of a pool's workers preloads a module."""
BREAKS = 3
"""Broken pools that a job survives. pebble gives up a whole pool if a worker dies before its first message is read."""
_OUT_OF_MEMORY, _WORN_OUT = 70, 71
_ROOT = Path(__file__).resolve().parent.parent


class PoolError(RuntimeError):
    """The worker processes do not start. The installation is broken; no job caused it."""


class Ending(Enum):
    """Why a job has no result."""

    OVER_TIME = "it used up its computing time"
    OVER_MEMORY = "it used up its memory"
    TIMEOUT = "it reached its deadline before it had used its computing time"
    CRASHED = "it lost two workers"


class Job:
    """A submitted job."""

    def __init__(self, argument: Any, deadline_s: float) -> None:
        self.argument, self.deadline_s = argument, deadline_s
        self.future: Future = Future()
        """Receives the result, an Ending or an exception."""
        self.task: Future | None = None
        self.tried = False
        """Whether a worker died under the job."""
        self.breaks = 0

    def begun(self) -> bool:
        """Whether a worker has started the job."""
        return self.future.done() or self.tried or bool(self.task and self.task.running())

    def cancel(self) -> bool:
        """Drop the job if no worker has started it; return whether it was dropped."""
        return not self.begun() and bool(self.task and self.task.cancel())

    def end(self, result: Any) -> None:
        """Resolve the future."""
        if not self.future.done():
            self.future.set_exception(result) if isinstance(
                result, BaseException
            ) else self.future.set_result(result)


class Pool:
    """`size` worker processes for one function of one argument. They start at the first job, and restart after a death.

    Args:
        function: called in a worker; importable by name, with picklable argument and result.
        preload: module that the server of the workers imports before it forks.
        size: number of worker processes.
        deadline_s: seconds from the start of a job until its worker is killed.

    Usable from any thread, and in a forked child.
    """

    def __init__(self, function: Callable[[Any], Any], preload: str, size: int, deadline_s: float) -> None:
        self.function, self.preload, self.size, self.deadline_s = function, preload, size, deadline_s
        self._processes = PerProcess(lambda: _Processes(self.preload, self.size))

    def submit(self, argument: Any) -> Job:
        """Start a job. Raises PoolError if the workers do not start."""
        job = Job(argument, self.deadline_s)
        self._start(job)
        return job

    def settle(self, jobs: Sequence[Job], patience_s: float) -> None:
        """Wait until jobs that have begun end. If a job does not, it ends as CRASHED, and the workers are replaced.

        pebble never ends a job whose worker is killed between the receipt of the job and its acknowledgement.

        Args:
            jobs: jobs that have begun.
            patience_s: seconds to wait beyond two deadlines.
        """
        longest = max((job.deadline_s for job in jobs), default=0.0)
        if wait([job.future for job in jobs], 2 * longest + patience_s).not_done:
            for job in jobs:
                job.end(Ending.CRASHED)
            self._replace(self._processes())

    def close(self) -> None:
        """End this process's workers; the next job starts new ones."""
        processes = self._processes.drop()
        if processes:
            processes.stop()

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return self._processes().pids

    def _start(self, job: Job) -> None:
        for _ in range(3):  # replace a pool that breaks, or that another thread closes
            processes = self._processes()
            try:
                arguments = (self.function, job.argument, CPU_SHARE * job.deadline_s)
                job.task = processes.schedule(_run, arguments, job.deadline_s)
            except RuntimeError:  # pebble's for a pool that broke or was stopped
                self._replace(processes)
                continue
            processes.watch(job)
            job.task.add_done_callback(lambda task: self._done(job, task))
            return
        raise PoolError(
            f"the worker processes do not start: `{SERVER_VARIABLE}=1 python -m {self.preload}` says why"
        )

    def _replace(self, broken: "_Processes") -> None:
        self._processes.drop(broken)
        waiting = [job for job in list(broken.jobs) if job.task and not job.task.done()]
        broken.jobs.clear()
        threading.Thread(
            target=broken.stop, daemon=True
        ).start()  # the current thread may be one of the threads that stop() joins
        for job in waiting:
            self._again(job)

    def _done(self, job: Job, task: Future) -> None:
        """A worker has finished a job, failed at it, or died."""
        if job.future.done() or job.task is not task:  # the pool was closed, or the job was started again
            return
        if task.cancelled():
            job.future.cancel()
            return
        error = task.exception()
        if error is None:
            job.end(task.result())
        elif isinstance(error, TimeoutError):
            job.end(Ending.TIMEOUT)
        elif isinstance(error, BrokenProcessPool):  # perhaps through another job
            job.breaks += 1
            job.end(Ending.CRASHED) if job.breaks > BREAKS else self._again(job)
        elif hasattr(error, "exitcode"):  # pebble's ProcessExpired: this worker died
            self._lost(job, error.exitcode)
        else:
            job.end(error)  # the function raised

    def _lost(self, job: Job, code: int) -> None:
        """A job's worker ended with an exit code."""
        if code == -signal.SIGPROF:
            job.end(Ending.OVER_TIME)
        elif code == _OUT_OF_MEMORY:
            job.end(Ending.OVER_MEMORY)
        elif job.tried and code != _WORN_OUT:
            job.end(Ending.CRASHED)
        else:
            job.tried = job.tried or code != _WORN_OUT
            self._again(job)

    def _again(self, job: Job) -> None:
        try:
            self._start(job)
        except BaseException as error:
            job.end(error)


class _Processes:
    """The pebble pool of one process, and the server that forks its workers."""

    def __init__(self, preload: str, size: int) -> None:
        self._preload, self._size = preload, size
        self._pool: Any = None
        self._lock = threading.Lock()
        self.jobs: set[Job] = set()

    def schedule(self, function: Callable, arguments: tuple, deadline_s: float) -> Future:
        """Start a task. Raises RuntimeError if the pool is broken or stopped, or does not start."""
        with self._lock:
            if self._pool is None:
                self._pool = self._started()
        return self._pool.schedule(function, args=arguments, timeout=deadline_s)

    def watch(self, job: Job) -> None:
        """Keep a job until it has ended."""
        self.jobs.add(job)
        job.future.add_done_callback(lambda _: self.jobs.discard(job))

    def _started(self) -> Any:
        from pebble import CONSTS, ProcessPool

        CONSTS.sleep_unit, CONSTS.term_timeout = POLL_S, POLL_S
        return ProcessPool(self._size, initializer=_prepare, context=_Context(self._preload))

    @property
    def pids(self) -> list[int]:
        return list(self._pool._pool_manager.worker_manager.workers) if self._pool else []

    def stop(self) -> None:
        """End the workers; open jobs end as CRASHED."""
        for job in list(self.jobs):  # before the workers end, or a dead worker would start its job again
            job.end(Ending.CRASHED)
        with self._lock:
            if self._pool is not None:
                self._pool.stop()
                self._pool.join()


class _Context(context.ForkServerContext):
    """Starts processes from its own server, which does not import the program's main module."""

    def __init__(self, preload: str) -> None:
        super().__init__()
        self._server = _Server()
        self._server.set_forkserver_preload([preload])

    def Process(self, *arguments: Any, **named: Any) -> process.BaseProcess:  # type: ignore[override]
        """A process that this context's server forks."""
        made = _Process(*arguments, **named)
        made.server = self._server
        return made


class _Server(forkserver.ForkServer):
    def ensure_running(self) -> None:
        if self._forkserver_pid is not None:  # type: ignore[attr-defined]
            return super().ensure_running()
        # As `python -P`, with this package first on the path: a user's folder must not shadow it.
        ours = {
            SERVER_VARIABLE: "1",
            "PYTHONSAFEPATH": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
        }
        before = {name: os.environ.get(name) for name in ours}
        os.environ.update(ours)
        try:
            return super().ensure_running()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


class _Process(process.BaseProcess):
    _start_method = "forkserver"
    server: _Server

    @staticmethod
    def _Popen(made: "_Process") -> "_Popen":  # type: ignore[override]
        return _Popen(made)

    def start(self) -> None:
        """As the base class's, but the worker is not registered as a child of this process.

        So a daemonic process may start it, and a forked child does not end its parent's workers at exit.
        """
        self._popen = self._Popen(self)
        self._sentinel = self._popen.sentinel
        del self._target, self._args, self._kwargs  # type: ignore[attr-defined]


class _Popen(popen_forkserver.Popen):
    def _launch(self, made: _Process) -> None:
        """Launch like the base class, with our server and without the program's main module."""
        buffer = io.BytesIO()
        server = made.__dict__.pop("server")
        context.set_spawning_popen(self)  # type: ignore[attr-defined]
        try:
            reduction.dump({"name": made.name, "authkey": bytes(process.current_process().authkey)}, buffer)
            reduction.dump(made, buffer)
        finally:
            context.set_spawning_popen(None)  # type: ignore[attr-defined]
        self.sentinel, writer = server.connect_to_new_process(self._fds)  # type: ignore[attr-defined]
        self.finalizer = util.Finalize(self, util.close_fds, (os.dup(writer), self.sentinel))  # type: ignore[attr-defined]
        with open(writer, "wb", closefd=True) as pipe:
            pipe.write(buffer.getbuffer())
        self.pid = forkserver.read_signed(self.sentinel)


_done = 0


def _prepare() -> None:
    """Set the limits of the worker process that calls this function."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would run only after a long C call ends
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError):  # if the machine runs out of memory, kill a worker before a trainer
        Path("/proc/self/oom_score_adj").write_text("1000")


def _run(function: Callable[[Any], Any], argument: Any, cpu_s: float) -> Any:
    """Run a job in a worker. The kernel ends the worker after the job has used its CPU time."""
    global _done
    if _done and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > WORN_OUT_KB:
        os._exit(_WORN_OUT)
    _done += 1
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        return function(argument)
    except MemoryError:
        os._exit(_OUT_OF_MEMORY)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
