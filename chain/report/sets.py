"""The data sets of a run: what they hold, which stages read them, what was dropped, how a curation made them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chain.inputs import locate_sets
from chain.recipe import Recipe
from core.files import read_json
from core.manifest import Manifest
from core.strict import ConfigError, parse

COUNTED = 100_000
"""Rows of a set whose modes, verifiers and sources are counted."""
_COLUMNS = ("mode", "verifier", "source")
_TOP = 4
"""Values of a column that are named; the others are counted together."""
Grid = dict[str, Any]


@dataclass(frozen=True)
class Sets:
    """The sets of a run's recipe."""

    places: Mapping[str, str]
    """Set -> Parquet file, folder or hub id."""
    held_out: Mapping[str, str]
    """Evaluation set -> the set that it reads."""

    def place(self, evaluation: str) -> str | None:
        """The place of an evaluation set's rows."""
        return self.places.get(self.held_out.get(evaluation, ""))


def sets_of(run_dir: Path) -> Sets:
    """The sets of the run; none if an earlier version wrote the recipe."""
    try:
        recipe = parse(Recipe, read_json(run_dir / "recipe.json"), str(run_dir / "recipe.json"))
    except ConfigError:
        return Sets({}, {})
    held_out = {name: one.set for name, one in recipe.eval.sets.items()} if recipe.eval else {}
    return Sets(locate_sets(recipe, run_dir.resolve()), held_out)


def tables(run_dir: Path, stages: Sequence[str], sets: Sets) -> list[Grid]:
    """The tables of the page's data section, `{"title", "heads", "rows"}`; tables without rows are left out.

    Args:
        run_dir: the run's folder.
        stages: finished stages, in order.
        sets: of the run's recipe.
    """
    readers = _readers(run_dir, stages, sets)
    known = {name: place for name, place in sets.places.items() if name in readers}
    found = [
        {
            "title": "Sets",
            "heads": ["set", "read by", "rows", "size", *(f"{name}s" for name in _COLUMNS), "hash"],
            "rows": [
                [name, ", ".join(readers[name]["by"]), *_facts(place), readers[name]["hash"]]
                for name, place in known.items()
            ],
        },
        {
            "title": "Made by a stage's own policy",
            "heads": ["stage", "step", "kept", "dropped"],
            "rows": [row for stage in stages for row in _prepared(run_dir, stage)],
        },
        {
            "title": "Trained rows and their packing",
            "heads": ["stage, phase", "rows", "dropped", "updates", "fill", "imbalance"],
            "rows": [row for stage in stages for row in _packed(run_dir, stage)],
        },
        *(_curation(name, place) for name, place in known.items()),
    ]
    return [table for table in found if table["rows"]]


def _readers(run_dir: Path, stages: Sequence[str], sets: Sets) -> dict[str, dict[str, Any]]:
    """Set -> the stages that read it, and the start of its hash."""
    found: dict[str, dict[str, Any]] = {}
    for stage in stages:
        for folder in (run_dir / "prepared" / stage, run_dir / stage):
            manifest = Manifest.read(folder)
            for name, digest in (manifest.inputs if manifest else {}).items():
                if name.startswith("set:"):
                    one = found.setdefault(name.removeprefix("set:"), {"by": [], "hash": digest[:12]})
                    one["by"] += [] if stage in one["by"] else [stage]
    for name in sets.held_out.values():
        found.setdefault(name, {"by": [], "hash": "–"})["by"].append("evaluation")
    return found


def _facts(place: str) -> list[str]:
    """Rows, size and shares of a local set. A set that is not on this machine has none of them."""
    path = Path(place)
    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path] if path.is_file() else []
    if not files:
        return ["–"] * (2 + len(_COLUMNS))
    size = sum(file.stat().st_size for file in files) / 1e6
    try:
        rows, counts = _counts(files)
    except (OSError, ValueError) as error:  # a report must not end the run that it is about
        return ["unreadable", f"{size:,.1f} MB", str(error), *["–"] * (len(_COLUMNS) - 1)]
    return [f"{rows:,}", f"{size:,.1f} MB", *(_shares(counts[name]) for name in _COLUMNS)]


def _counts(files: Sequence[Path]) -> tuple[int, dict[str, Counter[str]]]:
    """The number of rows, and how often each value of each column occurs in the first COUNTED of them."""
    import pyarrow.parquet as pq

    counts: dict[str, Counter[str]] = {name: Counter() for name in _COLUMNS}
    rows = counted = 0
    for file in files:
        parquet = pq.ParquetFile(file)
        rows += parquet.metadata.num_rows
        columns = [name for name in _COLUMNS if name in parquet.schema_arrow.names]
        batches = parquet.iter_batches(batch_size=COUNTED, columns=columns) if counted < COUNTED else ()
        for batch in batches:
            counted += batch.num_rows
            for name in columns:
                counts[name].update(str(value) for value in batch[name].to_pylist())
            if counted >= COUNTED:
                break
    return rows, counts


def _shares(counts: Counter[str]) -> str:
    total = sum(counts.values())
    named = counts.most_common(_TOP)
    if len(counts) == 1:
        return named[0][0] or "–"
    told = [f"{name or '(none)'} {count / total:.0%}" for name, count in named]
    rest = len(counts) - len(named)
    return ", ".join([*told, f"{rest} more"] if rest else told) or "–"


def _prepared(run_dir: Path, stage: str) -> Iterator[list[str]]:
    file = run_dir / stage / "prepare.json"
    for name, counts in (read_json(file) if file.exists() else {}).items():
        dropped = counts.get("dropped", {})
        yield [stage, name, f"{counts.get('kept')}", _reasons(dropped)]


def _packed(run_dir: Path, stage: str) -> Iterator[list[str]]:
    file = run_dir / stage / "data.json"
    for phase, counts in (read_json(file) if file.exists() else {}).items():
        packing = counts.get("packing") or {}
        figures = [packing.get(name) for name in ("updates", "fill", "imbalance")]
        yield [
            f"{stage}, {phase}",
            f"{counts.get('rows')}",
            _reasons(counts.get("dropped") or {}),
            *("–" if one is None else f"{one:.4g}" for one in figures),
        ]


def _curation(name: str, place: str) -> Grid:
    """The steps of the curation that wrote the set, if there was one."""
    folder = Path(place) if Path(place).is_dir() else Path(place).parent
    file = folder / "steps.json"
    steps = read_json(file)["steps"] if file.exists() else []
    rows = [
        [one["op"], f"{one['rows']:,}", f"{one['kept']:,}", f"{one['changed']:,}", _reasons(one["reasons"])]
        for one in steps
    ]
    return {
        "title": f"Curation of {name}",
        "heads": ["step", "rows in", "rows out", "changed", "dropped"],
        "rows": rows,
    }


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in dropped.items()) or "none"
