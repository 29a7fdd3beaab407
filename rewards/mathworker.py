"""The process that compares mathematical answers; rewards.mathcheck starts it as a script.

Two processes: this one, the keeper, imports the algebra once, never computes, and forks a worker that does.
A worker past its deadline is killed and forked again, which takes milliseconds because the imports are
inherited. The fork is safe: the keeper has one thread.

Protocol, a JSON object a line: {"gold", "prediction", "deadline_s"} on standard input, {"outcome"} on
standard output; prediction null asks only whether the gold is readable. The first line out is {"ready": true}
or {"error": text}. The end of standard input ends both processes.
"""

import contextlib
import ctypes
import json
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

MEMORY_BYTES = 2 << 30
_CHUNK_BYTES = 1 << 16
_PR_SET_PDEATHSIG = 1
_ANSWERS = 3
"""The worker's file descriptor for answers; 0 is its jobs."""


class Lines:
    """Lines from a file descriptor, with a deadline; os-level, so that select sees all there is."""

    def __init__(self, source: int) -> None:
        self.source, self._buffer = source, b""

    def read(self, timeout_s: float | None, hang_up: int | None = None) -> bytes | None:
        """The next line; b"" at the end of the source or of `hang_up`. None when the time is over."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        watched = [self.source] if hang_up is None else [self.source, hang_up]
        while b"\n" not in self._buffer:
            left = None if end is None else max(0.0, end - time.monotonic())
            ready = select.select(watched, [], [], left)[0]
            if not ready:
                return None
            if self.source not in ready:
                return b""
            chunk = os.read(self.source, _CHUNK_BYTES)
            if not chunk:
                return b""
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line


class Worker:
    """A forked process that computes one job at a time under a memory limit."""

    def __init__(self) -> None:
        jobs_out, self._jobs = os.pipe()
        answers, answers_in = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._jobs)
            os.close(answers)
            _compute(jobs_out, answers_in)
        os.close(jobs_out)
        os.close(answers_in)
        self._answers = Lines(answers)

    def ask(self, job: bytes, deadline_s: float) -> bytes | None:
        """The worker's answer; b"" if it died or the keeper's own input ended, None past the deadline."""
        try:
            os.write(self._jobs, job + b"\n")
        except BrokenPipeError:
            return b""
        return self._answers.read(deadline_s, hang_up=0)

    def kill(self) -> None:
        """End it, however busy, and free what it held."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._jobs)
        os.close(self._answers.source)


def _compute(jobs: int, answers: int) -> None:
    """Answer jobs until there are no more; never returns."""
    # Without a keeper nobody would stop a hung worker.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Hold nothing of the keeper's: its reader must see the end of the pipe when it dies.
    os.dup2(jobs, 0)
    os.dup2(answers, _ANSWERS)
    os.closerange(_ANSWERS + 1, 256)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines = Lines(0)
    while line := lines.read(None):
        os.write(_ANSWERS, json.dumps(_answer(json.loads(line))).encode() + b"\n")
    os._exit(0)


def _answer(job: dict[str, Any]) -> dict[str, Any]:
    from rewards.equality import Outcome, compare, readable

    try:
        if job["prediction"] is None:
            return {"outcome": Outcome.EQUAL if readable(job["gold"]) else Outcome.BAD_GOLD}
        return {"outcome": compare(job["gold"], job["prediction"])}
    except MemoryError:
        os._exit(1)  # what is left of the memory is of no use to the next job
    except RecursionError:
        return {"outcome": Outcome.UNPARSEABLE}


def keep(answers: int) -> None:
    """Serve jobs from standard input until it ends."""
    jobs, worker = Lines(0), Worker()
    while line := jobs.read(None):
        answer = worker.ask(line, json.loads(line)["deadline_s"])
        if not answer:
            outcome = "timeout" if answer is None else "crashed"
            answer = json.dumps({"outcome": outcome}).encode()
            worker.kill()
            worker = Worker()
        with contextlib.suppress(BrokenPipeError):  # then standard input has ended as well
            os.write(answers, answer + b"\n")
    worker.kill()


def main() -> None:
    """Import the algebra, say so, and serve."""
    # Whatever a dependency prints must not end up between the answers.
    answers = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    # First on the path: a folder of the user's named `rewards` must not stand in for this package.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    try:
        from rewards.equality import compare

        compare("x+1", "1+x")  # loads what math-verify and sympy load late
    except Exception as error:
        os.write(answers, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        raise SystemExit(1) from error
    os.write(answers, b'{"ready": true}\n')
    keep(answers)


if __name__ == "__main__":
    main()
