"""Words that a core's tokenizer does not know: counted per set and part, named, refused above a bound."""

import json

import pytest

from chain.checks import check_rows
from chain.make import vocabulary
from chain.recipe import CoreConfig, load_recipe
from core.model.tiny import build_tiny
from core.model.tokenizer import build_word_tokenizer, pieces
from core.strict import ConfigError
from core.training.job import Job
from corpus.records import write_records
from corpus.vocabulary import check_words, has_unknown, unknown

TOKENIZER = build_word_tokenizer(["How", "many", "pears"])


def row(question="How many pears?", answer="4", chain=None, **more):
    return {
        **{"id": "a", "question": question, "answer": answer, "chain": chain, "response": None},
        **{"mode": "think", "verifier": "number", **more},
    }


def test_the_share_counts_unknown_words_per_part():
    assert unknown([row()], TOKENIZER) == {}
    found = unknown([row("How many kiwis?"), row(answer="four", chain="4 pears")], TOKENIZER)
    assert found["questions"] == (1 / 10, {"kiwis": 1})  # four words and the contract, twice
    # "4", then <think> 4 pears </think> \boxed{ four }
    assert found["targets"] == (1 / 8, {"four": 1})


def test_a_few_unknown_words_are_a_warning_and_many_are_refused_with_the_remedy():
    rows = [row()] * 30 + [row("How many kiwis?")]
    (line,) = check_words("fruit", rows, TOKENIZER, most=0.05)
    assert "set fruit: the core's tokenizer does not know 0.6% of the tokens of its questions" in line
    with pytest.raises(
        ConfigError, match=r"'kiwis'; at most core.max_unknown=0.005 .*add fruit to core.vocabulary"
    ):
        check_words("fruit", rows, TOKENIZER, most=0.005)


def test_the_words_of_a_vocabulary_reach_the_builder(tmp_path):
    write_records(tmp_path / "fruit.parquet", [row("How many kiwis?", chain="1 kiwi; 1")])
    job = Job(stage="core", out=tmp_path, sets={"fruit": tmp_path / "fruit.parquet"})
    words = vocabulary(CoreConfig(build="a:b", vocabulary=("fruit",)), job)
    assert words == ["How", "many", "kiwis", "?", "1", "kiwi", ";", "4"]
    assert unknown([row("How many kiwis?", chain="1 kiwi; 1")], build_word_tokenizer(words)) == {}


def test_markup_is_no_word():
    assert pieces(r"<think>a</think>\boxed{b}") == ["a", "b"]


def test_plan_and_run_refuse_unknown_words_by_the_same_code(tmp_path):
    core = build_tiny(tmp_path / "core", words=["How", "many"], seed=0)
    assert has_unknown(core)
    write_records(tmp_path / "fruit.parquet", [row(mode="direct")])
    recipe_dir = tmp_path / "mine"
    recipe_dir.mkdir()
    phase = {"name": "one", "data": [{"set": "fruit"}], "optim": {"learning_rate": 1e-3, "epochs": 1}}
    phase["optim"] |= {"global_batch_size": 1, "micro_batch_size": 1}
    values = {"core": {"path": str(core)}, "data": {"sets": {"fruit": "../fruit.parquet"}}, "tracking": []}
    values["basic_sft"] = {"max_tokens": 64, "phases": [phase]}
    (recipe_dir / "pipeline.yaml").write_text(json.dumps(values))
    sets, said = {"fruit": str(tmp_path / "fruit.parquet")}, []
    with pytest.raises(ConfigError, match=r"25\.0% of the tokens of its questions.*'pears'"):
        check_rows(load_recipe(recipe_dir), sets, core, tmp_path / "run", said.append)
    allowed = load_recipe(recipe_dir, ["core.max_unknown=0.5"])
    check_rows(allowed, sets, core, tmp_path / "run", said.append)
    built = ["core.path=null", "core.build=recipes.demo.pretrain:build", "core.vocabulary=[fruit]"]
    check_rows(
        load_recipe(recipe_dir, built), sets, core, tmp_path / "run", said.append
    )  # it will be built anew
    (line,) = said
    assert line.startswith(
        "set fruit: the core's tokenizer does not know 25.0% of the tokens of its questions"
    )


def test_a_vocabulary_names_sets_that_exist_before_the_first_stage(tmp_path):
    (tmp_path / "pipeline.yaml").write_text("extends: smoke\ncore: {vocabulary: [genral, own_chains]}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path)
    assert "core.vocabulary[0] = 'genral': no such set before the first stage; did you mean general?" in str(
        caught.value
    )
    assert "core.vocabulary[1] = 'own_chains'" in str(caught.value)
