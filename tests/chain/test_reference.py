"""`posttrain explain` shows every key's type, default, unit and stages, and the JSON schema fits all recipes."""

import json

import pytest
import yaml

from chain import reference
from chain.cli.main import main
from core.strict import ConfigError


def test_a_key_is_explained_by_its_path_or_its_end():
    for path in ("group_size", "rlvr.rollout.group_size"):
        text = reference.explain(path)
        assert "whole number, >= 2" in text
        assert "default  required" in text
        assert "Completions per prompt; G in the GRPO paper." in text
        assert "rl/config.py: Rollout" in text
    assert "rlvr.rollout.group_size, mixed_rl.rollout.group_size" in reference.explain("group_size")
    assert "unit     tokens" in reference.explain("rlvr.rollout.max_completion_tokens")


def test_short_stage_names_and_list_places_are_known():
    assert reference.explain("sft.phases.0.optim.learning_rate").startswith(
        "basic_sft.phases.optim.learning_rate"
    )
    assert reference.explain("rlvr.rewards[1].weight").startswith("rlvr.rewards.weight")


def test_a_section_lists_its_keys():
    text = reference.explain("rlvr.algorithm")
    assert "where: rlvr.algorithm, mixed_rl.algorithm" in text
    assert "name: dapo or gspo or dr_grpo or bnpo or cispo or sapo or gdpo or distill; default dapo" in text


def test_an_unknown_key_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean group_size"):
        reference.explain("grup_size")


def test_every_key_of_every_section_is_on_the_page():
    page = reference.markdown()
    for section in reference.sections():
        assert f"## {section.model.__name__}\n" in page
        assert all(f"| `{key.name}` |" in page for key in section.keys)


def test_the_command_prints_text_and_a_schema(capsys):
    assert main(["explain", "max_staleness"]) == 0
    assert "default  1" in capsys.readouterr().out
    assert main(["explain", "--schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert "extends" in schema["properties"]
    assert not any("required" in part for part in (schema, *schema["$defs"].values()))


def unknown_keys(value, part, definitions) -> list[str]:
    """Keys of a recipe's file that the schema lacks."""
    options = [part, *part.get("anyOf", [])]
    options = [definitions[one["$ref"].rpartition("/")[2]] if "$ref" in one else one for one in options]
    if isinstance(value, list):
        items = next((one["items"] for one in options if "items" in one), {})
        return [key for item in value for key in unknown_keys(item, items, definitions)]
    properties = next((one["properties"] for one in options if "properties" in one), None)
    if not isinstance(value, dict) or properties is None:
        return []
    return [key for key in value if key not in properties] + [
        found
        for key, inner in value.items()
        if key in properties
        for found in unknown_keys(inner, properties[key], definitions)
    ]


def test_the_schema_knows_every_key_of_the_real_recipes(pytestconfig):
    schema = reference.schema()
    pipelines = (pytestconfig.rootpath / "recipes").rglob("pipeline.yaml")
    for file in (one for pipeline in pipelines for one in pipeline.parent.glob("*.yaml")):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        assert unknown_keys(values, schema, schema["$defs"]) == [], file
    assert unknown_keys({"rlvr": {"rollout": {"grup_size": 1}}}, schema, schema["$defs"]) == ["grup_size"]
