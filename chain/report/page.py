"""report.html: one self-contained file that shows a chain.

Completions come from a model, so they are untrusted text. The template escapes every value. As a second defence, the
page's content security policy forbids scripts and requests.
"""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chain.display import Tail, duration
from chain.report import charts
from chain.report.curves import curves, is_number
from chain.report.data import MODES, Failure, Report, StageReport
from core.files import PARTIAL
from core.model.pictures import Picture

THUMBNAIL_PX = 256
"""Larger images are reduced to this size. Smaller images keep their size, with every pixel visible."""


def page(report: Report, run_dir: Path) -> str:
    """The whole page, with the stages' curves and sampled completions from the run's folder."""
    stages = [_stage(stage, report, run_dir / stage.name) for stage in report.stages]
    if report.failed:
        stages.append(_failed(report.failed, run_dir))
    return rendered(
        "page.html.jinja",
        report=report,
        facts=_facts(report),
        stages=stages,
        table=[_row(stage) for stage in report.stages],
        overview=_overview(report),
        versions=", ".join(f"{name} {version}" for name, version in report.versions.items()),
    )


def rendered(template: str, **values: Any) -> str:
    """A template of this folder with its values, every one of them escaped."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**values)


def _facts(report: Report) -> list[str]:
    seconds = sum(stage.seconds + (stage.eval_seconds or 0) for stage in report.stages)
    commit = f"commit {report.commit or 'unknown'}"
    return [f"seed {report.seed}", commit, f"{duration(seconds)} in all", report.written]


def _row(stage: StageReport) -> dict[str, Any]:
    """One stage in the page's table."""
    scores = [stage.eval.get(mode) for mode in MODES]
    return {
        "name": stage.name,
        "scores": scores,
        "format": " / ".join(f"{score.format_rate:.2f}" if score else "–" for score in scores),
        "tokens": " / ".join(f"{score.mean_tokens:.1f}" if score else "–" for score in scores),
        "seconds": f"{stage.seconds:.0f}",
        "evaluation": f" + {stage.eval_seconds:.0f}" if stage.eval_seconds is not None else "",
    }


def _overview(report: Report) -> charts.Figure | None:
    """Held-out accuracy from stage to stage."""
    stages = [stage for stage in report.stages if stage.eval]
    if len(stages) < 2:
        return None
    series = {
        mode: [(found.accuracy, *found.ci95) if (found := stage.eval.get(mode)) else None for stage in stages]
        for mode in MODES
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


def _soup(ingredients: Sequence[Mapping[str, Any]], merged: Mapping[str, Any]) -> dict[str, Any]:
    """The table of ingredients and merge: validation scores and distances, then held-out accuracies."""
    rows = [(str(one.get("name")), _flat(one)) for one in ingredients] + [("merged", _flat(merged))]
    keys = list(dict.fromkeys(key for _, item in rows for key in item))
    return {
        "heads": ["", *keys],
        "rows": [[name, *(_plain(item.get(key)) for key in keys)] for name, item in rows],
    }


def _flat(measured: Mapping[str, Any]) -> dict[str, Any]:
    held_out = {f"held-out, {mode}": scores["accuracy"] for mode, scores in measured["eval"].items()}
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
    return thumbnail(Picture(path.read_bytes()))


def thumbnail(picture: Picture) -> dict[str, Any]:
    """A picture for a data URL: kind, whether it is small, and base64. Raises ValueError or OSError if it is broken."""
    shown = picture.rgb()
    small = max(shown.size) <= THUMBNAIL_PX // 2
    shown.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    shown.save(buffer, format="PNG" if small else "JPEG")
    kind = "png" if small else "jpeg"
    return {"kind": kind, "small": small, "data": base64.b64encode(buffer.getvalue()).decode()}


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return charts.number(value) if is_number(value) else str(value)
