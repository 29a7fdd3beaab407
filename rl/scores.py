"""The figures of one evaluation set, from its rows as held_out.jsonl keeps them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from core.stats import wilson

Row = Mapping[str, Any]
BINS = 4
"""Number of bins of completion length, each with as many rows as possible."""


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The figures of a set. Raises ValueError without rows.

    | figure | meaning |
    |---|---|
    | accuracy, n, ci95 | share of right greedy completions of n rows, with its 95% Wilson interval |
    | format_rate, truncated_rate | shares of well-formed and of truncated completions |
    | mean_tokens, tokens_per_correct | mean length; tokens of all rows per right row, null if none is right |
    | unscored | rows whose verifier or judge gave no verdict; they count as wrong |
    | by_length | accuracy by completion length, in bins of equal size |
    | length_auc | probability that a right completion is shorter than a wrong one; null if all are right or wrong |
    | blind | accuracy, n and ci95 of the rows with images, their images blanked |
    | drawn | k, mean accuracy, pass_at and majority_at: k -> share |
    """
    n = len(rows)
    if not n:
        raise ValueError("there are no rows to evaluate")
    tokens = [row["tokens"] for row in rows]
    correct = sum(row["correct"] for row in rows)
    found = {
        **_accuracy(rows),
        "format_rate": sum(row["verdicts"]["format"]["score"] == 1 for row in rows) / n,
        "mean_tokens": sum(tokens) / n,
        "truncated_rate": sum(row["truncated"] for row in rows) / n,
        "tokens_per_correct": sum(tokens) / correct if correct else None,
        "unscored": sum(row["verdicts"]["answer"]["score"] is None for row in rows),
        "by_length": by_length(rows),
        "length_auc": length_auc(rows),
    }
    if blind := [row["blind"] for row in rows if row.get("blind")]:
        found["blind"] = _accuracy(blind)
    if drawn := [row["drawn"] for row in rows if row.get("drawn")]:
        found["drawn"] = _drawn(drawn)
    return found


def _accuracy(rows: Sequence[Row]) -> dict[str, Any]:
    n, correct = len(rows), sum(row["correct"] for row in rows)
    return {"accuracy": correct / n, "n": n, "ci95": list(wilson(correct, n))}


def by_length(rows: Sequence[Row], bins: int = BINS) -> list[dict[str, Any]]:
    """Accuracy by completion length: rows sorted by tokens, cut into bins that keep equal lengths together."""
    ordered = sorted(rows, key=lambda row: row["tokens"])
    found: list[dict[str, Any]] = []
    start = 0
    for place in range(1, bins + 1):
        end = max(start, round(place * len(ordered) / bins))
        while 0 < end < len(ordered) and ordered[end]["tokens"] == ordered[end - 1]["tokens"]:
            end += 1
        if part := ordered[start:end]:
            span = [part[0]["tokens"], part[-1]["tokens"]]
            found.append(
                {"tokens": span, "n": len(part), "accuracy": sum(row["correct"] for row in part) / len(part)}
            )
        start = end
    return found


def length_auc(rows: Sequence[Row]) -> float | None:
    """Probability that a random right completion is shorter than a random wrong one; ties count as one half."""
    from scipy.stats import mannwhitneyu

    right = [row["tokens"] for row in rows if row["correct"]]
    wrong = [row["tokens"] for row in rows if not row["correct"]]
    if not right or not wrong:
        return None
    return float(mannwhitneyu(wrong, right).statistic) / (len(right) * len(wrong))


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Probability that one of k completions is right, from `correct` right ones of n. Unbiased.

    Source: Chen et al., Evaluating Large Language Models Trained on Code (arXiv:2107.03374), Eq. 1.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 4), pass_at_k(4, 2, 2) == 5 / 6
    (0.25, 1.0, True)
    """
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_correct(drawn: Sequence[Row]) -> float:
    """Whether the most frequent answer of these completions is right; in a tie, the share of right tied answers.

    Answers are compared as the verifier extracted them, without white space and case. Right answers count as one,
    because the verifier has found them equal to the gold answer. A completion without an answer has no vote.
    """
    votes: Counter[tuple[bool, str]] = Counter()
    for one in drawn:
        answer = one["verdicts"]["answer"]["answer"]
        if one["correct"] or answer:
            votes[bool(one["correct"]), "" if one["correct"] else "".join(answer.split()).casefold()] += 1
    most = [vote for vote, count in votes.items() if count == max(votes.values())]
    return sum(right for right, _ in most) / len(most) if most else 0.0


def _drawn(rows: Sequence[Sequence[Row]]) -> dict[str, Any]:
    """pass@k and majority@k for k = 1, 2, 4, ... up to the number of samples."""
    count = len(rows[0])
    ks = sorted({count, *(2**power for power in range(count.bit_length()) if 2**power <= count)})
    right = [sum(one["correct"] for one in row) for row in rows]
    return {
        "k": count,
        "accuracy": sum(right) / (count * len(rows)),
        "pass_at": {str(k): sum(pass_at_k(count, c, k) for c in right) / len(rows) for k in ks},
        "majority_at": {str(k): sum(majority_correct(row[:k]) for row in rows) / len(rows) for k in ks},
    }
