"""plan compares a recipe with a machine: the resources of each stage, and refusals with the key to change."""

from pathlib import Path
from typing import get_args

import pytest

from chain.plan import machine
from chain.plan.resources import DoesNotFit, resources
from chain.plan.text import as_json, plan, text
from chain.recipe import load_recipe
from core.training.memory import GIB
from rl.config import RLLearner

ROOT = Path(__file__).parents[2] / "recipes"
REAL = ("sailvl2_2b", "sailvl2_8b", "sailvl2_a3b", "sailvl2_2b_lora", "sailvl2_8b_lora")
SAVING = ("basic_sft", "longcot_sft", "rlvr", "think_fusion", "mixed_rl")
TRAINED = {"basic_sft", "longcot_sft", "rlvr", "think_fusion", "mixed_rl"}


@pytest.fixture(autouse=True)
def no_gpu_here(monkeypatch):
    monkeypatch.setattr(machine, "_gpus_here", list)


def taken(recipe, *overrides, tmp_path=Path("nowhere"), gpu_gib=None):
    return resources(load_recipe(ROOT / recipe, overrides), tmp_path, gpu_gib)


@pytest.mark.parametrize("recipe", REAL)
def test_every_recipe_fits_the_machine_that_it_was_written_for(recipe):
    found = taken(recipe)
    assert set(found.fits) == TRAINED
    found.check()


def test_the_plan_says_where_the_memory_goes_and_who_is_on_which_gpu(tmp_path):
    recipe = load_recipe(ROOT / "sailvl2_2b")
    found = resources(recipe, tmp_path)
    shown = text(recipe, plan(recipe, tmp_path, resources=found), tmp_path, found)
    memory = found.fits["longcot_sft"].largest.memory
    assert f"weights {memory.weights / GIB:.1f}, optimizer {memory.optimizer / GIB:.1f}" in shown
    assert "without checkpointing" in shown
    assert "learners on GPUs 0-5; servers on GPUs 6-7" in shown
    assert "packing: passes of at most 40960 tokens, rows of at most 20480" in shown
    assert "GPU memory of a server: weights 4.5 GiB, cache" in shown
    assert "counted for a core of 2.42B parameters on 8 GPUs of 80 GiB (the recipe's hardware)" in shown
    # Four checkpoints of basic SFT's phases, two of the soup's variants and one of each other stage, 2 bytes per
    # parameter; during training two of 16 bytes per parameter: a tiny core's took 16.1 on disk.
    kept, unfinished = (4 + 2 + 4) * 2 * 2_419_400_192, 2 * 16 * 2_419_400_192
    assert found.disk == kept + unfinished
    assert f"{unfinished / GIB:.1f} GiB more while it runs (save_every)" in shown
    without = taken("sailvl2_2b", *(f"{name}.save_every=null" for name in SAVING))
    assert without.disk == kept
    assert "optimizer states are not kept" in without.lines("basic_sft")[-2]
    told = as_json(recipe, plan(recipe, tmp_path), found)["resources"]
    assert told["stages"]["rlvr"]["weights"] == memory.weights
    assert told["problems"] == []


def test_a_core_on_disk_is_counted_as_it_is(tmp_path):
    from core.model.tiny import TinySize, tiny_config
    from core.model.tokenizer import build_word_tokenizer

    tiny_config(build_word_tokenizer(["A"]), TinySize()).save_pretrained(tmp_path / "core")
    found = taken("sailvl2_2b", f"core.path={tmp_path / 'core'}")
    assert found.shape.hidden == 128


