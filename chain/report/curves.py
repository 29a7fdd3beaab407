"""Selects, groups and labels the curves of a stage: everything in its metrics.jsonl that is a number."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Points = list[tuple[float, float]]
MAX_POINTS = 300
"""Longer curves are averaged in buckets, which keeps the page small without a visible difference."""
LARGEST = 1e300
"""Larger values, and NaN, leave a gap in their curve."""
MAIN = "Main curves"
CHARTS: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    (MAIN, "Reward", ("reward", "rollout/correct"), True),
    (MAIN, "Reward components, trained on", ("rewards/*/mean",), True),
    (MAIN, "Reward components, sampled", ("sampled/*/mean",), True),
    (MAIN, "Loss", ("loss",), False),
    (MAIN, "Token accuracy", ("mean_token_accuracy",), False),
    (MAIN, "Completion length, tokens", ("completions/mean_length", "completions/max_length"), True),
    (MAIN, "Entropy, nats per token", ("entropy",), True),
    (MAIN, "Public benchmarks, points", ("bench/*",), True),
    (MAIN, "Held-out watch, accuracy", ("watch/held_out_accuracy", "watch/held_out_accuracy_blanked"), True),
    (
        MAIN,
        "Groups sampled for a batch",
        ("rollout/groups_spread", "rollout/groups_solved", "rollout/groups_failed"),
        True,
    ),
    (MAIN, "Cut completions, share", ("rollout/truncated",), True),
    (
        MAIN,
        "Clipped tokens, share",
        ("clip_ratio/region_mean", "clip_ratio/low_mean", "clip_ratio/high_mean"),
        True,
    ),
    (MAIN, "Rollout against learner, log-probability", ("parity/max_logprob_difference",), True),
    (MAIN, "Gradient norm", ("grad_norm",), True),
    ("Rewards", "Spread of components, trained on", ("rewards/*/std",), True),
    ("Rewards", "Spread of components, sampled", ("sampled/*/std",), True),
    ("Rewards", "Groups without spread, share", ("sampled/*/zero_variance_groups",), True),
    (
        "Completions",
        "Length of finished completions, tokens",
        tuple(f"completions/{word}_terminated_length" for word in ("min", "mean", "max")),
        True,
    ),
    (
        "Time",
        "Rollout, seconds",
        tuple(f"rollout/{word}" for word in ("seconds", "generating_seconds", "grading_seconds")),
        True,
    ),
)
"""Group, title, metrics (`*` matches one reward component), and whether the y axis includes 0. Metrics that a stage
does not log are left out; every other metric is a chart of its own."""
GROUPS = {
    "rollout": "Rollout",
    "completions": "Completions",
    "sampling": "Rollout against learner",
    "parity": "Rollout against learner",
    "watch": "Watch and alarms",
    "alarm": "Watch and alarms",
    "sync": "Time",
    "step_time": "Time",
    "rewards": "Rewards",
    "sampled": "Rewards",
    "reward_std": "Rewards",
    "frac_reward_zero_std": "Rewards",
}
"""First part of a metric's name -> group of its chart; the default is "Optimizer and others"."""
OTHERS = "Optimizer and others"
POLICY_LOSS = "Policy loss (does not measure progress)"
"""Title of the loss of RL stages. Readers would take it as a measure of progress among the main curves."""
_NO_CURVES = {"step", "elapsed", "epoch"}
_COMPONENT = re.compile(r"(?:rewards|sampled)/([^/]+)/")


def groups(metrics: Sequence[Mapping[str, Any]], looks: Mapping[str, int]) -> list[dict[str, Any]]:
    """The charts of one stage by group: `{"title", "charts": [{"title", "zero", "series": [...]}]}`.

    A series has `label`, `key` (the metric's name), `look` (number of its colour) and `points`.

    Args:
        metrics: the lines of metrics.jsonl.
        looks: reward component -> number of its colour (`component_looks`).
    """
    steps, used = _steps(metrics), set(_NO_CURVES)
    names = list(dict.fromkeys(key for record in metrics for key in record))
    is_rl = "reward" in names
    found: dict[str, list[dict[str, Any]]] = {MAIN: []}
    for group, title, patterns, zero in [*CHARTS, *_statuses(names), *_others(names)]:
        if is_rl and title == "Loss":
            group, title = OTHERS, POLICY_LOSS
        keys = [key for pattern in patterns for key in _matching(pattern, names) if key not in used]
        used |= set(keys)
        series = [
            {"label": label, "key": key, "look": _look(key, number, looks), "points": points}
            for number, (key, label) in enumerate(_labels(keys).items())
            if (points := _points(key, steps, metrics))
        ]
        if series:
            found.setdefault(group, []).append({"title": title, "zero": zero, "series": series})
    return [{"title": title, "charts": charts} for title, charts in found.items() if charts]


