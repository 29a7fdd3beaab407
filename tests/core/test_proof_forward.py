"""An imported checkpoint computes what its release computes, by implementations that this project did not write:
vLLM's AIMv2 tower, transformers' Qwen3 and Qwen3-MoE, and for the composition the plain torch of
released_reference.py. Random weights, float32.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import SailVL2ForConditionalGeneration
from core.checkpoint.released import import_released

from .released_reference import (
    IDS,
    Computed,
    Sizes,
    compute,
    continue_greedily,
    read_released,
    write_released,
)

LANGUAGE_MODELS = {
    "tied": {},
    "untied": {"tied": False, "shards": 3},
    "experts": {"tied": False, "experts": 6, "shards": 2},
    "called Qwen2": {"qwen2_label": True, "lm_head": False},
}
RELEASES = {
    f"{name}, {select_layer}": {**options, "select_layer": select_layer, "seed": seed}
    for seed, (name, options) in enumerate(LANGUAGE_MODELS.items())
    for select_layer in (-1, -4)
}
CLOSE = 1e-5
"""Largest difference of two tensors, as a share of the largest value: what float32 loses on the way."""
NEW_TOKENS = 12


@dataclass
class Both:
    """A release and its import, on the same two rows of two tiles each."""

    release: Path
    config: dict[str, Any]
    state: dict[str, torch.Tensor]
    native: SailVL2ForConditionalGeneration
    ids: torch.Tensor
    tiles: torch.Tensor
    expected: Computed


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("releases")
    return {name: write_released(folder / name, **options) for name, options in RELEASES.items()}


@pytest.fixture(scope="module")
def both(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    imports = tmp_path_factory.mktemp("imports")

    @cache
    def made(name: str) -> Both:
        import_released(folders[name], imports / name)
        native = SailVL2ForConditionalGeneration.from_pretrained(imports / name).eval()
        config, state = read_released(folders[name])
        ids, tiles = rows(config["force_image_size"])
        return Both(folders[name], config, state, native, ids, tiles, compute(config, state, ids, tiles))

    return made


def rows(side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of two tiles and some words: ids (2, tokens), tiles (4, 3, side, side)."""
    random = torch.Generator().manual_seed(7)
    images = [IDS["<|im_start|>"], IDS["<img>"], *[IDS["<IMG_CONTEXT>"]] * 8, IDS["</img>"]]
    words = torch.randint(0, 250, (2, 9), generator=random)
    tiles = torch.randn(4, 3, side, side, generator=random)
    return torch.cat([torch.tensor([images, images]), words], dim=1), tiles


def assert_close(got: torch.Tensor, expected: torch.Tensor) -> None:
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype == torch.float32
    scale = expected.abs().max()
    assert scale > 0.1  # nothing is proved by zeros
    assert (got - expected).abs().max() < CLOSE * scale


