"""Facts about TRL that rl/trainer.py relies on. If a test here fails, TRL has changed: read TRL before the test."""

import inspect

import pytest

trl = pytest.importorskip("trl")


@pytest.fixture(scope="module")
def source():
    from trl import GRPOTrainer

    return inspect.getsource(GRPOTrainer)


def test_the_overridden_method_takes_inputs_and_is_called_once_per_generation_batch(source):
    from trl import GRPOTrainer

    signature = inspect.signature(GRPOTrainer._generate_and_score_completions)
    assert list(signature.parameters) == ["self", "inputs"]
    assert "generation_batch = self._generate_and_score_completions(generation_batch)" in source


def test_rollout_func_hands_over_ids_and_logprobs_and_keeps_the_rows_images(source):
    assert 'required_keys = {"prompt_ids", "completion_ids", "logprobs"}' in source
    assert "images = dataset_images  # restore dataset images (rollout_func path returns None)" in source


def test_use_vllm_after_construction_turns_on_the_correction_and_skips_the_sync(source):
    assert "if self.use_vllm and self.state.global_step != self._last_loaded_step:" in source
    assert "self.use_vllm and self.vllm_importance_sampling_correction" in source


def test_scoring_takes_images_by_row_and_by_tile():
    from trl import GRPOTrainer

    names = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert {
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "pixel_values",
        "num_images",
        "num_tiles",
    } <= set(names)


def test_the_fused_head_adds_the_heads_bias():
    from trl.trainer import utils

    assert "weight, bias = lm_head.weight, lm_head.bias" in inspect.getsource(utils.add_fused_lm_head)


def test_rows_without_any_score_are_left_out_of_the_baseline(source):
    assert "unscorable_mask = torch.isnan(rewards_per_func).all(dim=1)" in source
    assert "torch.nanmean(rewards.view(-1, num_generations), dim=1)" in source


def test_rows_are_shuffled_and_split_where_groups_are_kept_together(source):
    """rl/trainer.py has its own `_prepare_inputs`."""
    for line in (
        "generate_every = self.args.steps_per_generation * self.num_iterations",
        "if self._step % generate_every == 0 or self._buffered_inputs is None:",
        "generation_batch = shuffle_sequence_dict(generation_batch)",
        "inputs = self._buffered_inputs[self._step % self.args.steps_per_generation]",
    ):
        assert line in source


def test_the_image_processor_is_asked_for_pixels_and_for_tile_counts(source):
    assert "self.processing_class(images=images, text=prompts_text, padding=True" in source
    assert 'forward_kwargs["pixel_values"].ndim == 4' in source
    assert "self.processing_class.image_processor(" in source


def test_the_loss_takes_both_sums_from_one_overridable_pass(source):
    assert "per_token_logps, entropies, aux_loss = self._get_per_token_logps_and_entropies(" in source
    assert "all_logps.append(outputs.log_probs[:, -logits_to_keep:])" in source
    # packs of a micro-batch add up: dapo by the whole batch's tokens, grpo by the mean over rows
    assert (
        'normalizer = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes' in source
    )
    assert "loss = ((per_token_loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()" in source


def test_the_trainer_leaves_the_loss_as_it_is():
    from trl.trainer import base_trainer

    assert 'self.compute_loss_func = "non-None value to disable scaling"' in inspect.getsource(base_trainer)


def test_the_fused_head_takes_shifted_labels_of_the_backbones_positions():
    from trl.trainer import utils

    source = inspect.getsource(utils.add_fused_lm_head)
    assert "backbone_outputs = getattr(self, backbone_attr)(*args, **kwargs)" in source
    assert "hidden_states = backbone_outputs.last_hidden_state\n            labels = shift_labels" in source
    assert 'num_experts, num_experts_per_tok, kwargs.get("attention_mask")' in source
