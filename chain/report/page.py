"""report.html: one file that shows a chain, and asks for nothing outside itself.

Completions come from a model, so they are untrusted text: everything is escaped, and the page's policy
forbids scripts and requests in case something is not.
"""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from chain.display import duration
from chain.report import charts
from chain.report.data import MODES, ModeScores, Report, StageReport
from core.files import read_jsonl

STYLE = Path(__file__).with_name("report.css")
THUMBNAIL_PX = 256
"""Larger images are shown reduced; smaller ones as they are, every pixel visible."""
CHARTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("Loss", ("loss",), False),
    ("Token accuracy", ("token_accuracy",), False),
    ("Reward", ("reward", "rollout/correct", "rewards/*"), True),
    ("Completion length, tokens", ("completions/mean_length", "completions/max_length"), True),
    (
        "Clipped tokens, share",
        ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"),
        True,
    ),
    ("Entropy, nats per token", ("entropy",), True),
    (
        "Groups sampled for a batch",
        ("rollout/groups_spread", "rollout/groups_solved", "rollout/groups_failed"),
        True,
    ),
    ("Cut completions, share", ("rollout/truncated",), True),
    ("Held-out watch, accuracy", ("watch/held_out_accuracy", "watch/held_out_accuracy_blanked"), True),
    ("Rollout against learner, log-probability", ("parity/max_logprob_difference",), True),
    ("Gradient norm", ("grad_norm",), True),
)
"""Title, metrics (`*` stands for any rest), and whether 0 belongs on the axis; what a stage logs is drawn."""
_DROPPED_FOR_RL = ("Loss",)
"""The policy loss says nothing about progress, and readers take it for one."""


def page(report: Report, run_dir: Path) -> str:
    """The whole page, with the stages' curves and sampled completions from the run's folder."""
    names = [stage.name for stage in report.stages]
    links = "".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in names)
    about = f"<p>{escape(report.about)}</p>" if report.about else ""
    seconds = sum(stage.seconds + (stage.eval_seconds or 0) for stage in report.stages)
    facts = [
        f"seed {report.seed}",
        f"commit {report.commit or 'unknown'}",
        f"{duration(seconds)} in all",
        report.written,
    ]
    body = [
        f"<h1>{escape(report.recipe)}</h1>{about}",
        f'<p class="soft">{escape(" · ".join(facts))}</p><nav>{links}</nav>',
        _table(report),
        _overview(report),
        *(_stage(stage, report, run_dir / stage.name) for stage in report.stages),
        _versions(report),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.recipe)}: report</title><style>{STYLE.read_text()}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )


def _table(report: Report) -> str:
    rows = []
    for stage in report.stages:
        scores = [stage.eval.get(mode) for mode in MODES]
        cells = [f'<a href="#{escape(stage.name)}">{escape(stage.name)}</a>']
        cells += [_accuracy(score, index) for index, score in enumerate(scores)]
        cells.append(" / ".join(f"{score.format_rate:.2f}" if score else "–" for score in scores))
        cells.append(" / ".join(f"{score.mean_tokens:.1f}" if score else "–" for score in scores))
        evaluation = f" + {stage.eval_seconds:.0f}" if stage.eval_seconds is not None else ""
        cells.append(f"{stage.seconds:.0f}<small>{evaluation}</small>")
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ("stage", "thinking accuracy", "direct accuracy", "format rate", "mean tokens", "seconds")
    head = "".join(f"<th>{name}</th>" for name in heads)
    note = (
        "Greedy, on the held-out rows; in brackets the 95% Wilson interval. Format rate and mean tokens: "
        "thinking / direct. Seconds: training, with the data made for it, + evaluation."
    )
    if report.outdated:
        note += f" Not shown, as made from an earlier run of a stage before: {', '.join(report.outdated)}."
    return _grid(head, "".join(rows)) + f'<p class="soft">{escape(note)}</p>'


def _grid(head: str, rows: str) -> str:
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>'


def _accuracy(scores: ModeScores | None, series: int) -> str:
    if scores is None:
        return "–"
    low, high = scores.ci95
    bar = f'<span class="bar s{series}" style="width:{scores.accuracy * 100:.1f}%"></span>'
    return f"{scores.accuracy:.3f} <small>[{low:.3f}, {high:.3f}]</small>{bar}"


def _overview(report: Report) -> str:
    stages = [stage for stage in report.stages if stage.eval]
    if len(stages) < 2:
        return ""
    series = {
        mode: [(found.accuracy, *found.ci95) if (found := stage.eval.get(mode)) else None for stage in stages]
        for mode in MODES
    }
    return charts.intervals("Held-out accuracy along the chain", [stage.name for stage in stages], series)


def _stage(stage: StageReport, report: Report, folder: Path) -> str:
    origin = f"starts from {stage.parent}, " if stage.parent else ""
    steps = f", {stage.train['steps']} steps" if stage.train.get("steps") else ""
    parts = [
        f'<h2 id="{escape(stage.name)}">{escape(stage.name)}</h2>',
        f'<p class="soft">{escape(f"{origin}{duration(stage.seconds)}{steps}")}</p>',
    ]
    parts += [f"<p>{escape(_prepared(name, counts))}</p>" for name, counts in stage.prepare.items()]
    parts += [_alarm(stage.alarms)] if stage.alarms else []
    if stage.name == "soup" and report.soup:
        parts.append(_soup(report.soup.ingredients, report.soup.merged))
    drawn = _charts(read_jsonl(folder / "metrics.jsonl"))
    parts.append(f'<div class="charts">{drawn}</div>' if drawn else "")
    samples = read_jsonl(folder / "samples.jsonl")
    if samples:
        cards = "".join(_card(sample, folder) for sample in samples)
        parts.append(f'<h3>Held-out completions</h3><div class="cards">{cards}</div>')
    return "".join(parts)


