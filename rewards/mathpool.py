"""Worker processes that compare mathematical answers, and the one thread that hands them their jobs.

A worker does one job at a time, and the job's clock starts when the worker does; while many jobs wait, the next
one already lies in the worker's socket, so that a busy machine does not let it idle. The thread kills the worker at
the deadline through a pidfd, so a stopped keeper, a long C call or a worker that ignores signals changes
nothing. A worker's death costs at most its own job: the job is tried once more on a fresh worker as long as its
own deadline lasts, because most deaths come from outside (an out-of-memory killer, a `kill -9`), and one that a
comparison brings about repeats itself. When the keeper dies, which takes its workers along, the jobs in flight
end as CRASHED and the next one starts everything anew.

A job that meets its deadline is the prediction's fault (OVER_TIME) if the worker got at least CPU_SHARE of it
as computing time, and ours (TIMEOUT) if the machine was too busy, or the worker stopped.
"""

import array
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future
from pathlib import Path

from rewards.equality import Outcome
from rewards.mathworker import ANSWER

START_S = 120.0
"""Importing sympy takes a second, on a machine under load many."""
FORK_S = 10.0
"""A keeper that has not forked within it, while no worker is left, is replaced."""
FAILED_STARTS = 3
"""Keepers killed in a row before they are ready, after which it is no accident."""
CPU_SHARE = 0.5
"""Of the deadline; of 2 s it is 1 s, and the slowest honest comparison measured takes 0.93 s."""
MAX_PACKET_BYTES = 1 << 16
"""What a job may hold; a worker's socket takes it whole, so that sending never waits."""
_WORKER = Path(__file__).with_name("mathworker.py")
_OUTCOMES = tuple(Outcome)
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class MathCheckError(RuntimeError):
    """The checking process does not start: an installation is broken, no answer is to blame."""


class Job:
    """A question in the pool; its future runs from the moment that a worker has it."""

    __slots__ = ("_wanted", "deadline", "future", "packet", "tried")

    def __init__(self, gold: str, prediction: str | None) -> None:
        self.packet = json.dumps((gold, prediction)).encode()
        self.future: Future[Outcome] = Future()
        self.deadline = 0.0
        """When its time is over (time.monotonic); set at its start."""
        self.tried = False
        """Whether it has lost a worker."""
        self._wanted = True

    def begin(self, deadline_s: float) -> bool:
        """Start its clock; returns whether anybody waits for it. No-op for one that has begun."""
        if not self.deadline:
            self.deadline = time.monotonic() + deadline_s
            self._wanted = self.future.set_running_or_notify_cancel()
        return self._wanted

    def settle(self, outcome: Outcome | BaseException) -> None:
        """End it, begun or not."""
        if not self.begin(0):
            return
        if isinstance(outcome, Outcome):
            self.future.set_result(outcome)
        else:
            self.future.set_exception(outcome)

    def fits(self) -> bool:
        """Whether a worker takes so long a text."""
        return len(self.packet) <= MAX_PACKET_BYTES


