"""posttrain init: a folder that plans at once, with the user's rows in the sets that its stages need."""

import json
import subprocess
import sys

import pytest
from PIL import Image

from chain.checks import check
from chain.cli.main import main
from chain.init import init
from chain.recipe import load_recipe
from chain.yaml_files import check_sources
from core.strict import ConfigError
from corpus.records import load_records, write_records


def rows(count, **changes):
    for number in range(count):
        yield {
            "id": f"row-{number}",
            "images": [Image.new("RGB", (40, 40), "red")],
            "question": f"There are {number} pears and 2 plums. How many?",
            "answer": str(number + 2),
            "chain": f"{number} and 2; {number}+2={number + 2}" if number % 2 else None,
            "mode": "think",
            "verifier": "number",
        } | changes


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records("rows.parquet", rows(40))
    return tmp_path


@pytest.mark.parametrize("base", ["demo", "smoke"])
@pytest.mark.parametrize("data", [(), ("--data", "rows.parquet")], ids=["", "own-data"])
def test_a_tiny_recipe_passes_the_checks_of_run_at_once(here, base, data, capsys):
    assert main(["init", "mine", "--from", base, *data]) == 0
    assert "posttrain run mine" in capsys.readouterr().out
    recipe = load_recipe("mine")
    assert check(recipe) == []
    assert [term.use for term in recipe.rlvr.rewards] == ["answer", "think_format", "my_reward:Brief"]
    assert recipe.core.build == "recipes.demo.pretrain:build"
    assert check_sources(here / "mine") == []
    assert json.loads((here / "mine" / "recipe.schema.json").read_text())["$defs"]


def test_own_rows_become_prompts_answers_chains_and_held_out_rows(here):
    init(here / "mine", "smoke", here / "rows.parquet")
    sets = {file.stem: load_records(file) for file in (here / "mine" / "data").glob("*.parquet")}
    ids = {name: {row["id"] for row in records} for name, records in sets.items()}
    sizes = {name: len(records) for name, records in sets.items() if name != "chains"}
    assert sizes == {"prompts": 36, "direct": 36, "heldout": 4}
    assert ids["chains"] == {name for name in ids["prompts"] if int(name.partition("-")[2]) % 2}
    assert ids["prompts"] == ids["direct"] >= ids["chains"]
    assert not ids["prompts"] & ids["heldout"]
    assert {row["mode"] for row in sets["direct"]} == {"direct"}
    assert all(row["chain"] for row in sets["chains"])
    recipe = load_recipe(here / "mine")
    assert recipe.servers.max_model_tokens == recipe.basic_sft.max_tokens == 128
    assert set(recipe.core.vocabulary) == {*sets}


def test_without_chains_the_recipe_has_no_longcot_sft(here):
    write_records("bare.parquet", rows(20, chain=None))
    init(here / "mine", "smoke", here / "bare.parquet")
    assert load_recipe("mine").longcot_sft is None
    assert check(load_recipe("mine")) == []


def test_a_real_recipe_with_own_data_lacks_only_its_core(here):
    init(here / "mine", "sailvl2_2b", here / "rows.parquet")
    recipe = load_recipe("mine")
    assert recipe.basic_sft is None
    (missing,) = check(recipe, allow_missing=True)
    assert missing.startswith("core.path = 'core': this is not a checkpoint folder")


def test_the_reward_of_a_new_recipe_passes_its_own_test(here):
    init(here / "mine")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "mine"], cwd=here, capture_output=True, text=True, check=False
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_too_few_rows_and_existing_folders_are_refused(here):
    write_records("few.parquet", rows(15))
    with pytest.raises(ConfigError, match=r"few\.parquet: 15 of 15 rows can be used, at least 16 are needed"):
        init(here / "mine", "smoke", here / "few.parquet")
    assert not (here / "mine").exists()
    (here / "mine").mkdir()
    with pytest.raises(ConfigError, match="mine exists already"):
        init(here / "mine")
    with pytest.raises(ConfigError, match="the recipe's name may have letters"):
        init(here / "my recipe")


def test_rows_beyond_the_tiny_cores_context_are_left_out_and_counted(here):
    write_records("long.parquet", [*rows(20), *rows(1, id="long", question="word " * 3000)])
    lines = init(here / "mine", "smoke", here / "long.parquet")
    assert lines[1].endswith("; left out 1 rows: more than 2048 tokens")


def test_rejected_and_ungradable_rows_are_counted_with_their_reason(here):
    mixed = [
        *({"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(20)),
        {"question": "1?", "answer": ""},
    ]
    (here / "rows.jsonl").write_text("\n".join(map(json.dumps, mixed)))
    lines = init(here / "mine", "smoke", here / "rows.jsonl")
    assert lines[1].startswith("data: rows per set: prompts 16, direct 16, heldout 4; left out 1 rows: ")
