"""Calls a reward according to its form: plain or async, one completion at a time or a whole batch.

| form | how it is recognised | how it is called |
|---|---|---|
| plain | any other callable | once per completion, in threads |
| async | a coroutine function, or an object with an async `__call__` | concurrently per batch on one event loop |
| batched | a method `batch(completions, examples)`, or first parameters of these names | once per batch |
| batched and async | such a method or function that is a coroutine function | once per batch, on the event loop |

The event loop runs in its own thread. So rewards can be called from any thread, including one that runs an event
loop. A reward that raises becomes a RewardError for its completion; the other completions keep their verdicts.
"""

import inspect
import os
import threading
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewards.example import Example
from rewards.forks import PerProcess
from rewards.verdict import Verdict, as_verdict

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

Reward = Callable[..., Any]
"""(completion, example) -> Verdict, float, bool or None; or one of the other forms above."""
THREADS = 16
"""Completions that a plain reward grades concurrently."""
AT_ONCE = 256
"""Concurrent calls of one async reward within a batch."""
BATCH_NAMES = ["completions", "examples"]
_SHOWN_CHARS = 200


class RewardError(RuntimeError):
    """A reward failed on a completion. The message names the reward, the row and the completion."""

    def __init__(self, message: str, problem: str = "", always_stops: bool = False) -> None:
        super().__init__(message)
        self.problem = problem or message
        """The error without the names of reward, row and completion."""
        self.always_stops = always_stops
        """Whether the run stops regardless of the term's policy, as for a judge that failed its start-up check."""


@dataclass(frozen=True)
class Form:
    """The calling convention of a reward."""

    call: Reward
    batched: bool
    is_async: bool


def form_of(reward: Any) -> Form:
    """The form of a reward.

    >>> form_of(lambda completion, example: 1.0).batched
    False
    >>> form_of(lambda completions, examples: [1.0]).batched
    True
    """
    batch = getattr(reward, "batch", None)
    if callable(batch):
        return Form(batch, True, _is_async(batch))
    return Form(reward, _parameters(reward)[:2] == BATCH_NAMES, _is_async(reward))


class Watch:
    """Observer of the begin and end of calls; this base class does nothing. Rows are indices into the batch."""

    def begun(self, rows: Sequence[int]) -> None:
        """A call on these rows begins. For a batched reward, these are all rows of the batch."""

    def ended(self, row: int, result: Verdict | RewardError) -> None:
        """The call on a row has ended with this result."""


class Pending:
    """Pending verdicts, in the order of the completions."""

    def __init__(self, futures: Sequence[Future]) -> None:
        self.futures = futures

    def results(self) -> list[Verdict | RewardError]:
        """Wait for all calls; return a verdict or an error per completion.

        On an interrupt, calls that have not begun are cancelled. Otherwise the interpreter would wait for them at exit.
        """
        try:
            return [result for future in self.futures for result in future.result()]
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Cancel the calls that have not begun."""
        for future in self.futures:
            future.cancel()


class Caller:
    """Calls rewards in threads and on an event loop. Any thread may use a Caller, also in a forked child.

    >>> row = Example("row-1", "2 + 2?", "4", "direct")
    >>> pending = Caller().start(lambda completion, example: completion == "4", "mine", ["4", "5"], [row, row])
    >>> [verdict.score for verdict in pending.results()]
    [1.0, 0.0]
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._threads = PerProcess(lambda: ThreadPoolExecutor(threads, thread_name_prefix="reward"))

    def start(
        self,
        reward: Reward,
        name: str,
        completions: Sequence[str],
        examples: Sequence[Example],
        watch: Watch | None = None,
    ) -> Pending:
        """Start to grade each completion against its example."""
        form, pairs = form_of(reward), list(zip(completions, examples, strict=True))
        batch = _Batch(form, name, pairs, watch or Watch())
        calls = [range(len(pairs))] if form.batched else [range(row, row + 1) for row in range(len(pairs))]
        if form.is_async:
            return Pending([on_loop(batch.all_async(calls))])
        threads = self._threads()
        return Pending([threads.submit(batch.one, rows) for rows in calls])


Pair = tuple[str, Example]


