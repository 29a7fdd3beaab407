"""Statistics of two evaluations of the same questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean

from chain.compare.answers import Answer, Answers
from chain.compare.measures import Measure, measures
from core.strict import ConfigError

RESAMPLES = 9_999
BINS = 4
"""Number of bins of completion length."""


@dataclass(frozen=True)
class Pair:
    """One question with both answers."""

    base: Answer
    other: Answer

    @property
    def change(self) -> float:
        return self.other.score - self.base.score


@dataclass(frozen=True)
class Figures:
    """The comparison of a set of pairs. Differences are other minus base, as shares."""

    name: str
    n: int
    base: float
    other: float
    wins: int
    """Questions on which the other evaluation scores higher."""
    losses: int
    low: float
    """Ends of the 95% interval of the difference."""
    high: float
    p: float
    """Two-sided p-value of "wins and losses are equally likely"."""

    @property
    def difference(self) -> float:
        return self.other - self.base


@dataclass(frozen=True)
class Comparison:
    """The comparison of two evaluations."""

    base: str
    other: str
    sets: tuple[Figures, ...]
    groups: dict[str, tuple[Figures, ...]]
    """Property (source, kind, images, tokens of base) -> its values."""
    measures: dict[str, list[Measure]]
    """Set -> its figures beside the accuracy, over all questions of each evaluation."""
    pairs: tuple[Pair, ...]
    unpaired: tuple[int, int]
    """Questions that only the base and only the other evaluation has."""

    @property
    def flipped(self) -> list[Pair]:
        """Pairs with different scores."""
        return [pair for pair in self.pairs if pair.change]


def compare(base: Answers, other: Answers) -> Comparison:
    """Pair two evaluations by set and question id.

    Raises ConfigError if they share no question, or if one id stands for two questions.
    """
    keys = [key for key in base.rows if key in other.rows]
    if not keys:
        raise ConfigError(
            f"{base.label} ({', '.join(base.names)}) and {other.label} ({', '.join(other.names)}) share no question"
        )
    pairs = [Pair(base.rows[key], other.rows[key]) for key in keys]
    for pair in pairs:
        if (pair.base.question, pair.base.gold) != (pair.other.question, pair.other.gold):
            name, row = pair.base.key
            raise ConfigError(
                f"set {name!r}, id {row!r}: {base.label} and {other.label} have different questions under this id; "
                "evaluate both on the same data"
            )
    groups = {}
    for key in ("source", "kind", "images"):
        groups[key] = _grouped(pairs, partial(_group, key))
    if len({pair.base.tokens for pair in pairs} - {None}) > 1:
        groups[f"tokens of {base.label}"] = _grouped(
            sorted(pairs, key=lambda pair: pair.base.tokens or 0), _length_bins(pairs)
        )
    return Comparison(
        base.label,
        other.label,
        _grouped(pairs, lambda pair: pair.base.key[0]),
        {key: found for key, found in groups.items() if len(found) > 1},
        {
            name: measures(base.scores.get(name, {}), other.scores.get(name, {}))
            for name in dict.fromkeys(pair.base.key[0] for pair in pairs)
        },
        tuple(pairs),
        (len(base.rows) - len(keys), len(other.rows) - len(keys)),
    )


def figures(name: str, pairs: Sequence[Pair]) -> Figures:
    """Accuracies, bootstrap interval of the difference and McNemar's exact p-value.

    The interval is the percentile interval of 9,999 resamples of the questions, with a fixed seed. The test is the
    exact binomial form of McNemar's (Psychometrika 12, 1947); with scores between 0 and 1 it is the sign test.
    """
    import numpy as np
    from scipy.stats import binomtest

    changes = np.array([pair.change for pair in pairs])
    wins, losses = int((changes > 0).sum()), int((changes < 0).sum())
    low = high = float(changes.mean())
    if wins or losses:
        # A resample of n questions is a multinomial draw of how often each distinct change occurs.
        values, counts = np.unique(changes, return_counts=True)
        drawn = np.random.default_rng(0).multinomial(len(pairs), counts / len(pairs), size=RESAMPLES)
        low, high = map(float, np.quantile(drawn @ values / len(pairs), (0.025, 0.975)))
    return Figures(
        name=name,
        n=len(pairs),
        base=fmean(pair.base.score for pair in pairs),
        other=fmean(pair.other.score for pair in pairs),
        wins=wins,
        losses=losses,
        low=low,
        high=high,
        p=float(binomtest(wins, wins + losses).pvalue) if wins or losses else 1.0,
    )


def _group(key: str, pair: Pair) -> str:
    return pair.base.groups[key]


def _grouped(pairs: Sequence[Pair], group_of: Callable[[Pair], str]) -> tuple[Figures, ...]:
    found: dict[str, list[Pair]] = {}
    for pair in pairs:
        found.setdefault(group_of(pair), []).append(pair)
    return tuple(figures(name, part) for name, part in found.items())


def _length_bins(pairs: Sequence[Pair]) -> Callable[[Pair], str]:
    """The quartile of a pair's completion length in the base evaluation, as text."""
    lengths = sorted(pair.base.tokens for pair in pairs if pair.base.tokens is not None)
    ends = sorted({lengths[len(lengths) * place // BINS - 1] for place in range(1, BINS + 1)})

    def group_of(pair: Pair) -> str:
        if pair.base.tokens is None:
            return "unknown"
        return f"at most {next(end for end in ends if pair.base.tokens <= end)}"

    return group_of
