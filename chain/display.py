"""Progress output while a chain runs: one live line on a terminal, plain lines in a file or in CI."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from core.console import new_console

log = logging.getLogger(__name__)

PLAIN_EVERY_S = 10
"""Shortest time between two lines of progress without a terminal, seconds."""


class Tail:
    """The records added to a JSONL file since the last look.

    An incomplete last line waits for the next look. A replaced or rewritten file is read again from its start, and the
    leading lines that were read before and are unchanged are skipped. A line that is not JSON is skipped with a
    warning, because an observer must not end a run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read: list[bytes] = []
        """Digests of the lines read so far."""
        self._offset = 0
        self._last = b""

    def new(self) -> list[dict[str, Any]]:
        """New records in file order; [] while the file does not exist."""
        start = self._offset - len(self._last)
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                chunk = file.read()
                if not chunk.startswith(self._last):
                    file.seek(0)
                    return self._again(file.read())
        except FileNotFoundError:
            return []
        return self._take(chunk[len(self._last) :])

    def _again(self, content: bytes) -> list[dict[str, Any]]:
        """Read a rewritten file: the lines after the prefix that it shares with the old file."""
        shared = 0
        for digest, line in zip(self._read, _whole(content), strict=False):
            if digest != _digest(line):
                break
            shared += len(line)
        self._read = [_digest(line) for line in _whole(content[:shared])]
        self._offset, self._last = shared, (_whole(content[:shared]) or [b""])[-1]
        return self._take(content[shared:])

    def _take(self, added: bytes) -> list[dict[str, Any]]:
        records = []
        for line in _whole(added):
            self._read.append(_digest(line))
            self._offset, self._last = self._offset + len(line), line
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:
                log.warning("%s:%d: not a JSON record; skipped", self.path, len(self._read))
        return records


def _whole(content: bytes) -> list[bytes]:
    """The complete lines, each with its line break."""
    return content[: content.rfind(b"\n") + 1].splitlines(keepends=True)


def _digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=8).digest()


class Display:
    """Prints permanent lines, and one live line that each update replaces."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or new_console()
        self._status: Any = None
        self._label, self._started = "", 0.0
        self._last_plain, self._last_text = 0.0, ""

    def line(self, text: str) -> None:
        """Print a permanent line."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Show `label`, the latest text of `passing`, and the elapsed time until the block ends."""
        self._label, self._started = label, time.monotonic()
        self._last_plain, self._last_text = self._started, ""
        if not self.console.is_terminal:
            yield
            return
        with self.console.status(escape(label)) as self._status:
            try:
                yield
            finally:
                self._status = None

    def passing(self, text: str, *, elapsed: bool = True) -> None:
        """Show the current progress, with the time since the step began unless `elapsed` is false.

        On a terminal the next call replaces the line. Elsewhere a line is printed at most every PLAIN_EVERY_S seconds,
        and only if the text is new.
        """
        now = time.monotonic()
        line = " · ".join([self._label, text, *([duration(now - self._started)] if elapsed else [])])
        if self._status is not None:
            self._status.update(escape(line))
        elif now - self._last_plain >= PLAIN_EVERY_S and text != self._last_text:
            self._last_plain, self._last_text = now, text
            self.line(line)


def duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
