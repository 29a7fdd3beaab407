"""Every recipe in the tree loads, plans, and says where its numbers come from."""

from pathlib import Path

import pytest

from chain.plan.text import plan
from chain.recipe import load_recipe
from chain.yaml_files import check_sources

ROOT = Path(__file__).parents[2]
RECIPES = sorted(str(file.parent.relative_to(ROOT)) for file in (ROOT / "recipes").rglob("pipeline.yaml"))


def test_the_recipes_are_found():
    assert {"recipes/demo", "recipes/smoke", "recipes/sailvl2_2b"} <= set(RECIPES)


@pytest.mark.parametrize("folder", RECIPES)
def test_every_recipe_resolves_and_plans(folder, tmp_path):
    recipe = load_recipe(ROOT / folder)
    assert plan(recipe, tmp_path)


@pytest.mark.parametrize("folder", RECIPES)
def test_every_number_says_where_it_comes_from(folder):
    assert check_sources(ROOT / folder) == []


def test_the_2b_recipe_has_the_reports_figures():
    recipe = load_recipe(ROOT / "recipes/sailvl2_2b")
    rlvr = recipe.rlvr
    assert rlvr.completions_per_batch == 2048
    assert rlvr.mini_batch == 512
    assert rlvr.updates_per_batch == 8
    assert (rlvr.algorithm.clip_low, rlvr.algorithm.clip_high) == (0.20, 0.28)
    assert rlvr.optim.learning_rate == 1e-6
    assert rlvr.rollout.max_completion_tokens == 4096
    longcot = recipe.longcot_sft
    assert longcot.max_tokens == 20480
    assert (longcot.phases[0].optim.learning_rate, longcot.phases[0].optim.epochs) == (1e-6, 1)
    assert len(recipe.basic_sft.phases) == 4
