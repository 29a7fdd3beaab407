"""The parent's side of an isolated reward's process: starts the process, exchanges messages, and ends it."""

import contextlib
import json
import logging
import os
import pickle
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from rewards.calls import RewardError
from rewards.forks import PerProcess
from rewards.isolation.progress import too_late
from rewards.isolation.worker import LOST
from rewards.registry import UnknownReward

log = logging.getLogger(__name__)

START_S = 180.0
"""Time limit for loading the reward. An import of torch takes seconds, and much longer on a loaded machine."""
OUTPUT_BYTES = 1 << 20
"""Most output of a reward during one batch."""
SHOWN_OUTPUT_BYTES = 256 << 10
"""Most output of a process that is copied to the log."""
_TAIL_BYTES = 2000
_MOST_MESSAGE_BYTES = 4 << 20
_MESSAGE_S = 30.0
"""Longest pause within a message that has begun to arrive."""
_KINDS = (UnknownReward, ModuleNotFoundError, ImportError, NotADirectoryError, FileNotFoundError)
_KINDS_OF_LOADING = {kind.__name__: kind for kind in (*_KINDS, TypeError, ValueError)}


class ProcessEnded(RuntimeError):
    """A reward's process has ended, or was ended, before it had graded all rows."""


_starter = PerProcess(lambda: ThreadPoolExecutor(1, thread_name_prefix="reward-starter"))
"""The thread that starts all processes. The kernel kills a process when the thread that started it ends."""


class Process:
    """The parent's side of an isolated reward's process.

    Raises the exceptions of rewards.registry.load_reward, which runs in that process.
    """

    def __init__(self, setup: Mapping[str, Any], name: str, deadline_s: float) -> None:
        self.name, self._deadline_s = name, deadline_s
        self.printed = self._shown = 0
        self._tail = b""
        ours, theirs = socket.socketpair()
        for option, seconds in ((socket.SO_RCVTIMEO, _MESSAGE_S), (socket.SO_SNDTIMEO, deadline_s)):
            ours.setsockopt(
                socket.SOL_SOCKET, option, struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
            )
        self.channel = Connection(ours.detach())
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
            self.tell(pickle.dumps(dict(setup)))
            late_at = time.monotonic() + START_S
            while time.monotonic() < late_at:
                for kind, *content in self.hear(late_at - time.monotonic()):
                    if kind == "ready":
                        return content[0]
                    self._refuse(*content)
            raise ProcessEnded(f"loading took more than {START_S:g} s")
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

    def tell(self, packet: bytes) -> None:
        """Send a message. Raises ProcessEnded, or TimeoutError if the process reads nothing for deadline_s."""
        try:
            self.channel.send_bytes(packet)
        except BlockingIOError:
            raise too_late(self._deadline_s) from None
        except OSError:
            raise ProcessEnded(self._last_words()) from None

    def hear(self, timeout_s: float) -> list[list[Any]]:
        """The next messages; [] after `timeout_s`, or if the process only prints. Raises ProcessEnded."""
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
        """A description of how the process ended."""
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
        """Kill the process and its process group."""
        self._finalizer()

    def _message(self) -> list[Any]:
        try:
            message = json.loads(self.channel.recv_bytes(_MOST_MESSAGE_BYTES))
            if isinstance(message, list) and message and isinstance(message[0], str):
                return message
        except (EOFError, ConnectionError):
            raise ProcessEnded(self._last_words()) from None
        except (OSError, ValueError, RecursionError):
            pass
        raise ProcessEnded("its connection carried an unreadable message")

    def _print(self) -> None:
        """Read the process's output, count its bytes, and copy the beginning to the log."""
        assert self._output is not None
        try:
            text = self._output.read(1 << 16)
        except OSError:
            text = b""
        if not text:
            if text is not None:  # the process has closed its output
                self._events.unregister(self._output)
            return
        self.printed += len(text)
        self._tail = (self._tail + text)[-_TAIL_BYTES:]
        if self._shown < SHOWN_OUTPUT_BYTES:
            sys.stderr.write(text[: SHOWN_OUTPUT_BYTES - self._shown].decode("utf-8", "replace"))
            self._shown += len(text)
            if self._shown >= SHOWN_OUTPUT_BYTES:
                log.warning("reward %s: further output is not shown", self.name)
        if self.printed > OUTPUT_BYTES:
            raise ProcessEnded(f"it printed more than {OUTPUT_BYTES >> 20} MiB during one batch")

    def _last_words(self) -> str:
        """A description of how the process ended, with the end of its output: after a signal, a traceback."""
        status = self.status()
        with contextlib.suppress(ProcessEnded):
            while any(key.fileobj is self._output for key, _ in self._events.select(0)):
                self._print()
        said = " ".join(self._tail.decode("utf-8", "replace").split())
        fatal = said.rfind("Fatal Python error")
        said = said[-300:] if fatal < 0 else said[fatal : fatal + 300]
        return f"{status}; its last output: {said!r}" if said else status


def _popen(descriptor: int) -> subprocess.Popen:
    script = Path(__file__).with_name("worker.py")
    # -P keeps a user's folder from shadowing a module. A separate session keeps Ctrl-C from reaching the child.
    return subprocess.Popen(
        [sys.executable, "-P", str(script), str(descriptor)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        bufsize=0,
        pass_fds=(descriptor,),
        start_new_session=True,
    )


def _end(popen: subprocess.Popen, channel: Connection, events: Any, owner: int) -> None:
    if os.getpid() != owner:  # in a forked child, this is a copy
        return
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(popen.pid, signal.SIGKILL)
    popen.wait()
    events.close()
    channel.close()
    if popen.stdout:
        popen.stdout.close()