@dataclass(frozen=True)
class _Batch:
    """Completions with their examples, and the reward that grades them. A call grades one row, or all rows."""

    form: Form
    name: str
    pairs: list[Pair]
    watch: Watch

    def one(self, rows: Sequence[int]) -> list[Verdict | RewardError]:
        """Grade these rows with one call."""
        self.watch.begun(rows)
        try:
            value = self.form.call(*self._arguments(rows))
            if inspect.isawaitable(value):  # a plain function that returns a coroutine
                value = on_loop(_awaited(value)).result()
            results = self._results(rows, value)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # sys.exit() and math-verify's timeouts do not derive from Exception
            results = self._failed(rows, error)
        return self._told(rows, results)

    async def all_async(self, calls: Sequence[Sequence[int]]) -> list[Verdict | RewardError]:
        """Grade all rows, AT_ONCE calls concurrently."""
        import asyncio

        room = asyncio.Semaphore(AT_ONCE)

        async def one(rows: Sequence[int]) -> list[Verdict | RewardError]:
            async with room:
                self.watch.begun(rows)
                try:
                    results = self._results(rows, await self.form.call(*self._arguments(rows)))
                except asyncio.CancelledError:
                    raise
                except BaseException as error:  # uncaught, it would end the loop and all waiting calls
                    results = self._failed(rows, error)
                return self._told(rows, results)

        return [result for results in await asyncio.gather(*map(one, calls)) for result in results]

    def _arguments(self, rows: Sequence[int]) -> tuple[Any, Any]:
        if not self.form.batched:
            return self.pairs[rows[0]]
        return [completion for completion, _ in self.pairs], [example for _, example in self.pairs]

    def _result(self, row: int, value: Any) -> Verdict | RewardError:
        if isinstance(value, RewardError):  # a result of a reward that ran its function in another process
            return value
        try:
            return as_verdict(value, self.name)
        except (TypeError, ValueError) as error:
            return failure(self.name, [self.pairs[row]], error)

    def _results(self, rows: Sequence[int], values: Any) -> list[Verdict | RewardError]:
        if not self.form.batched:
            return [self._result(rows[0], values)]
        if hasattr(values, "tolist"):  # a numpy array or a torch tensor
            values = values.tolist()
        if not isinstance(values, Sequence) or isinstance(values, str | bytes | Mapping):
            raise TypeError(
                f"reward {self.name!r} returned {type(values).__name__} for a batch: "
                "return a list with a verdict, float, bool or None per completion"
            )
        if len(values) != len(rows):
            raise ValueError(
                f"reward {self.name!r} returned {len(values)} verdicts for a batch of {len(rows)} "
                "completions: return one per completion, in their order; None for one that cannot be graded"
            )
        return [self._result(row, value) for row, value in zip(rows, values, strict=True)]

    def _failed(self, rows: Sequence[int], error: BaseException) -> list[Verdict | RewardError]:
        return [failure(self.name, [self.pairs[row] for row in rows], error)] * len(rows)

    def _told(self, rows: Sequence[int], results: list[Verdict | RewardError]) -> list[Verdict | RewardError]:
        for row, result in zip(rows, results, strict=True):
            self.watch.ended(row, result)
        return results


def failure(name: str, pairs: Sequence[Pair], cause: BaseException) -> RewardError:
    """The RewardError for a call on these pairs that raised `cause`."""
    completion, example = pairs[0]
    batch = f"a batch of {len(pairs)} that begins with " if len(pairs) > 1 else ""
    problem = f"{type(cause).__name__}: {str(cause)[:1000]}"
    error = RewardError(
        f"reward {name!r} failed on {batch}row {example.id!r}: {problem}; "
        f"the completion begins {completion[:_SHOWN_CHARS]!r}",
        problem,
        bool(getattr(cause, "always_stops", False)),
    )
    error.__cause__ = cause
    return error


def traceback_text(error: BaseException | None) -> str:
    """The traceback of an exception, limited to the reward's own frames."""
    return "".join(traceback.format_exception(error, limit=-8))[-4000:] if error else ""


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _parameters(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some built-in functions have no signature
        return []


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def on_loop(work: Any) -> Future:
    """Start a coroutine on the background event loop. Raises RuntimeError in that loop's own thread."""
    import asyncio

    loop, thread = _background()
    if threading.current_thread() is thread:
        work.close()
        raise RuntimeError(
            "an async reward waits for another reward on the same event loop, which never ends; "
            "write `await asyncio.to_thread(mixture.grade, completion, example)`"
        )
    return asyncio.run_coroutine_threadsafe(work, loop)


def _started_loop() -> tuple["AbstractEventLoop", threading.Thread]:
    """An event loop and its thread. A process has one, because clients are bound to the first loop that they use."""
    import asyncio
    import atexit

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="reward-loop", daemon=True)
    thread.start()

    def stop(owner: int = os.getpid()) -> None:
        if os.getpid() == owner:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=5)
            if not thread.is_alive():
                loop.close()

    atexit.register(stop)
    return loop, thread


_background = PerProcess(_started_loop)
