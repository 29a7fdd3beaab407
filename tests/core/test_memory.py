"""The estimate of a learner's memory, against the model itself: its parameters, and what its passes keep."""

from types import SimpleNamespace

import pytest

from core.model.shape import SHAPES, CoreShape
from core.training.config import LearnerConfig
from core.training.memory import Work, estimate

TOKENS, TILES = 192, 3
SIZES = {
    "dense": {"tie_embeddings": True},
    "untied": {"tie_embeddings": False, "text_kv_heads": 4},
    "experts": {"experts": 4, "experts_per_token": 2},
}


def model_of(size: str, device: str = "cpu", **changes):
    """A random core, and its shape."""
    import torch

    from core import SailVL2ForConditionalGeneration, TinySize, register
    from core.model.tiny import tiny_config
    from core.model.tokenizer import build_word_tokenizer

    register()
    config = tiny_config(build_word_tokenizer(["A"]), TinySize(**SIZES[size], **changes))
    with torch.device(device):
        model = SailVL2ForConditionalGeneration(config)
    return model, CoreShape.of(config.to_dict())


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_those_of_the_model(size):
    from core.model.names import module_of

    model, shape = model_of(size, "meta")
    model.tie_weights()
    counted = dict.fromkeys(shape.parameters(), 0)
    for name, parameter in model.named_parameters():
        counted[module_of(name)] += parameter.numel()
    assert shape.parameters() == counted


@pytest.mark.parametrize(
    ("size", "published"),
    # Qwen3's model cards: 1.7B, 8.2B and 30.5B parameters.
    [("2b", 1.72e9), ("8b", 8.19e9), ("a3b", 30.53e9)],
)
def test_the_released_sizes_have_the_published_language_models(size, published):
    assert SHAPES[size].parameters()["language_model"] == pytest.approx(published, rel=0.002)


@pytest.mark.parametrize("targets", ["language_model", "all_linear"])
def test_adapters_have_the_parameters_that_peft_makes(targets):
    from peft import get_peft_model

    from core.training.config import LoRAConfig
    from core.training.model import peft_config

    model, shape = model_of("dense")
    lora = LoRAConfig(r=3, targets=targets)
    adapted = get_peft_model(model, peft_config(LearnerConfig(lora=lora)))
    made = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert shape.adapter_parameters(3, targets == "all_linear") == made


