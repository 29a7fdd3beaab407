"""Cores of the real shapes with random weights: parameter counts in plain arithmetic, and weights made in a stream."""

import json
import shutil
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open

from core.checkpoint.new import DiskFull, fresh_tensors, new_core, plan_core
from core.model.shape import count
from core.model.sizes import blueprint, core_config
from core.model.tokenizer import build_padded_tokenizer
from core.strict import ConfigError

VOCABULARY = 151936
# hidden, layers, query heads, key/value heads, dense mlp or (experts, per token, expert mlp), tied
PUBLISHED = {
    "2b": (2048, 28, 16, 8, 6144, True),
    "8b": (4096, 36, 32, 8, 12288, False),
    "a3b": (2048, 48, 32, 4, (128, 8, 768), False),
}


def tower_by_hand() -> int:
    """SAIL-ViT-Huge, 448 px: four square matrices and a SwiGLU per block, two norms; no biases but the patches'."""
    block = 4 * 1536 * 1536 + 3 * 1536 * 4096 + 2 * 1536
    patches = 3 * 14 * 14 * 1536 + 1536 + 1536
    positions = (448 // 14) ** 2 * 1536
    return 24 * block + patches + positions + 1536


def adapter_by_hand(hidden: int) -> int:
    return 2 * 6144 + (6144 * hidden + hidden) + (hidden * hidden + hidden)


def language_model_by_hand(size: str) -> tuple[int, int, int]:
    """Parameters without embeddings, of the embeddings, and of the experts that a token does not visit."""
    hidden, layers, heads, kv_heads, mlp, tied = PUBLISHED[size]
    attention = (
        2 * hidden * heads * 128 + 2 * hidden * kv_heads * 128 + 2 * 128
    )  # q and o, k and v, their norms
    idle = 0
    if isinstance(mlp, int):
        feed_forward = 3 * hidden * mlp
    else:
        experts, visited, width = mlp
        feed_forward = experts * hidden + experts * 3 * hidden * width
        idle = layers * (experts - visited) * 3 * hidden * width
    body = layers * (attention + feed_forward + 2 * hidden) + hidden
    return body, VOCABULARY * hidden * (1 if tied else 2), idle


@pytest.mark.parametrize("size", PUBLISHED)
def test_every_part_has_the_parameters_of_the_published_architecture(size):
    counts = count(core_config(size))
    body, embeddings, idle = language_model_by_hand(size)
    assert counts.tower == tower_by_hand() == 682_031_616
    assert counts.adapter == adapter_by_hand(PUBLISHED[size][0])
    assert (counts.language_model, counts.embeddings, counts.idle_experts) == (body, embeddings, idle)
    assert counts.total == counts.tower + counts.adapter + body + embeddings


@pytest.mark.parametrize(
    ("size", "total", "without_embeddings", "activated"),
    # The model cards of Qwen3-1.7B, Qwen3-8B and Qwen3-30B-A3B, in billions.
    [("2b", 1.7, 1.4, 1.7), ("8b", 8.2, 6.95, 8.2), ("a3b", 30.5, 29.9, 3.3)],
)
def test_the_language_models_have_the_size_that_their_cards_give(size, total, without_embeddings, activated):
    counts = count(core_config(size))
    assert counts.language_model_total / 1e9 == pytest.approx(total, abs=0.05)
    assert counts.language_model / 1e9 == pytest.approx(without_embeddings, abs=0.05)
    assert counts.activated / 1e9 == pytest.approx(activated, abs=0.06)


def test_a_2b_has_the_bytes_of_the_release():
    # total_size in the released SAIL-VL2-2B's index: bfloat16, its tied output layer stored as a second copy.
    assert 2 * (count(core_config("2b")).total + VOCABULARY * 2048) == 5_461_130_240


def test_a_real_sizes_tokenizer_has_the_released_ids_and_a_word_for_every_row():
    tokenizer = build_padded_tokenizer(["read", "A"])
    released = {"<|endoftext|>": 151643, "<|im_end|>": 151645, "</think>": 151668, "<IMG_CONTEXT>": 151671}
    assert {token: tokenizer.convert_tokens_to_ids(token) for token in released} == released
    assert len(tokenizer) == VOCABULARY
    every_kind = [0, 40, 77_000, 151_642, 151_667, 151_935]
    assert tokenizer.encode(" ".join(tokenizer.convert_ids_to_tokens(every_kind))) == every_kind


def native_names_and_shapes(core):
    names = {}
    for file in core.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return names


def test_a_tiny_core_loads_runs_and_has_the_names_that_transformers_saves(tmp_path):
    import core
    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor

    core.register()
    path = new_core(plan_core("tiny", tmp_path / "core"), tmp_path / "core")
    model, processor = load_model(path, LearnerConfig(deepspeed=None)), load_processor(path)
    model.save_pretrained(tmp_path / "saved")
    assert native_names_and_shapes(path) == native_names_and_shapes(tmp_path / "saved")
    inputs = processor(text=["read A<|im_end|>"], return_tensors="pt")
    assert model(**inputs).logits.isfinite().all()
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["stage"], manifest["seed"]) == ("core new", 0)


