"""Held-out evaluation with a scripted policy: what counts as right, the interval, the format rate."""

import pytest

from core.strict import parse
from corpus.records import write_records
from rl.config import EvalConfig
from rl.evaluate import evaluate
from rl.rollout.messages import Answer, Completion, CoreFacts

from .conftest import record

CONFIG = parse(
    EvalConfig, {"thinking": {"set": "t"}, "direct": {"set": "d"}, "max_completion_tokens": 8}, "test"
)


class Policy:
    """Greedy answers from a list; refuses to be sampled."""

    def __init__(self, *texts):
        self.texts = list(texts)

    core = CoreFacts(banned_ids=())

    def generate(self, prompts, sampling, on_answer=None):
        assert sampling.temperature == 0
        assert sampling.n == 1
        return [Answer([1], [Completion([1] * 5, [0.0] * 5, self.texts.pop(0), True)]) for _ in prompts]


@pytest.fixture
def sets(tmp_path):
    write_records(tmp_path / "t.parquet", [record(n) for n in range(4)])
    write_records(tmp_path / "d.parquet", [record(n, mode="direct") for n in range(2)])
    return {"t": tmp_path / "t.parquet", "d": tmp_path / "d.parquet"}


def test_both_modes_are_scored_with_intervals(sets):
    thinking = [r"<think>3+4=7</think>\boxed{7}", r"<think>x</think>\boxed{8}", r"\boxed{7}", "7"]
    scores, judged = evaluate(CONFIG, Policy(*thinking, "7", r"<think>7</think>7"), sets)
    assert scores["thinking"]["accuracy"] == 0.25
    assert scores["thinking"]["format_rate"] == 0.5
    # Wilson's interval of 1 in 4: (0.0456, 0.6994)
    assert scores["thinking"]["ci95"] == pytest.approx([0.0456, 0.6994], abs=1e-3)
    assert scores["direct"] | {"ci95": None} == {
        "accuracy": 0.5,
        "n": 2,
        "ci95": None,
        "format_rate": 0.5,
        "mean_tokens": 5.0,
    }
    assert [row.correct for row in judged] == [True, False, False, False, True, False]
    assert judged[0].to_dict()["verdicts"]["answer"]["answer"] == "7"


def test_rows_of_the_other_mode_are_refused(sets):
    with pytest.raises(ValueError, match=r"eval.thinking: set 't' holds 2 rows of another mode"):
        evaluate(CONFIG, Policy(), {**sets, "t": sets["d"]})
