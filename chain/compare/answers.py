"""The judged answers of one evaluation, read from a stage's folder, a run, `posttrain eval` or `posttrain bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chain.compare.measures import Scores, of_samples
from chain.inputs import is_on_hub
from chain.recipe import STAGE_NAMES
from core.files import read_json, read_jsonl
from core.strict import ConfigError

HELD_OUT, BENCH, SCORES = "held_out.jsonl", "bench.json", "eval.json"
Key = tuple[str, str]
"""Set or benchmark, and id of a question in it."""


@dataclass(frozen=True)
class Answer:
    """One question with its completion."""

    key: Key
    question: str
    gold: str
    completion: str
    score: float
    """In [0, 1]; 1 is right."""
    tokens: int | None
    groups: Mapping[str, str]
    """Property of the question (source, kind, images) -> value."""
    pictures: tuple[Path, ...] = ()
    """Files of the question's pictures, if the evaluation has kept them."""


@dataclass(frozen=True)
class Answers:
    """All answers of one evaluation."""

    label: str
    folder: Path
    rows: Mapping[Key, Answer]
    sets: Mapping[str, str] = field(default_factory=dict)
    """Set -> file or folder of its rows, which hold the pictures."""
    scores: Mapping[str, Scores] = field(default_factory=dict)
    """Set or benchmark -> its figures."""

    @property
    def names(self) -> list[str]:
        """Sets and benchmarks, in order."""
        return list(dict.fromkeys(name for name, _ in self.rows))


def read_all(paths: Sequence[Path]) -> list[Answers]:
    """The answers of each evaluation. Labels are the shortest ends of the paths that differ."""
    folders = [_folder(path) for path in paths]
    return [_read(folder, label) for folder, label in zip(folders, _labels(folders), strict=True)]


def _folder(path: Path) -> Path:
    """The folder with the answers: the path itself, or the last evaluated stage of a run."""
    path = path.parent if path.is_file() else path
    if (path / HELD_OUT).exists() or (path / BENCH).exists():
        return path
    stages = [path / name for name in STAGE_NAMES if (path / name / HELD_OUT).exists()]
    if stages and (path / "recipe.json").exists():
        return stages[-1]
    raise ConfigError(
        f"{path}: no {HELD_OUT} and no {BENCH}; name a stage's folder (runs/demo/rlvr), a run, or a folder that "
        "`posttrain eval` or `posttrain bench` has written"
    )


def _labels(folders: Sequence[Path]) -> list[str]:
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(one[-length:]) for one in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{label} ({place})" for place, label in enumerate(labels, start=1)]


def _read(folder: Path, label: str) -> Answers:
    found: dict[Key, Answer] = {}
    lines = read_jsonl(folder / HELD_OUT)
    evaluated = read_json(folder / SCORES) if (folder / SCORES).exists() else {}
    scores = dict(evaluated.get("scores", {}))
    rows = [_held_out(line, folder / HELD_OUT, number) for number, line in enumerate(lines, start=1)]
    for task, samples in _samples(folder / BENCH).items():
        rows += [_bench(task, sample, folder) for sample in samples]
        scores[task] = of_samples(samples)
    for row in rows:
        if row.key in found:
            raise ConfigError(f"{folder}: question {row.key[1]!r} is twice in set {row.key[0]!r}")
        found[row.key] = row
    sets = {
        name: place if is_on_hub(place) else str((folder / place).resolve())
        for name, place in evaluated.get("sets", {}).items()
    }
    return Answers(label, folder, found, sets, scores)


def _held_out(line: Mapping[str, Any], file: Path, number: int) -> Answer:
    if "set" not in line:
        raise ConfigError(
            f"{file}:{number}: no `set`: an earlier version wrote the file; evaluate the checkpoint again"
        )
    groups = {"source": line["source"], "kind": line["kind"], "images": str(line["images"])}
    return Answer(
        key=(line["set"], line["id"]),
        question=line["question"],
        gold=line["answer"],
        completion=line["completion"],
        score=float(line["correct"]),
        tokens=line["tokens"],
        groups=groups,
    )


def _samples(file: Path) -> dict[str, list[Mapping[str, Any]]]:
    """The samples of each benchmark that has a score."""
    tasks = read_json(file)["tasks"] if file.exists() else {}
    return {name: task["samples"] for name, task in tasks.items() if task.get("samples")}


def _bench(task: str, sample: Mapping[str, Any], folder: Path) -> Answer:
    return Answer(
        key=(task, str(sample["id"])),
        question=sample["prompt"],
        gold=sample["gold"],
        completion=sample["completion"],
        score=float(sample["score"]),
        tokens=sample["tokens"],
        groups={"source": task, "kind": sample.get("kind", ""), "images": str(len(sample["pictures"]))},
        pictures=tuple(folder / name for name in sample["pictures"]),
    )
