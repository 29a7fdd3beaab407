"""plan resolves a recipe and counts its batches; a missing file or module is reported with its key."""

from pathlib import Path

import pytest

from chain.checks import check
from chain.plan.text import as_json, plan, text
from chain.recipe import load_recipe
from core.model.tiny import build_tiny
from core.strict import ConfigError
from corpus.records import write_records


def planned(toy, *overrides: str):
    recipe = load_recipe(toy.recipe_dir, overrides)
    return recipe, plan(recipe, toy.root / "runs")


def test_each_stage_names_its_parent_and_its_sets(toy):
    _, plans = planned(toy)
    assert [(one.name, one.parent) for one in plans] == [
        ("core", None),
        ("basic_sft", "core"),
        ("rlvr", "basic_sft"),
    ]
    assert plans[1].sets == {"train": "generated (at the first run)"}
    assert plans[2].sets == {
        "extra": "generated (at the first run)",
        "hard": "made before rlvr",
    }


def test_a_stage_left_out_is_skipped_over(toy):
    _, plans = planned(toy, "basic_sft=null")
    assert [(one.name, one.parent) for one in plans] == [("core", None), ("rlvr", "core")]


def test_derived_batch_sizes_are_counted(toy):
    recipe, plans = planned(toy, "rlvr.rollout.group_size=16", "rlvr.mini_batch=32", "rlvr.passes=3")
    shown = text(recipe, plans)
    # 4 prompts x 16 completions = 64; 64 / 32 = 2 mini-batches x 3 passes = 6 updates; 2 batches = 12.
    assert "4 prompts x 16 completions of at most 8 tokens = 64 completions" in shown
    assert "2 mini-batches of 32 x 3 passes = 6 per batch; 2 batches = 12 updates" in shown
    assert "DeepSpeed ZeRO-2, 1 process x 1 threads" in shown
    assert "reward, think: 1 own (toy_stages:train)" in shown
    assert "first: hard = all of extra filtered by pass@4" in shown


def test_rows_of_sets_that_are_there_are_counted_into_updates(toy):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (toy.root / "own").mkdir()
    for name, rows in (("one", 9), ("two", 8)):
        pq.write_table(pa.table({"id": list(range(rows))}), toy.root / "own" / f"{name}.parquet")
    place = toy.root / "own"
    recipe, plans = planned(toy, f"data.sets.own={place}", "sft.phases.0.data.0.set=own")
    # 17 rows in batches of 8 are 3 updates an epoch.
    assert "all of own; 17 rows x 1 epochs = 3 updates of 8 rows" in text(recipe, plans)
    assert plans[1].sets == {"own": f"{place} (found, 17 rows)"}


def test_sets_on_the_hub_and_missing_ones_are_told_apart(toy):
    overrides = [
        "data.sets={a: 'hf://datasets/some/where', b: ./no/where}",
        "sft.phases.0.data=[{set: a}, {set: b}]",
    ]
    _, plans = planned(toy, *overrides)
    assert plans[1].sets["a"] == "hf://datasets/some/where on the hub"
    assert plans[1].sets["b"].endswith("no/where (MISSING)")


def test_the_soup_names_its_variants(toy):
    soup = (
        "soup={variants: [{seed_offset: 1}, {seed_offset: 2, learning_rate: 0.1}], validation: {set: extra}}"
    )
    recipe, plans = planned(toy, soup)
    assert plans[2].parent == "basic_sft"
    assert "2 further runs of basic_sft's phase only (learning rate: same, 0.1), uniform merge of 3" in text(
        recipe, plans
    )


def test_modules_that_do_not_exist_are_named_with_their_keys(toy):
    overrides = [
        "data.generate.by=nowhere:make",
        "core.build=no.where:build",
        "rlvr.rewards.0.use=gone:Reward",
    ]
    with pytest.raises(ConfigError) as caught:
        check(load_recipe(toy.recipe_dir, overrides))
    lines = str(caught.value).splitlines()
    assert [line.partition(" =")[0] for line in lines] == [
        "data.generate.by",
        "core.build",
        "rlvr.rewards[0].use",
    ]


def test_an_unknown_reward_names_the_nearest(toy):
    with pytest.raises(ConfigError, match=r"rlvr\.rewards\[0\]\.use = 'anser': .*answer"):
        check(load_recipe(toy.recipe_dir, ["rlvr.rewards.0.use=anser"]))


def test_a_reward_gets_only_parameters_it_has(toy):
    with pytest.raises(ConfigError, match=r"rlvr\.rewards\[0\]\.use = 'answer': .*colour"):
        check(
            load_recipe(toy.recipe_dir, ["rlvr.rewards.0.use=answer", "rlvr.rewards.0.params={colour: red}"])
        )


def test_the_plan_for_programs_holds_the_resolved_recipe(toy):
    recipe, plans = planned(toy)
    found = as_json(recipe, plans)
    assert found["recipe"]["rlvr"]["dynamic_sampling"]["max_rounds"] == 3  # a default, resolved
    assert [stage["name"] for stage in found["stages"]] == ["core", "basic_sft", "rlvr"]


