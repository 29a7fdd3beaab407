"""The console command starts fast, and its errors are clear messages."""

import json
import os
import subprocess
import sys

import pytest

from chain import run as runner
from chain.cli.main import main, parser
from chain.launch import StageFailed


def posttrain(*arguments: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-P", "-m", "chain.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.fixture
def importable(monkeypatch):
    """Makes our packages importable in a child process with another working directory, installed or not."""
    from chain.ranks import environment

    monkeypatch.setenv("PYTHONPATH", environment(1)["PYTHONPATH"])


LIGHT = """
import sys
from chain.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = {"torch", "transformers", "trl", "vllm", "deepspeed", "wandb", "sympy", "datasets"} & set(sys.modules)
sys.exit(f"imported {heavy}" if heavy else code)
"""


@pytest.mark.parametrize("words", [["--help"], ["plan", "RECIPE"], ["score", "--help"], ["stages"]])
def test_help_and_plan_import_nothing_heavy(toy, importable, words):
    words = [str(toy.recipe_dir) if word == "RECIPE" else word for word in words]
    command = [sys.executable, "-P", "-c", LIGHT, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=toy.root)
    assert (done.returncode, done.stderr) == (0, "")
    assert {"plan": "basic_sft: Basic SFT, from core", "--help": "rollout-server"}.get(
        words[0], ""
    ) in done.stdout


def test_a_wrong_recipe_ends_with_code_2_and_no_traceback(toy, importable):
    done = posttrain("plan", toy.recipe_dir, "--set", "rlvr.rollout.grup_size=4", cwd=toy.root)
    assert done.returncode == 2
    assert "rlvr.rollout.grup_size: unknown key; did you mean group_size" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_failed_stage_ends_with_code_1_and_a_bug_keeps_its_traceback(toy, monkeypatch, capsys):
    def fail(*args, **options):
        raise StageFailed("rlvr: it broke")

    monkeypatch.setattr(runner, "run", fail)
    assert main(["run", str(toy.recipe_dir)]) == 1
    assert capsys.readouterr().err == "posttrain: rlvr: it broke\n"

    def bug(*args, **options):
        raise KeyError("a bug")

    monkeypatch.setattr(runner, "run", bug)
    with pytest.raises(KeyError):
        main(["run", str(toy.recipe_dir)])


def test_an_interrupt_ends_with_code_130(toy, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", interrupted)
    assert main(["run", str(toy.recipe_dir)]) == 130
    assert "finished stages are kept" in capsys.readouterr().err


def test_options_reach_the_runner(toy, monkeypatch):
    calls = []
    monkeypatch.setattr(runner, "run", lambda recipe, **options: calls.append((recipe, options)))
    arguments = ["run", str(toy.recipe_dir), "--from", "sft", "--until", "rlvr", "--seed", "2", "--force"]
    assert main([*arguments, "--set", "rlvr.batches=3", "rlvr.passes=2"]) == 0
    recipe, options = calls[0]
    assert (recipe.name, recipe.seed) == ("toy-seed2", 2)
    assert (recipe.rlvr.batches, recipe.rlvr.passes) == (3, 2)
    assert (options["from_"], options["until"], options["force"]) == ("sft", "rlvr", True)


def test_plan_prints_json_for_programs(toy, capsys):
    assert main(["plan", str(toy.recipe_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "toy"


def test_stages_are_listed_with_their_short_names(capsys):
    assert main(["stages"]) == 0
    listed = capsys.readouterr().out
    assert "think_fusion" in listed
    assert "fusion" in listed


def test_data_is_generated_once(toy, capsys):
    arguments = ["data", "generate", str(toy.recipe_dir), "--runs-dir", str(toy.root / "runs")]
    assert main(arguments) == 0
    assert (toy.run_dir / "data" / "held.parquet").exists()
    assert main(arguments) == 0
    assert toy.calls() == ["data"]
    assert "exists, unchanged — skipped" in capsys.readouterr().out


def test_every_command_explains_itself():
    for action in parser()._subparsers._group_actions[0].choices.values():
        assert action.description
        assert all(argument.help for argument in action._actions)


def test_users_folders_with_our_names_shadow_nothing(tmp_path):
    for name in ("core", "rewards", "rl", "sft", "recipes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('a stranger')")
    (tmp_path / "mine.py").write_text("def one(completion, example):\n    return 1.0\n")
    (tmp_path / "rows.jsonl").write_text('{"completion": "4", "gold": "4"}\n')
    # Without PYTHONPATH: an editable install is searched only after sys.path, which has the working directory.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    score = ["score", "--rewards", "answer,mine:one", "--input", "rows.jsonl", "--output", "scored.jsonl"]
    command = [sys.executable, "-P", "-m", "chain.cli.main", *score]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert '"mine:one": {"score": 1.0' in (tmp_path / "scored.jsonl").read_text()


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback_of_a_clear_error(toy, monkeypatch, place):
    def fail(*args, **options):
        raise StageFailed("rlvr: it broke")

    monkeypatch.setattr(runner, "run", fail)
    words = ["run", str(toy.recipe_dir)]
    with pytest.raises(StageFailed):
        main(["--debug", *words] if place == "before" else [*words, "--debug"])


def test_plan_ends_with_code_2_for_missing_inputs_unless_allowed(toy, capsys):
    words = ["plan", str(toy.recipe_dir), "--set", "data.sets.more=nowhere.parquet"]
    assert main(words) == 0  # no stage reads it
    words.append("sft.phases.0.data.0.set=more")
    assert main(words) == 2
    assert "data.sets.more = 'nowhere.parquet': there is no such file or folder" in capsys.readouterr().err
    assert main([*words, "--allow-missing"]) == 0


def test_plan_refuses_a_reward_that_does_not_load_by_the_code_of_run(toy, capsys):
    words = [
        str(toy.recipe_dir),
        "--set",
        "rlvr.rewards.0.use=answer",
        "rlvr.rewards.0.params={tolerence: 1}",
    ]
    told = []
    for command in ("plan", "run"):
        assert main([command, *words]) == 2
        told.append(capsys.readouterr().err)
    assert told[0] == told[1]
    assert "rlvr.rewards[0].use = 'answer'" in told[0]
    assert "tolerance" in told[0]
