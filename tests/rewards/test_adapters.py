"""Reward functions of TRL and verl run unchanged, and our rewards run as TRL's."""

import sys
import textwrap

import pytest

from rewards.adapters import as_trl, check_columns
from rewards.answer import AnswerReward
from rewards.example import Example
from rewards.mix import Mixture, RewardError, Term
from rewards.registry import load_reward
from rewards.style.format import ThinkFormat
from rewards.verdict import Status, Verdict

ROW = Example("r", "2 + 2?", "4", "think", source="sums", meta={"level": 3})
OTHER = Example("s", "2 + 3?", "5", "think", source="sums", meta={"hint": "five"})
FOREIGN = """
seen = []

def plain(prompts, completions, **kwargs):
    seen.append(kwargs | {"prompts": prompts, "completions": completions})
    kwargs["log_extra"]("column", [])
    kwargs["log_metric"]("metric", 1.0)
    return [None if g == "5" else 1.0 for g in kwargs["solution"]]

async def later(completions, answer, *, worth=1.0):
    return [worth * (a in c[0]["content"]) for c, a in zip(completions, answer)]

def strings(completions, level, **kwargs):
    return [float(isinstance(c, str) and l == 3) for c, l in zip(completions, level)]

def signed(completions, **kwargs):
    return [-1.0, float("nan")]

def with_ids(completions, completion_ids, **kwargs):
    return [0.0 for _ in completions]

class Counting:
    __name__ = "counting"
    def __init__(self, most=10):
        self.most = most
    def __call__(self, completions, **kwargs):
        return [len(c[0]["content"]) / self.most for c in completions]

def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    assert data_source == "sums" and extra_info["index"] in "rs" and extra_info["question"]
    return {"score": float(ground_truth in solution_str), "acc": True, "pred": solution_str[-2:-1]}

def two_arguments(solution_str, ground_truth, strict=False):
    return int(solution_str == ground_truth) if strict else [0.25, "more"]

async def compute_later(data_source, solution_str, ground_truth, extra_info):
    return 1.0 if extra_info.get("level") == 3 else -1.0

def no_score(data_source, solution_str, ground_truth, extra_info):
    return {"acc": 1.0}

def nothing(x):
    return 0.0
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Loads a reward by adapter, name and params from a module of foreign functions."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "foreign_rewards.py").write_text(textwrap.dedent(FOREIGN))
    yield lambda name, **params: load_reward(name, params, [tmp_path])
    sys.modules.pop("foreign_rewards", None)


def grade(reward, completions=("it is 4", "it is 6"), rows=(ROW, OTHER)):
    graded = Mixture([Term("mine", reward, 1.0)]).grade_batch(completions, rows)
    return [one.verdicts["mine"] for one in graded]


def scores(*args, **kwargs):
    return [verdict.score for verdict in grade(*args, **kwargs)]


def test_trls_own_functions_run_unchanged():
    completions = [r"<think>2 + 2</think> It is \boxed{4}", r"It is \boxed{\frac{10}{4}}"]
    assert scores(load_reward("trl:trl.rewards:accuracy_reward"), completions) == [1, 0]
    assert scores(load_reward("trl:trl.rewards:think_format_reward"), completions) == [1, 0]


def test_a_trl_function_sees_the_row_as_columns(load):
    assert scores(load("trl:foreign_rewards:plain")) == [1, None]
    seen = sys.modules["foreign_rewards"].seen[0]
    assert seen["prompts"][0] == [{"role": "user", "content": "2 + 2?"}]
    assert seen["completions"][1] == [{"role": "assistant", "content": "it is 6"}]
    assert (seen["answer"], seen["solution"], seen["id"]) == (["4", "5"], ["4", "5"], ["r", "s"])
    assert (seen["level"], seen["hint"]) == ([3, None], [None, "five"])


@pytest.mark.parametrize("gold", ["answer", "solution", "ground_truth"])
def test_a_trl_function_gets_the_gold_answer_by_any_of_its_names(load, tmp_path, gold):
    (tmp_path / "golds.py").write_text(
        f"def right(completions, {gold}):\n"
        f"    return [float(c[0]['content'] == g) for c, g in zip(completions, {gold})]\n"
    )
    assert scores(load("trl:golds.py:right"), ("4", "4")) == [1, 0]


def test_a_column_of_meta_is_handed_on_or_refused_with_the_names_there_are(load, tmp_path):
    (tmp_path / "levels.py").write_text(
        "def level(completions, level):\n    return [None if n is None else n / 10 for n in level]\n"
    )
    reward = load("trl:levels.py:level")
    check_columns(reward, "mine", [ROW, OTHER])
    assert scores(reward) == [0.3, None]
    assert scores(reward, ["it is 6"], [OTHER]) == [None]  # a batch whose rows all lack the column
    with pytest.raises(ValueError, match=r"reward 'mine' needs the column 'level', which no row has.*hint"):
        check_columns(reward, "mine", [OTHER])
    (tmp_path / "typo.py").write_text("def levels(completions, levels):\n    return [1.0]\n")
    with pytest.raises(ValueError, match=r"needs the column 'levels', which no row has. did you mean level"):
        check_columns(load("trl:typo.py:levels"), "mine", [ROW])


def test_an_async_trl_function_with_a_parameter(load):
    assert scores(load("trl:foreign_rewards.py:later")) == [1, 0]
    assert scores(load("trl:foreign_rewards:later", worth=0.5)) == [0.5, 0]


def test_plain_text_for_functions_that_want_it(load):
    assert scores(load("trl:foreign_rewards:strings", conversational=False)) == [1, 0]


def test_a_class_takes_its_parameters(load):
    assert scores(load("trl:foreign_rewards:Counting", most=7)) == [1, 1]


def test_scores_outside_zero_and_one_need_a_scale(load):
    with pytest.raises(
        RewardError, match=r"its score -1 is outside \[0, 1\]; give its range with params: {scale"
    ):
        grade(load("trl:foreign_rewards:signed"))
    # -1 on a scale from -3 to 1 is half way; NaN is TRL's None
    assert scores(load("trl:foreign_rewards:signed", scale=[-3, 1])) == [0.5, None]
    with pytest.raises(RewardError, match=r"its score -1 is outside \[0, 2\]; correct scale"):
        grade(load("trl:foreign_rewards:signed", scale=[0, 2]))


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("trl:foreign_rewards:signed", {"scale": [1, 0]}, r"scale=\[1, 0\]"),
        ("trl:foreign_rewards:signed", {"scale": 2}, "scale=2"),
        ("trl:foreign_rewards:later", {"wort": 1}, "unknown parameter 'wort'; did you mean worth"),
        ("trl:foreign_rewards:plain", {"scal": [0, 1]}, "unknown parameter 'scal'; did you mean scale"),
        ("trl:foreign_rewards:Counting", {"least": 1}, "unknown parameter 'least'"),
        ("verl:foreign_rewards:two_arguments", {"strickt": 1}, "did you mean strict"),
        ("trl:foreign_rewards:plane", {}, "did you mean plain"),
        ("trl:foreign_rewards:plain", {"conversational": "no"}, "conversational='no'"),
    ],
)
def test_parameters_are_checked(load, name, params, says):
    with pytest.raises(ValueError, match=says):
        load(name, **params)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("trl:foreign_rewards:with_ids", "needs completion_ids"),
        ("trl:foreign_rewards:nothing", "does not take 'completions'"),
        ("verl:foreign_rewards:nothing", "does not take 'solution_str'"),
        ("foreign_rewards:plain", "write trl: before its name"),
        ("foreign_rewards:compute_score", "write verl: before its name"),
        ("trl:foreign_rewards:seen", "is a list, not a class or function"),
    ],
)
def test_what_cannot_be_called_is_refused_with_the_remedy(load, name, says):
    with pytest.raises(TypeError, match=says):
        load(name)


def test_verls_compute_score_runs_unchanged(load):
    verdicts = grade(load("verl:foreign_rewards.py:compute_score"), ("it is 4.", "it is 6."))
    assert verdicts[0] == Verdict(1.0, Status.CORRECT, "4", "acc True")
    assert (verdicts[1].score, verdicts[1].answer) == (0, "6")


def test_verl_functions_of_fewer_arguments_sequences_and_scales(load):
    assert scores(load("verl:foreign_rewards:two_arguments")) == [0.25, 0.25]
    assert scores(load("verl:foreign_rewards:two_arguments", strict=True), ("4", "4")) == [1, 0]
    assert scores(load("verl:foreign_rewards:compute_later", scale=[-1, 1])) == [1, 0]


def test_a_mapping_without_a_score_names_the_reward(load):
    with pytest.raises(RewardError, match=r"reward 'mine' failed on row 'r'.*without .score.: acc"):
        grade(load("verl:foreign_rewards:no_score"))


def test_nan_is_trls_none_and_an_error_of_verls(load, tmp_path):
    (tmp_path / "nans.py").write_text(
        "def trl(completions): return [float('nan')] * len(completions)\n"
        "def verl(solution_str): return float('nan')\n"
    )
    assert scores(load("trl:nans.py:trl")) == [None, None]
    with pytest.raises(RewardError, match="its score nan is outside"):
        grade(load("verl:nans.py:verl"))


def called_as_trl_does(function, completions, **columns):
    """Call a reward function like trl.GRPOTrainer._calculate_rewards."""
    prompts = [[{"role": "system", "content": "Think."}, {"role": "user", "content": "2 + 2?"}]] * len(
        completions
    )
    chats = [[{"role": "assistant", "content": text}] for text in completions]
    return function(
        prompts=prompts,
        completions=chats,
        completion_ids=[[1, 2]] * len(completions),
        trainer_state=object(),
        log_extra=lambda column, values: None,
        log_metric=lambda name, value: None,
        **columns,
    )


def test_ours_run_as_trl_reward_functions():
    function = as_trl(AnswerReward(), "answer")
    completions = [r"<think>2 + 2</think> \boxed{4}", r"\boxed{4}", r"<think>2 + 2</think> \boxed{5}"]
    assert function.__name__ == "answer"
    assert called_as_trl_does(function, completions, solution=["4"] * 3) == [1, 0, 0]
    modes = ["think", "direct", "direct"]
    assert called_as_trl_does(function, completions, answer=["4"] * 3, mode=modes) == [1, 1, 0]
    assert (
        called_as_trl_does(function, completions, answer=["4"] * 3, verifier=["judge", "math", "math"])[0]
        is None
    )
    assert called_as_trl_does(as_trl(ThinkFormat()), completions, answer=["4"] * 3) == [1, 0, 1]


def test_ours_in_other_forms_see_the_whole_row():
    rows = []

    async def mine(completion, example):
        rows.append(example)
        return None if example.meta.get("skip") else 1.0

    columns = {
        "id": ["a", "b"],
        "answer": ["1", "2"],
        "meta": ['{"skip": true}', {"level": 1}],
        "images": [["x"], []],
    }
    assert called_as_trl_does(as_trl(mine), ["", ""], **columns) == [None, 1]
    first = next(row for row in rows if row.id == "a")
    assert (first.question, first.answer, first.images) == ("2 + 2?", "1", ("x",))


def test_as_trl_says_what_is_missing():
    with pytest.raises(ValueError, match="add a column answer, solution or ground_truth"):
        called_as_trl_does(as_trl(AnswerReward()), ["4"])
    with pytest.raises(ValueError, match="did you mean think"):
        as_trl(AnswerReward(), mode="thinking")
    with pytest.raises(RewardError, match="reward 'mine' failed"):
        called_as_trl_does(as_trl(lambda completion, example: 2.0, "mine"), ["4"], answer=["4"])
