"""report.html: one self-contained file that shows a chain, and the content that its scripts show.

Completions come from a model, so they are untrusted text: chain/report/render.py says how the page is kept safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from chain.display import Tail, duration
from chain.report import curves
from chain.report.benches import benches
from chain.report.data import Failure, Report, StageReport, extra_columns, set_names
from chain.report.lineage import lineage
from chain.report.pictures import Thumbnails
from chain.report.questions import questions
from chain.report.render import interactive
from chain.report.sets import sets_of, tables
from core.files import PARTIAL
from rl.watch import ALARMS


def page(report: Report, run_dir: Path, thumbnails: Thumbnails | None = None) -> str:
    """The whole page, with the stages' curves and completions from the run's folder."""
    return interactive(f"{report.recipe}: report", content(report, run_dir, thumbnails or Thumbnails()))


def content(report: Report, run_dir: Path, thumbnails: Thumbnails) -> dict[str, Any]:
    """The content that the page's scripts show, by section. Equal runs give equal content, up to the time in `head`."""
    names = [stage.name for stage in report.stages]
    sets = sets_of(run_dir)
    others = [report.failed.stage] if report.failed else []
    training = list(_training(report, run_dir))
    return {
        "head": _head(report),
        "stages": {
            "sets": set_names(report),
            "extra": extra_columns(report),
            "rows": [_row(stage, report) for stage in report.stages],
            "others": [{"name": one["name"], "state": one["state"]} for one in training if one["state"]],
            "outdated": report.outdated,
        },
        "questions": questions(run_dir, names, [*others, *report.unfinished], sets, thumbnails),
        "benchmarks": benches(report, run_dir),
        "training": training,
        "sets": tables(run_dir, names, sets),
        "lineage": {
            "entries": lineage(run_dir, names),
            "versions": ", ".join(f"{name} {version}" for name, version in report.versions.items()),
        },
    }


def _head(report: Report) -> dict[str, Any]:
    seconds = sum(stage.seconds + (stage.eval_seconds or 0) for stage in report.stages)
    commit = f"commit {report.commit or 'unknown'}"
    failed = report.failed
    return {
        "title": report.recipe,
        "about": report.about,
        "facts": [f"seed {report.seed}", commit, f"{duration(seconds)} in all", report.written],
        "failed": f"{failed.stage} failed: {failed.error.partition(chr(10))[0]}" if failed else "",
    }


def _row(stage: StageReport, report: Report) -> dict[str, Any]:
    """One stage in the page's table."""
    return {
        "name": stage.name,
        "scores": [
            found.model_dump() if (found := stage.eval.get(name)) else None for name in set_names(report)
        ],
        "extra": extra_columns(report, stage),
        "seconds": stage.seconds,
        "eval_seconds": stage.eval_seconds,
        "alarms": len(stage.alarms),
    }


def _training(report: Report, run_dir: Path) -> Iterator[dict[str, Any]]:
    """Every stage with its curves: the finished ones, the one that failed, and those that train now."""
    lines = {stage.name: Tail(run_dir / stage.name / "metrics.jsonl").new() for stage in report.stages}
    partial = [*([report.failed.stage] if report.failed else []), *report.unfinished]
    lines |= {name: Tail(run_dir / f"{name}{PARTIAL}" / "metrics.jsonl").new() for name in partial}
    looks = curves.component_looks(lines.values())
    for stage in report.stages:
        yield _stage(stage, report) | _curves(lines[stage.name], stage.alarms, looks)
    if report.failed:
        yield _failed(report.failed) | _curves(lines[report.failed.stage], report.failed.alarms, looks)
    for name in report.unfinished:
        alarms = Tail(run_dir / f"{name}{PARTIAL}" / ALARMS).new()
        last = lines[name][-1].get("step", len(lines[name]))
        about = f"not finished; the last logged step is {last}"
        yield _entry(name, "not finished", about, alarms) | _curves(lines[name], alarms, looks)


