"""Figures of a set against plain enumeration."""

from itertools import combinations

import pytest

from rl.scores import by_length, length_auc, majority_correct, pass_at_k


def row(correct: bool, tokens: int = 4, answer: str | None = "a") -> dict:
    return {"correct": correct, "tokens": tokens, "verdicts": {"answer": {"answer": answer}}}


@pytest.mark.parametrize(("n", "correct", "k"), [(5, 2, 3), (6, 0, 2), (6, 6, 1), (7, 1, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, correct, k):
    subsets = list(combinations([True] * correct + [False] * (n - correct), k))
    assert pass_at_k(n, correct, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_the_majority_counts_equal_answers_and_shares_ties():
    right, wrong = row(True, answer="1/2"), row(False, answer="3")
    assert majority_correct([right, row(True, answer="0.5"), wrong]) == 1.0
    assert majority_correct([right, wrong, row(False, answer=" 3 ")]) == 0.0
    assert majority_correct([right, wrong]) == 0.5
    assert majority_correct([row(False, answer=None)] * 3 + [right]) == 1.0
    assert majority_correct([row(False, answer=None)]) == 0.0


def test_bins_of_length_keep_equal_lengths_together():
    rows = [row(n < 4, tokens) for n, tokens in enumerate([1, 1, 1, 2, 5, 6, 7, 8])]
    assert by_length(rows, 4) == [
        {"tokens": [1, 1], "n": 3, "accuracy": 1.0},
        {"tokens": [2, 2], "n": 1, "accuracy": 1.0},
        {"tokens": [5, 6], "n": 2, "accuracy": 0.0},
        {"tokens": [7, 8], "n": 2, "accuracy": 0.0},
    ]


def test_the_length_auc_counts_pairs():
    rows = [row(True, 1), row(True, 5), row(False, 5), row(False, 9)]
    pairs = [1, 1, 0.5, 1]  # (1, 5) (1, 9) (5, 5) (5, 9)
    assert length_auc(rows) == pytest.approx(sum(pairs) / 4)
    assert length_auc(rows[:2]) is None
