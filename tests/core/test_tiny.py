"""Tiny cores: deterministic bytes, and a tokenizer whose decoded text encodes to the same ids."""

import json
import random
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from core import SailVL2ForConditionalGeneration, TinySize, build_tiny
from core.model.prompts import THINK_CONTRACT
from core.model.tokenizer import build_word_tokenizer, generation_config

WORDS = ["A", "B", "C", "D", "compute", "largest", "minus", "smallest"]


def test_same_seed_gives_the_same_bytes_whatever_ran_before(tmp_path: Path) -> None:
    one = build_tiny(tmp_path / "one", words=WORDS, seed=3)
    torch.rand(7)
    two = build_tiny(tmp_path / "two", words=WORDS, seed=3)
    files = sorted(path.name for path in one.iterdir())
    assert files == sorted(path.name for path in two.iterdir())
    assert all((one / file).read_bytes() == (two / file).read_bytes() for file in files)


def test_another_seed_gives_other_weights_and_building_leaves_the_random_state_alone(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    weights = [
        (build_tiny(tmp_path / str(seed), words=WORDS, seed=seed) / "model.safetensors").read_bytes()
        for seed in (0, 1)
    ]
    assert weights[0] != weights[1]
    assert torch.equal(torch.get_rng_state(), state)


def test_the_default_size_is_the_studys(tmp_path: Path) -> None:
    words = [*WORDS, *(chr(97 + i // 26) + chr(97 + i % 26) for i in range(34))]  # 80 tokens, as the study's
    model = SailVL2ForConditionalGeneration.from_pretrained(build_tiny(tmp_path, words=words, seed=0))
    assert model.config.text_config.vocab_size == 80
    assert model.num_parameters() == 763_232
    assert model.dtype == torch.float32
    assert model.config.image_seq_length == 4
    assert model.lm_head.weight is model.get_input_embeddings().weight
    # Drawn with standard deviation 0.06: at 0.02 digits stayed at chance.
    assert model.lm_head.weight[1:].std().item() == pytest.approx(0.06, abs=0.003)
    tower = model.model.vision_tower.encoder.layers[0]
    assert tower.ffn.up_proj.weight.std().item() == pytest.approx(0.06, abs=0.003)


def test_generation_stops_at_the_end_of_turn_and_of_text_and_pads_with_the_latter(tmp_path: Path) -> None:
    build_tiny(tmp_path, words=WORDS, seed=0)
    saved = json.loads((tmp_path / "generation_config.json").read_text())
    tokenizer = build_word_tokenizer(WORDS)
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert saved.pop("transformers_version")
    # And nothing else: vLLM would adopt sampling parameters as every request's defaults.
    assert saved == {"eos_token_id": ends, "pad_token_id": ends[1]}
    assert generation_config(tokenizer).eos_token_id == ends


def test_generated_text_encodes_to_the_ids_it_was_decoded_from() -> None:
    tokenizer = build_word_tokenizer(WORDS)
    words = {tokenizer.convert_tokens_to_ids(word) for word in [*WORDS, "system", "user", "assistant"]}
    dice = random.Random(0)
    for _ in range(300):
        ids: list[int] = []
        while len(ids) < 20:
            drawn = dice.randrange(len(tokenizer))
            if not (ids and ids[-1] in words and drawn in words):  # two words side by side become one
                ids.append(drawn)
        assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_a_chain_decodes_without_spaces_and_reads_the_same_with_them() -> None:
    tokenizer = build_word_tokenizer(WORDS)
    chain = r"<think>C=9;9+7=16</think>\boxed{16}"
    assert tokenizer.decode(tokenizer.encode(chain)) == chain
    assert tokenizer.encode("<think> C = 9 ; 9 + 7 = 1 6 </think>\n\\boxed{ 16 }") == tokenizer.encode(chain)


def test_markup_survives_decoding_without_special_tokens() -> None:
    tokenizer = build_word_tokenizer(WORDS)
    text = r"<think>A</think>\boxed{3}"
    ids = tokenizer.encode(f"<|im_start|><img><IMG_CONTEXT></img>{text}<|im_end|><|endoftext|>")
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", ["<think>", "</think>", r"\boxed{", "}", THINK_CONTRACT, "<IMG_CONTEXT>"])
def test_markup_and_the_prompt_contract_are_one_token_each(text: str) -> None:
    assert len(build_word_tokenizer(WORDS).encode(text)) == 1


def test_an_unknown_word_is_unknown() -> None:
    tokenizer = build_word_tokenizer(WORDS)
    assert tokenizer.encode("A sailboat 7") == tokenizer.encode("A[UNK]7")


@pytest.mark.parametrize("word", ["two words", "A1", "", "42"])
def test_a_word_the_pre_tokenizer_would_cut_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match="a word is letters A-Z a-z only, or one other character"):
        build_word_tokenizer([*WORDS, word])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_px": 60}, "image_px=60 is not a multiple of 2 x patch_px=14"),
        ({"vision_heads": 5}, "vision_hidden=96 is not a multiple of vision_heads=5"),
        ({"text_kv_heads": 3}, "text_heads=4 is not a multiple of text_kv_heads=3"),
        ({"experts": 1}, "experts_per_token=2 exceeds experts=1"),
        ({"text_hiden": 64}, "did you mean text_hidden"),
    ],
)
def test_a_size_that_does_not_fit_together_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        TinySize(**wrong)