def _prepared(name: str, counts: Mapping[str, Any]) -> str:
    dropped = counts.get("dropped", {})
    why = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
    return f"{name}: kept {counts.get('kept')} rows, dropped {sum(dropped.values())}" + (
        f" ({why})" if why else ""
    )


def _alarm(alarms: Sequence[Mapping[str, Any]]) -> str:
    """The first alarm of each name, and how often it was raised."""
    lines = []
    for name, count in Counter(str(alarm["name"]) for alarm in alarms).items():
        first = next(alarm for alarm in alarms if alarm["name"] == name)
        told = f"{name}: raised {count} times, first in batch {first['batch']}: {first['text']}"
        lines.append(f"<li>{escape(told)}</li>")
    return f"<h3>Alarms</h3><ul>{''.join(lines)}</ul>"


def _soup(ingredients: Sequence[Mapping[str, Any]], merged: Mapping[str, Any]) -> str:
    """Ingredients and merge: what was measured on the validation split, then held-out accuracies."""
    rows = [(str(one.get("name")), _flat(one)) for one in ingredients] + [("merged", _flat(merged))]
    keys = list(dict.fromkeys(key for _, item in rows for key in item))
    head = "".join(f"<th>{escape(str(key))}</th>" for key in keys)
    body = "".join(
        f"<tr><td>{escape(name)}</td>"
        + "".join(f"<td>{escape(_plain(item.get(key)))}</td>" for key in keys)
        + "</tr>"
        for name, item in rows
    )
    return _grid(f"<th></th>{head}", body)


def _flat(measured: Mapping[str, Any]) -> dict[str, Any]:
    held_out = {f"held-out, {mode}": scores["accuracy"] for mode, scores in measured["eval"].items()}
    plain = {
        key: value for key, value in measured.items() if key not in ("name", "score") and _is_plain(value)
    }
    return {"validation": measured.get("score"), **held_out, **plain}


def _charts(metrics: Sequence[Mapping[str, Any]]) -> str:
    steps = _steps(metrics)
    is_rl = any("reward" in record for record in metrics)
    figures = []
    for title, patterns, zero in CHARTS:
        if is_rl and title in _DROPPED_FOR_RL:
            continue
        names = [name for pattern in patterns for name in _matching(pattern, metrics)]
        curves = {}
        for name in dict.fromkeys(names):
            found = zip(steps, metrics, strict=True)
            points = [(step, float(record[name])) for step, record in found if _is_number(record.get(name))]
            if len(points) > 1:
                curves[_short(name)] = points
        if curves:
            figures.append(charts.lines(title, curves, zero=zero))
    return "".join(figures)


def _matching(pattern: str, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    if not pattern.endswith("*"):
        return [pattern]
    start = pattern[:-1]
    found = {name for record in metrics for name in record if name.startswith(start)}
    return sorted(name for name in found if not name.endswith("/std"))


def _short(name: str) -> str:
    """`rewards/answer/mean` as `answer`, `clip_ratio/low_mean` as `low`."""
    return name.removesuffix("/mean").removesuffix("_mean").rpartition("/")[2].replace("_", " ")


def _steps(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """The x axis: the logged step, carried on where a new phase begins to count again."""
    steps: list[float] = []
    base = last = 0.0
    for index, record in enumerate(metrics):
        step = float(record.get("step", index))
        if step < last:
            base, last = steps[-1], 0.0
        steps.append(base + step)
        last = step
    return steps


def _card(sample: Mapping[str, Any], folder: Path) -> str:
    chips = "".join(_chip(name, verdict) for name, verdict in (sample.get("verdicts") or {}).items())
    image = _image(folder, sample.get("image"))
    gold = f'<div class="mode">gold <b>{escape(str(sample.get("answer")))}</b></div>'
    text = (
        f'<div class="mode">{escape(str(sample.get("mode")))} · {escape(str(sample.get("id")))}</div>'
        f"<div>{escape(str(sample.get('question')))}</div>{gold}"
    )
    right = " right" if sample.get("correct") else ""
    place = "text" if image else "full"
    completion = escape(str(sample.get("completion")))
    return (
        f'<div class="card{right}">{image}<div class="{place}">{text}</div>'
        f'<div class="full"><pre>{completion}</pre>{chips}</div></div>'
    )


def _chip(name: str, verdict: Mapping[str, Any]) -> str:
    score = verdict.get("score")
    kind = "" if score is None else " good" if score >= 1 else " bad"
    mark = "–" if score is None else "✓" if score >= 1 else "✗" if score <= 0 else charts.number(score)
    words = [str(verdict[key]) for key in ("status", "reason") if verdict.get(key)]
    return f'<span class="chip{kind}">{mark} {escape(name)}: {escape(", ".join(words))}</span>'


def _image(folder: Path, name: str | None) -> str:
    """The picture as a data URL; a name that leads out of the stage's folder is not followed."""
    if not name:
        return ""
    from core.model.pictures import Picture

    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.exists():
        return ""
    picture = Picture(path.read_bytes()).rgb()
    small = max(picture.size) <= THUMBNAIL_PX // 2
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG" if small else "JPEG")
    data, kind = base64.b64encode(buffer.getvalue()).decode(), "png" if small else "jpeg"
    return f'<img{" class=small" if small else ""} alt="" src="data:image/{kind};base64,{data}">'


def _versions(report: Report) -> str:
    words = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f'<h2>Made with</h2><p class="soft">{escape(words)}</p>'


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, str | int | float)


def _plain(value: Any) -> str:
    if value is None:
        return "–"
    return charts.number(value) if _is_number(value) else str(value)
