"""Configuration errors name the file, the key, the value, the rule and the nearest known key."""

import pytest
from pydantic import Field, ValidationError, model_validator

from core.strict import ConfigError, Strict, key_path, parse


class Rollout(Strict):
    group_size: int = Field(default=8, ge=2)
    """Completions per prompt."""
    temperature: float = 1.0


class Stage(Strict):
    rollout: Rollout = Rollout()
    terms: tuple[Rollout, ...] = ()
    batches: int

    @model_validator(mode="after")
    def _few(self):
        if self.batches > 100:
            raise ValueError(f"batches={self.batches}: at most 100; use fewer")
        return self


def problems_of(data) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(Stage, data, "r/3_rlvr.yaml")
    return str(caught.value).splitlines()


def test_unknown_key_names_its_path_and_the_nearest_known_key():
    assert problems_of({"batches": 1, "rollout": {"grup_size": 4}}) == [
        "r/3_rlvr.yaml: rollout.grup_size: unknown key; did you mean group_size? "
        "Known: group_size, temperature"
    ]


def test_every_problem_gets_a_line():
    assert problems_of({"rollout": {"group_size": 1, "x": 0}, "terms": [{}, {"temperature": "hot"}]}) == [
        "r/3_rlvr.yaml: rollout.x: unknown key; Known: group_size, temperature",
        "r/3_rlvr.yaml: rollout.group_size = 1: Input should be greater than or equal to 2",
        "r/3_rlvr.yaml: terms[1].temperature = 'hot': Input should be a valid number, "
        "unable to parse string as a number",
        "r/3_rlvr.yaml: batches: Field required",
    ]


def test_our_own_rules_keep_their_messages():
    assert problems_of({"batches": 101}) == [
        "r/3_rlvr.yaml: the whole configuration: batches=101: at most 100; use fewer"
    ]


def test_where_may_depend_on_the_key():
    with pytest.raises(ConfigError, match=r"^file of batches: batches"):
        parse(Stage, {}, lambda path: f"file of {path[0]}")


def test_nan_is_refused():
    assert "finite number" in problems_of({"batches": 1, "rollout": {"temperature": float("nan")}})[0]


def test_keys_with_braces_are_quoted_as_they_are():
    assert "{0}: unknown key" in problems_of({"batches": 1, "{0}": 1})[0]


def test_direct_construction_is_as_strict():
    with pytest.raises(ValidationError, match="did you mean group_size"):
        Rollout(group_sise=3)


def test_a_config_cannot_be_changed_and_documents_its_fields():
    with pytest.raises(ValidationError, match="frozen"):
        Rollout().group_size = 3
    assert Rollout.model_fields["group_size"].description == "Completions per prompt."


def test_key_path_shows_indices_in_brackets():
    assert key_path(("data", "sets", 0, "rows")) == "data.sets[0].rows"
