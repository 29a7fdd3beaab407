"""Several runs of one recipe: over seeds or over the values of one key, and the table that compares them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from chain.recipe import Recipe, load_recipe
from chain.report import data as report
from core.strict import ConfigError


@dataclass(frozen=True)
class Member:
    """One run of the group."""

    label: str
    """`seed 1`, or `group_size=8`."""
    recipe: Recipe


@dataclass(frozen=True)
class Cell:
    """One stage's accuracies on one set, a value per member."""

    values: tuple[float, ...]
    p: float | None
    """Of the paired test; None if there is nothing to compare."""

    @property
    def mean(self) -> float:
        return fmean(self.values)

    @property
    def spread(self) -> float:
        """Sample standard deviation; 0 for one member."""
        return stdev(self.values) if len(self.values) > 1 else 0.0


def over_seeds(path: Path, overrides: Sequence[str], seeds: str, name: str | None) -> list[Member]:
    """A member per seed of `0,1,2`; their runs are `<name>` and `<name>-seed<N>`. Raises ConfigError."""
    if name is not None:
        raise ConfigError(
            "--name with --seeds: every seed's run has its own name; set name=... by --set instead"
        )
    parts = seeds.split(",")
    if not all(part.isdigit() for part in parts) or len(set(map(int, parts))) < len(parts):
        raise ConfigError(f"--seeds {seeds}: write different whole numbers, such as 0,1,2")
    return [Member(f"seed {int(one)}", load_recipe(path, overrides, int(one))) for one in parts]


def over_key(
    path: Path, overrides: Sequence[str], sweep: str, seed: int | None, name: str | None
) -> list[Member]:
    """A member per value of `key=v1,v2`; their runs are `<name>-<last part of key>-<value>`. Raises ConfigError."""
    key, equals, text = sweep.partition("=")
    values = text.split(",")
    if not equals or not all(values) or len(set(values)) < len(values):
        raise ConfigError(f"--sweep {sweep}: write KEY=V1,V2 with different values")
    base, word = name or load_recipe(path, overrides, seed).name, key.rpartition(".")[2]
    found = []
    for value in values:
        own = f"{base}-{word}-{re.sub(r'[^A-Za-z0-9_.-]+', '_', value)}"
        found.append(Member(f"{word}={value}", load_recipe(path, [*overrides, f"{key}={value}"], seed, own)))
    return found


def compared(members: Sequence[Member], runs_dir: Path, paired_by: str) -> dict[str, dict[str, Cell]]:
    """Stage -> set -> accuracies of the members' finished runs, with the p-value of a paired test.

    paired_by "member": each stage against the stage before it, the members' differences by the paired t-test. Members
    with other seeds have other questions. paired_by "question": the last member against the first on the same
    questions, by McNemar's exact test.
    """
    runs = [report.build(runs_dir / member.recipe.name) for member in members]
    table: dict[str, dict[str, Cell]] = {}
    before: dict[str, Cell] = {}
    for stage in runs[0].stages:
        stages = [one for run in runs for one in run.stages if one.name == stage.name]
        if len(stages) < len(runs):
            continue
        row: dict[str, Cell] = {}
        for name in stage.eval:
            values = tuple(one.eval[name].accuracy for one in stages if name in one.eval)
            if len(values) < len(stages):
                continue
            if paired_by == "question":
                p = _by_question([runs_dir / one.recipe.name / stage.name for one in members], name)
            else:
                p = _by_member(before[name].values, values) if name in before else None
            row[name] = Cell(values, p)
        table[stage.name], before = row, row or before
    return table


def as_json(members: Sequence[Member], table: dict[str, dict[str, Cell]]) -> dict[str, Any]:
    """The table for a file."""
    cells = {
        stage: {
            name: {"values": cell.values, "mean": cell.mean, "spread": cell.spread, "p": cell.p}
            for name, cell in row.items()
        }
        for stage, row in table.items()
    }
    return {"members": {one.label: one.recipe.name for one in members}, "stages": cells}


def _by_member(before: Sequence[float], after: Sequence[float]) -> float | None:
    from scipy.stats import ttest_rel

    changes = {round(new - old, 12) for old, new in zip(before, after, strict=True)}
    if len(before) < 2 or len(changes) == 1:  # without variance there is no t-test
        return None
    return float(ttest_rel(after, before).pvalue)


def _by_question(folders: Sequence[Path], name: str) -> float | None:
    from chain.compare.answers import HELD_OUT, read_all
    from chain.compare.paired import compare

    if len(folders) < 2 or not all((folder / HELD_OUT).exists() for folder in folders):
        return None
    first, last = read_all([folders[0], folders[-1]])
    return next((one.p for one in compare(first, last).sets if one.name == name), None)
