"""The arithmetic of an RL stage is checked before anything starts."""

import pytest

from core.strict import ConfigError, parse
from rl.config import RLConfig
from rl.rollout.config import PoolConfig

STAGE = {
    "data": [{"set": "rl"}],
    "rewards": [
        {"name": "answer", "use": "answer", "weight": 0.8},
        {"name": "format", "use": "think_format", "weight": 0.2},
    ],
    "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
    "rollout": {"prompts_per_batch": 16, "group_size": 8, "max_completion_tokens": 32},
    "batches": 10,
    "mini_batch": 64,
    "passes": 2,
    "optim": {"learning_rate": 1e-4, "micro_batch_size": 32},
    "parity": {"bound": 1e-3},
}


def stage(**changes) -> RLConfig:
    return parse(RLConfig, {**STAGE, **changes}, "recipe")


def test_updates_follow_from_batches_mini_batches_and_passes():
    # 16 prompts x 8 = 128 completions = 2 mini-batches of 64, passed twice: 4 updates per batch, 40 in 10 batches
    cfg = stage()
    assert cfg.completions_per_batch == 128
    assert cfg.updates_per_batch == 4
    assert cfg.max_steps == 40


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mini_batch": 48}, "mini_batch=48 does not divide the 128 completions"),
        ({"optim": {"learning_rate": 1e-4, "micro_batch_size": 48}}, "not a multiple of"),
        (
            {"optim": {"learning_rate": 1e-4, "epochs": 2}},
            "optim.epochs is for SFT phases; an RL stage says batches",
        ),
        ({"overlong": {"cache_tokens": 32}}, "overlong.cache_tokens=32 must be below"),
        ({"overlong": "periodic"}, "'periodic' is a choice of SFT stages"),
        ({"rewards": [{"name": "answer", "use": "answer", "weight": 0.8}]}, "sum to 0.8, not 1"),
        ({"rollout": {**STAGE["rollout"], "group_size": 1}}, "group_size"),
        ({"rollout": {**STAGE["rollout"], "grup_size": 4}}, "did you mean group_size"),
    ],
)
def test_inconsistent_settings_are_refused_with_value_and_rule(changes, words):
    with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
        stage(**changes)


def test_ranks_take_whole_groups():
    with pytest.raises(ConfigError, match=r"prompts_per_batch=16 is not a multiple of"):
        stage(learner={"processes": 3})


def test_servers_that_share_gpus_start_with_sleep_mode(monkeypatch):
    from pathlib import Path

    from rl.rollout.command import command, environment
    from rl.rollout.config import PoolConfig

    # vLLM's sleeping allocator refuses to run with expandable segments, which a learner may want.
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    alone = PoolConfig(device="gpu", max_model_tokens=64)
    shared = alone.model_copy(update={"share_gpus": True})
    assert "--enable-sleep-mode" in command(shared, Path("core"), 1)
    assert "--enable-sleep-mode" not in command(alone, Path("core"), 1)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment(shared)
    assert "PYTORCH_CUDA_ALLOC_CONF" in environment(alone)


@pytest.mark.parametrize(
    "word", ["--trust-remote-code", "--trust_remote_code", "--host", "--port=80", "--uds"]
)
def test_arguments_that_would_open_a_server_are_refused(word):
    with pytest.raises(ConfigError, match=f"extra_args has {word.replace('_', '-')}"):
        parse(PoolConfig, {"max_model_tokens": 64, "extra_args": [word]})