def test_a_reward_of_another_library_is_looked_for_behind_its_prefix(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "theirs.py").write_text("def compute_score(solution_str):\n    return 1.0\n")
    for use in ("trl:trl.rewards:accuracy_reward", "verl:theirs.py:compute_score"):
        recipe = load_recipe(toy.recipe_dir, [f"rlvr.rewards.0.use={use}"])
        check(recipe)
        assert recipe.rlvr.rewards[0].use == use
    with pytest.raises(ConfigError, match=r"'verl:gone.py:compute_score': there is no such module or file"):
        check(load_recipe(toy.recipe_dir, ["rlvr.rewards.0.use=verl:gone.py:compute_score"]))


def test_a_trl_reward_that_needs_a_column_which_no_row_has_is_refused(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {
        "id": "a",
        "images": [],
        "question": "q",
        "answer": "4",
        "chain": None,
        "response": None,
        "mode": "think",
    }
    write_records(
        tmp_path / "mine.parquet", [{**row, "verifier": "math", "source": "t", "meta": {"level": 3}}]
    )
    (tmp_path / "theirs.py").write_text(
        "def graded(completions, level, ground_truth): return [1.0]\ndef typo(completions, levels): return [1.0]\n"
    )
    data = ["data.sets={mine: mine.parquet}", "rlvr.data=[{set: mine}]"]
    check(load_recipe(toy.recipe_dir, [*data, "rlvr.rewards.0.use=trl:theirs.py:graded"]))
    with pytest.raises(
        ConfigError, match=r"needs the column 'levels', which no row has\. did you mean level\?"
    ):
        check(load_recipe(toy.recipe_dir, [*data, "rlvr.rewards.0.use=trl:theirs.py:typo"]))


def test_a_reward_that_cannot_be_loaded_is_refused_before_anything_runs(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text("import nowhere_at_all\n")
    with pytest.raises(ConfigError, match=r"rlvr\.rewards\[0\]\.use = 'mine.py:Name': .*nowhere_at_all"):
        check(load_recipe(toy.recipe_dir, ["rlvr.rewards.0.use=mine.py:Name"]))


def test_missing_sets_are_an_error_unless_they_may_be_missing(toy):
    missing = "data.sets.more=nowhere.parquet"
    recipe = load_recipe(toy.recipe_dir, [missing, "sft.phases.0.data.0.set=more"])
    with pytest.raises(ConfigError, match=r"data\.sets\.more = 'nowhere\.parquet': there is no such file"):
        check(recipe)
    (line,) = check(recipe, allow_missing=True)
    assert line.endswith(f"looked in {toy.recipe_dir}, {Path.cwd()}")
    assert check(load_recipe(toy.recipe_dir, [missing])) == []  # no stage reads it


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("rlvr.rollout.max_completion_tokens=128", "rlvr.rollout.max_completion_tokens=128"),
        ("eval.max_completion_tokens=500", "eval.max_completion_tokens=500"),
        ("rlvr.prepare.max_completion_tokens=128", "rlvr.prepare.max_completion_tokens=128"),
    ],
)
def test_completions_that_leave_no_room_for_a_prompt_are_refused(toy, override, key):
    with pytest.raises(
        ConfigError, match=f"{key} leaves no room for a prompt in servers.max_model_tokens=128"
    ):
        load_recipe(toy.recipe_dir, [override])


def test_every_set_that_servers_are_asked_is_named():

    from chain.checks import asked
    from core.strict import key_path

    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / "smoke")
    found = {key_path(path): length for path, _, length, _ in asked(recipe)}
    assert {
        "eval.sets.thinking",
        "eval.sets.direct",
        "soup.validation",
        "rlvr.data[0]",
        "rlvr.watch.held_out",
    } <= set(found)
    assert found["rlvr.prepare.pass_at_k.source"] == recipe.rlvr.prepare.max_completion_tokens
    assert found["think_fusion.prepare.harvest.source"] == recipe.think_fusion.prepare.max_completion_tokens


@pytest.mark.parametrize(("ending", "wanted"), [("", "false"), (r"<think>\n", "true")])
def test_rewards_must_know_whether_the_chat_template_opens_the_thought(toy, tmp_path, ending, wanted):
    model = build_tiny(tmp_path / "core", words=["compute"], seed=0)
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace(r"assistant\n'", rf"assistant\n{ending}'"))

    def check_with(opened):
        params = f"rlvr.rewards.0.params={{thought_open: {opened}}}"
        check(load_recipe(toy.recipe_dir, ["rlvr.rewards.0.use=answer", params]), model=model)

    check_with(wanted)
    with pytest.raises(
        ConfigError, match=rf"rlvr\.rewards\[0\]\.use.*<think>.*set its parameter thought_open: {wanted}$"
    ):
        check_with({"false": "true", "true": "false"}[wanted])
