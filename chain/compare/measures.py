"""What an evaluation says of a set beside its accuracy: format, lengths, blind accuracy, pass@k and majority@k."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rl.scores import length_auc

Scores = Mapping[str, Any]
"""The figures of one set, as rl.scores.summary gives them."""


@dataclass(frozen=True)
class Measure:
    """One figure of both evaluations; None if an evaluation does not have it."""

    name: str
    base: float | None
    other: float | None


_PLAIN: dict[str, str] = {
    "format": "format_rate",
    "truncated": "truncated_rate",
    "tokens": "mean_tokens",
    "tokens per right answer": "tokens_per_correct",
    "P(right shorter)": "length_auc",
}


def measures(base: Scores, other: Scores) -> list[Measure]:
    """The figures that at least one of the evaluations of a set has."""
    ours, theirs = _named(base), _named(other)
    found = [Measure(name, ours.get(name), theirs.get(name)) for name in {**ours, **theirs}]
    return [one for one in found if (one.base, one.other) != (None, None)]


def of_samples(samples: Sequence[Mapping[str, Any]]) -> Scores:
    """The figures of a benchmark's samples in bench.json. A sample with a score of 1 is right."""
    rows = [{"correct": one["score"] == 1, "tokens": one["tokens"]} for one in samples]
    tokens, right = sum(row["tokens"] for row in rows), sum(row["correct"] for row in rows)
    return {
        "truncated_rate": sum(one.get("truncated", False) for one in samples) / len(samples),
        "mean_tokens": tokens / len(samples),
        "tokens_per_correct": tokens / right if right else None,
        "length_auc": length_auc(rows),
    }


def _named(scores: Scores) -> dict[str, float | None]:
    """The figures under the names that users see."""
    named = {name: scores.get(key) for name, key in _PLAIN.items()}
    named["blind"] = (scores.get("blind") or {}).get("accuracy")
    for kind in ("pass", "majority"):
        named |= {
            f"{kind}@{k}": share for k, share in (scores.get("drawn") or {}).get(f"{kind}_at", {}).items()
        }
    return named