class _Worker:
    """A worker process as its parent sees it."""

    def __init__(self, pid: int, pidfd: int, connection: socket.socket) -> None:
        self.pid, self._pidfd, self.connection = pid, pidfd, connection
        self.jobs: list[Job] = []
        """The one it does and the one it does next, if there are any."""
        self._spent_s = 0.0
        """Computing time up to the start of its job."""

    def take(self, job: Job) -> bool:
        """Whether it takes a job; it does not if it is dead, as its connection is about to say."""
        try:
            self.connection.send(job.packet, socket.MSG_DONTWAIT)
        except OSError:
            return False
        self.jobs.append(job)
        return True

    def answer(self) -> tuple[Outcome, bool] | None:
        """The outcome of its job and whether it leaves after it; None if it is dead."""
        try:
            packet = self.connection.recv(ANSWER.size, socket.MSG_DONTWAIT)
        except OSError:
            return None
        if len(packet) != ANSWER.size:
            return None
        place, leaves, self._spent_s = ANSWER.unpack(packet)
        return _OUTCOMES[place], leaves

    def computed_s(self) -> float:
        """Computing time that its job has had."""
        try:
            stat = Path(f"/proc/{self.pid}/stat").read_text()
        except OSError:
            return 0.0
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / _TICKS_PER_S - self._spent_s

    def end(self) -> None:
        """Kill it, however busy, and free what is held for it here."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        self.forget()

    def forget(self) -> None:
        self.connection.close()
        os.close(self._pidfd)


class _Keeper:
    """The process that forks workers, as its parent sees it."""

    def __init__(self) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            # -P: no folder of the user's stands in for a module. Its own session: Ctrl-C is for this process.
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(_WORKER)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.ready = False
        self.forking = 0
        """Workers that it was asked for and has not delivered."""
        self.since = time.monotonic()
        """When it was started, or last asked for a worker."""

    def ask_for_worker(self) -> None:
        with contextlib.suppress(OSError):  # it is dead: its connection is about to say so
            self.control.send(b"fork", socket.MSG_DONTWAIT)
        self.forking += 1
        self.since = time.monotonic()

    def listen(self) -> tuple[str, str, list[int]]:
        """A word, text and file descriptors from it; the word is "" if it is dead."""
        flags = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        try:
            packet, extra, _, _ = self.control.recvmsg(4096, socket.CMSG_SPACE(8), flags)
        except OSError:
            packet, extra = b"", []
        descriptors = array.array("i")
        for _, _, data in extra:
            descriptors.frombytes(data)
        word, _, text = packet.decode().partition(" ")
        return word, text, list(descriptors)

    def end(self) -> int:
        """Kill it, and its workers with it; returns its exit status."""
        self.control.close()
        self.process.kill()
        return self.process.wait()

    def forget(self) -> None:
        self.control.close()
        self.process.returncode = 0  # not ours to wait for


class Pool:
    """Up to `size` workers. Starts at the first job; usable from any thread and, after a fork, in the child.

    Args:
        size: most workers at a time; they are forked as jobs come.
        deadline_s: from the start of a job to its worker's death.
    """

    _thread: threading.Thread | None

    def __init__(self, size: int, deadline_s: float) -> None:
        self.size, self.deadline_s = size, deadline_s
        self._start_afresh()

    def submit(self, job: Job) -> None:
        """Have a job done: its future ends in an outcome or in MathCheckError, unless it is cancelled."""
        with self._lock:
            self._queue.append(job)
            if self._thread is None:
                self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._thread = threading.Thread(target=self._serve, name="math pool", daemon=True)
                self._thread.start()
            os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the processes; jobs not done are CRASHED. The next job starts anew."""
        with self._lock:
            thread = self._thread
            if thread:
                self._closing = True
                os.eventfd_write(self._wake, 1)
        if thread and thread is not threading.current_thread():
            thread.join()

    @property
    def pid(self) -> int | None:
        """Process id of the keeper; None while there is none."""
        keeper = self._keeper
        return keeper.process.pid if keeper else None

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers."""
        return [worker.pid for worker in list(self._workers)]

    def forget(self) -> None:
        """In a forked child: let go of the parent's processes without touching them."""
        for held in (*self._workers, self._keeper):
            if held:
                held.forget()
        if self._thread:
            os.close(self._wake)
        self._start_afresh()

    def _start_afresh(self) -> None:
        self._lock = threading.Lock()
        self._queue: deque[Job] = deque()
        self._again: list[Job] = []
        """Jobs that have begun and have no worker any more, to be started before all others."""
        self._thread = None
        self._closing = False
        self._keeper: _Keeper | None = None
        self._workers: list[_Worker] = []
        self._failed_starts = 0

    # What follows runs in the pool's thread alone.

    def _serve(self) -> None:
        try:
            while not self._closing:
                self._hand_out()
                self._wait()
                self._end_the_late()
        except BaseException as error:
            self._fail(error)
            raise
        finally:
            self._stop()
            with self._lock:
                jobs = [*self._again, *self._queue]
                self._again.clear()
                self._queue.clear()
                os.close(self._wake)
                self._thread, self._closing = None, False
            for job in jobs:
                job.settle(Outcome.CRASHED)

    def _hand_out(self) -> None:
        """Give jobs to the workers, and have more workers forked if there are jobs left."""
        for worker in self._workers:
            while not worker.jobs and (self._again or self._queue):
                job = self._again.pop(0) if self._again else self._queue.popleft()
                if job.begin(self.deadline_s) and not worker.take(job):
                    self._again.append(job)
                    break
        for worker in self._workers:
            # The last ones wait for the first worker that is free.
            if len(worker.jobs) == 1 and len(self._queue) > self.size and worker.take(self._queue[0]):
                self._queue.popleft()
        waiting = len(self._again) + len(self._queue)
        if not waiting:
            return
        if not self._keeper:
            self._keeper = _Keeper()
        keeper = self._keeper
        while keeper.ready and keeper.forking < min(waiting, self.size - len(self._workers)):
            keeper.ask_for_worker()

    def _wait(self) -> None:
        """Sleep until there is something to do, and take what the processes say."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        for worker in self._workers:
            poll.register(worker.connection, select.POLLIN)
        if self._keeper:
            poll.register(self._keeper.control, select.POLLIN)
        ends = [job.deadline for job in self._in_flight()]
        late = self._keeper_is_late_at()
        if late is not None:
            ends.append(late)
        left_ms = max(0.0, min(ends) - time.monotonic()) * 1000 if ends else None
        spoke = {descriptor for descriptor, _ in poll.poll(left_ms)}
        if self._wake in spoke:
            os.eventfd_read(self._wake)
        if self._keeper and self._keeper.control.fileno() in spoke:
            self._hear_keeper(self._keeper)
        for worker in [worker for worker in self._workers if worker.connection.fileno() in spoke]:
            self._hear_worker(worker)

    def _in_flight(self) -> list[Job]:
        return [worker.jobs[0] for worker in self._workers if worker.jobs] + self._again

    def _hear_worker(self, worker: _Worker) -> None:
        """Take a worker's answer, or its end."""
        answer = worker.answer()
        job = worker.jobs.pop(0) if worker.jobs else None
        if answer is None or answer[1]:
            self._dismiss(worker)
        elif worker.jobs:
            worker.jobs[0].begin(self.deadline_s)
        if job and answer:
            job.settle(answer[0])
        elif job:
            self._lose(job)

    def _dismiss(self, worker: _Worker) -> None:
        """End a worker; what it has not begun is for the others."""
        self._workers.remove(worker)
        worker.end()
        for job in reversed(worker.jobs):
            if job.deadline:
                self._again.append(job)
            else:
                self._queue.appendleft(job)

    def _lose(self, job: Job) -> None:
        """A job's worker has died: try it again, once."""
        if job.tried:
            job.settle(Outcome.CRASHED)
        else:
            job.tried = True
            self._again.append(job)

    def _hear_keeper(self, keeper: _Keeper) -> None:
        word, text, descriptors = keeper.listen()
        if word == "ready":
            keeper.ready, self._failed_starts = True, 0
        elif word == "worker":
            connection, pidfd = descriptors
            keeper.forking -= 1
            self._workers.append(_Worker(int(text), pidfd, socket.socket(fileno=connection)))
        elif word == "lost":
            keeper.forking -= 1
        elif word == "error":
            self._stop()
            self._fail(MathCheckError(f"the math checking process does not start: {text}"))
        else:
            was_ready, status = keeper.ready, self._stop()
            self._failed_starts += not was_ready
            # A signal may be an accident, once or twice.
            if not was_ready and (status >= 0 or self._failed_starts >= FAILED_STARTS):
                self._fail(MathCheckError(f"the math checking process does not start: exit status {status}"))

    def _end_the_late(self) -> None:
        """Kill what has outlived its time."""
        now = time.monotonic()
        for worker in [worker for worker in self._workers if worker.jobs and worker.jobs[0].deadline <= now]:
            job, computed_s = worker.jobs.pop(0), worker.computed_s()
            self._dismiss(worker)
            own_fault = computed_s >= CPU_SHARE * self.deadline_s
            job.settle(Outcome.OVER_TIME if own_fault else Outcome.TIMEOUT)
        for job in [job for job in self._again if job.deadline <= now]:
            self._again.remove(job)
            job.settle(Outcome.CRASHED)
        late = self._keeper_is_late_at()
        if self._keeper and late is not None and late <= now:
            was_ready = self._keeper.ready
            self._stop()
            if not was_ready:
                reason = f"it is not ready within {START_S:g} s"
                self._fail(MathCheckError(f"the math checking process does not start: {reason}"))

    def _keeper_is_late_at(self) -> float | None:
        """When to give up a keeper that starts, or that alone could bring workers; None if neither."""
        keeper = self._keeper
        if not keeper:
            return None
        if not keeper.ready:
            return keeper.since + START_S
        return keeper.since + FORK_S if keeper.forking and not self._workers else None

    def _stop(self) -> int:
        """End the processes, with what they have answered taken; returns the keeper's exit status."""
        for worker in list(self._workers):
            self._hear_worker(worker)
            if worker in self._workers:
                self._dismiss(worker)
        keeper, self._keeper = self._keeper, None
        return keeper.end() if keeper else 0

    def _fail(self, error: BaseException) -> None:
        """End all jobs in an error; the next one starts anew."""
        self._failed_starts = 0
        with self._lock:
            jobs = [*self._again, *self._queue]
            self._again.clear()
            self._queue.clear()
        for job in jobs:
            job.settle(error)
