"""The public interface: its names, their types, and a user's modules of our names beside it."""

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sailvl2_posttrain
from chain.cli.main import main
from sailvl2_posttrain.names import PACKAGES, ROOT

SCRIPT = """
import core, rl  # the user's own
from sailvl2_posttrain import Example, Verdict, load_reward, register
import rewards
assert core.MINE == rl.MINE == 1
assert not hasattr(rewards, "MINE")
from rewards.isolation import load_limited

class Mine:
    def __call__(self, completion, example):
        return Verdict.correct()

row = Example("a", "What is 2 + 2?", "4", "direct", "number")
assert Mine()("4", row).score == 1
hard = Example("b", "Expand.", "2^{x+1}+1", "direct", "math")
assert load_reward("answer")("1+2*2^x", hard).score == 1  # compared in a process of its own
isolated = load_limited("my_reward:four", {}, ["."])
print([verdict.score for verdict in isolated.batch(["4", "5"], [row, row])], Verdict.__module__)
isolated.close()
import importlib
importlib.invalidate_caches()  # as pytest and pip do
"""
REWARD = """
from sailvl2_posttrain import Verdict

def four(completion, example):
    return Verdict.correct() if completion == "4" else Verdict.wrong(reason="not four")
"""


def in_folder(folder: Path, script: str, *options: str) -> subprocess.CompletedProcess:
    """Run a script as a user would, with the user's own `core.py`, `rl.py` and `rewards.py` beside it."""
    for name in PACKAGES:
        (folder / f"{name}.py").write_text("MINE = 1\n")
    (folder / "my_reward.py").write_text(REWARD)
    (folder / "script.py").write_text(script)
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    return subprocess.run(
        [sys.executable, *options, "script.py"], cwd=folder, env=env, capture_output=True, text=True
    )


def test_modules_of_our_names_beside_a_script_do_no_harm(tmp_path):
    done = in_folder(tmp_path, SCRIPT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[1.0, 0.0] rewards.verdict\n"


def test_children_of_a_script_keep_their_own_path(tmp_path):
    """`run` starts `chain.worker`; a generator that does not exist is refused there, by our code and in one line."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pipeline.yaml").write_text(
        "core: {build: 'rewards.verdict:Verdict'}\ntracking: []\nname: mine\n"
    )
    script = (
        "from sailvl2_posttrain import load_recipe, run\n"
        "try:\n    run(load_recipe('mine'))\n"
        "except Exception as error:\n    print(str(error).splitlines()[0])\n"
    )
    done = in_folder(tmp_path, script)
    assert "core: TypeError" in done.stdout, done.stdout + done.stderr


def test_importing_the_interface_is_cheap(tmp_path):
    script = "import sys, sailvl2_posttrain\nprint(sorted({'torch', 'pydantic', 'core', 'chain'} & {*sys.modules}))"
    assert in_folder(tmp_path, script).stdout == "[]\n"


@pytest.mark.parametrize("name", sailvl2_posttrain.__all__)
def test_every_public_name_exists_and_is_the_one_that_type_checkers_see(name):
    tree = ast.parse(Path(sailvl2_posttrain.__file__).read_text())
    seen = {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert getattr(sailvl2_posttrain, name).__doc__
    assert seen[name] == sailvl2_posttrain._HOMES[name]


def test_an_unknown_name_is_refused_with_the_known_names():
    with pytest.raises(AttributeError, match=r"no attribute 'verdict'; it has .*Verdict"):
        _ = sailvl2_posttrain.verdict


def test_all_packages_are_installed_and_typed():
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(PACKAGES) < {name.rstrip("*") for name in setuptools["packages"]["find"]["include"]}
    assert setuptools["package-data"]["*"] == ["py.typed"]
    assert [
        name for name in (*PACKAGES, "sailvl2_posttrain") if not (ROOT / name / "py.typed").exists()
    ] == []


GENERATOR = """
from sailvl2_posttrain import write_records
from my_shapes import COLOUR

def make(out, *, seed, rows):
    write_records(out / "mine.parquet", (
        {"id": str(n), "question": f"{COLOUR}?", "answer": str(n), "mode": "direct", "verifier": "number"}
        for n in range(rows)
    ))
"""


def test_a_generator_in_the_recipes_folder_runs_from_anywhere(tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "my_data.py").write_text(GENERATOR)
    (mine / "my_shapes.py").write_text("COLOUR = 'red'\n")
    (mine / "pipeline.yaml").write_text(
        "core: {path: core}\ndata: {generate: {by: 'my_data:make', sets: [mine], params: {rows: 3}}}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["data", "generate", "mine"]) == 0
    records = sailvl2_posttrain.load_records("runs/mine/data/mine.parquet")
    assert [row["question"] for row in records] == ["red?"] * 3
