"""Two gloo ranks with the shared prefix, one of them without images, train what stock TRL trains on one rank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import WORDS

WORKER = Path(__file__).with_name("rank_worker.py")


def train(ranks, core, out, *options, **learner):
    """The losses of two updates and the saved weights."""
    from safetensors.torch import load_file

    out.mkdir()
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    )
    arguments = [str(WORKER), str(core), str(out), json.dumps({"processes": ranks, **learner}), *options]
    done = subprocess.run(
        [sys.executable, "-P", *launcher, *arguments],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return json.loads((out / "losses.json").read_text()), load_file(out / "checkpoint" / "model.safetensors")


def assert_same_policy(core, ours, stock):
    from safetensors.torch import load_file

    start = load_file(core / "model.safetensors")
    assert ours[0] == pytest.approx(stock[0], abs=1e-4)
    moved = max((stock[1][name] - start[name]).abs().max().item() for name in start)
    assert moved > 1e-3
    for name in start:
        assert (ours[1][name] - stock[1][name]).abs().max().item() <= moved * 1e-3, name


@pytest.fixture(scope="module")
def stock(tiny_core, tmp_path_factory):
    return train(1, tiny_core, tmp_path_factory.mktemp("stock") / "out", prefix="stock", deepspeed=None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "deepspeed", [None, {"zero_stage": 2}, {"zero_stage": 2, "offload": "cpu"}, {"zero_stage": 3}]
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_in_packs_train_what_stock_trains(tiny_core, tmp_path, stock, ranks, deepspeed):
    # 60 tokens: each rank's eight rows take several packs
    ours = train(ranks, tiny_core, tmp_path / "out", deepspeed=deepspeed, token_budget=60)
    assert_same_policy(tiny_core, ours, stock)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_images_of_any_resolution_on_two_ranks(tmp_path, zero_stage):
    from core.model.tiny import TinySize, build_tiny

    size = TinySize(any_resolution=True)
    core = build_tiny(tmp_path / "any", words=WORDS, seed=0, size=size)
    stock = train(1, core, tmp_path / "stock", prefix="stock", deepspeed=None)
    ours = train(2, core, tmp_path / "out", deepspeed={"zero_stage": zero_stage}, token_budget=60)
    assert_same_policy(core, ours, stock)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [2, 3])
def test_a_frozen_tower_on_two_ranks(tiny_core, tmp_path, zero_stage):
    frozen = {"freeze": ["tower"]}
    stock = train(1, tiny_core, tmp_path / "stock", prefix="stock", deepspeed=None, **frozen)
    ours = train(
        2, tiny_core, tmp_path / "out", deepspeed={"zero_stage": zero_stage}, token_budget=60, **frozen
    )
    assert_same_policy(tiny_core, ours, stock)


@pytest.fixture(scope="module")
def balanced(tmp_path_factory):
    """A mixture of experts whose balancing loss outweighs the policy's, and two updates of it by TRL on one rank."""
    from core.files import read_json, write_json
    from core.model.tiny import TinySize, build_tiny

    folder = tmp_path_factory.mktemp("balanced")
    core = build_tiny(folder / "core", words=WORDS, seed=0, size=TinySize(experts=4, text_layers=2))
    config = read_json(core / "config.json")
    config["text_config"]["router_aux_loss_coef"] = 1.0
    write_json(core / "config.json", config)
    # Two micro-batches of two groups.
    return core, folder / "stock", train(1, core, folder / "stock", "ordered", prefix="stock", deepspeed=None)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "deepspeed"), [(1, None), (2, None), (2, {"zero_stage": 2})])
def test_the_routers_balancing_loss_is_the_mean_over_ranks(balanced, tmp_path, ranks, deepspeed):
    """Two ranks of two groups, and one rank of two packs of two groups, train what TRL's two micro-batches train."""
    core, folder, stock = balanced
    # 120 tokens: the first two groups have 111.
    ours = train(ranks, core, tmp_path / "out", "ordered", deepspeed=deepspeed, token_budget=120)
    assert_same_policy(core, ours, stock)
    found, expected = (json.loads((one / "balance.json").read_text()) for one in (tmp_path / "out", folder))
    assert found == pytest.approx(expected, rel=1e-5)
    assert all(loss > 1 for loss in found)  # 1 is perfect balance
