"""report.html: one self-contained file that shows a chain.

Completions come from a model, so they are untrusted text. The template escapes every value. As a second defence, the
page's content security policy forbids scripts and requests.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chain.display import Tail, duration
from chain.report import charts
from chain.report.curves import curves, is_number
from chain.report.data import Failure, Report, StageReport, extra_columns, published, set_names
from chain.report.pictures import data_url
from chain.report.render import template
from core.files import PARTIAL
from core.model.pictures import Picture
from rl.watch import ALARMS


def page(report: Report, run_dir: Path) -> str:
    """The whole page, with the stages' curves and sampled completions from the run's folder."""
    stages = [_stage(stage, report, run_dir / stage.name) for stage in report.stages]
    if report.failed:
        stages.append(_failed(report.failed, run_dir))
    stages += [_unfinished(name, run_dir) for name in report.unfinished]
    return template("page.html.jinja").render(
        report=report,
        facts=_facts(report),
        stages=stages,
        sets=set_names(report),
        extra=extra_columns(report),
        table=[_row(stage, report) for stage in report.stages],
        overview=_overview(report),
        benches=_benches(report, run_dir),
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
    )


def _facts(report: Report) -> list[str]:
    seconds = sum(stage.seconds + (stage.eval_seconds or 0) for stage in report.stages)
    commit = f"commit {report.commit or 'unknown'}"
    return [f"seed {report.seed}", commit, f"{duration(seconds)} in all", report.written]


def _row(stage: StageReport, report: Report) -> dict[str, Any]:
    """One stage in the page's table."""
    scores = [stage.eval.get(name) for name in set_names(report)]
    return {
        "name": stage.name,
        "scores": scores,
        "extra": extra_columns(report, stage),
        "format": " / ".join(f"{score.format_rate:.2f}" if score else "–" for score in scores),
        "tokens": " / ".join(f"{score.mean_tokens:.1f}" if score else "–" for score in scores),
        "seconds": f"{stage.seconds:.0f}",
        "evaluation": f" + {stage.eval_seconds:.0f}" if stage.eval_seconds is not None else "",
    }


def _benches(report: Report, run_dir: Path) -> dict[str, Any] | None:
    """The table of public benchmarks: stages, then published models. A column's base is its part before a dot."""
    names = list(dict.fromkeys(name for stage in report.stages for name in stage.bench))
    if not names:
        return None
    rows = [(stage.name, stage.bench) for stage in report.stages if stage.bench]
    for model, scores in published(run_dir, report).items():
        own = {name: scores[name.partition(".")[0]] for name in names if name.partition(".")[0] in scores}
        rows += [(f"{model} (published)", own)] if own else []
    cells = [[label, *(f"{own[name]:.1f}" if name in own else "–" for name in names)] for label, own in rows]
    return {"heads": ["points", *names], "rows": cells}


def _overview(report: Report) -> charts.Figure | None:
    """Held-out accuracy from stage to stage."""
    stages = [stage for stage in report.stages if stage.eval]
    if len(stages) < 2:
        return None
    series = {
        name: [(found.accuracy, *found.ci95) if (found := stage.eval.get(name)) else None for stage in stages]
        for name in set_names(report)
    }
    return charts.intervals("Held-out accuracy along the chain", [stage.name for stage in stages], series)


def _stage(stage: StageReport, report: Report, folder: Path) -> dict[str, Any]:
    """The template's values for a finished stage."""
    origin = f"starts from {stage.parent}, " if stage.parent else ""
    steps = f", {stage.train['steps']} steps" if stage.train.get("steps") else ""
    soup = report.soup if stage.name == "soup" else None
    return {
        "name": stage.name,
        "origin": f"{origin}{duration(stage.seconds)}{steps}",
        "prepared": [_prepared(name, counts) for name, counts in stage.prepare.items()],
        "error": "",
        "alarms": _alarms(stage.alarms),
        "soup": _soup(soup.ingredients, soup.merged) if soup else None,
        "figures": _figures(stage),
        "charts": curves(Tail(folder / "metrics.jsonl").new()),
        "cards": [_card(sample, folder) for sample in Tail(folder / "samples.jsonl").new()],
    }


