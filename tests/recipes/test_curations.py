"""Every curation in the tree loads, and says where its numbers come from."""

from pathlib import Path

import pytest

from chain.curation.config import load_curation
from chain.curation.plan import plan
from chain.recipe import load_recipe
from chain.yaml_files import check_sources

ROOT = Path(__file__).parents[2]
FILES = [
    file
    for file in sorted((ROOT / "recipes").rglob("*.yaml"))
    if file.name == "curation.yaml" or (file.parent.name == "curation" and file.name != "common.yaml")
]


def test_the_curations_are_found():
    assert len(FILES) == 8


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_curation_resolves_and_plans(file):
    curation = load_curation(file)
    said = plan(curation, 20_000_000)
    assert all(step.op in said for step in curation.steps)
    assert check_sources(file.parent) == []


def test_the_2b_sets_are_made_where_the_recipe_reads_them():
    made = {load_curation(file).output for file in FILES if file.parent.name == "curation"}
    assert made <= set(load_recipe(ROOT / "recipes/sailvl2_2b").data.sets.values())