def test_a_core_of_unknown_shape_is_not_counted(toy):
    recipe = load_recipe(toy.recipe_dir)
    found = resources(recipe, toy.root)
    assert found.fits == {}
    assert "memory: not counted" in text(recipe, plan(recipe, toy.root), toy.root, found)


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (
            "sailvl2_2b",
            ["longcot_sft.learner.gradient_checkpointing=false"],
            r"longcot_sft: a rank needs .* of 80 GiB .*set longcot_sft.learner.gradient_checkpointing=true \(",
        ),
        (
            "sailvl2_2b",
            ["longcot.packing.micro_batch_tokens=163840"],
            r"longcot_sft: a rank needs .*lower longcot_sft.packing.micro_batch_tokens: \d+ tokens a pass take",
        ),
        (
            "sailvl2_2b",
            ["rlvr.learner.token_budget=327680"],
            r"rlvr: a rank needs .*lower rlvr.learner.token_budget: \d+ tokens a pass take",
        ),
        (
            "sailvl2_8b",
            [
                "sft.learner.processes=1",
                "servers.share_gpus=false",
                "servers.first_gpu=4",
                "servers.count=4",
            ],
            r"basic_sft: a rank needs .*set basic_sft.learner.deepspeed=\{zero_stage: 2, offload: cpu\}",
        ),
        (
            "sailvl2_2b",
            ["sft.learner.processes=12", "sft.packing.update_tokens=1179648"],
            r"basic_sft.learner.processes=12 needs 12 GPUs, but the machine has 8",
        ),
        ("sailvl2_2b", ["servers.first_gpu=4"], r"servers begin at servers.first_gpu=4: lower the former"),
        (
            "sailvl2_2b",
            ["servers.count=3"],
            r"3 servers x 1 GPUs from first_gpu=6 end at GPU 8, but a node has 8 GPUs",
        ),
        (
            "sailvl2_8b",
            ["servers.gpu_memory_utilization=0.9"],
            r"rlvr: while the servers are awake .*gpu_memory_utilization=0.9 .*lower gpu_memory_utilization to 0\.\d+",
        ),
        ("sailvl2_8b", ["servers.gpu_memory_utilization=0.2"], r"servers: a server's cache holds 0 tokens"),
        (
            "sailvl2_a3b",
            ["hardware.host_gib=512"],
            r"host memory of a node .* GiB, of 512 GiB; spread the ranks over more nodes",
        ),
        ("sailvl2_a3b", ["hardware.disk_gib=100"], r"disk: the chain's checkpoints take .* GiB of 100 GiB"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_key_to_change(recipe, overrides, message):
    with pytest.raises(DoesNotFit, match=message):
        taken(recipe, *overrides).check()


def test_another_gpu_is_asked_about_on_the_command_line():
    taken("sailvl2_2b", gpu_gib=141).check()
    with pytest.raises(DoesNotFit, match=r"of 24 GiB \(--gpu-gib\)"):
        taken("sailvl2_2b", gpu_gib=24).check()


def test_where_the_learner_alone_fills_the_gpu_no_share_of_it_is_advised():
    found = "\n".join(taken("sailvl2_8b", gpu_gib=24).problems)
    assert "needs 12.0 GiB; set servers.share_gpus=false, or take larger GPUs" in found
    assert "gpu_memory_utilization to 0 " not in found


def test_a_remedy_below_a_rows_length_names_the_length_as_well():
    problems = taken("sailvl2_2b", gpu_gib=24).problems
    assert (
        "lower longcot_sft.packing.micro_batch_tokens and longcot_sft.max_tokens: 10240 tokens" in problems[1]
    )
    assert "lower rlvr.learner.token_budget and servers.max_model_tokens: 10240 tokens" in problems[2]


def test_this_machines_gpus_come_before_the_recipes(monkeypatch):
    monkeypatch.setattr(machine, "_gpus_here", lambda: [39.5] * 8)
    found = taken("sailvl2_2b")
    assert (found.machine.gpu_gib, found.machine.origin) == (39.5, "this machine's GPUs")


def test_the_remedy_fits():
    found = taken("sailvl2_2b", "longcot.packing.micro_batch_tokens=163840").problems[0]
    tokens = found.split("micro_batch_tokens: ")[1].split()[0]
    assert taken("sailvl2_2b", f"longcot.packing.micro_batch_tokens={tokens}").problems == []


def test_on_cpus_the_ranks_share_the_hosts_memory(toy, monkeypatch):
    monkeypatch.setattr(machine, "_host_gib", lambda: 20.0)
    overrides = ["core={path: nowhere, size: 2b}", "sft.learner.processes=2"]
    found = resources(load_recipe(toy.recipe_dir, overrides), toy.root)
    fit = found.fits["basic_sft"]
    # float32: weights, DeepSpeed's masters and two moments, of which each rank has half.
    assert fit.largest.memory.weights + fit.largest.memory.optimizer == (4 + 12 / 2) * 2_419_400_192
    with pytest.raises(DoesNotFit, match=r"basic_sft: host memory of a node .* GiB, of 20 GiB"):
        found.check()


@pytest.mark.parametrize("prefix", get_args(RLLearner.model_fields["prefix"].annotation))
def test_every_way_of_computing_a_prefix_is_planned_as_it_is_run(prefix):
    from rl.algorithm import trl_config

    recipe = load_recipe(
        ROOT / "sailvl2_8b",
        [f"rlvr.learner.prefix={prefix}", "rlvr.learner.dtype=float32", "rlvr.learner.deepspeed=null"],
    )
    fit = resources(recipe, Path("nowhere")).fits["rlvr"]
    config = recipe.rlvr
    # With shared prefixes, TRL gets the rows of a whole update, else of a micro-batch.
    rows = trl_config(config, Path("out"), 0).per_device_train_batch_size * config.learner.processes
    assert (rows == config.mini_batch) == config.learner.shares_prefix == (prefix != "stock")
    assert ("token_budget" in fit.largest.knob) == config.learner.shares_prefix
