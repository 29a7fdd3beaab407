"""Compares mathematical answers in another process, so that no answer can hang, bloat or crash this one.

math-verify's own timeouts are SIGALRM: useless off the main thread, deaf inside long C calls. Here a job that
outlives its deadline costs its worker's life and nothing else. Works from any thread; after a fork each
process starts a worker of its own; the processes end with this one.
"""

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import weakref
from collections import OrderedDict
from pathlib import Path

from rewards.equality import Outcome
from rewards.mathworker import Lines

DEADLINE_S = 2.0
"""The slowest honest comparison measured took 0.93 s."""
START_S = 120.0
"""Importing sympy takes a second, on a machine under load many."""
GRACE_S = 5.0
"""Beyond a job's deadline, before the keeper itself is given up."""
CACHE_PAIRS = 1 << 16
_WORKER = Path(__file__).with_name("mathworker.py")


class MathCheckError(RuntimeError):
    """The checking process does not start: an installation is broken, no answer is to blame."""


class MathChecker:
    """One checking process, started at the first question and again after a death.

    >>> checker = MathChecker()
    >>> checker.compare("x^2 - 1", "(x - 1)(x + 1)")
    <Outcome.EQUAL: 'equal'>
    >>> checker.close()
    """

    _process: subprocess.Popen[bytes] | None
    _answers: Lines | None

    def __init__(self, deadline_s: float = DEADLINE_S) -> None:
        self.deadline_s = deadline_s
        self._cache: OrderedDict[tuple[str, str | None], Outcome] = OrderedDict()
        self._forget()
        _CHECKERS.add(self)

    def compare(self, gold: str, prediction: str) -> Outcome:
        """How the two compare. TIMEOUT and CRASHED say that this was not found out.

        Raises MathCheckError if the process does not start.
        """
        return self._ask(gold, prediction)

    def readable(self, gold: str) -> Outcome:
        """EQUAL if the gold answer parses, else BAD_GOLD, TIMEOUT or CRASHED. Raises as `compare`."""
        return self._ask(gold, None)

    def close(self) -> None:
        """End the process; the next question starts another."""
        with self._lock:
            self._stop()

    @property
    def pid(self) -> int | None:
        """Process id of the keeper, the worker's parent; None while there is none."""
        return self._process.pid if self._process else None

    def _ask(self, gold: str, prediction: str | None) -> Outcome:
        key = gold, prediction
        with self._lock:
            known = self._cache.get(key)
            if known:
                self._cache.move_to_end(key)
                return known
            try:
                outcome = self._converse(gold, prediction)
            except BaseException:  # an answer may still be on its way, to be taken for the next one's
                self._stop()
                raise
            if outcome != Outcome.CRASHED:  # may be an accident; a timeout would only be waited for again
                self._cache[key] = outcome
                if len(self._cache) > CACHE_PAIRS:
                    self._cache.popitem(last=False)
            return outcome

    def _converse(self, gold: str, prediction: str | None) -> Outcome:
        process, answers = self._running()
        job = {"gold": gold, "prediction": prediction, "deadline_s": self.deadline_s}
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(job).encode() + b"\n")
        except BrokenPipeError:
            self._stop()
            return Outcome.CRASHED
        answer = answers.read(self.deadline_s + GRACE_S)
        if not answer:
            self._stop()
            return Outcome.TIMEOUT if answer is None else Outcome.CRASHED
        return Outcome(json.loads(answer)["outcome"])

    def _running(self) -> tuple[subprocess.Popen[bytes], Lines]:
        if self._process and self._answers:
            return self._process, self._answers
        # -P: no folder of the user's stands in for a module. Its own session: Ctrl-C is for this process.
        process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,
        )
        assert process.stdout is not None
        self._process, self._answers = process, Lines(process.stdout.fileno())
        first = self._answers.read(START_S)
        hello = json.loads(first) if first else {}
        if "ready" not in hello:
            self._stop()
            reason = hello.get("error") or f"it said {first!r} within {START_S:g} s"
            raise MathCheckError(
                f"the math checking process does not start: {reason}; is math-verify installed?"
            )
        return process, self._answers

    def _stop(self) -> None:
        process = self._process
        self._process = self._answers = None
        if not process:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
        with contextlib.suppress(ProcessLookupError):
            process.kill()  # its worker dies with it
        process.wait()

    def _forget(self) -> None:
        """Without a process: at the start, and in a forked child, where the process is the parent's."""
        self._lock = threading.Lock()
        self._process = self._answers = None


_CHECKERS: weakref.WeakSet[MathChecker] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for checker in list(_CHECKERS):
        process = checker._process
        checker._forget()
        if process:  # close our copies, or the parent's end would not be the end for its worker
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()
            process.returncode = 0  # not ours to wait for


def _close_all() -> None:
    for checker in list(_CHECKERS):
        checker.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_close_all)

SHARED = MathChecker()
"""The checker behind every AnswerReward of this process."""
