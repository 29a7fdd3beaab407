"""Recipes: merged from files, overridden key by key, refused with the offending key."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from chain.inputs import code_file
from chain.recipe import load_recipe
from chain.yaml_files import check_sources, read_folder
from core.strict import ConfigError

ROOT = Path(__file__).parents[2]
RECIPES = sorted(file.parent for file in ROOT.glob("recipes/**/pipeline.yaml"))


def test_a_recipe_is_one_object_over_its_files(toy):
    recipe = load_recipe(toy.recipe_dir)
    assert recipe.name == "toy"
    assert recipe.basic_sft.phases[0].optim.learning_rate == 0.001
    assert recipe.rlvr.completions_per_batch == 8  # 4 prompts x 2 completions
    assert recipe.soup is None


def test_an_extending_recipe_changes_what_it_names_and_keeps_the_rest(toy, write_recipe):
    small = write_recipe(
        "small",
        pipeline={"extends": "../recipe", "eval": {"samples": 3}},
        more={"basic_sft": {"max_tokens": 32}, "rlvr": None},
    )
    recipe = load_recipe(small)
    assert recipe.name == "small"  # a name is not inherited
    assert (recipe.eval.samples, recipe.eval.max_completion_tokens) == (3, 8)
    assert recipe.basic_sft.max_tokens == 32
    assert recipe.rlvr is None


def test_lists_are_replaced_whole(toy, write_recipe):
    phase = {"name": "other", "data": [{"set": "train"}], "optim": {"learning_rate": 1, "epochs": 2}}
    phase["optim"]["global_batch_size"] = 4
    small = write_recipe("small", pipeline={"extends": "../recipe", "basic_sft": {"phases": [phase]}})
    assert [phase.name for phase in load_recipe(small).basic_sft.phases] == ["other"]


def test_recipes_that_extend_in_a_circle_are_refused(write_recipe):
    write_recipe("one", pipeline={"extends": "../two"})
    two = write_recipe("two", pipeline={"extends": "../one"})
    with pytest.raises(ConfigError, match="in a circle"):
        load_recipe(two)


def test_overrides_reach_any_key_list_items_and_defaults_included(toy):
    overrides = [
        "rlvr.rollout.group_size=4",
        "rlvr.rewards.0.name=mine",
        "sft.learner.deepspeed=null",
        "basic_sft.phases.0.optim.learning_rate=1e-5",
        "wandb.tags=[a, b]",
    ]
    recipe = load_recipe(toy.recipe_dir, overrides)
    assert recipe.rlvr.rollout.group_size == 4
    assert recipe.rlvr.rewards[0].name == "mine"
    assert recipe.basic_sft.learner.deepspeed is None
    assert recipe.basic_sft.phases[0].optim.learning_rate == 1e-5
    assert recipe.wandb.tags == ("a", "b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "rlvr.rollout.grup_size=4",
            r"SET rlvr.*: rlvr.rollout.grup_size: unknown key; did you mean group_size",
        ),
        ("rlvrr.batches=4", r"rlvrr: unknown key; did you mean rlvr\?"),
        ("rlvr.rollout.group_size=1", r"rlvr.rollout.group_size = 1: .* greater than or equal to 2"),
        ("rlvr.rewards.3.weight=1", r"rlvr.rewards is a list of 1 items; '3' is not a valid index"),
        ("rlvr.batches.x=1", r"rlvr.batches is the value 2, not a mapping"),
        ("rlvr.batches", "is not an assignment"),
        ("rlvr.batches=[", "the value is not YAML"),
    ],
)
def test_a_wrong_override_is_named(toy, override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(toy.recipe_dir, [override])


def test_an_error_names_the_file_that_wrote_the_key(toy, write_recipe):
    small = write_recipe("small", pipeline={"extends": "../recipe", "rlvr": {"mini_batch": 7}})
    with pytest.raises(ConfigError, match=r"small/pipeline\.yaml: rlvr: mini_batch=7 does not divide"):
        load_recipe(small)
    (toy.recipe_dir / "sft.yaml").write_text("basic_sft: {max_tokens: 64, fases: []}")
    with pytest.raises(
        ConfigError, match=r"recipe/sft\.yaml: basic_sft\.fases: unknown key; did you mean phases"
    ):
        load_recipe(toy.recipe_dir)


def test_a_set_without_an_origin_is_refused_with_the_nearest(toy):
    with pytest.raises(
        ConfigError, match=r"basic_sft\.phases\[0\]\.data\[0\]\.set = 'trian'.*did you mean train"
    ):
        load_recipe(toy.recipe_dir, ["basic_sft.phases.0.data.0.set=trian"])


def test_a_set_made_before_a_later_stage_is_not_there_yet(toy):
    with pytest.raises(ConfigError, match=r"'hard': no such set at this stage"):
        load_recipe(toy.recipe_dir, ["basic_sft.phases.0.data.0.set=hard"])


def test_no_stage_may_train_on_the_held_out_set(toy):
    with pytest.raises(ConfigError, match=r"data\[0\]\.set = 'held': this is the held-out set of eval"):
        load_recipe(toy.recipe_dir, ["basic_sft.phases.0.data.0={set: held, split: think}"])


def test_another_seed_makes_another_run(toy):
    assert load_recipe(toy.recipe_dir).name == "toy"
    assert load_recipe(toy.recipe_dir, seed=0).name == "toy"  # the recipe's own
    other = load_recipe(toy.recipe_dir, seed=1)
    assert (other.name, other.seed) == ("toy-seed1", 1)
    assert load_recipe(toy.recipe_dir, seed=1, name="mine").name == "mine"


def test_a_core_is_built_or_found_but_not_both(toy):
    with pytest.raises(ConfigError, match="give exactly one of the two"):
        load_recipe(toy.recipe_dir, ["core.path=somewhere"])


def test_a_recipe_that_samples_needs_rollout_workers(toy):
    with pytest.raises(ConfigError, match=r"servers is missing: eval, rlvr need rollout servers"):
        load_recipe(toy.recipe_dir, ["servers=null"])


def test_yaml_reads_numbers_and_words_as_they_look(tmp_path):
    (tmp_path / "pipeline.yaml").write_text("a: 1e-6\nb: off\nc: 1_000\nd: 007\ne: true\nf:\ng: .5\n")
    values = read_folder(tmp_path).values
    del values["name"]
    assert values == {"a": 1e-6, "b": "off", "c": 1000, "d": "007", "e": True, "f": None, "g": 0.5}


def test_a_key_written_twice_is_an_error(tmp_path):
    (tmp_path / "pipeline.yaml").write_text("a: 1\nb: {c: 1, c: 2}\n")
    with pytest.raises(ConfigError, match=r"pipeline\.yaml: not YAML: key 'c' is repeated.*line 2"):
        read_folder(tmp_path)
    (tmp_path / "pipeline.yaml").write_text("a: 1\n")
    (tmp_path / "1.yaml").write_text("a: 1\n")
    with pytest.raises(ConfigError, match=r"1\.yaml: a is also in .*pipeline\.yaml"):
        read_folder(tmp_path)


def test_an_alias_does_not_tie_two_places_together(tmp_path):
    (tmp_path / "pipeline.yaml").write_text("a: &x {n: 1}\nb: *x\n")
    folder = read_folder(tmp_path)
    folder.override("b.n=2", {})
    assert (folder.values["a"], folder.values["b"]) == ({"n": 1}, {"n": 2})


def test_a_folder_without_a_pipeline_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"this is not a recipe folder: pipeline\.yaml is missing"):
        load_recipe(tmp_path)


def test_numbers_without_a_source_are_found(tmp_path):
    (tmp_path / "pipeline.yaml").write_text(
        "a: 1  # ours\n"
        "b: 2  # report, table 3: two\n"
        "c: 3  # because\n"
        "d: {e: 4, f: 5}  # differs: report 6; four fits\n"
        "g:  # ours: a block of numbers\n"
        "  h: 7\n"
        "  i: {j: 8}\n"
        "  k: [9, 10]\n"
        "l: word\n"
        "m: [{n: 11}]\n"
    )
    found = [problem.partition("pipeline.yaml:")[2] for problem in check_sources(tmp_path)]
    # The key i, which encloses j, has no source. The list m has no source either.
    assert found == ["3: c = 3", "7: j = 8", "8: k[0] = 9", "8: k[1] = 10", "10: n = 11"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads_and_every_number_says_where_it_comes_from(recipe):
    load_recipe(recipe)
    assert check_sources(recipe) == []


def test_reading_a_recipe_imports_nothing_heavy():
    code = (
        "import sys, chain.recipe, chain.plan.text, chain.run, chain.cli.main; "
        "heavy = {'torch', 'transformers', 'trl', 'vllm', 'datasets', 'wandb', 'sklearn', 'numpy'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["servers.weights=nccl", "servers.device=gpu"], "NCCL connects no two processes on one GPU"),
        (["servers.device=cpu"], "vLLM sleeps on GPUs only"),
        (["servers.device=gpu", "rlvr.rollout.overlap=true"], "the servers sleep while the learner trains"),
    ],
)
def test_shared_gpus_refuse_what_needs_both_sides_at_once(toy, overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(toy.recipe_dir, ["servers.share_gpus=true", *overrides])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rollout.max_images=2", "rollout: unknown key; it is called servers now"),
        ("servers.servers=2", "servers.servers: unknown key; it is called count now"),
    ],
)
def test_a_key_that_was_renamed_is_refused_with_its_new_name(toy, override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(toy.recipe_dir, [override])


def test_hard_cases_come_from_an_earlier_rl_stage(toy):
    with pytest.raises(
        ConfigError, match=r"hard_cases\.stage='rlvr': no RL stage of this recipe before rlvr"
    ):
        load_recipe(toy.recipe_dir, ["rlvr.prepare.hard_cases={into: hard2, max_pass_rate: 0.5}"])


def test_paths_and_modules_are_searched_in_the_recipes_folder_then_in_those_it_extends_then_here(
    tmp_path, monkeypatch
):
    here, base, mine = (tmp_path / name for name in ("here", "base", "mine"))
    for folder in (here, base, mine):
        (folder / "data").mkdir(parents=True)
    (base / "pipeline.yaml").write_text("core: {path: cores/tiny}\n")
    (mine / "pipeline.yaml").write_text("extends: ../base\n")
    monkeypatch.chdir(here)
    recipe = load_recipe(mine)
    assert recipe.folders == (mine, base, here)
    assert recipe.place("data/rows.parquet") == here / "data" / "rows.parquet"  # the place to make it
    for folder in (here, base, mine):
        (folder / "data" / "rows.parquet").touch()
        (folder / "my_code.py").touch()
        assert recipe.place("data/rows.parquet") == folder / "data" / "rows.parquet"
        assert code_file("my_code:make", recipe.folders) == folder / "my_code.py"
        assert code_file("my_code.py:make", recipe.folders) == folder / "my_code.py"
    assert code_file("json:dumps", recipe.folders) == Path(json.__file__)  # installed modules come first


def test_a_shipped_recipe_is_extended_by_its_name_unless_a_folder_has_that_name(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "pipeline.yaml").write_text("extends: smoke\n")
    assert load_recipe(mine).about == load_recipe(ROOT / "recipes" / "smoke").about
    (mine / "smoke").mkdir()
    (mine / "smoke" / "pipeline.yaml").write_text("core: {path: own}\n")
    assert load_recipe(mine).core.path == "own"


def test_eval_takes_any_number_of_sets_and_null_drops_one(toy):
    mcq = "eval.sets.mcq={set: held, split: mcq, mode: direct, verifier: choice}"
    recipe = load_recipe(
        toy.recipe_dir, [mcq, "eval.sets.thinking=null", "eval.sets.mcq.max_completion_tokens=4"]
    )
    assert list(recipe.eval.sets) == ["direct", "mcq"]
    assert (recipe.eval.longest("direct"), recipe.eval.longest("mcq")) == (8, 4)
    with pytest.raises(ConfigError, match=r"verifier = 'coice': no such verifier; did you mean choice"):
        load_recipe(toy.recipe_dir, [mcq, "eval.sets.mcq.verifier=coice"])
    with pytest.raises(ConfigError, match=r"data\[0\]\.set = 'held': this is the held-out set of eval"):
        load_recipe(toy.recipe_dir, [mcq, "basic_sft.phases.0.data.0={set: held, split: mcq}"])
