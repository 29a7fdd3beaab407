"""A user's reward in a separate process.

The following faults become a RewardError that names the reward, the row and the fault: the reward hangs, exits, dies by
a signal, prints without end, takes too much memory, changes the working folder, replaces functions of `json`, or closes
the connection. The term's policy (`on_error`) then stops the run or leaves the row unscored.

When the process dies, all running calls fail. If there were several, each of their rows is graded once more and alone,
so that one bad completion does not cost other completions their verdicts. After MOST_DEATHS deaths in a batch, the
remaining rows fail without a call.
"""

import dataclasses
import logging
import os
import pickle
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rewards.calls import THREADS, Pair, RewardError, failure
from rewards.example import Example
from rewards.forks import PerProcess
from rewards.isolation.process import Process, ProcessEnded
from rewards.isolation.progress import Progress, Result, only, too_late
from rewards.verdict import Status, Verdict

log = logging.getLogger(__name__)

MOST_DEATHS = 4
_OURS = str(Path(__file__).resolve().parents[2])
"""The folder that contains this package."""


class Isolated:
    """A user's reward in a separate process. Any thread may call it; batches run one at a time.

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
            "path": [_OURS, *sys.path],  # the folder of the user's script may hold a `rewards.py`
            "memory_gib": memory_gib,
        }
        self._name, self._deadline_s, self._memory_gib = name, deadline_s, memory_gib
        self._process = PerProcess(self._start)
        self._lock = PerProcess(threading.Lock)
        vars(self).update(self._process().attributes)

    def __call__(self, completion: str, example: Example) -> Verdict:
        return only(self.batch([completion], [example]))

    def batch(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Result]:
        """A verdict or RewardError per completion."""
        pairs = list(zip(completions, examples, strict=True))
        results: dict[int, Result] = {}
        with self._lock():
            waves, deaths = [list(range(len(pairs)))], 0
            while waves:
                rows = waves.pop(0)
                if deaths == MOST_DEATHS:
                    problem = ProcessEnded(f"not graded: its process has ended {deaths} times in this batch")
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
        """End the process. The next batch starts a new process."""
        process = self._process.drop()
        if process:
            process.end()

    def _start(self) -> "Process":
        return Process(self._setup, self._name, self._deadline_s)

    def _failures(self, wave: "_Wave", pairs: Sequence[Pair], rows: Sequence[int]) -> dict[int, Result]:
        """The rows' errors after a death. If one call graded many rows, they share one error."""
        assert wave.problem is not None
        if wave.whole:
            return dict.fromkeys(rows, failure(self._name, [pairs[row] for row in rows], wave.problem))
        return {row: failure(self._name, [pairs[row]], wave.problem) for row in rows}

    def _wave(self, pairs: Sequence[Pair]) -> "_Wave":
        """Grade completions concurrently until all are done or the process dies."""
        process = self._process()
        if process.ended():
            log.warning("reward %s: its process ended between two batches (%s)", self._name, process.status())
            self.close()
            process = self._process()
        wave = _Wave(process, pairs, self._name, self._deadline_s, self._memory_gib)
        try:
            wave.run()
        except BaseException:  # after an interrupt, late results must not reach the next batch
            self.close()
            raise
        if wave.problem is not None:
            self.close()
        return wave


class _Wave(Progress):
    """Completions that a process grades concurrently."""

    def __init__(
        self,
        process: "Process",
        pairs: Sequence[Pair],
        name: str,
        deadline_s: float,
        memory_gib: float,
    ) -> None:
        super().__init__()
        self.process, self.pairs, self.name = process, pairs, name
        self.deadline_s, self.memory_gib = deadline_s, memory_gib
        self._late_rows: list[int] = []
        self.problem: BaseException | None = None
        """The reason why the process ended; None while it is alive."""
        self._examples = list({id(example): example for _, example in pairs}.values())

    def run(self) -> None:
        """Send the completions and receive the results."""
        places = {id(example): place for place, example in enumerate(self._examples)}
        rows = [(dataclasses.replace(one, images=()), len(one.images)) for one in self._examples]
        texts = [completion for completion, _ in self.pairs]
        message = ("grade", texts, [places[id(example)] for _, example in self.pairs], rows, THREADS)
        packet = pickle.dumps(message)
        self.process.printed = 0
        self.last = time.monotonic()
        try:
            self.process.tell(packet)
            while len(self.results) < len(self.pairs):
                left_s = self.late_at(self.deadline_s) - time.monotonic()
                if left_s <= 0:
                    raise too_late(self.deadline_s)
                for kind, *content in self.process.hear(left_s):
                    self._take(kind, content)
        except (ProcessEnded, TimeoutError) as error:
            self._late_rows = self.late(self.deadline_s) if isinstance(error, TimeoutError) else []
            self.problem = error

    def shares(self, count: int) -> tuple[list[int], list[int], list[int]]:
        """After a death: the rows at fault, the rows to grade again alone, and the rows that had not begun."""
        under_way = sorted(self.since)
        untouched = [row for row in range(count) if row not in self.since and row not in self.results]
        if not under_way:  # the process died between two calls or before the first call
            return ([], [], untouched) if self.results else (untouched, [], [])
        guilty = self._late_rows or under_way
        if self._late_rows or len(under_way) == 1 or self.whole:
            return guilty, [row for row in under_way if row not in guilty], untouched
        return [], under_way, untouched

    whole = False
    """Whether one call grades all rows."""

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
            raise ProcessEnded(f"its connection carried an unreadable message: {error}") from error

    def _end(self, row: int, result: Result) -> None:
        if row not in self.since:
            raise ValueError(f"a result of row {row!r}, which is not being graded")
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
        self.process.tell(packet)
