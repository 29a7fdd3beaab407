"""`posttrain diff`: shows which verdicts differ between two scored files, such as of an old and a new reward."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from core.strict import ConfigError
from rewards.offline.rows import Line, printable, read_lines

TOLERANCE = 1e-9
"""Scores that differ by less are equal."""
NO_ROW = "row"
"""In place of a reward's name, for a line that is an error in only one of the two files."""


def compare(before: Path, after: Path, on_change: Any = None) -> dict[str, Any]:
    """Totals of the changes between two outputs of `posttrain score` for one input.

    Line n is compared with line n. If both lines have ids and the ids differ, or if one file has ended, the lines are
    counted as unmatched and not compared. A verdict has changed if its score or status has changed.

    Args:
        on_change: called with each change: line, id, reward, before and after (a verdict, or None for a missing
            verdict). Changes are not stored, so that memory does not grow with the files.

    Returns lines, unmatched, and per reward: compared, changed, up, down, scored (without a score before), unscored
    (without a score after).
    """
    for path in (before, after):
        if not path.is_file():
            raise ConfigError(
                f"{path}: there is no such file; diff compares two outputs of `posttrain score`"
            )
    totals: dict[str, Any] = {"lines": 0, "unmatched": 0, "rewards": {}}
    for old, new in zip_longest(read_lines(before), read_lines(after)):
        totals["lines"] += 1
        if old is None or new is None or _other_row(old, new):
            totals["unmatched"] += 1
            continue
        for name, was, now in _pairs(old, new):
            counts = totals["rewards"].setdefault(name, dict.fromkeys(_COUNTS, 0))
            counts["compared"] += 1
            change = _change(was, now)
            if not change:
                continue
            counts["changed"] += 1
            counts[change] += 1
            if on_change:
                identity = (new.row or {}).get("id", (old.row or {}).get("id"))
                on_change({"line": old.number, "id": identity, "reward": name, "before": was, "after": now})
    return totals


_COUNTS = ("compared", "changed", "up", "down", "scored", "unscored", "other")


def _other_row(old: Line, new: Line) -> bool:
    ids = [line.row["id"] for line in (old, new) if line.row and line.row.get("id") is not None]
    return len(ids) == 2 and ids[0] != ids[1]


def _pairs(old: Line, new: Line) -> Iterator[tuple[str, Any, Any]]:
    was, now = _verdicts(old), _verdicts(new)
    if was is None and now is None:
        return
    if was is None or now is None:
        yield NO_ROW, was, now
        return
    for name in dict.fromkeys([*was, *now]):
        yield name, was.get(name), now.get(name)


def _verdicts(line: Line) -> dict[str, Any] | None:
    """A line's verdicts; None if it is an error line."""
    rewards = (line.row or {}).get("rewards")
    if not isinstance(rewards, dict):
        return None
    return {name: verdict if isinstance(verdict, dict) else None for name, verdict in rewards.items()}


def _change(was: Any, now: Any) -> str:
    """up, down, scored, unscored or other; "" if score and status are the same."""
    old, new = _score(was), _score(now)
    if old is not None and new is not None and abs(new - old) > TOLERANCE:
        return "up" if new > old else "down"
    if (old is None) != (new is None):
        return "scored" if old is None else "unscored"
    if was is None or now is None:
        return "" if was is now else "other"
    return "" if was.get("status") == now.get("status") else "other"


def _score(verdict: Any) -> float | None:
    score = verdict.get("score") if isinstance(verdict, dict) else None
    return score if isinstance(score, int | float) and not isinstance(score, bool) else None


def run(before: Path, after: Path, limit: int, as_json: bool) -> None:
    """The command: print totals and the first changes, or all changes as JSON."""
    import json

    from core.console import new_console

    changes: list[dict[str, Any]] = []

    def keep(change: dict[str, Any]) -> None:
        if as_json or len(changes) < limit:
            changes.append(change)

    totals = compare(before, after, keep)
    if as_json:
        print(json.dumps({**totals, "changes": changes}, indent=2))
        return
    console = new_console()
    for table in (_totals_table(totals), _changes_table(changes)):
        if table.row_count:
            console.print(table)
    changed = sum(counts["changed"] for counts in totals["rewards"].values())
    words = [f"{totals['lines']} lines, {changed} verdicts changed"]
    if changed > len(changes):
        words.append(f"the first {len(changes)} are shown; --limit shows more, --json all")
    if totals["unmatched"]:
        words.append(
            f"{totals['unmatched']} lines hold different rows and were not compared; score both files from one input"
        )
    console.print("; ".join(words), markup=False, soft_wrap=True)


def _totals_table(totals: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("reward", *_COUNTS)
    for name, counts in totals["rewards"].items():
        table.add_row(escape(printable(name)), *(str(counts[key]) for key in _COUNTS))
    return table


def _changes_table(changes: list[dict[str, Any]]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table("line", "id", "reward", "before", "after", "answer", "why now")
    for change in changes:
        now = change["after"] or {}
        said = (str(now[key]) if now.get(key) is not None else "" for key in ("answer", "why"))
        cells = (
            str(change["line"]),
            "" if change["id"] is None else str(change["id"]),
            change["reward"],
            _shown(change["before"]),
            _shown(change["after"]),
            *said,
        )
        table.add_row(*(escape(printable(cell, 60)) for cell in cells))
    return table


def _shown(verdict: Any) -> str:
    if not isinstance(verdict, dict):
        return "none"
    if "status" not in verdict:
        return "scored"
    score = _score(verdict)
    return str(verdict["status"]) if score is None else f"{score:g} {verdict['status']}"
