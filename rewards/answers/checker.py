"""Settles open comparisons in worker processes, so that no answer can hang, bloat or crash this process.

math-verify's own timeouts use SIGALRM, which fails off the main thread and inside long C calls. Here a job that
exceeds its deadline loses its worker and nothing else (rewards.pool). Outcomes are cached, and equal questions asked
at the same time are computed once.
"""

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from functools import partial

from rewards.answers.compare import decide, readable
from rewards.answers.expression import settled
from rewards.answers.outcome import Outcome, Result
from rewards.forks import PerProcess
from rewards.pool import Ending, Job, Pool

DEADLINE_S = 2.0
"""The slowest honest comparison measured took 0.93 s."""
QUEUE_S = 60.0
"""The longest wait for a worker."""
CACHE_SIZE = 1 << 16
WORKERS_VARIABLE = "POSTTRAIN_MATH_WORKERS"
_NOT_SETTLED = (Outcome.TIMEOUT, Outcome.CRASHED)


class _State:
    """The questions and outcomes of one process; a forked child starts with an empty state."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.known: OrderedDict[Result, Outcome] = OrderedDict()
        self.open: dict[Result, _Question] = {}


class _Question:
    """A question that has no outcome yet; several callers may wait for it."""

    def __init__(self, result: Result, job: Job) -> None:
        self.result, self.job, self.askers = result, job, 1


class MathChecker:
    """Up to `workers` processes that settle comparisons; they start at the first open comparison.

    Args:
        deadline_s: seconds that one comparison may take, from its start in a worker; a call ends at most 0.1 s later.
        queue_s: seconds that a comparison may wait for a worker, before it ends as TIMEOUT.
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
        self.pool = Pool(settled, "rewards.answers.warmed", workers or _workers(), deadline_s)
        """The workers; its `deadline_s` may be changed."""
        self._state = PerProcess(_State)
        weakref.finalize(self, self.pool.close)  # at the latest at the end of the program

    def settle(self, result: Result) -> Outcome:
        """The outcome of a comparison; TIMEOUT and CRASHED mean that it is unknown.

        Raises rewards.pool.PoolError if the processes do not start.
        """
        return self._settle([self._ask(result)], self.queue_s)[0]

    def compare(self, gold: str, answer: str) -> Outcome:
        """How two texts compare. Raises as `settle`."""
        return self.settle(decide(gold, answer))

    def compare_many(self, pairs: Iterable[tuple[str, str]], timeout_s: float | None = None) -> list[Outcome]:
        """How the (gold, answer) pairs compare, in order, with all workers busy. Raises as `settle`.

        A pair that no worker has started within `timeout_s` ends as TIMEOUT. The default is `queue_s` plus the time
        that the pairs take if every one of them runs to its deadline.
        """
        asked = [self._ask(decide(*pair)) for pair in pairs]
        if timeout_s is None:
            timeout_s = self.queue_s + len(asked) * self.pool.deadline_s / self.pool.size
        return self._settle(asked, timeout_s)

    def readable(self, gold: str) -> Outcome:
        """EQUAL if the gold answer parses, else BAD_GOLD, TIMEOUT or CRASHED. Raises as `settle`."""
        return self.settle(readable(gold))

    def close(self) -> None:
        """End the processes; the next question starts new ones."""
        self.pool.close()

    def _ask(self, result: Result) -> Outcome | _Question:
        """The outcome if it is known, else the question, which is submitted to a worker."""
        if isinstance(result, Outcome):
            return result
        state = self._state()
        with state.lock:
            known = state.known.get(result)
            if known:
                state.known.move_to_end(result)
                return known
            question = state.open.get(result)
            if question:
                question.askers += 1
                return question
        job = self.pool.submit(result)
        with state.lock:
            question = state.open[result] = _Question(result, job)
        job.future.add_done_callback(partial(self._answered, state, result))
        return question

    def _settle(self, asked: Sequence[Outcome | _Question], timeout_s: float) -> list[Outcome]:
        """The outcomes; TIMEOUT for a question that no worker starts in time."""
        questions = [one for one in asked if isinstance(one, _Question)]
        try:
            wait([question.job.future for question in questions], timeout_s)
            self.pool.settle([question.job for question in questions if question.job.begun()], self.queue_s)
            # A question that begins only now ends for its other callers.
            ended = {question for question in questions if question.job.future.done()}
        finally:
            for question in questions:
                self._leave(question)
        return [
            one
            if isinstance(one, Outcome)
            else _outcome(one.job.future.result())
            if one in ended
            else Outcome.TIMEOUT
            for one in asked
        ]

    def _leave(self, question: _Question) -> None:
        """Withdraw one caller; a question without callers is cancelled if no worker has started it."""
        state = self._state()
        with state.lock:
            question.askers -= 1
            drop = not question.askers and not question.job.future.done()
            if drop and question.job.cancel():
                state.open.pop(question.result, None)

    def _answered(self, state: _State, result: Result, future: Future) -> None:
        if future.cancelled():
            return
        with state.lock:
            state.open.pop(result, None)
            if future.exception() or _outcome(future.result()) in _NOT_SETTLED:
                return  # another attempt may settle it
            state.known[result] = _outcome(future.result())
            if len(state.known) > CACHE_SIZE:
                state.known.popitem(last=False)


def _outcome(result: Outcome | Ending) -> Outcome:
    return Outcome[result.name] if isinstance(result, Ending) else result


def _workers() -> int:
    """How many workers the environment asks for, else one for each core that this process may use, at most 4."""
    asked = os.environ.get(WORKERS_VARIABLE)
    if not asked:
        return min(4, len(os.sched_getaffinity(0)))
    if not asked.isdecimal() or not int(asked):
        raise ValueError(f"{WORKERS_VARIABLE}={asked!r}: how many processes compare answers, 1 or more")
    return int(asked)


SHARED = MathChecker()
"""The checker behind every AnswerReward of this process."""
