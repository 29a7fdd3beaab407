"""The demo's thinking judge: gold chains earn full marks, each fault costs its criterion, garbage costs all."""

from random import Random

import pytest

from recipes.demo.scene_judge import SceneJudge
from recipes.demo.scenes import REASONING, ask
from rewards import Example

JUDGE = SceneJudge()


def row(kind="xyz", expr=("C", "+", "A", "-", "B"), scene=None) -> Example:
    scene = scene or {"A": 0, "B": 4, "C": 9, "D": 3}
    return Example("r", "compute", "5", "think", meta={"scene": scene, "kind": kind, "expr": list(expr)})


def judged(thought, box="5", **changes):
    return JUDGE(rf"<think>{thought}</think>\boxed{{{box}}}", row(**changes))


@pytest.mark.parametrize("kind", REASONING)
def test_gold_chains_earn_full_marks(kind):
    rng = Random(0)
    for _ in range(50):
        digits = tuple(rng.randrange(10) for _ in "ABCD")
        question = ask(rng, kind, digits)
        example = row(kind, question.expr, dict(zip("ABCD", digits, strict=True)))
        text = rf"<think>{question.chain}</think>\boxed{{{question.answer}}}"
        assert JUDGE(text, example).score == 1


@pytest.mark.parametrize(
    ("thought", "box", "score", "reason"),
    [
        ("C=9;A=0;B=4;9+0=9;9-4=5", "5", 3, ""),
        ("C=8;A=0;B=4;8+0=8;8-4=4", "4", 2, "factual_grounding: C=8 is not in the picture"),
        ("C=9;A=0;9+0=9;9-4=5", "5", 1, "factual_grounding: B not read; logical_soundness: it uses a cell"),
        ("C=9;A=0;B=4;9+0=9;9-4=6", "6", 2, "logical_soundness: 9-4=6 is wrong"),
        ("C=9;A=0;B=4;9+0=9;8-4=4", "4", 2, "logical_soundness: 8-4=4 is not what comes next: 9-4"),
        ("C=9;A=0;B=4;9+0=9;9-4=5", "6", 2, "answer_consistency: the box does not hold 5"),
        ("C=9;A=0;B=4", "5", 1, "logical_soundness: no step"),
        ("C=9;A=0;B=4;9+0=9;9-4=5;because", "5", 2, "a statement is neither a reading nor a step"),
    ],
)
def test_each_fault_costs_its_criterion(thought, box, score, reason):
    verdict = judged(thought, box)
    assert verdict.score == pytest.approx(score / 3)
    assert reason in verdict.reason


def test_all_or_nothing_gives_no_third():
    text = r"<think>C=9;A=0;B=4</think>\boxed{5}"
    assert SceneJudge(all_or_nothing=True)(text, row()).score == 0


@pytest.mark.parametrize(
    "text", ["", "5", "<think>", r"\boxed{5}", "<think>" + "9+0=9;" * 100_000, "=;" * 100_000]
)
def test_garbage_earns_nothing_and_raises_nothing(text):
    assert JUDGE(text, row()).score == 0


def test_a_row_without_a_scene_is_unscored():
    assert JUDGE(r"<think>A=1</think>\boxed{1}", Example("r", "q", "1", "think")).score is None
