"""Data between the stages with a scripted policy: kept and dropped rows, and the reasons."""

import pytest

from core.files import append_jsonl
from core.strict import parse
from corpus.records import load_records, write_records
from rl.config import HardCases, Harvest, PassAtK
from rl.curate import TooFewRows, hard_cases, harvest, pass_at_k
from rl.rollout.messages import Answer, Completion, CoreFacts

from .conftest import record

RIGHT = r"<think>A=3;B=4;3+4=7</think>\boxed{7}"
WRONG = r"<think>A=3;B=4;3+4=8</think>\boxed{8}"
BARE = r"\boxed{7}"
SHAPELESS = "7"


class Script:
    """Answers each prompt with its scripted completions."""

    core = CoreFacts(banned_ids=())

    def __init__(self, *answers, finished=True):
        self.answers, self.finished = answers, finished

    def generate(self, prompts, sampling, on_answer=None):
        return [
            Answer([1], [Completion([1], [0.0], text, self.finished) for text in texts])
            for texts in self.answers
        ]


@pytest.fixture
def sets(tmp_path):
    write_records(tmp_path / "rl.parquet", [record(n, image=n != 3) for n in range(4)])
    return {"rl": tmp_path / "rl.parquet"}


def config(kind, **keys):
    return parse(kind, {"source": {"set": "rl"}, "into": "made", **keys}, "test")


def made(tmp_path):
    return load_records(tmp_path / "made.parquet")


def test_pass_at_k_drops_what_teaches_nothing_and_keeps_the_rate(sets, tmp_path):
    policy = Script([RIGHT, RIGHT], [WRONG, WRONG], [RIGHT, WRONG], [WRONG, RIGHT])
    report = pass_at_k(config(PassAtK, samples=2), policy, sets, tmp_path, seed=0, max_tokens=8)
    assert report == {"kept": 2, "dropped": {"always solved": 1, "never solved": 1}}
    assert [(row["id"], row["meta"]["pass_rate"]) for row in made(tmp_path)] == [
        ("row-2", 0.5),
        ("row-3", 0.5),
    ]


def test_never_solved_prompts_stay_where_no_reasoning_is_needed(tmp_path):
    write_records(tmp_path / "rl.parquet", [record(n, mode="direct") for n in range(2)])
    sets = {"rl": tmp_path / "rl.parquet"}
    policy = Script(["8", "8"], ["7", "7"])
    report = pass_at_k(config(PassAtK, samples=2), policy, sets, tmp_path, seed=0, max_tokens=8)
    assert report == {"kept": 1, "dropped": {"always solved": 1}}
    assert [row["id"] for row in made(tmp_path)] == ["row-0"]


def test_a_filter_that_keeps_too_little_says_what_it_dropped(sets, tmp_path):
    policy = Script(*[[WRONG]] * 4)
    with pytest.raises(TooFewRows, match=r"kept 0 rows, min_rows is 1.*never solved"):
        pass_at_k(config(PassAtK, samples=1), policy, sets, tmp_path, seed=0, max_tokens=8)


def test_harvest_keeps_one_correct_well_formed_chain_per_prompt(sets, tmp_path):
    policy = Script([WRONG, RIGHT], [BARE, SHAPELESS], [WRONG, WRONG], [RIGHT, RIGHT])
    report = harvest(config(Harvest, keep=9, samples=2), policy, sets, tmp_path, seed=0, max_tokens=8)
    assert report == {"kept": 2, "dropped": {"no well-formed completion": 1, "no correct completion": 1}}
    rows = made(tmp_path)
    assert [row["id"] for row in rows] == ["row-0", "row-3"]
    assert all(row["chain"] == "A=3;B=4;3+4=7" and row["response"] == RIGHT for row in rows)


def test_harvest_drops_duplicates_of_picture_question_and_chain(tmp_path):
    rows = [record(1), {**record(1), "id": "again"}, record(2)]
    write_records(tmp_path / "rl.parquet", rows)
    policy = Script([RIGHT], [RIGHT], [RIGHT])
    sets = {"rl": tmp_path / "rl.parquet"}
    report = harvest(config(Harvest, keep=9), policy, sets, tmp_path, seed=0, max_tokens=8)
    assert report == {"kept": 2, "dropped": {"duplicate": 1}}


def test_harvest_takes_no_truncated_chain_and_no_more_than_keep(sets, tmp_path):
    cut = Script(*[[RIGHT]] * 4, finished=False)
    with pytest.raises(TooFewRows):
        harvest(config(Harvest, keep=2), cut, sets, tmp_path, seed=0, max_tokens=8)
    report = harvest(config(Harvest, keep=2), Script(*[[RIGHT]] * 4), sets, tmp_path, seed=0, max_tokens=8)
    assert report == {"kept": 2, "dropped": {"more than keep": 2}}


def test_hard_cases_are_the_last_visits_worst_first(tmp_path):
    log = tmp_path / "record.jsonl"
    visits = [("row-0", 8), ("row-1", 2), ("row-0", 1), ("row-2", 6), ("row-1", 8)]  # row-3 was never drawn
    for name, correct in visits:
        append_jsonl(log, {"id": name, "correct": correct, "of": 8})
    append_jsonl(log, {"id": "row-2", "correct": 0, "of": 0})  # a visit without scored completions
    cfg = parse(HardCases, {"into": "made", "max_pass_rate": 0.8}, "test")
    report = hard_cases(cfg, [record(n) for n in range(4)], log, tmp_path)
    assert report == {"kept": 2, "dropped": {"solved more than 80% of the time": 1, "not visited": 1}}
    assert [(row["id"], row["meta"]["pass_rate"]) for row in made(tmp_path)] == [
        ("row-0", 0.125),
        ("row-2", 0.75),
    ]


def test_where_the_template_opens_the_thought_completions_begin_inside_it(sets, tmp_path):
    policy = Script(*[[RIGHT.removeprefix("<think>"), WRONG.removeprefix("<think>")]] * 4)
    policy.core = CoreFacts(banned_ids=(), thought_open=True)
    report = pass_at_k(config(PassAtK, samples=2), policy, sets, tmp_path, seed=0, max_tokens=8)
    assert report["kept"] == 4
    assert {row["meta"]["pass_rate"] for row in made(tmp_path)} == {0.5}
    harvest(config(Harvest, keep=4, samples=2, min_rows=1), policy, sets, tmp_path, seed=0, max_tokens=8)
    assert {row["chain"] for row in made(tmp_path)} == {"A=3;B=4;3+4=7"}
