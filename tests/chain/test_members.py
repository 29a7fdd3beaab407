"""Runs over seeds or over a key: their names, their table, and that finished members are skipped."""

import json
from dataclasses import replace

import pytest
from scipy.stats import ttest_rel

import chain.run
from chain.cli.main import main
from chain.members import compared, over_key, over_seeds
from core.strict import ConfigError

from .conftest import scores_of


def test_seeds_and_values_make_runs_with_names_of_their_own(toy):
    found = over_seeds(toy.recipe_dir, [], "0,2", None)
    assert [(one.label, one.recipe.name, one.recipe.seed) for one in found] == [
        ("seed 0", "toy", 0),
        ("seed 2", "toy-seed2", 2),
    ]
    swept = over_key(toy.recipe_dir, [], "rlvr.rollout.group_size=2,4", None, None)
    assert [(one.label, one.recipe.name) for one in swept] == [
        ("group_size=2", "toy-group_size-2"),
        ("group_size=4", "toy-group_size-4"),
    ]
    assert [one.recipe.rlvr.rollout.group_size for one in swept] == [2, 4]


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda folder: over_seeds(folder, [], "0,zero", None), "write different whole numbers"),
        (lambda folder: over_seeds(folder, [], "1,01", None), "write different whole numbers"),
        (lambda folder: over_seeds(folder, [], "0,1", "mine"), "--name with --seeds"),
        (lambda folder: over_key(folder, [], "rlvr.batches", None, None), "write KEY=V1,V2"),
        (lambda folder: over_key(folder, [], "rlvr.batchs=1,2", None, None), "did you mean batches"),
    ],
)
def test_wrong_members_are_refused(toy, ask, words):
    with pytest.raises(ConfigError, match=words):
        ask(toy.recipe_dir)


@pytest.fixture
def run_toy(toy, monkeypatch):
    """The command `run` over the toy chain; the accuracy depends on stage and seed."""
    real = chain.run.run

    def substitute(recipe, **options):
        def evaluate(context):
            toy.evaluated.append(f"{recipe.name} {context.stage}")
            gain = 0.02 * recipe.seed**2 if context.stage == "rlvr" else 0.0
            return scores_of({"core": 0.1, "basic_sft": 0.3, "rlvr": 0.6}[context.stage] + gain)

        own = tuple(replace(one, evaluate=evaluate) for one in toy.stages)
        return real(recipe, stages=own, open_pool=toy.open_pool, **options)

    monkeypatch.setattr(chain.run, "run", substitute)
    return lambda *words: main(["run", str(toy.recipe_dir), "--runs-dir", str(toy.root / "runs"), *words])


def test_the_table_has_mean_spread_and_a_paired_test_and_finished_members_are_skipped(toy, run_toy, capsys):
    assert run_toy("--seeds", "0,1") == 0
    assert len(toy.evaluated) == 6
    assert run_toy("--seeds", "0,1,2") == 0
    assert toy.evaluated[6:] == [f"toy-seed2 {name}" for name in ("core", "basic_sft", "rlvr")]
    found = json.loads((toy.root / "runs" / "toy.members.json").read_text())
    cell = found["stages"]["rlvr"]["thinking"]
    assert cell["values"] == pytest.approx([0.6, 0.62, 0.68])
    assert cell["mean"] == pytest.approx(1.9 / 3)
    assert cell["spread"] == pytest.approx(0.0416333)  # of 0.6, 0.62, 0.68
    assert cell["p"] == pytest.approx(ttest_rel([0.6, 0.62, 0.68], [0.3, 0.3, 0.3]).pvalue)
    assert found["stages"]["basic_sft"]["thinking"]["p"] is None  # every seed gains the same
    assert "0.633 ± 0.042 (0.600 0.620 0.680)" in capsys.readouterr().out


def test_a_swept_key_is_compared_by_question(toy, run_toy):
    assert run_toy("--sweep", "rlvr.rollout.group_size=2,4", "--until", "rlvr") == 0
    runs, rows = toy.root / "runs", range(8)
    for value, right in ((2, 1), (4, 7)):
        lines = [
            {"id": str(n), "set": "thinking", "question": "?", "answer": "1", "completion": "1", "tokens": 1}
            | {"source": "s", "kind": "k", "images": 0, "correct": n < right}
            for n in rows
        ]
        folder = runs / f"toy-group_size-{value}" / "rlvr"
        (folder / "held_out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    members = over_key(toy.recipe_dir, [], "rlvr.rollout.group_size=2,4", None, None)
    cell = compared(members, runs, "question")["rlvr"]["thinking"]
    assert cell.p == pytest.approx(2 / 2**6)  # six wins, no loss


def test_several_members_need_one_way_of_seeding(toy, capsys):
    assert main(["run", str(toy.recipe_dir), "--seeds", "0,1", "--seed", "3"]) == 2
    assert "--seed with --seeds" in capsys.readouterr().err
