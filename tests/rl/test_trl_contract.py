"""What rl/trainer.py relies on inside TRL. When one of these fails, TRL changed: read it before you mend the test."""

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
