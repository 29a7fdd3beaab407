"""The rewards in the docs and in the example package work as shown."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from core.strict import ConfigError, parse
from rewards.example import Example
from rewards.mix import RewardError
from rewards.selftest import self_test
from rl.config import RLConfig
from rl.reward import mixture_of

TESTS = Path(__file__).parents[1]
STAGE = {
    "data": [{"set": "rl"}],
    "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
    "rollout": {"prompts_per_batch": 1, "group_size": 2, "max_completion_tokens": 32},
    "batches": 1,
    "mini_batch": 2,
    "optim": {"learning_rate": 1e-4},
    "parity": {"bound": 1e-3},
}
ROW = Example("r", "How long is it?", "4", "think", meta={"unit": "cm"})
COMPLETIONS = [r"<think>one two three</think> \boxed{4} cm", r"<think>one</think> \boxed{5}"]


@pytest.fixture(autouse=True)
def search_path(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("example_rewards", "my_rewards")]:
        del sys.modules[name]


def mixture(terms, folder):
    return mixture_of(parse(RLConfig, {**STAGE, "rewards": terms}, "recipe").rewards, [folder])


@pytest.mark.parametrize(
    ("folder", "place"), [(TESTS, "example_rewards.{}:{}"), (TESTS / "example_rewards", "{}.py:{}")]
)
def test_a_recipe_uses_the_example_package_by_module_and_by_file(folder, place):
    terms = [
        {"name": "unit", "use": place.format("units", "names_the_unit"), "weight": 0.5},
        {
            "name": "brief",
            "use": place.format("budget", "WordBudget"),
            "weight": 0.25,
            "params": {"words": 2},
        },
        {"name": "novel", "use": place.format("novelty", "Novelty"), "weight": 0.25},
    ]
    graded = mixture(terms, folder).grade_batch(COMPLETIONS, [ROW, ROW])
    scores = [{name: verdict.score for name, verdict in one.verdicts.items()} for one in graded]
    # three words of a budget of two: 2 - 3/2 = 0.5
    assert scores == [{"unit": 1, "brief": 0.5, "novel": 1}, {"unit": 0, "brief": 1, "novel": 1}]
    assert [one.total for one in graded] == [0.875, 0.5]


def test_the_example_packages_parameters_are_checked_when_the_recipe_is_read():
    term = {"name": "brief", "use": "example_rewards.budget:WordBudget", "weight": 1.0}
    with pytest.raises(ValueError, match="unknown parameter 'word'; did you mean words"):
        mixture([{**term, "params": {"word": 2}}], TESTS)
    with pytest.raises(ValueError, match="words=0: a budget"):
        mixture([{**term, "params": {"words": 0}}], TESTS)


def test_the_reward_in_the_docs_is_ten_lines_and_grades(tmp_path):
    page = (TESTS.parent / "docs" / "rewards.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n# (my_rewards\.py)\n(.*?)```", page, re.DOTALL)
    (tmp_path / code[1]).write_text(code[2], encoding="utf-8")
    assert len([line for line in code[2].splitlines() if line.strip()]) <= 10
    import yaml

    recipe = re.search(r"```yaml\n(rewards:.*?my_rewards:Short.*?)```", page, re.DOTALL)
    terms = yaml.safe_load(recipe[1])["rewards"]
    terms[1]["params"] = {"words": 2}
    graded = mixture(terms, tmp_path).grade_batch([*COMPLETIONS, r"<think>one</think> \boxed{4}"], [ROW] * 3)
    # right but too long; short but gated by the wrong answer; both
    assert [one.total for one in graded] == pytest.approx([0.8, 0.0, 1.0])
    assert graded[0].verdicts["short"].reason == "3 words"
    assert graded[1].verdicts["short"].reason == "gated: 'answer' scored 0, not 1"
    assert self_test(mixture(terms, tmp_path), [ROW]) == []


def test_a_folder_of_the_users_that_is_called_like_ours_hides_nothing(tmp_path):
    for name in ("rewards", "core", "rl"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "mine.py").write_text(
        "from rewards import Verdict\nimport core.strict\n"
        "def one(completion, example):\n    return Verdict.correct(core.strict.__name__)\n"
    )
    code = f"""
        from rewards.registry import load_reward
        from rewards.selftest import self_test
        for name in ("mine:one", "mine.py:one"):
            verdict = load_reward(name, None, [{str(tmp_path)!r}])("", None)
            assert verdict.answer == "core.strict", verdict
        import rl.config
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_recipe_says_what_happens_when_a_reward_raises(tmp_path):
    (tmp_path / "failing.py").write_text("def fails(completion, example):\n    raise KeyError('scene')\n")
    term = {"name": "mine", "use": "failing.py:fails", "weight": 1.0}
    with pytest.raises(RewardError, match="reward 'mine' failed on row 'r': KeyError: 'scene'"):
        mixture([term], tmp_path).grade("", ROW)
    graded = mixture([{**term, "on_error": "unscorable"}], tmp_path).grade("", ROW)
    assert (graded.total, graded.verdicts["mine"].reason) == (None, "KeyError: 'scene'")


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ([{"name": "a", "use": "answer", "weight": 1.0, "gate": "b"}], "rewards: .*gate='b' is not a term"),
        (
            [
                {"name": "a", "use": "answer", "weight": 0.9, "graded": ["verifiable"]},
                {"name": "f", "use": "format", "weight": 0.1},
            ],
            "rewards: weights for mode 'think', judged rows, sum to 0.1, not 1: f 0.1",
        ),
        ([{"name": "a", "use": "answer", "weight": 1.0, "on_error": "ignore"}], "on_error"),
        ([{"name": "a", "use": "answer", "weight": 1.0, "graded": ["rule"]}], "graded"),
    ],
)
def test_a_recipe_that_makes_no_mixture_is_refused(terms, says):
    with pytest.raises(ConfigError, match=says):
        parse(RLConfig, {**STAGE, "rewards": terms}, "recipe")
