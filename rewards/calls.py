"""Calls a reward in the form that it has: plain or async, one completion at a time or a whole batch.

| form | how it is told | how it is called |
|---|---|---|
| plain | anything else | once per completion, many at once in threads |
| async | a coroutine function, or an object with an async `__call__` | all of a batch at once on one event loop |
| batched | a method `batch(completions, examples)`, or first parameters of these names | once per batch |
| batched and async | such a method or function that is a coroutine function | once per batch, on the event loop |

The event loop has a thread of its own, so that all this works from any thread, one that runs an event loop
included. A reward that raises becomes a RewardError in its place: the other completions keep their verdicts.
"""

import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewards.example import Example
from rewards.verdict import Verdict, as_verdict

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

Reward = Callable[..., Any]
"""(completion, example) -> Verdict, float, bool or None; or one of the other forms above."""
THREADS = 16
"""Completions that plain rewards grade at once."""
AT_ONCE = 256
"""Calls of one async reward that wait at once within a batch."""
BATCH_NAMES = ["completions", "examples"]
_SHOWN_CHARS = 200


class RewardError(RuntimeError):
    """A reward raised; the message names the reward, the row and the completion, the cause is chained."""


@dataclass(frozen=True)
class Form:
    """How a reward wants to be called."""

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


class Pending:
    """Verdicts to come, in the order of the completions."""

    def __init__(self, futures: Sequence[Future], whole: bool) -> None:
        self._futures, self._whole = futures, whole

    def results(self) -> list[Verdict | RewardError]:
        """One verdict per completion, or the error that stands in its place; waits for them.

        Interrupted, it drops what has not begun: the interpreter would wait for all of it before it ends.
        """
        try:
            results = [future.result() for future in self._futures]
        except BaseException:
            self.cancel()
            raise
        return results[0] if self._whole else results

    def cancel(self) -> None:
        """Drop what has not begun."""
        for future in self._futures:
            future.cancel()


class Caller:
    """Calls rewards from threads and an event loop; any thread may use one, and a forked child as well.

    >>> row = Example("row-1", "2 + 2?", "4", "direct")
    >>> pending = Caller().start(lambda completion, example: completion == "4", "mine", ["4", "5"], [row, row])
    >>> [verdict.score for verdict in pending.results()]
    [1.0, 0.0]
    """

    def __init__(self, threads: int = THREADS) -> None:
        self.threads = threads
        self._lock = threading.Lock()
        self._pool: tuple[int, ThreadPoolExecutor] | None = None

    def start(
        self, reward: Reward, name: str, completions: Sequence[str], examples: Sequence[Example]
    ) -> Pending:
        """Begin to grade each completion against its example."""
        form = form_of(reward)
        pairs = list(zip(completions, examples, strict=True))
        if form.is_async:
            grade = _async_batch if form.batched else _async_each
            return Pending([_on_loop(grade(form.call, name, pairs))], whole=True)
        pool = self._threads()
        if form.batched:
            return Pending([pool.submit(_batch, form.call, name, pairs)], whole=True)
        return Pending([pool.submit(_one, form.call, name, *pair) for pair in pairs], whole=False)

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pool[0] != os.getpid():  # a forked child has none of our threads
                self._pool = os.getpid(), ThreadPoolExecutor(self.threads, thread_name_prefix="reward")
            return self._pool[1]


Pair = tuple[str, Example]


def _one(call: Reward, name: str, completion: str, example: Example) -> Verdict | RewardError:
    try:
        value = call(completion, example)
        if inspect.isawaitable(value):  # a plain function that hands on a coroutine
            value = _on_loop(_awaited(value)).result()
        return as_verdict(value, name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a reward's sys.exit() and math-verify's timeouts are no Exceptions
        return _failed(name, [(completion, example)], error)


def _batch(call: Reward, name: str, pairs: list[Pair]) -> Sequence[Verdict | RewardError]:
    try:
        values = call([completion for completion, _ in pairs], [example for _, example in pairs])
        if inspect.isawaitable(values):
            values = _on_loop(_awaited(values)).result()
        return _verdicts(values, name, pairs)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return [_failed(name, pairs, error)] * len(pairs)


async def _async_each(call: Reward, name: str, pairs: list[Pair]) -> Sequence[Verdict | RewardError]:
    import asyncio

    room = asyncio.Semaphore(AT_ONCE)

    async def one(completion: str, example: Example) -> Verdict | RewardError:
        async with room:
            try:
                return as_verdict(await call(completion, example), name)
            except asyncio.CancelledError:
                raise
            except BaseException as error:  # one that got out would end the loop, and every wait with it
                return _failed(name, [(completion, example)], error)

    return await asyncio.gather(*(one(*pair) for pair in pairs))


async def _async_batch(call: Reward, name: str, pairs: list[Pair]) -> Sequence[Verdict | RewardError]:
    import asyncio

    try:
        values = await call([completion for completion, _ in pairs], [example for _, example in pairs])
        return _verdicts(values, name, pairs)
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return [_failed(name, pairs, error)] * len(pairs)


def _verdicts(values: Any, name: str, pairs: list[Pair]) -> list[Verdict | RewardError]:
    if hasattr(values, "tolist"):  # a numpy array or a torch tensor
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str | bytes | Mapping):
        raise TypeError(
            f"reward {name!r} returned {type(values).__name__} for a batch: "
            "return a list with a verdict, float, bool or None per completion"
        )
    if len(values) != len(pairs):
        raise ValueError(
            f"reward {name!r} returned {len(values)} verdicts for a batch of {len(pairs)} completions: "
            "return one per completion, in their order; None for one that cannot be graded"
        )
    return [
        _one(lambda *_, value=value: value, name, *pair) for value, pair in zip(values, pairs, strict=True)
    ]


def _failed(name: str, pairs: list[Pair], cause: BaseException) -> RewardError:
    completion, example = pairs[0]
    batch = f"a batch of {len(pairs)} that begins with " if len(pairs) > 1 else ""
    error = RewardError(
        f"reward {name!r} failed on {batch}row {example.id!r}: {problem_text(cause)}; "
        f"the completion begins {completion[:_SHOWN_CHARS]!r}"
    )
    error.__cause__ = cause
    return error


def problem_text(cause: BaseException) -> str:
    """Kind and words of an exception, as far as a record needs them."""
    return f"{type(cause).__name__}: {str(cause)[:1000]}"


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _parameters(function: Any) -> list[str]:
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some built-in functions have no signature
        return []


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value


def _on_loop(work: Any) -> Future:
    import asyncio

    loop, thread = _background()
    if threading.current_thread() is thread:
        work.close()
        raise RuntimeError(
            "an async reward grades with another reward and waits for it: that would wait for ever; "
            "write `await asyncio.to_thread(mixture.grade, completion, example)`"
        )
    return asyncio.run_coroutine_threadsafe(work, loop)


_starting = threading.Lock()


def _background() -> tuple["AbstractEventLoop", threading.Thread]:
    with _starting:
        return _started_loop()


@functools.cache
def _started_loop() -> tuple["AbstractEventLoop", threading.Thread]:
    """The event loop of this process and its thread: one for all, as clients are bound to the loop they met."""
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


def _after_fork_in_child() -> None:
    global _starting
    _starting = threading.Lock()
    _started_loop.cache_clear()


os.register_at_fork(after_in_child=_after_fork_in_child)