def _curves(
    metrics: Sequence[Mapping[str, Any]], alarms: Sequence[Mapping[str, Any]], looks: Mapping[str, int]
) -> dict[str, Any]:
    return {"groups": curves.groups(metrics, looks), "marks": curves.marks(metrics, alarms)}


def _stage(stage: StageReport, report: Report) -> dict[str, Any]:
    origin = f"starts from {stage.parent}, " if stage.parent else ""
    steps = f", {stage.train['steps']} steps" if stage.train.get("steps") else ""
    soup = report.soup if stage.name == "soup" else None
    tables = [_lengths(stage)] if any(one.truncated_rate is not None for one in stage.eval.values()) else []
    tables += [_soup(soup.ingredients, soup.merged)] if soup else []
    prepared = [_prepared(name, counts) for name, counts in stage.prepare.items()]
    entry = _entry(stage.name, "", f"{origin}{duration(stage.seconds)}{steps}", stage.alarms)
    return {**entry, "notes": prepared, "tables": tables}


def _failed(failure: Failure) -> dict[str, Any]:
    about = f"failed at {failure.at}, after {failure.train.get('steps', 0)} steps"
    return {**_entry(failure.stage, "failed", about, failure.alarms), "error": failure.error}


def _entry(name: str, state: str, about: str, alarms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "name": name,
        "state": state,
        "about": about,
        "error": "",
        "notes": [],
        "tables": [],
        "alarms": _alarms(alarms),
    }


def _prepared(name: str, counts: Mapping[str, Any]) -> str:
    dropped = counts.get("dropped", {})
    why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    told = f"{name}: kept {counts.get('kept')} rows, dropped {sum(dropped.values())}"
    return f"{told} ({why})" if why else told


def _alarms(alarms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Per alarm name: the first alarm, and the number of alarms."""
    lines = []
    for name, count in Counter(str(alarm["name"]) for alarm in alarms).items():
        first = next(alarm for alarm in alarms if alarm["name"] == name)
        times = "once" if count == 1 else f"{count} times"
        lines.append(f"{name}: raised {times}, first in batch {first['batch']}: {first['text']}")
    return lines


def _lengths(stage: StageReport) -> dict[str, Any]:
    """The table of a stage's held-out sets beyond their accuracy."""
    rows = []
    for name, one in stage.eval.items():
        bins = [f"{part['tokens'][0]}–{part['tokens'][1]}: {part['accuracy']:.2f}" for part in one.by_length]
        figures = [one.format_rate, one.truncated_rate, one.tokens_per_correct, one.length_auc]
        rows.append([name, *map(_plain, figures), ", ".join(bins)])
    heads = [
        "set",
        "format",
        "truncated",
        "tokens per right answer",
        "P(right shorter)",
        "accuracy by tokens",
    ]
    return {"title": "Lengths", "heads": heads, "rows": rows}


def _soup(ingredients: Sequence[Mapping[str, Any]], merged: Mapping[str, Any]) -> dict[str, Any]:
    """The table of ingredients and merge: validation scores and distances, then held-out accuracies."""
    rows = [(str(one.get("name")), _flat(one)) for one in ingredients] + [("merged", _flat(merged))]
    keys = list(dict.fromkeys(key for _, item in rows for key in item))
    return {
        "title": "Ingredients and merge",
        "heads": ["", *keys],
        "rows": [[name, *(_plain(item.get(key)) for key in keys)] for name, item in rows],
    }


def _flat(measured: Mapping[str, Any]) -> dict[str, Any]:
    held_out = {f"held-out, {name}": scores["accuracy"] for name, scores in measured["eval"].items()}
    plain = {
        key: value for key, value in measured.items() if key not in ("name", "score") and _is_plain(value)
    }
    return {"validation": measured.get("score"), **held_out, **plain}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _plain(value: Any) -> str:
    """Text of a table's cell: a number with three significant digits."""
    if value is None:
        return "–"
    return f"{value:.3g}" if curves.is_number(value) else str(value)
