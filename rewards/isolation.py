"""Users' rewards under limits: a deadline always, and by default a process of their own.

A reward that hangs, exits, dies by a signal, prints without end, takes too much memory, changes the working folder,
replaces functions of `json` or closes the connection becomes a RewardError that names the reward, the row and what
happened. The term's policy (`on_error`) then stops the run or leaves the row unscored.

A process that dies takes the calls under way with it. If there were several, each of their rows is graded once more
on its own, so that one bad completion costs no other completion its verdict. After MOST_DEATHS deaths in a batch
the rest of the batch fails without being asked.
"""

import contextlib
import dataclasses
import json
import logging
import os
import pickle
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NoReturn

from rewards.calls import THREADS, Caller, Pair, Reward, RewardError, Watch, failure
from rewards.example import Example
from rewards.forks import PerProcess
from rewards.isolation_worker import LOST, receive, send
from rewards.registry import UnknownReward, is_builtin, load_reward
from rewards.verdict import Status, Verdict

log = logging.getLogger(__name__)

DEADLINE_S = 60.0
MEMORY_GIB = 4.0
START_S = 180.0
"""For loading the reward; importing torch takes seconds, on a machine under load many."""
MOST_DEATHS = 4
OUTPUT_BYTES = 1 << 20
"""What a reward may print during one batch."""
SHOWN_OUTPUT_BYTES = 256 << 10
"""What of the output of a process reaches our log in all."""
_TAIL_BYTES = 2000
_MOST_MESSAGE_BYTES = 4 << 20
_MESSAGE_S = 30.0
"""For the rest of a message that has begun to arrive."""
_KINDS = (UnknownReward, ModuleNotFoundError, ImportError, NotADirectoryError, FileNotFoundError)
_KINDS_OF_LOADING = {kind.__name__: kind for kind in (*_KINDS, TypeError, ValueError)}

Result = Verdict | RewardError


def load_limited(
    use: str,
    params: Mapping[str, Any] | None = None,
    folders: Sequence[str | os.PathLike[str]] = (),
    *,
    name: str = "",
    isolate: bool = True,
    deadline_s: float = DEADLINE_S,
    memory_gib: float = MEMORY_GIB,
) -> Reward:
    """The reward of that name (rewards.registry.load_reward); one that is not built in comes under limits.

    Args:
        name: for messages; "" takes `use`.
        isolate: run it in a process of its own. False: in this one, with a deadline alone.
        deadline_s: for one call: a completion, or the batch of a batched reward.
        memory_gib: of its process's private memory.

    Raises what `load_reward` raises, RewardError where the reward cannot be loaded for another reason.
    """
    if is_builtin(use):
        return load_reward(use, params, folders)
    if isolate:
        return Isolated(use, dict(params or {}), folders, name or use, deadline_s, memory_gib)
    return Shared(load_reward(use, params, folders), name or use, deadline_s)


class Progress(Watch):
    """Which rows of a batch are under way, since when, and what came of those that ended."""

    def __init__(self) -> None:
        self.since: dict[int, float] = {}
        """Rows under way, and when (time.monotonic) their calls began."""
        self.results: dict[int, Result] = {}
        self.last = time.monotonic()
        """When anything last happened."""

    def begun(self, rows: Sequence[int]) -> None:
        self.last = time.monotonic()
        self.since |= dict.fromkeys(rows, self.last)

    def ended(self, row: int, result: Result) -> None:
        self.last = time.monotonic()
        self.results[row] = result
        self.since.pop(row, None)

    def late_at(self, deadline_s: float) -> float:
        """When the first call under way is late; when none is, when the next one should have begun."""
        return min(list(self.since.values()), default=self.last) + deadline_s

    def late(self, deadline_s: float) -> list[int]:
        """The rows whose calls are late."""
        now = time.monotonic()
        return [row for row, began in list(self.since.items()) if began + deadline_s <= now]


class Shared:
    """A user's reward in this process. Past the deadline it is left behind with its threads, as none can be ended."""

    def __init__(self, reward: Reward, name: str, deadline_s: float) -> None:
        self._reward, self._name, self._deadline_s = reward, name, deadline_s
        self._caller = Caller()

    def __getattr__(self, attribute: str) -> Any:
        return getattr(self._reward, attribute)

    def __call__(self, completion: str, example: Example) -> Verdict:
        return _only(self.batch([completion], [example]))

    def batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Result]:
        """A verdict or RewardError per completion."""
        progress = Progress()
        pending = self._caller.start(self._reward, self._name, completions, examples, progress)
        waiting = set(pending.futures)
        try:
            while waiting:
                left_s = progress.late_at(self._deadline_s) - time.monotonic()
                if left_s <= 0:
                    break
                waiting = wait(waiting, left_s).not_done
            if not waiting:
                return pending.results()
        except BaseException:
            pending.cancel()
            raise
        pending.cancel()
        self._caller = Caller()
        late = progress.late(self._deadline_s) or list(range(len(completions)))
        row, results = late[0], dict(progress.results)
        pairs = list(zip(completions, examples, strict=True))
        for other in range(len(pairs)):
            if other not in results:
                after = (
                    ""
                    if other in late
                    else f"; row {examples[row].id!r} of its batch kept it from being graded"
                )
                results[other] = failure(self._name, [pairs[other]], _late(self._deadline_s, after))
        return [results[place] for place in range(len(pairs))]


