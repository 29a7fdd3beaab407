"""Compares mathematical answers in other processes, so that no answer can hang, bloat or crash this one.

math-verify's own timeouts are SIGALRM: useless off the main thread, deaf inside long C calls. Here a job that
outlives its deadline costs its worker's life and nothing else (rewards.mathpool says how). Works from any
thread and any event loop; after a fork each process starts workers of its own; the processes end with this one.
Whatever is known is not computed again: outcomes are remembered, and equal questions asked at the same time
are one.
"""

import asyncio
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from functools import partial

from rewards.equality import Outcome, quick
from rewards.mathpool import Job, MathCheckError, Pool

__all__ = ["SHARED", "MathCheckError", "MathChecker"]

DEADLINE_S = 2.0
"""The slowest honest comparison measured took 0.93 s."""
QUEUE_S = 60.0
"""The longest wait for a worker; the start of the first ones takes seconds."""
CACHE_PAIRS = 1 << 16
MAX_QUICK_CHARS = 2000
"""What is longer is compared in a worker: this process parses nothing that could keep it."""
WORKERS_VARIABLE = "POSTTRAIN_MATH_WORKERS"
_NOT_FOUND_OUT = (Outcome.TIMEOUT, Outcome.CRASHED)

_Key = tuple[str, str | None]


class _Question:
    """What has been asked and not answered, by one caller or by many at once."""

    def __init__(self, key: _Key, future: Future[Outcome]) -> None:
        self.key, self.future, self.askers = key, future, 1

    def begun(self) -> bool:
        """Whether its answer is here, or cannot be farther away than the deadline."""
        return self.future.running() or self.future.done()


