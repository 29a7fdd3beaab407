"""The table of public benchmarks: stages by benchmarks, then the published scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chain.report.data import BENCH, Report, published
from core.files import read_json


def benches(report: Report, run_dir: Path) -> dict[str, Any] | None:
    """The table and its notes; None if no stage has been benchmarked.

    A column's base is its part before a dot: `mathvista.thinking` is compared with the published `mathvista`.
    """
    files = {stage.name: run_dir / stage.name / BENCH for stage in report.stages}
    found = {name: read_json(file) for name, file in files.items() if file.exists()}
    columns = list(dict.fromkeys(key for bench in found.values() for key in bench["tasks"]))
    if not columns:
        return None
    rows = [[name, *(_score(bench["tasks"].get(key)) for key in columns)] for name, bench in found.items()]
    for model, scores in published(run_dir, report).items():
        cells = [scores.get(key.partition(".")[0]) for key in columns]
        if any(cell is not None for cell in cells):
            rows.append([f"{model} (published)", *("–" if one is None else f"{one:.1f}" for one in cells)])
    return {"heads": ["points", *columns], "rows": rows, "notes": _notes(found)}


def _score(task: dict[str, Any] | None) -> str:
    if task is None or "score" not in task:
        return "–"
    limit = f" (first {task['limit']:,})" if task.get("limit") else ""
    return f"{task['score']:.1f}{limit}"


def _notes(found: dict[str, Any]) -> list[str]:
    """Harness and judge, and why a benchmark has no score."""
    judges = {(bench.get("judge") or {}).get("model") for bench in found.values()} - {None}
    harness = {f"{one['name']} {one['version']}" for bench in found.values() if (one := bench.get("harness"))}
    notes = [", ".join([*sorted(harness), *(f"judge {name}" for name in sorted(map(str, judges)))])]
    for stage, bench in found.items():
        for name, task in bench["tasks"].items():
            if "failed" in task:
                notes.append(f"{stage}, {name}: no score: {task['failed']}")
    return [note for note in notes if note]
