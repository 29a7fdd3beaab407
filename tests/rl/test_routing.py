"""Routing replay: what a server records, how a reply carries it, and that the learner's layers visit those experts."""

import ast

import numpy as np
import pytest
import torch

from benchmarks.routing import gaps, sampled
from chain.recipe import load_recipe
from core.strict import ConfigError
from rl.rollout.command import command
from rl.rollout.config import PoolConfig
from rl.rollout.messages import CoreFacts, Sampling, read_answer
from rl.rollout.routing import Recorder, Routing, routers, written

from .conftest import WORDS
from .learners import Scripted, backward, learner, relative_difference, shared
from .test_vllm_contract import defined, fields, source

ROUTING = Routing(layers=2, per_token=2, experts=8)
GROUPS = (Scripted(0, (1,), (5, 3, 7, 4)), Scripted(1, (2,), (6, 2, 5, 7), cut=(1,)))


@pytest.fixture(scope="module")
def moe_core(tmp_path_factory):
    from core.model.tiny import TinySize, build_tiny

    size = TinySize(experts=8, text_layers=2)
    return build_tiny(tmp_path_factory.mktemp("moe") / "tiny", words=WORDS, seed=0, size=size)


def replaying(experts):
    """The side of a learner whose rows have `experts(prompt ids, completion ids)` of their tokens."""

    def side(rows, **own):
        for row in rows:
            row["experts"] = experts(row["prompt_ids"], row["completion_ids"])
        return shared(rows, **own)

    return side


def random_experts(prompt, completion):
    """Two of eight experts in two layers; the same for the same prompt, as within a group."""
    return tuple(
        np.stack(
            [
                np.random.default_rng(token * 7 + at).permutation(8)[[0, 1, 2, 3]]
                for at, token in enumerate(ids)
            ]
        )
        .reshape(-1, 2, 2)
        .astype(np.int16)
        for ids in (prompt, completion[:-1])
    )


# The server's side


def test_a_replay_brings_a_server_in_bfloat16_close_to_the_learner(tmp_path):
    from core.model.tiny import TinySize, build_tiny

    size = TinySize(experts=16, experts_per_token=4, text_layers=6)
    core = build_tiny(tmp_path / "core", words=WORDS, seed=0, size=size)
    found = gaps(core, sampled(core, "bfloat16", 2, Sampling(max_tokens=12, n=4)))
    assert found["other experts, share"] > 0.01
    assert found["mean, replayed"] < 0.6 * found["mean, own"]
    assert found["max, replayed"] < 0.03 < found["max, own"]


def test_a_server_in_the_learners_precision_returns_the_learners_own_choice(moe_core):
    found = gaps(moe_core, sampled(moe_core, "float32", 2, Sampling(max_tokens=6, n=2)))
    assert found["other experts, share"] == 0
    assert found["max, replayed"] < 1e-5


def reply(**choice):
    logprobs = {"content": [{"logprob": -1.0}] * 3}
    one = {"token_ids": [5, 6, 7], "logprobs": logprobs, "finish_reason": "stop", "message": {"content": "x"}}
    return {"prompt_token_ids": [1, 2], "choices": [{**one, **choice}]}


def test_a_replys_experts_are_those_of_the_prompt_and_of_the_tokens_that_were_read():
    experts = np.arange(16, dtype=np.uint8).reshape(4, 2, 2) % 8
    facts = CoreFacts(banned_ids=(7,), routing=ROUTING)
    answer = read_answer(reply(routed_experts=written(experts)), facts)
    assert (answer.experts == experts[:2]).all()
    assert answer.completions[0].token_ids == [5, 6]  # cut at a banned token
    assert (answer.completions[0].experts == experts[2:3]).all()
    first = read_answer(reply(routed_experts=written(experts)), CoreFacts(banned_ids=(5,), routing=ROUTING))
    assert first.completions[0].experts.shape == (0, 2, 2)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (None, "start it with servers.routing_replay"),
        (np.zeros((3, 2, 2), np.uint8), r"of shape \(3, 2, 2\) and type uint8; \(4, 2, 2\) integers are due"),
        (np.zeros((4, 2, 2), np.float32), "type float32"),
        (np.full((4, 2, 2), 8, np.uint8), "experts 8 to 8 of 8"),
    ],
)
def test_a_reply_without_fitting_experts_is_refused(experts, message):
    body = reply(routed_experts=None if experts is None else written(experts))
    with pytest.raises(ValueError, match=message):
        read_answer(body, CoreFacts(banned_ids=(), routing=ROUTING))


