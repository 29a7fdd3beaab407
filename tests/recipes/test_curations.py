"""Every curation in the tree loads, and says where its numbers come from."""

import re
from pathlib import Path

import pytest

from chain.checks import check
from chain.curation.config import load_curation
from chain.curation.plan import estimate, plan
from chain.plan.curations import curations, lines, to_dict
from chain.recipe import load_recipe
from chain.yaml_files import check_sources
from core.strict import ConfigError

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


def test_the_plan_of_the_2b_recipe_shows_the_hours_of_its_curations():
    recipe = load_recipe(ROOT / "recipes/sailvl2_2b")
    found = curations(recipe)
    assert {one.name for one in found.values()} == {
        one.stem for one in FILES if one.parent.name == "curation"
    }
    _, *said = lines(recipe)
    for name, line in zip(found, said, strict=True):
        assert line.startswith(f"  {name}: {found[name].rows:,} rows, {estimate(found[name]).total()}")
    assert to_dict(recipe)["basic_quality"]["requests"] == 60_000_000  # two scores and a phrase for 20M rows


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.curated.stem=gone.yaml", "data.curated.stem = 'gone.yaml': there is no such file; looked in"),
        (
            "data.curated.stem=curation/general.yaml",
            "writes data/sailvl2/general, and data.sets.stem is data/sailvl2/stem",
        ),
        ("data.curated.steam=curation/stem.yaml", "'steam' is not a path in data.sets; did you mean stem?"),
    ],
)
def test_a_wrong_curation_of_a_recipe_is_refused(override, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        check(load_recipe(ROOT / "recipes/sailvl2_2b", [override]), allow_missing=True)
