"""A training with non-finite losses or gradients skips and logs these updates, and ends after a few in a row."""

import math

import pytest


def trained(tmp_path, factors, deepspeed=None):
    """Train one weight on a loss that is multiplied by a factor per update; (weights after each update, logs)."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from core.training.config import DeepSpeedConfig, LearnerConfig
    from core.training.finite import watch_finite
    from core.training.ranks import join_process_group

    learner = LearnerConfig(deepspeed=DeepSpeedConfig(zero_stage=deepspeed) if deepspeed else None)
    join_process_group(learner)

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))

        def forward(self, factor):
            # The gradient of 1e30 w**2, squared for the norm, overflows; that of NaN is NaN.
            return {"loss": (factor.mean() * self.weight.square()).mean()}

    weights, logs = [], []

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            weights.append(model.weight.detach().clone())

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                lines.append(dict(logs))

    lines = logs
    trainer = Trainer(
        model=Model(),
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            max_steps=len(factors),
            learning_rate=0.1,
            logging_steps=1,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            dataloader_pin_memory=False,
            deepspeed=learner.deepspeed.to_dict() if learner.deepspeed else None,
        ),
        train_dataset=[{"factor": value} for value in factors],
        callbacks=[Note()],
    )
    watch_finite(trainer)
    error = None
    try:
        trainer.train()
    except RuntimeError as raised:
        error = raised
    return weights, logs, error


@pytest.mark.parametrize("deepspeed", [None, 2])
def test_one_bad_update_is_skipped_counted_and_logged_as_it_is(tmp_path, deepspeed):
    weights, logs, error = trained(tmp_path, [1.0, math.nan, 1.0, 1.0], deepspeed)
    assert error is None
    assert (weights[1] == weights[0]).all()
    assert (weights[2] != weights[1]).all()
    assert [math.isnan(line["loss"]) for line in logs] == [False, True, False, False]
    assert [line.get("nonfinite_updates") for line in logs] == [None, 1, 1, 1]


@pytest.mark.parametrize("deepspeed", [None, 2])
def test_three_in_a_row_end_the_training(tmp_path, deepspeed):
    from core.training.finite import Diverged

    weights, logs, error = trained(tmp_path, [1.0, math.nan, math.inf, math.nan, 1.0], deepspeed)
    assert isinstance(error, Diverged)
    assert "the last 3 updates" in str(error)
    assert "step 4: loss nan" in str(error)
    assert "last finite loss was 1 at step 1" in str(error)
    assert len(logs) == 4
    assert (weights[-1] == weights[0]).all()


def test_a_norm_that_overflows_behind_a_finite_loss_counts_too(tmp_path):
    from core.training.finite import Diverged

    _, logs, error = trained(tmp_path, [1.0, 1e30, 1.0])
    assert error is None
    assert math.isfinite(logs[1]["loss"])
    assert [line.get("nonfinite_updates") for line in logs] == [None, 1, 1]
    assert isinstance(trained(tmp_path, [1.0, 1e30, 1e30, 1e30])[2], Diverged)


def test_a_training_of_two_updates_ends_after_two(tmp_path):
    from core.training.finite import Diverged

    assert isinstance(trained(tmp_path, [math.nan, math.nan])[2], Diverged)
