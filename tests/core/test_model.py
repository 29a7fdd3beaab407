"""The model against a plain-torch computation, and against what transformers and TRL expect of it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import core
from core import SailVL2Config, SailVL2ForConditionalGeneration, SailVL2Processor, TinySize, build_tiny

PROMPT = "<|im_start|>user\n<IMG_CONTEXT>compute A + B<|im_end|><|im_start|>assistant\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny") / "core", words=["A", "B", "compute"], seed=0)


@pytest.fixture(scope="module")
def model(tiny: Path) -> SailVL2ForConditionalGeneration:
    return SailVL2ForConditionalGeneration.from_pretrained(tiny)


@pytest.fixture(scope="module")
def processor(tiny: Path) -> SailVL2Processor:
    return SailVL2Processor.from_pretrained(tiny)


def noise(seed: int) -> Image.Image:
    pixels = torch.randint(
        0, 256, (56, 56, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    return Image.fromarray(pixels.numpy())


def test_importing_core_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, core; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return weight * x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Softmax attention over (heads, tokens, head_dim), heads joined again."""
    scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if causal:
        scores += torch.full(scores.shape[1:], float("-inf")).triu(1)
    return (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)


def heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.unflatten(1, (count, -1)).transpose(0, 1)


def reference_image_tokens(w: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """(3, 56, 56) -> (4 image tokens, 128): AIMv2 tower, pixel shuffle in InternVL's order, adapter."""
    tower = {key.removeprefix("model.vision_tower."): value for key, value in w.items()}
    # A strided convolution is one linear map of each 14x14 patch.
    patches = pixels.unfold(1, 14, 14).unfold(2, 14, 14).permute(1, 2, 0, 3, 4).reshape(16, -1)
    x = patches @ tower["embeddings.patch_embed.weight"].flatten(1).T + tower["embeddings.patch_embed.bias"]
    x = rms_norm(x, tower["embeddings.rms_norm.weight"], 1e-5) + tower["embeddings.position_embedding.weight"]
    for i in range(2):
        layer = {k.removeprefix(f"encoder.layers.{i}."): v for k, v in tower.items()}
        y = rms_norm(x, layer["rms_norm1.weight"], 1e-5)
        q, k, v = (heads(y @ layer[f"attention.{name}_proj.weight"].T, 4) for name in "qkv")
        x = x + attend(q, k, v, causal=False) @ layer["attention.out_proj.weight"].T
        y = rms_norm(x, layer["rms_norm2.weight"], 1e-5)
        x = x + swiglu(y, *(layer[f"ffn.{name}_proj.weight"] for name in ("gate", "up", "down")))
    x = rms_norm(x, tower["rms_norm.weight"], 1e-5).reshape(4, 4, 96)
    # Block (i, j) is its patches (2i, 2j), (2i, 2j+1), (2i+1, 2j), (2i+1, 2j+1), one after the other.
    x = x.reshape(2, 2, 2, 2, 96).permute(0, 2, 1, 3, 4).reshape(4, 384)
    adapter = {key.removeprefix("model.multi_modal_projector."): value for key, value in w.items()}
    x = torch.nn.functional.layer_norm(x, (384,), adapter["layer_norm.weight"], adapter["layer_norm.bias"])
    x = torch.nn.functional.gelu(x @ adapter["linear_1.weight"].T + adapter["linear_1.bias"])
    return x @ adapter["linear_2.weight"].T + adapter["linear_2.bias"]


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (heads, tokens, 32), base 10,000, halves as pairs."""
    angles = torch.outer(torch.arange(x.shape[1]).float(), 10000.0 ** (-torch.arange(0, 32, 2).float() / 32))
    first, second = x.chunk(2, -1)
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1
    )


def reference_logits(
    w: dict[str, torch.Tensor], ids: torch.Tensor, image_tokens: torch.Tensor
) -> torch.Tensor:
    """(tokens,) -> (tokens, vocabulary): Qwen3 with the image tokens put in, output layer tied."""
    text = {key.removeprefix("model.language_model."): value for key, value in w.items()}
    x = text["embed_tokens.weight"][ids].clone()
    x[ids == 5] = image_tokens
    for i in range(3):
        layer = {k.removeprefix(f"layers.{i}."): v for k, v in text.items()}
        y = rms_norm(x, layer["input_layernorm.weight"], 1e-6)
        q = heads(y @ layer["self_attn.q_proj.weight"].T, 4)
        k = heads(y @ layer["self_attn.k_proj.weight"].T, 2)
        v = heads(y @ layer["self_attn.v_proj.weight"].T, 2)
        q = rotate(rms_norm(q, layer["self_attn.q_norm.weight"], 1e-6))
        k = rotate(rms_norm(k, layer["self_attn.k_norm.weight"], 1e-6))
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)  # each key head serves two query heads
        x = x + attend(q, k, v, causal=True) @ layer["self_attn.o_proj.weight"].T
        y = rms_norm(x, layer["post_attention_layernorm.weight"], 1e-6)
        x = x + swiglu(y, *(layer[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))
    return rms_norm(x, text["norm.weight"], 1e-6) @ text["embed_tokens.weight"].T


def test_logits_equal_a_plain_torch_forward_pass(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    inputs = processor(images=[[noise(0)]], text=[PROMPT], return_tensors="pt")
    weights = {key: value.detach() for key, value in model.named_parameters()}
    image_tokens = reference_image_tokens(weights, inputs["pixel_values"][0])
    expected = reference_logits(weights, inputs["input_ids"][0], image_tokens)
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits[0], expected, atol=2e-4)


def test_images_reach_the_logits_in_their_order(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    two = PROMPT.replace("<IMG_CONTEXT>", "<IMG_CONTEXT>" * 2)
    with torch.no_grad():
        logits = [
            model(**processor(images=[images], text=[two], return_tensors="pt")).logits
            for images in ([noise(0), noise(1)], [noise(1), noise(0)])
        ]
    assert not torch.allclose(*logits, atol=1e-2)


def test_saved_and_reloaded_through_the_auto_classes_the_core_is_the_same(
    tiny: Path, model: SailVL2ForConditionalGeneration, processor: SailVL2Processor, tmp_path: Path
) -> None:
    from transformers import AutoModel, AutoModelForImageTextToText

    core.register()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    inputs = processor(images=[[noise(0)]], text=[PROMPT], return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, again(**inputs).logits)
    assert isinstance(again, SailVL2ForConditionalGeneration)
    assert type(AutoModel.from_config(again.config)) is core.SailVL2Model
    for file in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / file).read_bytes() == (tiny / file).read_bytes()


def test_trl_creates_the_core_from_its_path(tiny: Path) -> None:
    from trl.trainer.utils import create_model_from_path

    core.register()
    core.register()  # a second call changes nothing
    assert type(create_model_from_path(str(tiny))) is SailVL2ForConditionalGeneration


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_vision_feature_layer_selects_a_hidden_state(
    tiny: Path, model: SailVL2ForConditionalGeneration, processor: SailVL2Processor, layer: int
) -> None:
    pixels = processor(images=[[noise(0)]], text=[PROMPT], return_tensors="pt")["pixel_values"]
    config = SailVL2Config.from_pretrained(tiny, vision_feature_layer=layer)
    selected = SailVL2ForConditionalGeneration.from_pretrained(tiny, config=config)
    with torch.no_grad():
        tower = model.model.vision_tower(pixel_values=pixels, output_hidden_states=True)
        # Hidden state k is the input of block k; -1 alone is the normed output.
        features = tower.last_hidden_state if layer == -1 else tower.hidden_states[layer]
        shuffled = model.model.pixel_shuffle(features.reshape(1, 4, 4, 96)).reshape(1, 4, 384)
        expected = model.model.multi_modal_projector(shuffled)
        assert torch.equal(selected.get_image_features(pixels).pooler_output, expected)


def test_image_tokens_without_their_tiles_are_refused(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    inputs = processor(images=[[noise(0)]], text=[PROMPT], return_tensors="pt")
    inputs["input_ids"][0, -1] = model.config.image_token_id  # what an exploring policy may write
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        model(**inputs)


def test_padding_changes_no_greedy_completion(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    rows = [PROMPT, PROMPT.replace("compute", "compute compute compute")]
    images = [[noise(0)], [noise(1)]]
    greedy = {"max_new_tokens": 8, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    both = model.generate(**processor(images=images, text=rows, padding=True, return_tensors="pt"), **greedy)
    alone = model.generate(**processor(images=images[:1], text=rows[:1], return_tensors="pt"), **greedy)
    assert both[0].tolist()[-8:] == alone[0].tolist()[-8:]


def test_several_completions_of_a_row_with_two_images_see_both_images(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    two = PROMPT.replace("<IMG_CONTEXT>", "<IMG_CONTEXT>" * 2)
    inputs = processor(images=[[noise(0), noise(1)]], text=[two], return_tensors="pt")
    ids, expanded = model._expand_inputs_for_generation(expand_size=2, **inputs)
    pixels = inputs["pixel_values"]
    assert torch.equal(expanded["pixel_values"], torch.cat([pixels, pixels]))  # a, b, a, b and not a, a, b, b
    assert ids.shape[0] == 2


def test_a_mixture_of_experts_adds_its_balancing_loss(tmp_path: Path) -> None:
    size = TinySize(experts=4, tie_embeddings=False)
    build_tiny(tmp_path, words=["A"], seed=0, size=size)
    moe = SailVL2ForConditionalGeneration.from_pretrained(tmp_path)
    ids = torch.tensor([[1, 8, 9, 10]])
    with torch.no_grad():
        plain = moe(input_ids=ids, labels=ids)
        balanced = moe(input_ids=ids, labels=ids, output_router_logits=True)
    assert plain.aux_loss is None
    assert balanced.loss - plain.loss == pytest.approx(0.001 * balanced.aux_loss.item(), rel=1e-2)
    assert len(balanced.router_logits) == 3


def test_a_dictionary_without_use_head_becomes_a_tower_without_head() -> None:
    config = SailVL2Config(vision_config={"hidden_size": 96}, text_config={"tie_word_embeddings": True})
    assert config.vision_config.model_type == "aimv2_vision_model"
    assert config.vision_config.use_head is False
    assert config.text_config.model_type == "qwen3"
    assert config.tie_word_embeddings is True


def test_the_default_is_the_released_tower_with_256_tokens_per_tile() -> None:
    config = SailVL2Config()
    assert (config.vision_config.hidden_size, config.vision_config.num_hidden_layers) == (1536, 24)
    assert config.image_seq_length == 256  # (448 / 14 / 2) ** 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_seq_length": 100}, "image_seq_length=100: the parts of the model say 256"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True: the parts of the model say False"),
        ({"vision_config": {"use_head": True}}, "use_head=True"),
        ({"vision_feature_select_strategy": "default"}, "no CLS token"),
        ({"vision_config": {"image_size": 70, "patch_size": 14}}, "5 patches per side cannot be downsampled"),
    ],
)
def test_a_configuration_that_contradicts_itself_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SailVL2Config(**wrong)


def test_a_batch_without_any_tile_reads_as_text_and_reaches_the_towers_gradients(tmp_path):
    """A text-only micro-batch cut from a mixed batch has pixel_values of no tile."""
    from core.model.tiny import build_tiny
    from core.training.config import LearnerConfig
    from core.training.model import load_model

    model = load_model(build_tiny(tmp_path / "tiny", words=["A"], seed=0), LearnerConfig())
    ids = torch.tensor([[20, 21, 22]])
    nothing = torch.zeros(0, 3, 56, 56)
    with_nothing = model(input_ids=ids, pixel_values=nothing).logits
    assert torch.equal(with_nothing, model(input_ids=ids).logits)
    with_nothing.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.vision_tower.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_checkpointing_gives_a_frozen_tower_no_backward_pass(tiny: Path, frozen: bool) -> None:
    model = SailVL2ForConditionalGeneration.from_pretrained(tiny)
    model.model.vision_tower.requires_grad_(not frozen)
    model.train()
    model.gradient_checkpointing_enable()
    features = model.model.tower_features(torch.zeros(1, 3, 56, 56))
    assert features.requires_grad == (not frozen)
