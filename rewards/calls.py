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

    def __init__(self, futures: Sequence[Future], whole: bool) -> None:
        self.futures, self._whole = futures, whole

    def results(self) -> list[Verdict | RewardError]:
        """Wait for all calls; return a verdict or an error per completion.

        On an interrupt, calls that have not begun are cancelled. Otherwise the interpreter would wait for them at exit.
        """
        try:
            results = [future.result() for future in self.futures]
        except BaseException:
            self.cancel()
            raise
        return results[0] if self._whole else results

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
        form = form_of(reward)
        batch = _Batch(form.call, name, list(zip(completions, examples, strict=True)), watch or Watch())
        if form.is_async:
            return Pending([on_loop(batch.whole_async() if form.batched else batch.each_async())], True)
        threads = self._threads()
        if form.batched:
            return Pending([threads.submit(batch.whole)], True)
        return Pending([threads.submit(batch.one, row) for row in range(len(batch.pairs))], False)


Pair = tuple[str, Example]


@dataclass(frozen=True)
class _Batch:
    """Completions with their examples, and the reward that grades them."""

    call: Reward
    name: str
    pairs: list[Pair]
    watch: Watch

    def one(self, row: int) -> Verdict | RewardError:
        """Grade one completion."""
        self.watch.begun([row])
        try:
            value = self.call(*self.pairs[row])
            if inspect.isawaitable(value):  # a plain function that returns a coroutine
                value = on_loop(_awaited(value)).result()
            result = self._result(row, value)
        except KeyboardInterrupt:
            raise
        except (
            BaseException
        ) as error:  # a reward's sys.exit() and math-verify's timeouts do not derive from Exception
            result = failure(self.name, [self.pairs[row]], error)
        self.watch.ended(row, result)
        return result

    def whole(self) -> Sequence[Verdict | RewardError]:
        """Grade all completions with one call."""
        self.watch.begun(range(len(self.pairs)))
        try:
            values = self.call(*self._columns())
            if inspect.isawaitable(values):
                values = on_loop(_awaited(values)).result()
            results = self._results(values)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            results = self._all_failed(error)
        return self._told(results)

    async def each_async(self) -> Sequence[Verdict | RewardError]:
        """Grade every completion with a separate call, AT_ONCE calls concurrently."""
        import asyncio

        room = asyncio.Semaphore(AT_ONCE)

        async def one(row: int) -> Verdict | RewardError:
            async with room:
                self.watch.begun([row])
                try:
                    result = self._result(row, await self.call(*self.pairs[row]))
                except asyncio.CancelledError:
                    raise
                except (
                    BaseException
                ) as error:  # an uncaught exception would end the loop and all waiting calls
                    result = failure(self.name, [self.pairs[row]], error)
                self.watch.ended(row, result)
                return result

        return await asyncio.gather(*map(one, range(len(self.pairs))))

    async def whole_async(self) -> Sequence[Verdict | RewardError]:
        """Grade all completions with one call on the event loop."""
        import asyncio

        self.watch.begun(range(len(self.pairs)))
        try:
            results = self._results(await self.call(*self._columns()))
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            results = self._all_failed(error)
        return self._told(results)

    def _columns(self) -> tuple[list[str], list[Example]]:
        return [completion for completion, _ in self.pairs], [example for _, example in self.pairs]

    def _result(self, row: int, value: Any) -> Verdict | RewardError:
        if isinstance(value, RewardError):  # a result of a reward that ran its function in another process
            return value
        try:
            return as_verdict(value, self.name)
        except (TypeError, ValueError) as error:
            return failure(self.name, [self.pairs[row]], error)

    def _results(self, values: Any) -> list[Verdict | RewardError]:
        if hasattr(values, "tolist"):  # a numpy array or a torch tensor
            values = values.tolist()
        if not isinstance(values, Sequence) or isinstance(values, str | bytes | Mapping):
            raise TypeError(
                f"reward {self.name!r} returned {type(values).__name__} for a batch: "
                "return a list with a verdict, float, bool or None per completion"
            )
        if len(values) != len(self.pairs):
            raise ValueError(
                f"reward {self.name!r} returned {len(values)} verdicts for a batch of {len(self.pairs)} "
                "completions: return one per completion, in their order; None for one that cannot be graded"
            )
        return [self._result(row, value) for row, value in enumerate(values)]

    def _all_failed(self, error: BaseException) -> list[Verdict | RewardError]:
        return [failure(self.name, self.pairs, error)] * len(self.pairs)

    def _told(self, results: list[Verdict | RewardError]) -> list[Verdict | RewardError]:
        for row, result in enumerate(results):
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
