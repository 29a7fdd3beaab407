"""plan's hours: FLOPs at a stated MFU, completion tokens at a stated speed, every assumption named."""

from pathlib import Path

import pytest

from chain.plan import machine
from chain.plan.resources import resources
from chain.plan.text import as_json, plan, text
from chain.recipe import load_recipe

ROOT = Path(__file__).parents[2] / "recipes"


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch):
    monkeypatch.setattr(machine, "_gpus_here", list)


def hours(*overrides: str, recipe: str = "sailvl2_2b"):
    return resources(load_recipe(ROOT / recipe, overrides), Path("nowhere")).hours


def test_rollouts_take_their_tokens_at_the_servers_speed():
    rlvr = hours()["rlvr"]
    # 550 batches of 128 x 16 completions of 4,096 x 0.5 tokens on two GPUs at 2,000 tokens/s.
    assert rlvr.rollout == pytest.approx(550 * 128 * 16 * 2048 / 2000 / 2 / 3600)
    assert rlvr.hours == rlvr.learner + rlvr.rollout
    assert rlvr.gpus == 6  # four learners and two servers
    assert rlvr.gpu_hours == 6 * rlvr.hours


def test_the_learner_takes_its_flops_at_the_stated_mfu():
    once, half = hours()["rlvr"], hours("hardware.mfu=0.2")["rlvr"]
    assert half.learner == pytest.approx(2 * once.learner)
    assert once.learner == pytest.approx(once.flops / 4 / (989e12 * 0.4) / 3600)
    assert hours("rlvr.learner.prefix=stock")["rlvr"].flops > 1.5 * once.flops


def test_overlap_costs_the_longer_part():
    rlvr = hours("rlvr.rollout.overlap=true", "rlvr.rollout.max_staleness=1")["rlvr"]
    assert rlvr.hours == max(rlvr.learner, rlvr.rollout)


def test_servers_that_share_gpus_are_not_counted_twice():
    assert hours(recipe="sailvl2_8b")["rlvr"].gpus == 8


def test_rows_that_exist_are_counted_and_others_are_not_guessed(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "long").mkdir()
    pq.write_table(pa.table({"id": list(range(3000))}), tmp_path / "long" / "a.parquet")
    found = hours(f"data.sets.longcot={tmp_path / 'long'}")
    assert found["longcot_sft"].of == "0.003B tokens"
    assert found["longcot_sft"].flops == pytest.approx(found["basic_sft"].flops * 0.003)
    assert found["basic_sft"].of == "each 1B tokens (a set does not exist yet)"


def test_the_text_and_the_json_name_every_assumption(tmp_path):
    recipe = load_recipe(ROOT / "sailvl2_2b")
    found = resources(recipe, tmp_path)
    shown = text(recipe, plan(recipe, tmp_path, resources=found), tmp_path, found)
    assert "GPU-hours for 1,126,400 completions: learner" in shown
    names = ("row_tokens", "image_share", "completion_share", "tflops", "mfu", "rollout_tokens_per_s")
    assumed = ", ".join(f"{name}={getattr(recipe.hardware, name):g}" for name in names)
    assert f"assumed: hardware {assumed}" in shown
    assert "time of all stages: about" in shown
    told = as_json(recipe, plan(recipe, tmp_path), found)["resources"]["hours"]["rlvr"]
    assert told["gpu_hours"] == pytest.approx(found.hours["rlvr"].gpu_hours)


def test_without_gpus_no_time_is_told(toy):
    assert resources(load_recipe(toy.recipe_dir), toy.root).hours == {}
