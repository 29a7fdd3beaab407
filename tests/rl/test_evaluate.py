"""Held-out evaluation with a scripted policy: named sets, what counts as right, samples, blanked images."""

import pytest

from core.strict import ConfigError, parse
from corpus.records import write_records
from rewards.answer import GoldError
from rl.eval_config import EvalConfig
from rl.evaluate import evaluate, held_out
from rl.rollout.messages import Answer, Completion, CoreFacts

from .conftest import record

SETS = {"thinking": {"set": "t", "mode": "think"}, "direct": {"set": "d", "mode": "direct"}}


def config(**changes) -> EvalConfig:
    return parse(EvalConfig, {"sets": SETS, "max_completion_tokens": 8, **changes}, "test")


class Policy:
    """Completions from a list, and a record of how they were asked for."""

    core = CoreFacts(banned_ids=())

    def __init__(self, *texts):
        self.texts, self.asked = list(texts), []

    def generate(self, prompts, sampling, on_answer=None):
        self.asked.append((prompts, sampling))
        return [
            Answer([1], [Completion([1] * 5, [0.0] * 5, self.texts.pop(0), True) for _ in range(sampling.n)])
            for _ in prompts
        ]


@pytest.fixture
def sets(tmp_path):
    write_records(tmp_path / "t.parquet", [record(n) for n in range(4)])
    write_records(tmp_path / "d.parquet", [record(n, mode="direct") for n in range(2)])
    return {"t": tmp_path / "t.parquet", "d": tmp_path / "d.parquet"}


def test_each_named_set_is_scored_with_its_interval(sets):
    thinking = [r"<think>3+4=7</think>\boxed{7}", r"<think>x</think>\boxed{8}", r"\boxed{7}", "7"]
    policy = Policy(*thinking, "7", r"<think>7</think>7")
    scores, judged = evaluate(config(), policy, sets)
    assert [sampling.temperature for _, sampling in policy.asked] == [0, 0]
    assert scores["thinking"]["accuracy"] == 0.25
    assert scores["thinking"]["format_rate"] == 0.5
    # Wilson's interval of 1 in 4: (0.0456, 0.6994)
    assert scores["thinking"]["ci95"] == pytest.approx([0.0456, 0.6994], abs=1e-3)
    assert (scores["direct"]["accuracy"], scores["direct"]["n"], scores["direct"]["mean_tokens"]) == (
        0.5,
        2,
        5.0,
    )
    assert scores["direct"]["tokens_per_correct"] == 10.0  # 2 completions of 5 tokens, one is right
    assert [row.correct for row in judged] == [True, False, False, False, True, False]
    line = judged[0].to_dict()
    assert line["verdicts"]["answer"]["answer"] == "7"
    assert {key: line[key] for key in ("set", "kind", "images", "tokens", "truncated")} == {
        "set": "thinking", "kind": record(0)["verifier"], "images": 1, "tokens": 5, "truncated": False,
    }  # fmt: skip


def test_a_set_asks_its_rows_in_its_mode_and_grades_with_its_verifier(sets):
    cfg = config(sets={"other": {"set": "t", "mode": "direct", "verifier": "exact"}})
    rows = held_out(cfg, "other", sets)
    assert {(row["mode"], row["verifier"]) for row in rows} == {("direct", "exact")}
    own = held_out(config(sets={"own": {"set": "t"}}), "own", sets)
    assert {row["mode"] for row in own} == {"think"}


def test_a_set_without_a_mode_holds_rows_of_one_mode(sets, tmp_path):
    write_records(tmp_path / "both.parquet", [record(0), record(1, mode="direct")])
    with pytest.raises(ValueError, match=r"eval\.sets\.mixed: .*several modes .*say mode"):
        held_out(config(sets={"mixed": {"set": "both"}}), "mixed", {"both": tmp_path / "both.parquet"})


def test_a_gold_answer_that_the_verifier_cannot_use_is_refused(sets):
    with pytest.raises(GoldError, match=r"(?s)t\.parquet.*on_bad_gold"):
        held_out(config(sets={"mcq": {"set": "t", "verifier": "choice"}}), "mcq", sets)


def test_the_former_two_slots_are_refused_with_the_remedy():
    with pytest.raises(
        ConfigError, match=r"thinking: unknown key; .*sets: \{thinking: \{set: \.\.\., mode: think"
    ):
        parse(EvalConfig, {"thinking": {"set": "t"}, "max_completion_tokens": 8}, "test")


def test_samples_give_pass_and_majority_at_k(sets):
    cfg = config(sets={"direct": {"set": "d", "mode": "direct", "draws": 4, "temperature": 0.7}})
    policy = Policy("7", "7", *("8", "8", "7", "8"), *("7", "7", "7", "1"))
    scores, judged = evaluate(cfg, policy, sets)
    (_, greedy), (prompts, drawn) = policy.asked
    assert (greedy.n, drawn.n, drawn.temperature, [prompt.seed for prompt in prompts]) == (1, 4, 0.7, [0, 4])
    # 1 of 4 right in the first row, 3 of 4 in the second
    assert scores["direct"]["drawn"] == {
        "k": 4,
        "accuracy": 0.5,
        "pass_at": {"1": 0.5, "2": pytest.approx((0.5 + 1) / 2), "4": 1.0},
        "majority_at": {"1": 0.5, "2": 0.5, "4": 0.5},
    }
    assert [one["correct"] for one in judged[1].to_dict()["drawn"]] == [True, True, True, False]


def test_the_blind_pass_sees_grey_images_and_no_text_rows(tmp_path):
    write_records(tmp_path / "d.parquet", [record(0, mode="direct"), record(1, mode="direct", image=False)])
    policy = Policy("7", "7", "8")
    cfg = config(sets={"direct": {"set": "d", "mode": "direct"}}, blind=True)
    scores, judged = evaluate(cfg, policy, {"d": tmp_path / "d.parquet"})
    (prompt,) = policy.asked[1][0]
    image = prompt.messages[0]["content"][0]["image"].rgb()
    assert image.getextrema() == ((128, 128),) * 3
    assert (scores["direct"]["accuracy"], scores["direct"]["blind"]["accuracy"]) == (1.0, 0.0)
    assert scores["direct"]["blind"]["n"] == 1
    assert ("blind" in judged[0].to_dict(), "blind" in judged[1].to_dict()) == (True, False)
