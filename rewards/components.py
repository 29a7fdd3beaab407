"""Metrics of each component of a mixed reward over a batch."""

import math
from collections import Counter
from collections.abc import Sequence

from rewards.mix import Graded
from rewards.verdict import Status

SPREAD = 1e-6
"""A group whose scores differ by less has zero advantages."""


def component_metrics(groups: Sequence[Sequence[Graded]]) -> dict[str, float]:
    """Flat metrics per term over groups of graded completions, one group per prompt.

    | key | |
    |---|---|
    | sampled/<name>/mean, std | over scored completions; std is the population standard deviation |
    | sampled/<name>/zero_variance_groups | share of groups with equal scores, among groups with two or more scores |
    | sampled/<name>/correlation/<other> | Pearson correlation over completions that both terms scored; one per pair |
    | sampled/<name>/status/<status> | number of completions with that status; every status is listed |

    Undefined values (without scores or variance) are left out, so that all values are finite.

    >>> from rewards.verdict import Verdict
    >>> right, wrong = Verdict.correct(), Verdict.wrong()
    >>> metrics = component_metrics([[Graded(1.0, {"answer": right}), Graded(0.0, {"answer": wrong})]])
    >>> metrics["sampled/answer/mean"], metrics["sampled/answer/zero_variance_groups"]
    (0.5, 0.0)
    """
    every = [graded for group in groups for graded in group]
    names = list(dict.fromkeys(name for graded in every for name in graded.verdicts))
    metrics: dict[str, float] = {}
    for place, name in enumerate(names):
        key = f"sampled/{name}"
        scores = _scores(every, name)
        if scores:
            metrics[f"{key}/mean"], metrics[f"{key}/std"] = _mean(scores), _std(scores)
        spreads = [max(own) - min(own) for group in groups if len(own := _scores(group, name)) > 1]
        if spreads:
            metrics[f"{key}/zero_variance_groups"] = _mean([float(spread <= SPREAD) for spread in spreads])
        for other in names[place + 1 :]:
            correlation = _correlation(every, name, other)
            if correlation is not None:
                metrics[f"{key}/correlation/{other}"] = correlation
        counts = Counter(graded.verdicts[name].status for graded in every if name in graded.verdicts)
        metrics |= {f"{key}/status/{status.value}": float(counts[status]) for status in Status}
    return metrics


def _scores(gradeds: Sequence[Graded], name: str) -> list[float]:
    verdicts = (graded.verdicts.get(name) for graded in gradeds)
    return [verdict.score for verdict in verdicts if verdict is not None and verdict.score is not None]


def _correlation(gradeds: Sequence[Graded], first: str, second: str) -> float | None:
    both = [_scores([graded], first) + _scores([graded], second) for graded in gradeds]
    pairs = [scores for scores in both if len(scores) == 2]
    if not pairs:
        return None
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    spread = _std(a) * _std(b)
    if spread <= SPREAD**2:
        return None
    mean_a, mean_b = _mean(a), _mean(b)
    return _mean([(x - mean_a) * (y - mean_b) for x, y in pairs]) / spread


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _std(values: Sequence[float]) -> float:
    mean = _mean(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
