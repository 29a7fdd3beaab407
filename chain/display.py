"""What the terminal shows while a chain runs: a living line on a terminal, plain lines in a file or in CI."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from core.console import new_console

PLAIN_EVERY_S = 10
"""Without a terminal, at most one line of progress in so many seconds."""
_SHOWN = ("loss", "reward", "rollout/correct", "token_accuracy")
"""Metrics worth a place in the line, of those that a stage logs."""


class Tail:
    """The records added to a JSONL file since the last look; an unfinished line waits for the next."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read = 0

    def new(self) -> list[dict[str, Any]]:
        """Records in the order they were written; [] while there is no file."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._read)
                chunk = file.read()
        except FileNotFoundError:
            return []
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines() if line.strip()]


class Display:
    """Prints what stays, and shows what passes."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or new_console()
        self._status: Any = None
        self._label, self._started = "", 0.0
        self._last_plain, self._last_text = 0.0, ""

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def step(self, label: str) -> Iterator[None]:
        """Show `label`, what `passing` says, and the time since, until the block ends."""
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

    def passing(self, text: str) -> None:
        """What is going on now; the next call replaces it, and one with the same text moves the clock on."""
        now = time.monotonic()
        line = f"{self._label}: {text}  {duration(now - self._started)}"
        if self._status is not None:
            self._status.update(escape(line))
        elif now - self._last_plain >= PLAIN_EVERY_S and text != self._last_text:
            self._last_plain, self._last_text = now, text
            self.line(line)


def metrics_text(record: Mapping[str, Any]) -> str:
    """One metrics line in few words: `phase general  step 12  loss 0.431`."""
    words = [str(record["phase"])] if record.get("phase") else []
    words += [f"step {record['step']}"] if "step" in record else []
    words += [
        f"{name.rpartition('/')[2]} {record[name]:.3f}"
        for name in _SHOWN
        if isinstance(record.get(name), int | float)
    ]
    return "  ".join(words)


def duration(seconds: float) -> str:
    """`42s`, `3m05s`, `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
