"""Rewards by name: built-in, from a module, from a file; and messages for unknown names."""

import subprocess
import sys
import textwrap

import pytest

from rewards.example import Example
from rewards.registry import REWARDS, UnknownReward, load_reward

ROW = Example("r", "q", "4", "direct")
JUDGE = {"base_url": "http://127.0.0.1:1/v1", "model": "judge"}
PARAMS = dict.fromkeys(("vision_judge", "answer_judge", "judging"), JUDGE)
MINE = '''
from dataclasses import dataclass

@dataclass(frozen=True)
class Short:
    """1 for a completion of at most `chars` characters."""
    chars: int = 3
    def __call__(self, completion, example):
        return len(completion) <= self.chars

def contains(completion, example, *, word="4", case=True):
    return word in completion

def alone(completion):
    return 1.0

def theirs(completion, ground_truth):
    return float(ground_truth in completion)

NUMBER = 3
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder with a module and a file of the user's; the search path is restored afterwards."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "users_rewards.py").write_text(MINE)
    yield tmp_path
    sys.modules.pop("users_rewards", None)


@pytest.mark.parametrize("name", REWARDS)
def test_every_built_in_reward_loads(name):
    assert callable(load_reward(name, PARAMS.get(name)))


def test_a_module_and_a_file_of_the_users(mine):
    module = load_reward("users_rewards:Short", {"chars": 1}, [mine])
    file = load_reward("users_rewards.py:Short", {"chars": 1}, [mine])
    absolute = load_reward(f"{mine}/users_rewards.py:Short")
    assert [reward("ab", ROW) for reward in (module, file, absolute)] == [False, False, True]
    assert type(file) is type(absolute)


def test_a_function_takes_its_parameters_from_the_recipe(mine):
    assert load_reward("users_rewards:contains", None, [mine])("4", ROW) is True
    assert load_reward("users_rewards:contains", {"word": "x"}, [mine])("4", ROW) is False


@pytest.mark.parametrize(
    ("name", "params", "says"),
    [
        ("anser", {}, "unknown reward 'anser'; did you mean answer"),
        ("no_such_module_at_all:X", {}, "no module 'no_such_module_at_all'"),
        ("users_rewards:Shirt", {}, "users_rewards.py has no 'Shirt'; did you mean Short"),
        ("nowhere.py:X", {}, "no such file; looked at"),
        ("answer", {"tolerence": 1}, "unknown parameter 'tolerence'; did you mean tolerance"),
        ("users_rewards:contains", {"words": "x"}, "unknown parameter 'words'; did you mean word"),
        ("users_rewards:contains", {"example": 1}, "unknown parameter 'example'"),
        ("vision_judge", {"model": "judge"}, "missing a required argument: 'base_url'"),
        ("answer", {"tolerance": -1}, "tolerance=-1"),
    ],
)
def test_errors_name_the_nearest_known(mine, name, params, says):
    with pytest.raises(ValueError, match=says):
        load_reward(name, params, [mine])


def test_an_unknown_reward_is_a_lookup_error_too():
    with pytest.raises(LookupError):
        load_reward("anser")
    assert issubclass(UnknownReward, ValueError)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("alone", "too many positional"),
        ("theirs", "'ground_truth', but it gets the row"),
        ("NUMBER", "is a int, not"),
        ("Example", "method __call__|missing"),
    ],
)
def test_objects_that_cannot_grade_are_refused(mine, name, says):
    module = "rewards.example" if name == "Example" else "users_rewards"
    params = {"id": "r", "question": "q", "answer": "a", "mode": "think"} if name == "Example" else None
    with pytest.raises(TypeError, match=says):
        load_reward(f"{module}:{name}", params, [mine])


def test_a_file_that_an_installed_module_hides_is_named(mine):
    (mine / "rewards.py").write_text("def mine(completion, example):\n    return 1.0\n")
    with pytest.raises(UnknownReward, match=r"it hides .*/rewards\.py, so name rewards\.py:mine"):
        load_reward("rewards:mine", None, [mine])
    assert load_reward("rewards.py:mine", None, [mine])("4", ROW) == 1.0


@pytest.mark.parametrize("name", ["needs_more:X", "needs_more.py:X"])
def test_an_import_that_fails_inside_the_users_module_is_named_with_the_module(mine, name):
    (mine / "needs_more.py").write_text("import a_package_that_is_not_there")
    with pytest.raises(
        UnknownReward, match=r"needs_more.* imports 'a_package_that_is_not_there', which is not"
    ):
        load_reward(name, None, [mine])


def test_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(NotADirectoryError, match="no such folder"):
        load_reward("users:X", None, [tmp_path / "typo"])


def test_a_users_folder_comes_last_and_shadows_nothing(tmp_path):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "theirs.py").write_text("def one(completion, example):\n    return 1.0\n")
    code = f"""
        import sys
        from pathlib import Path
        before = list(sys.path)
        from rewards import registry
        from rewards.registry import load_reward
        assert load_reward("theirs:one", None, [{str(tmp_path)!r}])("", None) == 1.0
        root = str(Path(registry.__file__).resolve().parents[1])
        ours = [] if root in before else [root]  # an editable install, which must come before what the user has
        assert sys.path == [*before, *ours, {str(tmp_path)!r}], sys.path
        assert load_reward("answer").__class__.__module__ == "rewards.answer"
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
