"""`posttrain score`: grades stored completions with any rewards, without a model. One output line per input line."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from core.files import writing
from core.strict import ConfigError
from rewards.calls import Caller, Pending, Reward, RewardError
from rewards.example import Example
from rewards.isolation import load_limited
from rewards.offline.rows import (
    Line,
    RowError,
    completion_of_row,
    example_of_row,
    mode_of_row,
    read_lines,
)
from rewards.offline.summary import Summary, table, words
from rewards.verdict import Verdict

CHUNK_ROWS = 512
CHUNK_BYTES = 8 << 20
"""Most rows and bytes of a chunk. Up to two chunks are in memory."""


class NothingScored(RuntimeError):
    """All rows are without a score. The causes were printed."""


def rewards_of(
    names: str, params: Mapping[str, Mapping[str, Any]], folders: Sequence[Path]
) -> dict[str, Reward]:
    """Label -> reward, for a list of rewards.

    Args:
        names: separated by commas; each is a name of rewards.registry, or `label=name`.
        params: label -> parameters of that reward.
        folders: folders in which users' own modules are searched.

    Raises ConfigError for an unknown name or an invalid parameter.
    """
    found: dict[str, Reward] = {}
    for text in filter(None, (part.strip() for part in names.split(","))):
        shown, equals, use = text.partition("=")
        if not equals:
            use = text
        if shown in found:
            raise ConfigError(f"--rewards: {shown!r} twice; give one of them another label: other={use}")
        found[shown] = load(use, params.get(shown, {}), folders, shown)
    if not found:
        raise ConfigError("--rewards is empty; write names separated by commas: answer,format")
    strange = sorted(set(params) - set(found))
    if strange:
        raise ConfigError(f"--param is for {strange[0]!r}, which --rewards does not name")
    return found


def load(use: str, params: Mapping[str, Any], folders: Sequence[Path], name: str = "") -> Reward:
    """Load one reward; a user's own reward runs in a separate process. Raises ConfigError for an unknown name or
    parameter."""
    try:
        return load_limited(use, params, folders, name=name)
    except (ValueError, TypeError, ImportError, RewardError) as error:
        raise ConfigError(str(error)) from error


def score(
    source: Path,
    target: Path,
    rewards: Mapping[str, Reward],
    workers: int,
    mode: str | None = None,
    on_bytes: Any = None,
) -> Summary:
    """Write every row of a JSONL file, with its verdicts under "rewards", to another file, in order.

    A line that is not a row becomes {"line": number, "error": reason}. If a reward raises, that verdict is unscorable
    with the error as its reason. Memory does not grow with the file. The target is written atomically, and may be the
    source file.

    Args:
        rewards: label -> reward.
        workers: completions graded concurrently.
        mode: mode of rows without a mode; None derives it from the row (rewards.offline.rows).
        on_bytes: called with the number of bytes processed since the last call.
    """
    started = time.monotonic()
    summary = Summary(statuses={name: Counter() for name in rewards})
    caller = Caller(workers)
    begun: list[_Chunk] = []
    with writing(target) as file:
        try:
            for lines in _chunks(source):
                begun.append(_Chunk.begin(lines, source.parent, rewards, caller, mode))
                # A chunk is graded while the last completions of the previous chunk finish.
                if len(begun) > 1:
                    begun.pop(0).write(file, summary, on_bytes)
            for chunk in begun:
                chunk.write(file, summary, on_bytes)
        finally:
            for chunk in begun:
                chunk.cancel()
    summary.seconds = time.monotonic() - started
    return summary


@dataclass
class _Chunk:
    """Lines whose completions are being graded."""

    lines: list[Line]
    problems: dict[int, str]
    """Index in the chunk -> error of an invalid line."""
    pending: dict[str, Pending]
    modes: dict[int, tuple[str, str]]
    """Index in the chunk -> mode of the row and source of the mode."""

    @classmethod
    def begin(
        cls, lines: list[Line], folder: Path, rewards: Mapping[str, Reward], caller: Caller, mode: str | None
    ) -> _Chunk:
        problems: dict[int, str] = {}
        completions: list[str] = []
        examples: list[Example] = []
        modes: dict[int, tuple[str, str]] = {}
        for place, line in enumerate(lines):
            try:
                if line.row is None:
                    raise RowError(line.problem)
                example = example_of_row(line.row, line.number, folder, mode)
                completions.append(completion_of_row(line.row, example))
                examples.append(example)
                modes[place] = mode_of_row(line.row, mode)
            except RowError as error:
                problems[place] = str(error)
        pending = {}
        if examples:
            pending = {
                name: caller.start(reward, name, completions, examples) for name, reward in rewards.items()
            }
        return cls(lines, problems, pending, modes)

    def cancel(self) -> None:
        """Cancel the calls that have not begun."""
        for pending in self.pending.values():
            pending.cancel()

    def write(self, file: IO[str], summary: Summary, on_bytes: Any) -> None:
        graded = {name: iter(pending.results()) for name, pending in self.pending.items()}
        for place, line in enumerate(self.lines):
            summary.rows += 1
            problem = self.problems.get(place)
            if problem is None:
                verdicts = {name: _counted(name, next(results), summary) for name, results in graded.items()}
                contract = self.modes[place]
                summary.modes[contract] += 1
                text = _json(line.row or {}, verdicts, contract[0])
                problem = "" if text else "nested too deeply to write"
            if problem:
                summary.errors += 1
                summary.count_cause("", problem)
                text = json.dumps(_error_line(line, problem))
            file.write(text + "\n")
        if on_bytes:
            on_bytes(sum(line.size for line in self.lines))


def _counted(name: str, result: Verdict | RewardError, summary: Summary) -> Verdict:
    if isinstance(result, RewardError):
        count, first = summary.raised.get(name, (0, str(result)))
        summary.raised[name] = count + 1, first
        result = Verdict.unscored(result.problem)
    summary.statuses[name][result.status.value] += 1
    if result.score is None:
        summary.count_cause(name, f"{result.status.value}: {result.reason}")
    else:
        summary.scored[name] += 1
        summary.sums[name] += result.score  # type: ignore[assignment]  # a Counter adds floats as well
    return result


def _json(row: Mapping[str, Any], verdicts: Mapping[str, Verdict], contract: str) -> str:
    """The row with its verdicts and their mode as JSON; "" if the row is nested too deeply to write."""
    scored = {}
    for name, verdict in verdicts.items():
        scored[name] = verdict.to_dict()
        scored[name]["why"] = scored[name].pop("reason")
    whole = {**row, "contract": contract, "rewards": scored}
    try:
        text = json.dumps(whole, ensure_ascii=False)
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:  # half a surrogate pair cannot be encoded as UTF-8, so it is escaped
        return json.dumps(whole)
    except RecursionError:
        return ""


def _error_line(line: Line, problem: str) -> dict[str, Any]:
    identity = (line.row or {}).get("id")
    known = {"id": identity} if isinstance(identity, str | int) else {}
    return {"line": line.number, **known, "error": problem}


def _chunks(source: Path) -> Iterator[list[Line]]:
    chunk: list[Line] = []
    size = 0
    for line in read_lines(source):
        chunk.append(line)
        size += line.size
        if len(chunk) >= CHUNK_ROWS or size >= CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def run(
    source: Path,
    target: Path,
    names: str,
    params: Mapping[str, Mapping[str, Any]],
    workers: int,
    mode: str | None,
    allow_unscorable: bool = False,
) -> Summary:
    """The command: score with a progress bar, and print the summary.

    Raises ConfigError for a missing file or reward, NothingScored unless allowed.
    """
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from core.console import new_console

    if not source.is_file():
        raise ConfigError(f"--input {source}: there is no such file")
    rewards = rewards_of(names, params, [Path.cwd()])
    console = new_console()
    columns = (TextColumn("scoring"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("scoring", total=source.stat().st_size)
        summary = score(source, target, rewards, workers, mode, lambda size: progress.advance(task, size))
    console.print(table(summary))
    for line in words(summary, target):
        console.print(line, markup=False, soft_wrap=True)
    if summary.rows and not summary.scored and not allow_unscorable:
        raise NothingScored(
            f"none of the {summary.rows} rows could be scored, for the causes above; --allow-unscorable accepts that"
        )
    return summary