def _failed(failure: Failure, run_dir: Path) -> dict[str, Any]:
    """The template's values for the stage that ended the run."""
    metrics = Tail(run_dir / f"{failure.stage}{PARTIAL}" / "metrics.jsonl").new()
    return {
        "name": failure.stage,
        "origin": f"failed at {failure.at}, after {failure.train.get('steps', 0)} steps",
        "prepared": [],
        "error": failure.error,
        "alarms": _alarms(failure.alarms),
        "soup": None,
        "figures": None,
        "charts": curves(metrics),
        "cards": [],
    }


def _unfinished(name: str, run_dir: Path) -> dict[str, Any]:
    """The template's values for a stage that trains now, or whose run was killed."""
    folder = run_dir / f"{name}{PARTIAL}"
    metrics = Tail(folder / "metrics.jsonl").new()
    return {
        "name": name,
        "origin": f"not finished; the last logged step is {metrics[-1].get('step', len(metrics))}",
        "prepared": [],
        "error": "",
        "alarms": _alarms(Tail(folder / ALARMS).new()),
        "soup": None,
        "figures": None,
        "charts": curves(metrics),
        "cards": [],
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


def _figures(stage: StageReport) -> dict[str, Any] | None:
    """The table of a stage's held-out sets beyond their accuracy."""
    known = {name: one for name, one in stage.eval.items() if one.truncated_rate is not None}
    if not known:
        return None
    rows = []
    for name, one in known.items():
        bins = [f"{part['tokens'][0]}–{part['tokens'][1]}: {part['accuracy']:.2f}" for part in one.by_length]
        per, auc = one.tokens_per_correct, one.length_auc
        rows.append(
            [
                *(name, f"{one.format_rate:.2f}", f"{one.truncated_rate:.2f}"),
                *("–" if per is None else charts.number(per), "–" if auc is None else f"{auc:.2f}"),
                ", ".join(bins),
            ]
        )
    heads = [
        "set",
        "format",
        "truncated",
        "tokens per right answer",
        "P(right shorter)",
        "accuracy by tokens",
    ]
    return {"heads": heads, "rows": rows}


def _soup(ingredients: Sequence[Mapping[str, Any]], merged: Mapping[str, Any]) -> dict[str, Any]:
    """The table of ingredients and merge: validation scores and distances, then held-out accuracies."""
    rows = [(str(one.get("name")), _flat(one)) for one in ingredients] + [("merged", _flat(merged))]
    keys = list(dict.fromkeys(key for _, item in rows for key in item))
    return {
        "heads": ["", *keys],
        "rows": [[name, *(_plain(item.get(key)) for key in keys)] for name, item in rows],
    }


def _flat(measured: Mapping[str, Any]) -> dict[str, Any]:
    held_out = {f"held-out, {name}": scores["accuracy"] for name, scores in measured["eval"].items()}
    plain = {
        key: value for key, value in measured.items() if key not in ("name", "score") and _is_plain(value)
    }
    return {"validation": measured.get("score"), **held_out, **plain}


def _card(sample: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """One held-out completion."""
    return {
        **{key: str(sample.get(key)) for key in ("id", "mode", "question", "answer", "completion")},
        "right": bool(sample.get("correct")),
        "picture": _picture(folder, sample.get("image")),
        "chips": [_chip(name, verdict) for name, verdict in (sample.get("verdicts") or {}).items()],
    }


def _chip(name: str, verdict: Mapping[str, Any]) -> dict[str, str]:
    """One verdict: mark and colour of the score, and the reason."""
    score = verdict.get("score")
    words = ", ".join(str(verdict[key]) for key in ("status", "reason") if verdict.get(key))
    if score is None:
        return {"name": name, "kind": "", "mark": "–", "words": words}
    mark = "✓" if score >= 1 else "✗" if score <= 0 else charts.number(score)
    return {"name": name, "kind": "good" if score >= 1 else "bad", "mark": mark, "words": words}


def _picture(folder: Path, name: str | None) -> dict[str, Any] | None:
    """The picture for a data URL. A path that leaves the stage's folder is ignored."""
    if not name:
        return None
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.exists():
        return None
    return data_url(Picture(path.read_bytes()).rgb())


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return charts.number(value) if is_number(value) else str(value)
