"""A stage's `algorithm` as TRL's settings, and refused combinations."""

import pytest

from core.strict import ConfigError
from rl.rollout.config import PoolConfig

from .test_loss import config


def trl(tmp_path, **algorithm):
    from rl.algorithm import trl_config

    return trl_config(config(**algorithm), tmp_path, seed=0)


@pytest.mark.parametrize(
    ("name", "loss", "level", "scale", "aggregation"),
    [
        ("dapo", "dapo", "token", "group", "sum_then_normalize"),
        ("gspo", "grpo", "sequence", "group", "sum_then_normalize"),
        ("dr_grpo", "dr_grpo", "token", "none", "sum_then_normalize"),
        ("bnpo", "bnpo", "token", "group", "sum_then_normalize"),
        ("sapo", "sapo", "token", "group", "sum_then_normalize"),
        ("gdpo", "dapo", "token", "group", "normalize_then_sum"),
    ],
)
def test_a_name_sets_trls_switches(tmp_path, name, loss, level, scale, aggregation):
    args = trl(tmp_path, name=name)
    found = args.loss_type, args.importance_sampling_level, args.scale_rewards
    assert found == (loss, level, scale)
    assert args.multi_objective_aggregation == aggregation


def test_the_other_switches(tmp_path):
    args = trl(tmp_path, delta=1.5, entropy_bonus=0.01, top_entropy=0.2, kl_beta=0.1)
    assert (args.delta, args.entropy_coef, args.top_entropy_quantile, args.beta) == (1.5, 0.01, 0.2, 0.1)
    args = trl(tmp_path, name="sapo", sapo_temperature_positive=2.0)
    assert (args.sapo_temperature_pos, args.sapo_temperature_neg) == (2.0, 1.05)
    assert trl(tmp_path, name="cispo", clip_high=5).epsilon_high == 5
    assert trl(tmp_path, name="dr_grpo", scale_by_std=True).scale_rewards == "group"


@pytest.mark.parametrize(
    ("algorithm", "words"),
    [
        ({"name": "cispo"}, "caps the ratio itself"),
        ({"name": "sapo", "delta": 2.0}, "sapo does not have"),
        ({"name": "cispo", "clip_high": 5, "clip_schedule": {"end": 5}}, "cispo does not have"),
        ({"delta": 1.1}, r"above 1 \+ clip_high = 1.28"),
        ({"name": "gdpo", "scale_by_std": False}, "normalised per reward"),
        ({"name": "grpo2"}, "dapo"),
    ],
)
def test_switches_that_do_not_go_together_are_refused(algorithm, words):
    with pytest.raises(ConfigError, match=words):
        config(**algorithm)


@pytest.mark.parametrize(
    "knob", [{"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.1}, {"repetition_penalty": 1.1}, {"logit_bias": {}}]
)
def test_knobs_that_bend_the_distribution_are_refused_with_the_reason(knob):
    with pytest.raises(ConfigError, match="samples from the whole distribution"):
        config(rollout=knob)


def test_server_arguments_that_bend_the_distribution_are_refused():
    for word in ("--override-generation-config={}", "--logprobs_mode=raw_logprobs"):
        with pytest.raises(ValueError, match="whole distribution"):
            PoolConfig(max_model_tokens=64, extra_args=(word,))


def test_the_clip_moves_linearly_from_the_first_update_to_the_last():
    from types import SimpleNamespace

    from rl.algorithm import move_clip

    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=["writer"]), epsilon_high=0.28)
    move_clip(trainer, config(clip_schedule={"end": 0.2}).algorithm)
    callback, clips = trainer.callback_handler.callbacks[0], []
    for step in range(5):
        state, logs = SimpleNamespace(global_step=step, max_steps=5), {"loss": 0.0}
        callback.on_step_begin(None, state, None)
        callback.on_log(None, state, None, logs=logs)
        clips.append(logs["clip_high"])
    assert clips == pytest.approx([0.28, 0.26, 0.24, 0.22, 0.2])


def test_without_a_schedule_nothing_moves():
    from types import SimpleNamespace

    from rl.algorithm import move_clip

    trainer = SimpleNamespace(callback_handler=SimpleNamespace(callbacks=[]))
    move_clip(trainer, config().algorithm)
    assert trainer.callback_handler.callbacks == []