def component_looks(metrics: Iterable[Sequence[Mapping[str, Any]]]) -> dict[str, int]:
    """Reward component -> number of its colour, the same in all charts of a run; of the metrics of all stages."""
    keys = {key for lines in metrics for record in lines for key in record}
    names = sorted({found[1] for key in keys if (found := _COMPONENT.match(key))})
    return {name: number for number, name in enumerate(names)}


def marks(metrics: Sequence[Mapping[str, Any]], alarms: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Places on the x axis: the first step of each phase after the first, and the step of each alarm."""
    steps, found = _steps(metrics), []
    for before, record, step in zip(metrics, metrics[1:], steps[1:], strict=False):
        if record.get("phase") != before.get("phase"):
            found.append({"kind": "phase", "x": step, "label": str(record.get("phase"))})
    # The first update of a rollout batch logs the batch's metrics.
    starts = [
        step
        for step, record in zip(steps, metrics, strict=True)
        if any(key.startswith("rollout/") for key in record)
    ]
    for alarm in alarms:
        batch = alarm.get("batch")
        step = steps[-1] if steps else 0.0
        if isinstance(batch, int) and 0 <= batch < len(starts):
            step = starts[batch]
        label = f"{alarm.get('name')}: {alarm.get('text')}"
        found.append({"kind": "alarm", "x": step, "label": label})
    return found


def is_number(value: Any) -> bool:
    """Whether a value of a metrics line is a number to draw."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST


def _statuses(names: Sequence[str]) -> list[tuple[str, str, tuple[str, ...], bool]]:
    """One chart per reward component: how its verdicts divide over the statuses."""
    starts = dict.fromkeys(key.partition("/status/")[0] for key in names if "/status/" in key)
    return [
        (
            "Verdicts by status",
            f"{start.rpartition('/')[2]}: verdicts, share",
            tuple(key for key in names if key.startswith(f"{start}/status/")),
            True,
        )
        for start in starts
    ]


def _others(names: Sequence[str]) -> list[tuple[str, str, tuple[str, ...], bool]]:
    """One chart per metric, grouped by the first part of its name."""
    return [(GROUPS.get(key.partition("/")[0], OTHERS), key, (key,), False) for key in names]


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    start, star, end = pattern.partition("*")
    if not star:
        return [pattern] if pattern in names else []
    found = {name for name in names if name.startswith(start) and name.endswith(end)}
    return sorted(name for name in found if "/" not in name[len(start) : len(name) - len(end)])


def _look(key: str, number: int, looks: Mapping[str, int]) -> int:
    component = _COMPONENT.match(key)
    return number if component is None or "/status/" in key else looks.get(component[1], number)


def _labels(names: Sequence[str]) -> dict[str, str]:
    """Metric -> legend label: `rewards/answer/mean` becomes `answer`, unless two metrics would have the same label."""
    short = {
        name: re.sub(r"/(mean|std|zero_variance_groups)$|_mean$", "", name)
        .rpartition("/")[2]
        .replace("_", " ")
        for name in names
    }
    counts = Counter(short.values())
    return {name: label if counts[label] == 1 else name for name, label in short.items()}


def _points(key: str, steps: Sequence[float], metrics: Sequence[Mapping[str, Any]]) -> Points:
    """The metric's points, at most MAX_POINTS, y to six significant digits."""
    found = [
        (step, float(record[key]))
        for step, record in zip(steps, metrics, strict=True)
        if is_number(record.get(key))
    ]
    return [(x, float(f"{y:.6g}")) for x, y in _thinned(found)]


def _thinned(points: Points) -> Points:
    size = math.ceil(len(points) / MAX_POINTS)
    if size <= 1:
        return points
    buckets = [points[start : start + size] for start in range(0, len(points), size)]
    return [(bucket[-1][0], math.fsum(y for _, y in bucket) / len(bucket)) for bucket in buckets]


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