def kept_bytes(model, shape, dtype, packed, autocast):
    """Bytes of what a forward pass keeps for the backward pass, each storage once, weights not counted."""
    import torch

    from rl.shared_prefix.attention import SHARED_PREFIX
    from rl.shared_prefix.layout import PrefixGroup, PrefixLayout
    from sft.packed_rows import attend_within_samples

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    image = [model.config.image_token_id] * shape.tile_tokens * TILES
    ids = torch.tensor([[*image, *[20] * (TOKENS - len(image))]])
    positions = torch.arange(TOKENS)[None]
    if packed:
        attend_within_samples(model.get_base_model() if hasattr(model, "peft_config") else model)
        ends = torch.tensor([0, TOKENS // 2, TOKENS], dtype=torch.int32)
        layout = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "sample_lengths": (TOKENS // 2, TOKENS // 2)}
    else:
        core = model.get_base_model() if hasattr(model, "peft_config") else model
        core.config.text_config._attn_implementation = SHARED_PREFIX
        prompt = TOKENS // 2
        groups = PrefixLayout((PrefixGroup(prompt, (TOKENS - prompt - 20, 20)),))
        layout = {"prefix": groups, "attention_mask": torch.ones(1, 1, 1, 1)}
    core = model.base_model.model if hasattr(model, "peft_config") else model
    model.train()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        core.model(
            input_ids=ids,
            position_ids=positions,
            pixel_values=torch.randn(TILES, 3, shape.image_px, shape.image_px).to(dtype),
            use_cache=False,
            **layout,
        )
    return sum(size for size, _ in found.values())


KEPT = [
    pytest.param(SimpleNamespace(**{"size": "dense", "packed": True, "learner": {}, **case}), id=name)
    for name, case in {
        "packed": {},
        "shared prefix": {"packed": False},
        "no grouped heads": {"size": "untied"},
        "experts": {"size": "experts"},
        "bfloat16": {"learner": {"dtype": "bfloat16"}},
        "bfloat16 under autocast": {"learner": {"dtype": "bfloat16", "deepspeed": None}},
        "LoRA, bfloat16 under autocast": {
            "learner": {"dtype": "bfloat16", "deepspeed": None, "lora": {"r": 2}}
        },
        "bfloat16, shared prefix": {"packed": False, "learner": {"dtype": "bfloat16"}},
        "frozen tower": {"learner": {"freeze": ["tower"]}},
        "tower and adapter alone": {"learner": {"freeze": ["language_model"]}},
        "LoRA": {"learner": {"lora": {"r": 2}}},
        "LoRA everywhere": {"learner": {"lora": {"r": 2, "targets": "all_linear"}}},
    }.items()
]


@pytest.mark.parametrize("case", KEPT)
def test_activations_are_what_autograd_keeps(case):
    import torch
    from peft import get_peft_model

    from core.training.model import apply_freeze, peft_config

    sizes = {"vision_layers": 4, "text_layers": 4, "text_hidden": 192, "text_mlp": 448, "image_px": 112}
    model, shape = model_of(case.size, **sizes)
    learner = LearnerConfig(**case.learner)
    autocast = learner.dtype == "bfloat16" and learner.deepspeed is None
    half = learner.dtype == "bfloat16" and (
        learner.lora or not autocast
    )  # as core.training.model.load_model has it
    dtype = torch.bfloat16 if half else torch.float32
    model = model.to(dtype)
    if learner.lora:
        model = get_peft_model(model, peft_config(learner))
    else:
        apply_freeze(model, learner.freeze)
    work = Work(tokens=TOKENS, tiles=TILES, repeats_heads=not case.packed)
    memory = estimate(shape, learner, work, gpu=False)
    said = memory.activations + (
        memory.buffers if autocast else 0
    )  # autocast's copies of the weights are kept too
    assert said == pytest.approx(kept_bytes(model, shape, dtype, case.packed, autocast), rel=0.15)


def states(**learner):
    return estimate(SHAPES["2b"], LearnerConfig(dtype="bfloat16", **learner), Work(tokens=1024))


TOTAL = sum(SHAPES["2b"].parameters().values())


def test_zero_splits_states_then_gradients_then_weights_over_the_ranks():
    one, two, three = (states(processes=8, deepspeed={"zero_stage": stage}) for stage in (1, 2, 3))
    assert one.optimizer == two.optimizer == pytest.approx(12 * TOTAL / 8)  # float32 masters and two moments
    assert (one.gradients, two.gradients) == (2 * TOTAL, pytest.approx(2 * TOTAL / 8))
    assert one.weights == two.weights == 2 * TOTAL
    assert three.weights < two.weights  # its share, and the billion that is gathered at a time
    assert two.buffers == 2 * (
        2 * 500_000_000 + SHAPES["2b"].embedding
    )  # and the largest gradient that comes


def test_offloaded_states_are_on_the_host_with_the_gradients_that_wait():
    work = Work(tokens=1024, accumulates=False)
    learner = LearnerConfig(dtype="bfloat16", processes=8, deepspeed={"zero_stage": 2, "offload": "cpu"})
    off = estimate(SHAPES["2b"], learner, work)
    assert (off.optimizer, off.gradients, off.step) == (0, 0, 0)
    # Masters, moments, gradients in float32 and what AdamW makes for a moment, of an eighth of the weights.
    assert off.host == pytest.approx((12 + 4 + 8) * TOTAL / 8)
    # Several passes per update: DeepSpeed keeps their gradients whole, on every rank.
    assert estimate(SHAPES["2b"], learner, Work(tokens=1024)).host - off.host == 2 * TOTAL


def test_plain_pytorch_keeps_float32_weights_and_bfloat16_copies_of_them():
    plain = states(deepspeed=None)
    assert (plain.weights, plain.optimizer, plain.gradients) == (4 * TOTAL, 8 * TOTAL, 4 * TOTAL)
    assert plain.buffers == 2 * TOTAL


def test_lora_leaves_the_weights_in_bfloat16_and_moves_little():
    lora = states(deepspeed=None, lora={"r": 16})
    assert lora.weights == pytest.approx(2 * TOTAL, rel=0.02)
    assert lora.optimizer < 0.1 * lora.weights


def test_checkpointing_keeps_a_layers_input_in_the_place_of_its_inside():
    kept = {
        on: estimate(
            SHAPES["2b"], LearnerConfig(dtype="bfloat16", gradient_checkpointing=on), Work(tokens=16384)
        )
        for on in (False, True)
    }
    inputs = 28 * 16384 * 2048 * 2
    assert inputs < kept[True].activations < kept[False].activations / 10
    # What is computed again is one of 28 layers, and the gradients inside it.
    assert kept[False].activations / 28 < kept[True].recomputed < kept[False].activations / 14


def test_a_reference_model_costs_its_weights_unless_adapters_can_be_turned_off():
    with_kl = Work(tokens=1024, reference=True)
    full = estimate(SHAPES["2b"], LearnerConfig(dtype="bfloat16"), with_kl)
    assert full.weights == 2 * 2 * TOTAL
    lora = LearnerConfig(dtype="bfloat16", lora={"r": 8})
    assert estimate(SHAPES["2b"], lora, with_kl).weights == estimate(SHAPES["2b"], lora, Work(1024)).weights


def test_the_logits_never_exist_whole():
    # 20,480 x 151,936 float32 logits are 11.6 GiB; a tile and the output layer's gradient are under 3.
    head = estimate(SHAPES["2b"], LearnerConfig(dtype="bfloat16"), Work(tokens=20480)).head
    assert head < 3 * 2**30


@pytest.mark.slow
def test_estimates_are_within_15_percent_of_what_training_takes():
    from benchmarks.memory import CASES, table

    for line in table(CASES):
        assert line["ratio"] == pytest.approx(1, abs=0.15), line["case"]