def test_vllms_replies_and_option_are_the_ones_that_we_read():
    """By contract: vLLM returns experts on GPUs only (model runner V2, which needs Triton)."""
    names = {}
    function = defined("utils/serial_utils.py", "numpy2base64")
    exec(  # vLLM's own function, without importing vLLM
        f"import base64 as pybase64, io, numpy as np\n{ast.unparse(function)}", names
    )
    experts = np.arange(16, dtype=np.uint8).reshape(4, 2, 2) % 8
    assert names["numpy2base64"](experts) == written(experts)
    assert "routed_experts" in fields(
        "entrypoints/openai/chat_completion/protocol.py", "ChatCompletionResponseChoice"
    )
    assert "enable_return_routed_experts" in ast.unparse(source("engine/arg_utils.py"))
    conditions = ast.unparse(defined("config/vllm.py", "VllmConfig._verify_aux_output_compatibility"))
    assert "use_v2_model_runner" in conditions
    assert "enable_prefix_caching" in conditions
    reset = ast.unparse(defined("v1/core/sched/scheduler.py", "Scheduler.reset_prefix_cache"))
    assert "aux_output_connector.reset()" in reset  # new weights: no experts of the old ones
    pool = PoolConfig(device="gpu", max_model_tokens=64, routing_replay=True)
    assert "--enable-return-routed-experts" in command(pool, "core", 1)


# The learner's side


def test_a_replay_of_the_own_choice_changes_nothing(moe_core, tmp_path):
    plain, inputs = learner(shared, moe_core, GROUPS, tmp_path)
    recorder = Recorder(plain.model, 1)
    packed = {}

    def choice(prompt, completion):
        ids = torch.tensor([[*prompt, *completion]])
        key = tuple(prompt)
        batch = packed[key]
        with recorder.running(), torch.no_grad():
            plain.model.model(input_ids=ids, **batch)
        experts = recorder.experts()[0]
        recorder._chosen = {number: [] for number in recorder._chosen}
        return experts[: len(prompt)], experts[len(prompt) : -1]

    from .learners import scripted_rows

    for row in scripted_rows(plain.processing_class, GROUPS):
        images = plain.processing_class.image_processor(row["images"], return_tensors="pt")
        packed[tuple(row["prompt_ids"])] = {"pixel_values": images["pixel_values"]}
    replayed, theirs = learner(replaying(choice), moe_core, GROUPS, tmp_path)
    (loss, gradients), (loss_, gradients_) = backward(plain, inputs), backward(replayed, theirs)
    assert float(loss_) == pytest.approx(float(loss), abs=1e-6)
    assert relative_difference(gradients_, gradients) < 1e-5


@pytest.mark.parametrize(
    "how", [{"own": {"token_budget": 60}}, {"gradient_checkpointing": True}, {"num_iterations": 1}]
)
def test_packs_and_checkpointing_replay_the_same_experts(moe_core, tmp_path, how):
    side = replaying(random_experts)
    (one, whole), (other, parts) = (
        learner(side, moe_core, GROUPS, tmp_path, **{"loss_type": "grpo", **options}) for options in ({}, how)
    )
    if "num_iterations" not in how:
        assert torch.allclose(whole["old_per_token_logps"], parts["old_per_token_logps"], atol=1e-5)
    (loss, gradients), (loss_, gradients_) = backward(one, whole), backward(other, parts)
    assert float(loss_) == pytest.approx(float(loss), abs=1e-5)
    assert relative_difference(gradients_, gradients) < 1e-4


