"""Recipes are untrusted input: any content is read within limits, or refused by one line that names file and rule."""

import os

import pytest

from chain.recipe import load_recipe
from core.strict import LARGEST, ConfigError

CORE = "core: {build: toy:build}\n"
NINE = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    + [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 9)]
)
HOSTILE = {
    "anchors that multiply": (NINE, "more than 100000 values after its aliases are expanded"),
    "an anchor in itself": ("about: &a [*a]", "an anchor contains itself"),
    "depth": ("about: " + "[" * 60 + "]" * 60, "nested more than 50 levels deep"),
    "depth beyond the interpreter's": ("about: " + "[" * 5000, "nested more than 50 levels deep"),
    "a list as a key": ("? [a, b]\n: 1", "a key must be a string, not a list or a mapping"),
    "a mapping as a key": ("? {a: b}\n: 1", "a key must be a string, not a list or a mapping"),
    "digits": (f"seed: {'9' * 5000}", "a number of 5000 characters, at most 40 are read"),
    "size": ("about: " + "x" * 1_000_001, "at most 1000000 are read"),
}


@pytest.fixture
def recipe(tmp_path):
    """Writes pipeline.yaml from text or bytes; returns its folder."""

    def write(text):
        content = text if isinstance(text, bytes) else (CORE + text).encode()
        (tmp_path / "pipeline.yaml").write_bytes(content)
        return tmp_path

    return write


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_by_one_line(recipe, kind):
    text, rule = HOSTILE[kind]
    with pytest.raises(ConfigError) as caught:
        load_recipe(recipe(text))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(str(recipe(text) / "pipeline.yaml"))
    assert rule in str(caught.value)


def test_text_that_is_not_utf8_is_refused(recipe):
    with pytest.raises(ConfigError, match="byte 7 is not UTF-8; save the file as UTF-8"):
        load_recipe(recipe(b"about: \xff"))


def test_a_pipe_is_not_waited_for(recipe, tmp_path):
    os.mkfifo(tmp_path / "stage.yaml")
    with pytest.raises(ConfigError, match=r"stage\.yaml: .*not a regular file"):
        load_recipe(recipe(""))


def test_anchors_within_bounds_are_read(recipe):
    text = "data: {sets: &s {one: a.parquet}}\nwandb: {tags: &t [x, y]}\nabout: fine"
    assert load_recipe(recipe(text)).wandb.tags == ("x", "y")


def test_an_override_is_held_to_the_same_bounds(recipe):
    with pytest.raises(ConfigError, match="a number of 5000 characters"):
        load_recipe(recipe(""), [f"seed={'9' * 5000}"])


@pytest.mark.parametrize(("seed", "fits"), [(LARGEST, True), (LARGEST + 1, False), (10**30, False)])
def test_whole_numbers_have_a_bound(recipe, seed, fits):
    if fits:
        assert load_recipe(recipe(f"seed: {seed}")).seed == seed
        return
    with pytest.raises(ConfigError, match=r"seed = .*at most 2147483647"):
        load_recipe(recipe(f"seed: {seed}"))


@pytest.mark.parametrize("threads", [0, 2000])
def test_threads_have_a_bound(recipe, threads):
    with pytest.raises(ConfigError, match=r"core\.threads"):
        load_recipe(recipe(""), [f"core.threads={threads}"])


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("name=../elsewhere", "name"),
        ("data.sets={../x: a.parquet}", r"data\.sets"),
        ("rlvr.prepare.pass_at_k.into=../../x", r"rlvr\.prepare\.pass_at_k\.into"),
        ("rlvr.prepare.pass_at_k.into=a/b", r"rlvr\.prepare\.pass_at_k\.into"),
        ("data.generate.sets=[train, extra, held, ..]", r"data\.generate\.sets"),
        ("eval.sets.thinking.split=../x", r"eval\.sets\.thinking\.split"),
    ],
)
def test_a_name_never_leads_out_of_its_folder(toy, override, key):
    with pytest.raises(ConfigError, match=rf"{key}.*should match pattern"):
        load_recipe(toy.recipe_dir, [override])