def test_experts_are_written_one_by_one_and_load_as_the_stack_they_are(tmp_path):
    import core
    from core.checkpoint.stream import write_stream
    from core.model.tiny import TinySize, tiny_config
    from core.model.tokenizer import build_word_tokenizer

    core.register()
    config = tiny_config(build_word_tokenizer(["A"]), TinySize(experts=3, tie_embeddings=False))
    tensors = dict(fresh_tensors(config, seed=0))
    write_stream(iter(tensors.items()), tmp_path, total_bytes=0)
    config.save_pretrained(tmp_path)
    model, found = core.SailVL2ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]  # noqa: PT018
    gate = tensors["model.language_model.layers.1.mlp.experts.2.gate_proj.weight"]
    stacked = model.model.language_model.layers[1].mlp.experts.gate_up_proj[2]
    assert torch.equal(stacked[: len(gate)], gate)


def test_weights_are_drawn_as_transformers_draws_them():
    from core.model.modeling import SailVL2ForConditionalGeneration

    config = blueprint("tiny").config
    ours = dict(fresh_tensors(config, seed=0))
    with torch.random.fork_rng(devices=[]):
        theirs = SailVL2ForConditionalGeneration(config).float().state_dict()
    for name, tensor in ours.items():
        if tensor.unique().numel() < 3:  # norms, biases
            assert torch.equal(tensor, theirs[name]), name
        else:
            assert tensor.std().item() == pytest.approx(theirs[name].std().item(), rel=0.15), name
    assert (ours["model.language_model.embed_tokens.weight"][config.text_config.pad_token_id] == 0).all()


def test_a_seed_makes_the_same_weights_and_leaves_the_random_state_alone():
    config, state = blueprint("tiny").config, torch.get_rng_state()
    one, again, other = (dict(fresh_tensors(config, seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(
        one["model.vision_tower.embeddings.patch_embed.weight"],
        other["model.vision_tower.embeddings.patch_embed.weight"],
    )
    assert torch.equal(torch.get_rng_state(), state)


def test_shards_hold_what_one_file_holds_and_their_index_finds_it(tmp_path):
    import core

    core.register()
    plan = plan_core("tiny", tmp_path / "one", dtype="bfloat16")
    one = new_core(plan, tmp_path / "one")
    many = new_core(plan, tmp_path / "many", max_shard_bytes=200_000)
    index = json.loads((many / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == plan.weight_bytes
    assert len(set(index["weight_map"].values())) > 5
    whole, sharded = (core.SailVL2ForConditionalGeneration.from_pretrained(path) for path in (one, many))
    assert whole.dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))


def test_no_tensor_keeps_a_larger_one_in_memory():
    from core.model.tiny import TinySize, tiny_config
    from core.model.tokenizer import build_word_tokenizer

    config = tiny_config(build_word_tokenizer(["A"]), TinySize(experts=3, tie_embeddings=False))
    # An expert cut from its stack as a view would keep the whole stack until its file is written.
    assert all(
        tensor.untyped_storage().nbytes() == tensor.nbytes for _, tensor in fresh_tensors(config, seed=0)
    )


def test_the_released_layout_imports_to_the_native_core(tmp_path):
    from core.checkpoint.released import import_released

    plan = plan_core("tiny", tmp_path / "released", layout="released")
    imported = import_released(new_core(plan, tmp_path / "released", seed=3), tmp_path / "imported")
    assert "without a meaning" not in imported.text()
    native = new_core(plan_core("tiny", tmp_path / "native"), tmp_path / "native", seed=3)
    one, other = (path / "model.safetensors" for path in (native, tmp_path / "imported"))
    assert one.read_bytes() == other.read_bytes()
    assert "vision_model.trunk.post_trunk_norm.weight" in native_names_and_shapes(tmp_path / "released")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported", "native", "released"]


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("U", "free")(50_000_000_000))
    plan = plan_core("a3b", tmp_path / "core")
    with pytest.raises(DiskFull, match=r"takes 62\.5 GB and 50\.0 GB are free"):
        new_core(plan, tmp_path / "core")
    assert not list(tmp_path.iterdir())


def test_an_existing_folder_an_unknown_size_and_an_invalid_word_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="exists already"):
        plan_core("tiny", tmp_path)
    with pytest.raises(ConfigError, match="a3b, mid, tiny"):
        plan_core("30b", tmp_path / "core")
    with pytest.raises(ConfigError, match="word 'A1': a word is letters"):
        plan_core("tiny", tmp_path / "core", words=["A1"])


def test_the_command_prints_the_parts_and_writes_nothing_when_it_plans(tmp_path, capsys):
    from chain.cli.main import main

    assert main(["core", "new", "--size", "a3b", "--plan-only", str(tmp_path / "core")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "682,031,616",
        "8 of 128 experts",
        "3.35B",
        "30.53B",
        "31,230,947,840",
        "62.5 GB in bfloat16",
    ):
        assert words in text
    assert not list(tmp_path.iterdir())