def test_every_token_visits_the_experts_of_its_row_and_the_router_learns(moe_core, tmp_path):
    trainer, inputs = learner(replaying(random_experts), moe_core, GROUPS, tmp_path, router_aux_loss_coef=0.1)
    seen = []
    router = routers(trainer.model)[1]
    router.register_forward_hook(lambda _, __, output: seen.append(output[2]))
    with torch.no_grad():  # the pass of the loss holds whole completions, for the router's balance
        rows = trainer.passes.rows(inputs)
        trainer.passes.over(trainer.model, inputs, rows)
    expected = []
    for row in (rows[0], *rows[:4]):
        prompt, completion = random_experts(row.prompt, row.completion)
        expected.append(prompt if not expected else completion)
    (found,) = seen
    places = 0
    for part in expected:
        assert (found[places : places + len(part)].numpy() == part[:, 1]).all()
        places += len(part) + (part is not expected[0])  # a completion's last token: the learner's own choice
    _, gradients = backward(trainer, inputs)
    assert all(float(gradients[name].norm()) > 0 for name in gradients if name.endswith("mlp.gate.weight"))


# What is refused


def test_cores_and_engines_without_experts_to_return_are_refused():
    with pytest.raises(ValueError, match=r"model runner V2 only.*engine: hf, or device: gpu"):
        PoolConfig(max_model_tokens=64, routing_replay=True)
    with pytest.raises(ValueError, match="this core is dense"):
        Routing.of({"num_hidden_layers": 2})
    replay, hf = "servers.routing_replay=true", "servers.engine=hf"
    with pytest.raises(ConfigError, match=r"rlvr\.learner\.prefix=stock with servers\.routing_replay"):
        load_recipe("recipes/sailvl2_a3b", [replay, "rlvr.learner.prefix=stock"])
    from chain.checks import check

    with pytest.raises(ConfigError, match=r"servers\.routing_replay: the core is dense"):
        check(load_recipe("recipes/sailvl2_2b", [replay, hf]), allow_missing=True)
    assert load_recipe("recipes/sailvl2_a3b", [replay]).servers.routing_replay


# A stage

STAGE = {
    "data": [{"set": "rl"}],
    "rewards": [{"name": "answer", "use": "answer", "weight": 1.0}],
    "algorithm": {"name": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
    "rollout": {"prompts_per_batch": 2, "group_size": 4, "max_completion_tokens": 12},
    "dynamic_sampling": {"max_rounds": 0},
    "batches": 2,
    "mini_batch": 4,
    "optim": {"learning_rate": 1e-4, "micro_batch_size": 4},
    "learner": {"deepspeed": None},
    "self_test_rows": 0,
}


def test_a_stage_replays_after_every_update_and_its_parity_probe_too(tmp_path, records):
    from core.files import read_jsonl
    from core.model.tiny import TinySize, build_tiny
    from core.strict import parse
    from corpus.records import write_records
    from rl.config import RLConfig
    from rl.job import ServedJob
    from rl.rollout.server import rollout_pool
    from rl.train import train

    size = TinySize(experts=16, experts_per_token=4, text_layers=6)
    core = build_tiny(tmp_path / "core", words=WORDS, seed=0, size=size)
    write_records(tmp_path / "rl.parquet", records[:4])
    pool = PoolConfig(engine="hf", dtype="bfloat16", routing_replay=True, max_model_tokens=256)
    found = {}
    with rollout_pool(pool, core, tmp_path) as urls:
        for replay in (True, False):
            cfg = parse(RLConfig, {**STAGE, "parity": {"bound": 5.0, "tokens": 12}}, "test")
            out = tmp_path / f"replay-{replay}"
            out.mkdir()
            job = ServedJob(
                stage="rlvr",
                model=core,
                out=out,
                sets={"rl": tmp_path / "rl.parquet"},
                pool=pool.model_copy(update={"routing_replay": replay}),
                urls=urls,
                weights=out,
            )
            train(cfg, job)
            found[replay] = read_jsonl(out / "metrics.jsonl")[::2]  # the first of each batch's two updates
    gap = "sampling/sampling_logp_difference/mean"
    assert len(found[True]) == 2
    for ours, plain in zip(found[True], found[False], strict=True):
        assert ours[gap] < 0.7 * plain[gap]
        assert ours["parity/max_logprob_difference"] < plain["parity/max_logprob_difference"]
