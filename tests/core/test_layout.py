"""Our files equal those that transformers writes, and the arithmetic of sizes agrees with the tensors."""

import pytest
import torch
from safetensors.torch import load_file

from core import SailVL2ForConditionalGeneration
from core.checkpoint.stream import write_stream
from core.model.layout import native_shapes, stored
from core.model.shape import CoreShape, count
from core.model.tiny import TinySize, tiny_config
from core.model.tokenizer import build_word_tokenizer

SIZES = {
    "dense": TinySize(),
    "output layer of its own": TinySize(tie_embeddings=False),
    "experts": TinySize(experts=3, experts_per_token=2, tie_embeddings=False),
    "any resolution": TinySize(any_resolution=True),
}


@pytest.fixture(params=SIZES)
def model(request):
    return SailVL2ForConditionalGeneration(tiny_config(build_word_tokenizer(["A"]), SIZES[request.param]))


def test_a_checkpoint_is_byte_for_byte_the_one_that_transformers_saves(model, tmp_path):
    model.save_pretrained(tmp_path / "theirs")
    (tmp_path / "ours").mkdir()
    write_stream(stored(model.state_dict(), model.all_tied_weights_keys), tmp_path / "ours")
    ours, theirs = (tmp_path / name / "model.safetensors" for name in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_the_shapes_of_a_configuration_are_those_on_disk(model, tmp_path):
    write_stream(stored(model.state_dict(), model.all_tied_weights_keys), tmp_path)
    found = {name: tuple(tensor.shape) for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert native_shapes(model.config) == found


@pytest.mark.parametrize("biases", [{}, {"qkv_bias": True}, {"mlp_bias": True}, {"attention_bias": True}])
def test_parameters_are_counted_without_a_model(model, biases):
    config = model.config
    for key, value in biases.items():
        setattr(config.text_config if key == "attention_bias" else config.vision_config, key, value)
    built = SailVL2ForConditionalGeneration(config)
    assert count(config).total == sum(parameter.numel() for parameter in built.parameters())
    assert sum(CoreShape.of(config.to_dict()).parameters().values()) == count(config).total


def test_experts_that_a_token_does_not_visit_are_idle():
    config = tiny_config(build_word_tokenizer(["A"]), SIZES["experts"])
    counted, text = count(config), config.text_config
    expert = 3 * text.hidden_size * text.moe_intermediate_size
    assert counted.idle_experts == text.num_hidden_layers * (3 - 2) * expert
    assert counted.activated == counted.language_model_total - counted.idle_experts


def test_half_precision_is_written_as_it_is(model, tmp_path):
    half = model.to(torch.bfloat16)
    write_stream(stored(half.state_dict(), half.all_tied_weights_keys), tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