class ProcessEnded(RuntimeError):
    """A reward's process has ended, or was ended, before it had graded everything."""


class Isolated:
    """A user's reward in a process of its own. One batch at a time; any thread may call it.

    Args: as `load_limited`.
    """

    def __init__(
        self,
        use: str,
        params: dict[str, Any],
        folders: Sequence[str | os.PathLike[str]],
        name: str,
        deadline_s: float,
        memory_gib: float,
    ) -> None:
        self._setup = {
            "use": use,
            "params": params,
            "folders": [os.fspath(folder) for folder in folders],
            "name": name,
            "path": list(sys.path),
            "memory_gib": memory_gib,
        }
        self._name, self._deadline_s, self._memory_gib = name, deadline_s, memory_gib
        self._process = PerProcess(self._start)
        self._lock = PerProcess(threading.Lock)
        vars(self).update(self._process().attributes)

    def __call__(self, completion: str, example: Example) -> Verdict:
        return _only(self.batch([completion], [example]))

    def batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Result]:
        """A verdict or RewardError per completion."""
        pairs = list(zip(completions, examples, strict=True))
        results: dict[int, Result] = {}
        with self._lock():
            waves, deaths = [list(range(len(pairs)))], 0
            while waves:
                rows = waves.pop(0)
                if deaths == MOST_DEATHS:
                    problem = ProcessEnded(f"not asked: its process has ended {deaths} times in this batch")
                    results |= {row: failure(self._name, [pairs[row]], problem) for row in rows}
                    continue
                wave = self._wave([pairs[row] for row in rows])
                results |= {rows[place]: result for place, result in wave.results.items()}
                if wave.problem is None:
                    continue
                deaths += 1
                log.warning("reward %s: %s; its process is started again", self._name, wave.problem)
                guilty, again, untouched = wave.shares(len(rows))
                results |= self._failures(wave, pairs, [rows[place] for place in guilty])
                waves = [[rows[place]] for place in again] + [[rows[place] for place in untouched]] + waves
                waves = [rows for rows in waves if rows]
        return [results[row] for row in range(len(pairs))]

    def close(self) -> None:
        """End the process; the next batch starts another."""
        process = self._process.drop()
        if process:
            process.end()

    def _start(self) -> "_Process":
        return _Process(self._setup, self._name)

    def _failures(self, wave: "_Wave", pairs: Sequence[Pair], rows: Sequence[int]) -> dict[int, Result]:
        """The rows' errors after a death; of a call on many rows all that is known is that one of them did it."""
        assert wave.problem is not None
        if wave.whole:
            return dict.fromkeys(rows, failure(self._name, [pairs[row] for row in rows], wave.problem))
        return {row: failure(self._name, [pairs[row]], wave.problem) for row in rows}

    def _wave(self, pairs: Sequence[Pair]) -> "_Wave":
        """Grade completions side by side, up to the death of the process."""
        process = self._process()
        if process.ended():
            log.warning("reward %s: its process ended between two batches (%s)", self._name, process.status())
            self.close()
            process = self._process()
        wave = _Wave(process, pairs, self._name, self._deadline_s, self._memory_gib)
        try:
            wave.run()
        except BaseException:  # an interrupt: what it has not answered yet must not meet the next batch
            self.close()
            raise
        if wave.problem is not None:
            self.close()
        return wave


