"""The process of one isolated reward; rewards.isolation.process starts this file as a script.

The process reads messages from its parent: first a setup, then batches and requested pictures. It writes:

| message | meaning |
|---|---|
| ready, attributes | the reward is loaded |
| refused, kind, text, trace | the reward cannot be loaded |
| begun, rows | a call on these rows of the batch begins |
| scored, row, score, status, answer, reason | a verdict |
| failed, row, message, problem, always stops, trace | the reward raised |
| picture, example, place | the reward requests a picture |
| fault, text | the reward changed state that all code of the process shares; the process ends |

The parent sends pickles, and this process answers in JSON. So the parent never unpickles output of a user's code.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import functools
import json
import os
import pickle
import resource
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rewards.calls import RewardError
    from rewards.verdict import Verdict

FORWARDED = ("self_test", "contract_of", "thought_open", "needs")
"""Attributes of a reward that are sent to the parent."""
LOST = 70
"""Exit status of a process that can no longer answer."""
MOST_CHARS = 10_000
"""Longest answer or reason, characters."""
_PR_SET_PDEATHSIG = 1
_encode = json.JSONEncoder().encode  # saved here, because a reward may replace json.dumps


def main() -> None:
    """Load the reward and grade batches until the parent closes the connection."""
    _end_with_parent()
    faulthandler.enable(all_threads=False)
    channel = Connection(int(sys.argv[1]))
    setup = pickle.loads(channel.recv_bytes())
    sys.path[:] = setup["path"]
    bytes_allowed = int(setup["memory_gib"] * 2**30)
    resource.setrlimit(resource.RLIMIT_DATA, (bytes_allowed, bytes_allowed))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    worker = _Worker(channel)
    if worker.load(setup):
        worker.serve()
    os._exit(0)  # the reward's own threads must not keep the process alive


class _Worker:
    def __init__(self, channel: Connection) -> None:
        self.channel = channel
        self._sending = threading.Lock()
        self._pictures: dict[tuple[int, int], Future] = {}

    def say(self, *message: Any) -> None:
        """Write a message; end the process if the connection is closed."""
        try:
            packet = _encode(message).encode()
            with self._sending:
                self.channel.send_bytes(packet)
        except OSError:  # the reward has closed the connection
            os._exit(LOST)

    def load(self, setup: dict[str, Any]) -> bool:
        """Load the reward; report its attributes, or the reason why it cannot be loaded."""
        from rewards.calls import Caller, traceback_text
        from rewards.registry import load_reward

        self._caller = functools.cache(Caller)

        try:
            self.reward = load_reward(setup["use"], setup["params"], setup["folders"])
            attributes = {name: getattr(self.reward, name, None) for name in FORWARDED}
            self.say("ready", {name: value for name, value in attributes.items() if value is not None})
        except BaseException as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            self.say("refused", kinds, f"{error}"[:MOST_CHARS], traceback_text(error))
            return False
        self.name, self.folder = setup["name"], os.getcwd()
        self._json = dict(vars(json))
        return True

    def serve(self) -> None:
        """Grade batches. While the reward works, this thread keeps reading messages and delivers pictures."""
        while True:
            try:
                packet = self.channel.recv_bytes()
            except (EOFError, OSError):  # the parent has closed the connection, or has died
                return
            kind, *content = pickle.loads(packet)
            if kind == "grade":
                threading.Thread(target=self._grade, args=content, daemon=True).start()
            else:
                key, picture, problem = content
                waiting = self._pictures.get(key)
                if waiting is None:  # a picture for an earlier batch
                    continue
                if problem:
                    waiting.set_exception(RuntimeError(problem))
                else:
                    waiting.set_result(picture)

    def _grade(self, completions: list[str], places: list[int], rows: list[Any], threads: int) -> None:
        self._pictures.clear()
        examples = [
            dataclasses.replace(example, images=_Pictures(number, count, self._picture))
            for number, (example, count) in enumerate(rows)
        ]
        told = [examples[place] for place in places]
        watch: Any = _Teller(self)
        try:
            self._caller(threads).start(self.reward, self.name, completions, told, watch).results()
        except BaseException as error:
            self._end(f"{type(error).__name__}: {error}")

    def _picture(self, example: int, place: int) -> Any:
        key = (example, place)
        with self._sending:
            waiting, new = self._pictures.get(key), key not in self._pictures
            if waiting is None:
                waiting = self._pictures[key] = Future()
        if new:
            self.say("picture", example, place)
        return waiting.result()

    def check(self) -> None:
        """End the process if the reward has changed shared state, as later verdicts might be wrong."""
        try:
            folder = os.getcwd()
        except OSError:
            folder = "a folder that no longer exists"
        if folder != self.folder:
            self._end(f"it changed the working folder to {folder}")
        replaced = [name for name, value in self._json.items() if vars(json).get(name) is not value]
        if replaced:
            self._end(f"it replaced json.{replaced[0]}, which other code of its process uses")

    def _end(self, text: str) -> None:
        self.say("fault", text[:MOST_CHARS])
        os._exit(LOST)


class _Teller:
    """Reports the begin and the result of each call to the parent (a rewards.calls.Watch)."""

    def __init__(self, worker: _Worker) -> None:
        self.worker = worker

    def begun(self, rows: Sequence[int]) -> None:
        self.worker.say("begun", list(rows))

    def ended(self, row: int, result: "Verdict | RewardError") -> None:
        from rewards.calls import RewardError, traceback_text

        self.worker.check()
        if isinstance(result, RewardError):
            trace = traceback_text(result.__cause__)
            message = (str(result)[:MOST_CHARS], result.problem[:MOST_CHARS])
            self.worker.say("failed", row, *message, result.always_stops, trace)
        else:
            texts = (result.answer and result.answer[:MOST_CHARS], result.reason[:MOST_CHARS])
            self.worker.say("scored", row, result.score, result.status.value, *texts)


class _Pictures(Sequence[Any]):
    """A row's pictures, each fetched from the parent on access. Most rewards do not use pictures."""

    def __init__(self, example: int, count: int, fetch: Callable[[int, int], Any]) -> None:
        self._example, self._count, self._fetch = example, count, fetch

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        places = range(self._count)[index]
        if isinstance(places, int):
            return self._fetch(self._example, places)
        return tuple(self._fetch(self._example, place) for place in places)


def _end_with_parent() -> None:
    """Tell the kernel to kill this process when the thread that started it ends."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(LOST)


if __name__ == "__main__":
    main()