class MathChecker:
    """Up to `workers` processes that compare; they start at the first question and again after a death.

    Args:
        deadline_s: what one comparison may take, from its start in a worker; a call ends at most 0.1 s later.
        queue_s: what a comparison may wait for a worker, before it ends as TIMEOUT.
        workers: processes; by default POSTTRAIN_MATH_WORKERS, else as many as cores, at most 4.

    >>> checker = MathChecker()
    >>> checker.compare("x^2 - 1", "(x - 1)(x + 1)")
    <Outcome.EQUAL: 'equal'>
    >>> [outcome.value for outcome in checker.compare_many([("x+1", "1+x"), ("x+1", "x+2")])]
    ['equal', 'different']
    >>> checker.close()
    """

    def __init__(
        self, deadline_s: float = DEADLINE_S, queue_s: float = QUEUE_S, workers: int | None = None
    ) -> None:
        self.queue_s = queue_s
        self._cache: OrderedDict[_Key, Outcome] = OrderedDict()
        self._pool = Pool(workers or _workers(), deadline_s)
        self._forget()
        _CHECKERS.add(self)
        weakref.finalize(self, self._pool.close)  # at the latest at the end of the program

    def compare(self, gold: str, prediction: str) -> Outcome:
        """How the two compare. TIMEOUT and CRASHED say that this was not found out.

        Raises MathCheckError if the processes do not start.
        """
        return self._settle([self._ask((gold, prediction))], self.queue_s)[0]

    def compare_many(self, pairs: Iterable[tuple[str, str]], timeout_s: float | None = None) -> list[Outcome]:
        """How the (gold, prediction) pairs compare, in order, with all workers busy. Raises as `compare`.

        Pairs that no worker has begun within `timeout_s` are TIMEOUT. By default that is `queue_s` and the
        time in which all of them could be hostile.
        """
        asked = [self._ask(pair) for pair in pairs]
        if timeout_s is None:
            timeout_s = self.queue_s + len(asked) * self.deadline_s / self.workers
        return self._settle(asked, timeout_s)

    async def acompare(self, gold: str, prediction: str) -> Outcome:
        """As `compare`, without holding up the event loop."""
        asked = self._ask((gold, prediction))
        if isinstance(asked, Outcome):
            return asked
        answer = asyncio.wrap_future(asked.future)
        try:
            await asyncio.wait([answer], timeout=self.queue_s)
            begun = asked.begun()
        finally:
            self._leave(asked)
        return await asyncio.shield(answer) if begun else Outcome.TIMEOUT

    def readable(self, gold: str) -> Outcome:
        """EQUAL if the gold answer parses, else BAD_GOLD or what became of parsing it. Raises as `compare`."""
        return self._settle([self._ask((gold, None))], self.queue_s)[0]

    def close(self) -> None:
        """End the processes; the next question starts others."""
        self._pool.close()

    @property
    def deadline_s(self) -> float:
        """What one comparison may take."""
        return self._pool.deadline_s

    @deadline_s.setter
    def deadline_s(self, deadline_s: float) -> None:
        self._pool.deadline_s = deadline_s

    @property
    def workers(self) -> int:
        """Processes that compare at the same time, at most."""
        return self._pool.size

    @property
    def pid(self) -> int | None:
        """Process id of the keeper, the workers' parent; None while there is none."""
        return self._pool.pid

    @property
    def worker_pids(self) -> list[int]:
        """Process ids of the workers there are."""
        return self._pool.pids

    def _ask(self, key: _Key) -> Outcome | _Question:
        """The outcome if it shows at once, else the question, in a worker or on its way to one."""
        gold, prediction = key
        with self._lock:
            known = self._cache.get(key)
            if known:
                self._cache.move_to_end(key)
                return known
        if prediction is not None and max(len(gold), len(prediction)) <= MAX_QUICK_CHARS:
            outcome = quick(gold, prediction)
            if outcome:
                return outcome
        job = Job(gold, prediction)
        if not job.fits():
            return Outcome.BAD_GOLD if len(gold) > len(prediction or "") else Outcome.UNPARSEABLE
        with self._lock:
            question = self._open.get(key)
            if question:
                question.askers += 1
                return question
            question = self._open[key] = _Question(key, job.future)
        job.future.add_done_callback(partial(self._answered, key))
        self._pool.submit(job)
        return question

    def _settle(self, asked: Sequence[Outcome | _Question], timeout_s: float) -> list[Outcome]:
        """The outcomes; TIMEOUT for questions that are not begun in time."""
        questions = [one for one in asked if isinstance(one, _Question)]
        try:
            wait([question.future for question in questions], timeout_s)
            begun = {question for question in questions if question.begun()}
        finally:
            for question in questions:
                self._leave(question)
        outcomes = []
        for one in asked:
            if isinstance(one, _Question):
                outcomes.append(one.future.result() if one in begun else Outcome.TIMEOUT)
            else:
                outcomes.append(one)
        return outcomes

    def _leave(self, question: _Question) -> None:
        """Stop asking; what nobody asks any more is not begun."""
        with self._lock:
            question.askers -= 1
            if not question.askers and question.future.cancel():
                del self._open[question.key]

    def _answered(self, key: _Key, future: Future[Outcome]) -> None:
        if future.cancelled():
            return
        with self._lock:
            self._open.pop(key, None)
            if future.exception() or future.result() in _NOT_FOUND_OUT:
                return  # another time it may be
            self._cache[key] = future.result()
            if len(self._cache) > CACHE_PAIRS:
                self._cache.popitem(last=False)

    def _forget(self) -> None:
        """Without processes and open questions: at the start, and in a forked child, where they are the parent's."""
        self._lock = threading.Lock()
        self._open: dict[_Key, _Question] = {}


def _workers() -> int:
    """How many workers the environment asks for, else one for each core that this process may use, at most 4."""
    asked = os.environ.get(WORKERS_VARIABLE)
    if not asked:
        return min(4, len(os.sched_getaffinity(0)))
    if not asked.isdecimal() or not int(asked):
        raise ValueError(f"{WORKERS_VARIABLE}={asked!r}: how many processes compare answers, 1 or more")
    return int(asked)


def _after_fork_in_child() -> None:
    for checker in list(_CHECKERS):
        checker._forget()
        checker._pool.forget()


_CHECKERS: weakref.WeakSet[MathChecker] = weakref.WeakSet()
os.register_at_fork(after_in_child=_after_fork_in_child)

SHARED = MathChecker()
"""The checker behind every AnswerReward of this process."""