class _Wave(Progress):
    """Completions that a process grades side by side."""

    def __init__(
        self,
        process: "_Process",
        pairs: Sequence[Pair],
        name: str,
        deadline_s: float,
        memory_gib: float,
    ) -> None:
        super().__init__()
        self.process, self.pairs, self.name = process, pairs, name
        self.deadline_s, self.memory_gib = deadline_s, memory_gib
        self.problem: BaseException | None = None
        """Why the process ended; None if it lives."""
        self._examples = list({id(example): example for _, example in pairs}.values())

    def run(self) -> None:
        """Send the completions and take the results."""
        places = {id(example): place for place, example in enumerate(self._examples)}
        rows = [(dataclasses.replace(one, images=()), len(one.images)) for one in self._examples]
        texts = [completion for completion, _ in self.pairs]
        message = ("grade", texts, [places[id(example)] for _, example in self.pairs], rows, THREADS)
        packet = pickle.dumps(message)
        self.process.printed = 0
        self.last = time.monotonic()
        try:
            self.process.tell(packet, self.deadline_s)
            while len(self.results) < len(self.pairs):
                left_s = self.late_at(self.deadline_s) - time.monotonic()
                if left_s <= 0:
                    raise _late(self.deadline_s)
                for kind, *content in self.process.hear(left_s):
                    self._take(kind, content)
        except (ProcessEnded, TimeoutError) as error:
            self._late_rows = self.late(self.deadline_s) if isinstance(error, TimeoutError) else []
            self.problem = error

    def shares(self, count: int) -> tuple[list[int], list[int], list[int]]:
        """After a death: the rows to blame, those to grade again each on its own, those that had not begun."""
        under_way = sorted(self.since)
        untouched = [row for row in range(count) if row not in self.since and row not in self.results]
        if not under_way:  # it died between two calls, or could not even begin
            return ([], [], untouched) if self.results else (untouched, [], [])
        guilty = self._late_rows or under_way
        if self._late_rows or len(under_way) == 1 or self.whole:
            return guilty, [row for row in under_way if row not in guilty], untouched
        return [], under_way, untouched

    whole = False
    """Whether one call grades all rows."""
    _late_rows: Sequence[int] = ()

    def _take(self, kind: str, content: list[Any]) -> None:
        try:
            if kind == "begun":
                (rows,) = content
                self.whole = len(rows) > 1
                self.begun([row for row in rows if self.pairs[row]])
            elif kind == "scored":
                row, score, status, answer, reason = content
                self._end(row, Verdict(score, Status(status), answer, reason))
            elif kind == "failed":
                row, message, problem, always_stops, trace = content
                if problem.startswith("MemoryError"):
                    problem += f" (its process may use memory_gib={self.memory_gib:g})"
                    message += f"; its process may use memory_gib={self.memory_gib:g}"
                error = RewardError(message, problem, always_stops)
                error.add_note(trace)
                self._end(row, error)
            elif kind == "picture":
                self._show(*content)
            elif kind == "fault":
                raise ProcessEnded(content[0])
        except (LookupError, TypeError, ValueError) as error:
            raise ProcessEnded(f"it wrote what cannot be read on its connection: {error}") from error

    def _end(self, row: int, result: Result) -> None:
        if row not in self.since:
            raise ValueError(f"a result of row {row!r}, which is not under way")
        self.ended(row, result)

    def _show(self, example: int, place: int) -> None:
        """Send a picture."""
        picture, problem = None, ""
        try:
            picture = self._examples[example].images[place]
            packet = pickle.dumps(("picture", (example, place), picture, ""))
        except Exception as error:
            problem = f"picture {place}: {type(error).__name__}: {error}"
            packet = pickle.dumps(("picture", (example, place), None, problem))
        self.process.tell(packet, self.deadline_s)


_starter = PerProcess(lambda: ThreadPoolExecutor(1, thread_name_prefix="reward-starter"))
"""Starts all processes: the kernel kills a process with the thread that started it."""


