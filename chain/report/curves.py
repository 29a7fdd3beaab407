"""Selects and labels the metrics that the report draws."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from chain.report import charts

CHARTS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("Loss", ("loss",), False),
    ("Token accuracy", ("mean_token_accuracy",), False),
    ("Reward", ("reward", "rollout/correct"), True),
    ("Reward components, trained on", ("rewards/*/mean",), True),
    ("Reward components, sampled", ("sampled/*/mean",), True),
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
"""Title, metrics (`*` matches one component's name), and whether the y axis includes 0. Metrics that a stage does not
log are left out."""
_DROPPED_FOR_RL = ("Loss",)
"""Charts left out for RL stages. The policy loss does not measure progress, but readers would take it as a measure."""


def curves(metrics: Sequence[Mapping[str, Any]]) -> list[charts.Figure]:
    """The charts of one stage, from its metrics.jsonl."""
    steps = _steps(metrics)
    is_rl = any("reward" in record for record in metrics)
    figures = []
    for title, patterns, zero in CHARTS:
        if is_rl and title in _DROPPED_FOR_RL:
            continue
        names = dict.fromkeys(name for pattern in patterns for name in _matching(pattern, metrics))
        series: dict[str, charts.Points] = {}
        for name, label in _labels(list(names)).items():
            found = zip(steps, metrics, strict=True)
            points = [(step, float(record[name])) for step, record in found if is_number(record.get(name))]
            if len(points) > 1:
                series[label] = points
        if series:
            figures.append(charts.lines(title, series, zero=zero))
    return figures


def is_number(value: Any) -> bool:
    """Whether a value of a metrics line is a number to draw."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _matching(pattern: str, metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    start, star, end = pattern.partition("*")
    if not star:
        return [pattern]
    found = {name for record in metrics for name in record if name.startswith(start) and name.endswith(end)}
    return sorted(name for name in found if "/" not in name[len(start) : len(name) - len(end)])


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Metric -> legend label: `rewards/answer/mean` becomes `answer`, unless two metrics would have the same label."""
    short = {
        name: name.removesuffix("/mean").removesuffix("_mean").rpartition("/")[2].replace("_", " ")
        for name in names
    }
    counts = Counter(short.values())
    return {name: label if counts[label] == 1 else name for name, label in short.items()}


def _steps(metrics: Sequence[Mapping[str, Any]]) -> list[float]:
    """Values on the x axis: the logged steps, continued across phases that restart their count."""
    steps: list[float] = []
    base = last = 0.0
    for index, record in enumerate(metrics):
        step = float(record.get("step", index))
        if step < last:
            base, last = steps[-1], 0.0
        steps.append(base + step)
        last = step
    return steps