def outputs_of(modules: Any, run: Any) -> list[torch.Tensor]:
    """What each of the modules returns while `run` is called."""
    seen: list[torch.Tensor] = []
    hooks = [
        module.register_forward_hook(
            lambda *call: seen.append(call[2][0] if type(call[2]) is tuple else call[2])
        )
        for module in modules
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return seen


def tower_states(native: SailVL2ForConditionalGeneration, tiles: torch.Tensor) -> list[torch.Tensor]:
    """The imported tower's embedded patches, the output of each block, and the normed last one."""
    tower = native.model.vision_tower
    layers = [tower.embeddings, *tower.encoder.layers, tower.rms_norm]
    return outputs_of(layers, lambda: tower(pixel_values=tiles))


@pytest.mark.parametrize("name", RELEASES)
def test_every_block_of_the_tower_and_the_adapter_compute_what_the_release_does(both: Any, name: str) -> None:
    one = both(name)
    states = [*one.expected.tower, one.expected.tower_normed]
    for got, expected in zip(tower_states(one.native, one.tiles), states, strict=True):
        assert_close(got, expected)
    with torch.no_grad():
        pooled = one.native.get_image_features(one.tiles, return_dict=True).pooler_output
        folded = one.native.model.multi_modal_projector(one.native.model.tower_features(one.tiles))
    for features in (pooled, folded):  # two ways to the same features; the learner takes the second
        assert_close(features.reshape(one.expected.image_features.shape), one.expected.image_features)


@pytest.mark.parametrize("name", RELEASES)
def test_every_layer_of_the_language_model_and_the_logits_are_those_of_the_release(
    both: Any, name: str
) -> None:
    one = both(name)
    text = one.native.model.language_model
    run: dict[str, Any] = {}

    def forward() -> None:
        run["logits"] = one.native(
            input_ids=one.ids, pixel_values=one.tiles, attention_mask=torch.ones_like(one.ids)
        ).logits

    seen = outputs_of([*text.layers, text.norm], forward)
    for got, expected in zip(seen, [*one.expected.hidden[1:], one.expected.hidden_normed], strict=True):
        assert_close(got, expected)
    assert_close(run["logits"], one.expected.logits)


@pytest.mark.parametrize("name", RELEASES)
def test_greedy_generations_are_those_of_the_release(both: Any, name: str) -> None:
    one = both(name)
    expected = continue_greedily(one.config, one.state, one.ids, one.tiles, NEW_TOKENS)
    assert len(set(expected.flatten().tolist())) > NEW_TOKENS // 2  # no endless repetition of one token
    assert torch.equal(
        generate(one.native, input_ids=one.ids, pixel_values=one.tiles)[:, -NEW_TOKENS:], expected
    )


@pytest.mark.parametrize("name", RELEASES)
def test_transformers_qwen3_computes_the_same_from_the_released_language_weights(
    both: Any, name: str, tmp_path: Path
) -> None:
    one = both(name)
    qwen = qwen3(one, tmp_path)
    embedded = one.expected.hidden[0]
    run: dict[str, Any] = {}

    def forward() -> None:
        run["logits"] = qwen(inputs_embeds=embedded).logits

    theirs = outputs_of([*qwen.model.layers, qwen.model.norm], forward)
    text = one.native.model.language_model
    ours = outputs_of([*text.layers, text.norm], lambda: text(inputs_embeds=embedded))
    for got, expected in zip(ours, theirs, strict=True):
        assert_close(got, expected)
    with torch.no_grad():
        logits = one.native(input_ids=one.ids, pixel_values=one.tiles).logits
    assert_close(logits, run["logits"])
    ids = generate(one.native, input_ids=one.ids, pixel_values=one.tiles)[:, -NEW_TOKENS:]
    assert torch.equal(ids, generate(qwen, inputs_embeds=embedded))


def test_vllms_aimv2_computes_the_same_in_every_block_from_the_released_vision_weights(
    both: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    tiles = both(next(iter(RELEASES))).tiles
    theirs = vllm_states(folders, tiles, tmp_path)
    for name in RELEASES:
        assert_same_states(tower_states(both(name).native, tiles), theirs[name])


@pytest.mark.slow
def test_vllms_aimv2_computes_the_same_at_the_released_shape(tmp_path: Path) -> None:
    # SAIL-ViT-Huge: errors add up over 24 blocks and 1,024 patches.
    sizes = Sizes(vision_hidden=1536, vision_mlp=4096, vision_blocks=24, vision_heads=12, image_px=448)
    release = write_released(tmp_path / "release", sizes=sizes, shards=4)
    import_released(release, tmp_path / "import")
    tiles = torch.randn(1, 3, 448, 448, generator=torch.Generator().manual_seed(0))
    ours = tower_states(SailVL2ForConditionalGeneration.from_pretrained(tmp_path / "import").eval(), tiles)
    assert_same_states(ours, vllm_states({"real": release}, tiles, tmp_path)["real"])


def vllm_states(
    releases: dict[str, Path], tiles: torch.Tensor, folder: Path
) -> dict[str, dict[str, torch.Tensor]]:
    """What vllm_tower.py writes about each release."""
    save_file({"tiles": tiles}, folder / "tiles")
    folders = {name: str(release) for name, release in releases.items()}
    job = {"releases": folders, "tiles": str(folder / "tiles"), "out": str(folder)}
    (folder / "job.json").write_text(json.dumps(job))
    child = subprocess.run(
        [sys.executable, "-P", str(Path(__file__).with_name("vllm_tower.py")), str(folder / "job.json")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "WARNING"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return {name: load_file(folder / name) for name in releases}


def assert_same_states(ours: list[torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    names = [*(str(number) for number in range(len(ours) - 1)), "normed"]
    assert sorted(theirs) == sorted(names)
    for name, got in zip(names, ours, strict=True):
        assert_close(got, theirs[name])


def generate(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    model.generation_config.eos_token_id = None  # as many tokens as the reference
    with torch.no_grad():
        return model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            suppress_tokens=[IDS["<IMG_CONTEXT>"]],
            pad_token_id=IDS["<|endoftext|>"],
        )


def qwen3(one: Both, folder: Path) -> Any:
    """transformers' own model of the release's language part: its configuration and tensors."""
    from transformers import AutoModelForCausalLM

    prefix = "language_model."
    state = {name.removeprefix(prefix): value for name, value in one.state.items() if name.startswith(prefix)}
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    config = one.config["llm_config"]
    if config["model_type"] == "qwen2":  # what the older releases call theirs
        config = {**config, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return AutoModelForCausalLM.from_pretrained(folder).eval()