class _Process:
    """The process of an isolated reward as its parent sees it.

    Raises what rewards.registry.load_reward raises there.
    """

    def __init__(self, setup: Mapping[str, Any], name: str) -> None:
        self.name = name
        self.printed = self._shown = 0
        self._tail = b""
        self.channel, theirs = socket.socketpair()
        with theirs:
            self._popen = _starter().submit(_popen, theirs.fileno()).result()
        self._output = self._popen.stdout
        assert self._output is not None
        os.set_blocking(self._output.fileno(), False)
        self._events = selectors.DefaultSelector()
        self._events.register(self.channel, selectors.EVENT_READ)
        self._events.register(self._output, selectors.EVENT_READ)
        self._finalizer = weakref.finalize(self, _end, self._popen, self.channel, self._events, os.getpid())
        self.attributes = self._loaded(setup)

    def _loaded(self, setup: Mapping[str, Any]) -> dict[str, Any]:
        try:
            self.tell(pickle.dumps(dict(setup)), START_S)
            late_at = time.monotonic() + START_S
            while time.monotonic() < late_at:
                for kind, *content in self.hear(late_at - time.monotonic()):
                    if kind == "ready":
                        return content[0]
                    self._refuse(*content)
            raise ProcessEnded(f"it is not loaded within {START_S:g} s")
        except ProcessEnded as error:
            self.end()
            raise RewardError(f"reward {self.name!r} cannot be loaded: {error}", str(error)) from None
        except BaseException:
            self.end()
            raise

    def _refuse(self, kinds: Sequence[str], text: str, trace: str) -> NoReturn:
        kind = next((_KINDS_OF_LOADING[name] for name in kinds if name in _KINDS_OF_LOADING), None)
        error = (
            kind(text) if kind else RewardError(f"reward {self.name!r} cannot be loaded: {kinds[0]}: {text}")
        )
        error.add_note(trace)
        raise error

    def tell(self, packet: bytes, deadline_s: float) -> None:
        """Send a message. Raises ProcessEnded, or TimeoutError if it is not read in time."""
        self.channel.settimeout(deadline_s)
        try:
            send(self.channel, packet)
        except TimeoutError:
            raise _late(deadline_s) from None
        except OSError:
            raise ProcessEnded(self._last_words()) from None

    def hear(self, timeout_s: float) -> list[list[Any]]:
        """The next messages; none if nothing comes in time, or it only prints. Raises ProcessEnded."""
        messages = []
        for key, _ in self._events.select(max(0.0, timeout_s)):
            if key.fileobj is self.channel:
                messages.append(self._message())
            else:
                self._print()
        return messages

    def ended(self) -> bool:
        """Whether the process is dead."""
        return self._popen.poll() is not None

    def status(self) -> str:
        """How it ended, in words."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1.0)
        status = self._popen.returncode
        if status is None or status == LOST:
            return "it closed the connection on which it answers"
        if status < 0:
            name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
            return f"its process was killed by {name}" + (
                " (out of memory?)" if -status == signal.SIGKILL else ""
            )
        return f"its process ended with exit status {status}"

    def end(self) -> None:
        """Kill it with what it has started."""
        self._finalizer()

    def _message(self) -> list[Any]:
        self.channel.settimeout(_MESSAGE_S)
        try:
            packet = receive(self.channel, _MOST_MESSAGE_BYTES)
            if not packet:
                raise ProcessEnded(self._last_words())
            message = json.loads(packet)
            if isinstance(message, list) and message and isinstance(message[0], str):
                return message
        except ConnectionError:
            raise ProcessEnded(self._last_words()) from None
        except (OSError, ValueError, RecursionError):
            pass
        raise ProcessEnded("it wrote what cannot be read on its connection")

    def _print(self) -> None:
        """Take what it has printed: some of it for our log, all of it into account."""
        assert self._output is not None
        try:
            text = self._output.read(1 << 16)
        except OSError:
            text = b""
        if not text:
            if text is not None:  # it has closed its output
                self._events.unregister(self._output)
            return
        self.printed += len(text)
        self._tail = (self._tail + text)[-_TAIL_BYTES:]
        if self._shown < SHOWN_OUTPUT_BYTES:
            sys.stderr.write(text[: SHOWN_OUTPUT_BYTES - self._shown].decode("utf-8", "replace"))
            self._shown += len(text)
            if self._shown >= SHOWN_OUTPUT_BYTES:
                log.warning("reward %s: what else it prints is not shown", self.name)
        if self.printed > OUTPUT_BYTES:
            raise ProcessEnded(f"it printed more than {OUTPUT_BYTES >> 20} MiB during one batch")

    def _last_words(self) -> str:
        """How it ended, with the end of its output: a traceback, if it was a signal."""
        status = self.status()
        with contextlib.suppress(ProcessEnded):
            while any(key.fileobj is self._output for key, _ in self._events.select(0)):
                self._print()
        said = " ".join(self._tail.decode("utf-8", "replace").split())
        fatal = said.rfind("Fatal Python error")
        said = said[-300:] if fatal < 0 else said[fatal : fatal + 300]
        return f"{status}; its last output: {said!r}" if said else status


def _popen(descriptor: int) -> subprocess.Popen:
    script = Path(__file__).with_name("isolation_worker.py")
    # -P: no folder of the user's stands in for a module. Its own session: Ctrl-C is for this process.
    return subprocess.Popen(
        [sys.executable, "-P", str(script), str(descriptor)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        pass_fds=(descriptor,),
        start_new_session=True,
    )


def _end(popen: subprocess.Popen, channel: socket.socket, events: Any, owner: int) -> None:
    if os.getpid() != owner:  # a forked child's copy
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()
    events.close()
    channel.close()
    if popen.stdout:
        popen.stdout.close()


def _only(results: list[Result]) -> Verdict:
    (result,) = results
    if isinstance(result, RewardError):
        raise result
    return result


def _late(deadline_s: float, after: str = "") -> TimeoutError:
    return TimeoutError(f"no verdict within deadline_s={deadline_s:g}{after}")
