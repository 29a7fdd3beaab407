"""Images of any size: positions, tokens and features against plain torch, and against the fixed-size core."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import core
from core import SailVL2Config, SailVL2ForConditionalGeneration, SailVL2Processor, TinySize, build_tiny
from core.model.any_resolution import interpolated_positions
from core.model.image_patches import fitted_size

SIZE = TinySize(any_resolution=True, image_px=84)
QUESTION = "<IMG_CONTEXT>compute A"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("any") / "core", words=["A", "compute"], seed=0, size=SIZE)


@pytest.fixture(scope="module")
def model(folder: Path) -> SailVL2ForConditionalGeneration:
    return SailVL2ForConditionalGeneration.from_pretrained(folder)


@pytest.fixture
def processor(folder: Path) -> SailVL2Processor:
    return SailVL2Processor.from_pretrained(folder)


def noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def features(model: SailVL2ForConditionalGeneration, inputs: dict) -> list[torch.Tensor]:
    """(image tokens, hidden) of each image."""
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw") if name in inputs}
    with torch.no_grad():
        return list(model.model.get_image_features(**images).pooler_output)


def cubic(distance: float) -> float:
    """Keys' kernel with a = -0.75, torch's."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def stretching(learned: int, wanted: int) -> torch.Tensor:
    """(wanted, learned): each new place's weights of the learned ones, edges repeated."""
    weights = torch.zeros(wanted, learned, dtype=torch.float64)
    for place in range(wanted):
        centre = (place + 0.5) * learned / wanted - 0.5
        for source in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            weights[place, min(max(source, 0), learned - 1)] += cubic(centre - source)
    return weights


def in_blocks(grid: torch.Tensor) -> torch.Tensor:
    """(rows, columns, hidden) -> (rows * columns, hidden), 2x2 block after 2x2 block."""
    rows, columns, _ = grid.shape
    return torch.stack(
        [
            grid[row + i, column + j]
            for row in range(0, rows, 2)
            for column in range(0, columns, 2)
            for i in (0, 1)
            for j in (0, 1)
        ]
    )


@pytest.mark.parametrize(("rows", "columns"), [(6, 6), (2, 16), (14, 4), (8, 8), (2, 2)])
def test_positions_are_stretched_bicubically_in_both_directions(rows: int, columns: int) -> None:
    table = torch.randn(36, 5, generator=torch.Generator().manual_seed(0))
    square = table.double().reshape(6, 6, 5)
    expected = torch.einsum("rs,cd,sdh->rch", stretching(6, rows), stretching(6, columns), square)
    got = interpolated_positions(table, rows, columns)
    torch.testing.assert_close(got, in_blocks(expected).float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_learned_size_positions_are_the_learned_ones_bit_for_bit(dtype: torch.dtype) -> None:
    table = torch.randn(36, 5).to(dtype)
    assert torch.equal(interpolated_positions(table, 6, 6), in_blocks(table.reshape(6, 6, 5)))


@pytest.mark.parametrize("layer", [-1, -2])
def test_an_image_of_the_learned_size_is_seen_as_by_the_fixed_size_core(tmp_path: Path, layer: int) -> None:
    """448 px and 256 tokens, as the released cores."""
    size = {"image_px": 448, "vision_layers": 3}
    fixed_path = build_tiny(tmp_path / "fixed", words=["A"], seed=0, size=TinySize(**size))
    any_path = build_tiny(tmp_path / "any", words=["A"], seed=1, size=TinySize(**size, any_resolution=True))
    seen = []
    for path in (fixed_path, any_path):
        processor = SailVL2Processor.from_pretrained(path)
        if path == any_path:
            processor.image_processor.size = {"longest_edge": 1792}
        config = SailVL2Config.from_pretrained(path, vision_feature_layer=layer)
        # One file of weights serves both.
        weights = SailVL2ForConditionalGeneration.from_pretrained(fixed_path).state_dict()
        model = SailVL2ForConditionalGeneration(config)
        model.load_state_dict(weights)
        inputs = processor(images=[[noise(448, 448), noise(448, 448, 1)]], text=["<IMG_CONTEXT>A<IMG_CONTEXT>"],
                           return_tensors="pt")  # fmt: skip
        with torch.no_grad():
            seen.append((inputs["input_ids"], torch.stack(features(model, inputs)), model(**inputs).logits))
    (ids, fixed_features, fixed_logits), (any_ids, any_features, any_logits) = seen
    assert torch.equal(ids, any_ids)
    assert any_features.shape == (2, 256, 128)
    torch.testing.assert_close(any_features, fixed_features, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(any_logits, fixed_logits, atol=1e-5, rtol=1e-5)


def test_an_image_of_odd_aspect_is_seen_as_by_a_tower_of_that_shape(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    """The fixed-size tower run on 8 by 2 patches, its positions put in by hand."""
    inputs = processor(images=[[noise(112, 28)]], text=[QUESTION], return_tensors="pt")
    blocks = inputs["pixel_values"].reshape(4, 1, 2, 2, 3, 14, 14)
    pixels = blocks.permute(4, 0, 2, 5, 1, 3, 6).reshape(1, 3, 112, 28)
    tower = model.model.vision_tower
    with torch.no_grad():
        table = tower.embeddings.position_embedding.weight.double().reshape(6, 6, 96)
        positions = torch.einsum("rs,cd,sdh->rch", stretching(6, 8), stretching(6, 2), table).float()
        x = tower.embeddings.patch_embed(pixels)[0].permute(1, 2, 0)  # (8, 2, hidden), row-major
        x = (tower.embeddings.rms_norm(x) + positions).reshape(16, 96)
        for layer in tower.encoder.layers:
            y, attention = layer.rms_norm1(x), layer.attention
            q, k, v = (
                projection(y).reshape(16, 4, 24).transpose(0, 1)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            weights = (q @ k.transpose(1, 2) / 24**0.5).softmax(-1)
            x = x + attention.out_proj((weights @ v).transpose(0, 1).reshape(16, 96))
            x = x + layer.ffn(layer.rms_norm2(x))
        x = tower.rms_norm(x).reshape(1, 8, 2, 96)
        expected = model.model.multi_modal_projector(model.model.pixel_shuffle(x).reshape(4, 384))
    torch.testing.assert_close(features(model, inputs)[0], expected, atol=2e-5, rtol=1e-5)


def test_no_image_sees_another(model: SailVL2ForConditionalGeneration, processor: SailVL2Processor) -> None:
    images = [noise(60, 200, 1), noise(28, 28, 2), noise(130, 90, 3), noise(60, 200, 4)]
    text = QUESTION.replace("<IMG_CONTEXT>", "<IMG_CONTEXT>" * 4)
    together = features(model, processor(images=[images], text=[text], return_tensors="pt"))
    assert [len(one) for one in together] == [14, 1, 15, 14]  # 2x7, 1x1, 5x3 and 2x7 blocks of 28 px
    for image, seen in zip(images, together, strict=True):
        (alone,) = features(model, processor(images=[[image]], text=[QUESTION], return_tensors="pt"))
        torch.testing.assert_close(seen, alone, atol=2e-5, rtol=1e-5)
    images[2] = noise(130, 90, 5)
    changed = features(model, processor(images=[images], text=[text], return_tensors="pt"))
    assert [torch.equal(*pair) for pair in zip(together, changed, strict=True)] == [True, True, False, True]


def test_rows_of_a_batch_read_what_they_read_alone(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    """Two images, none and one; greedy completions and logits are those of each row by itself."""
    images = [[noise(60, 200, 1), noise(28, 56, 2)], [], [noise(130, 90, 3)]]
    rows = ["<IMG_CONTEXT>compute<IMG_CONTEXT>A", "A", QUESTION]
    batch = processor(images=images, text=rows, padding=True, padding_side="left", return_tensors="pt")
    greedy = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": [model.config.image_token_id]}
    completions = model.generate(**batch, **greedy)[:, -5:]
    with torch.no_grad():
        logits = model(**batch).logits
    for row in range(3):
        alone = processor(images=images[row : row + 1], text=rows[row : row + 1], return_tensors="pt")
        with torch.no_grad():
            expected = model(**alone).logits[0]
        torch.testing.assert_close(logits[row, -len(expected) :], expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(model.generate(**alone, **greedy)[0, -5:], completions[row])


def test_several_completions_of_each_row_see_the_images_of_their_row(
    model: SailVL2ForConditionalGeneration, processor: SailVL2Processor
) -> None:
    images = [[noise(60, 200, 1), noise(28, 56, 2)], [], [noise(130, 90, 3)]]
    rows = ["<IMG_CONTEXT>compute<IMG_CONTEXT>A", "A", QUESTION]
    batch = processor(images=images, text=rows, padding=True, return_tensors="pt")
    twice = processor(
        images=[row for row in images for _ in range(2)],
        text=[row for row in rows for _ in range(2)],
        padding=True,
        return_tensors="pt",
    )
    ids, expanded = model._expand_inputs_for_generation(expand_size=2, **batch)
    for name, value in {"input_ids": ids, **expanded}.items():
        assert torch.equal(value, twice[name]), name


def test_a_batch_without_images_reads_as_text_and_reaches_the_towers_gradients(
    model: SailVL2ForConditionalGeneration,
) -> None:
    from core.model.modeling import no_images

    ids = torch.tensor([[1, 8, 9]])
    model.zero_grad()
    logits = model(input_ids=ids, **no_images(model.config)).logits
    assert torch.equal(logits, model(input_ids=ids).logits)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.vision_tower.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradient_checkpointing_and_each_attention_give_the_same_gradients(
    folder: Path, processor: SailVL2Processor, implementation: str
) -> None:
    images = [[noise(60, 200, 1), noise(28, 56, 2)]]
    inputs = processor(images=images, text=["<IMG_CONTEXT>A<IMG_CONTEXT>"], return_tensors="pt")
    gradients = []
    for checkpointing in (False, True):
        attention = implementation if checkpointing else "sdpa"
        model = SailVL2ForConditionalGeneration.from_pretrained(folder, attn_implementation=attention).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append(model.model.vision_tower.embeddings.position_embedding.weight.grad)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_saved_and_reloaded_by_the_auto_classes_the_core_is_the_same(
    folder: Path, model: SailVL2ForConditionalGeneration, processor: SailVL2Processor, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    core.register()
    AutoModelForImageTextToText.from_pretrained(folder).save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path)
    for file in ("config.json", "model.safetensors", "processor_config.json"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    again = AutoProcessor.from_pretrained(tmp_path)
    assert type(again.image_processor).__name__ == "SailVL2AnyResImageProcessor"
    inputs = again(images=[[noise(61, 200)]], text=[QUESTION], return_tensors="pt")
    with torch.no_grad():
        logits = AutoModelForImageTextToText.from_pretrained(tmp_path)(**inputs).logits
        assert torch.equal(logits, model(**inputs).logits)


def test_a_fixed_size_core_does_not_mention_any_resolution_in_its_files(tmp_path: Path) -> None:
    fixed = build_tiny(tmp_path, words=["A"], seed=0)
    assert "any_resolution" not in (fixed / "config.json").read_text()
    assert SailVL2Config.from_pretrained(fixed).any_resolution is False


def test_the_longest_side_of_the_released_core_is_1792() -> None:
    from core.model.image_patches import SailVL2AnyResImageProcessor

    images = SailVL2AnyResImageProcessor()
    assert images.get_number_of_image_patches(10_000, 10_000) == 128**2
    assert images.get_number_of_image_patches(10_000, 10_000, {"size": {"longest_edge": 448}}) == 32**2


@pytest.mark.parametrize(
    ("given", "seen"),
    [
        ((448, 448), (448, 448)),
        ((1, 1), (28, 28)),
        ((14, 42), (28, 56)),  # half-way sides go to the even number of blocks
        ((1000, 700), (1008, 700)),
        ((3584, 896), (1792, 448)),  # scaled down by its longer side
        ((3584, 3584), (1792, 1792)),
        ((5000, 1), (1792, 28)),
    ],
)
def test_an_image_goes_to_its_nearest_size_in_whole_blocks(
    given: tuple[int, int], seen: tuple[int, int]
) -> None:
    assert fitted_size(*given, block=28, longest=1792) == seen


def test_any_size_gives_whole_blocks_within_the_limit_and_nearly_keeps_its_aspect() -> None:
    dice = np.random.default_rng(0)
    for height, width in dice.integers(28, 4000, (500, 2)).tolist():
        rows, columns = fitted_size(height, width, block=28, longest=1792)
        assert rows % 28 == columns % 28 == 0
        assert min(rows, columns) >= 28
        assert max(rows, columns) <= 1792
        scale = min(1, 1792 / max(height, width))
        assert abs(rows - height * scale) <= 28
        assert abs(columns - width * scale) <= 28


@pytest.mark.parametrize("size", [(56, 56), (131, 57), (1, 1), (5000, 1), (3, 500), (1000, 900)])
def test_token_count_from_the_size_alone_equals_the_real_one(
    processor: SailVL2Processor, size: tuple[int, int]
) -> None:
    inputs = processor(images=[[noise(*size)]], text=["<IMG_CONTEXT>"], return_tensors="pt")
    counted = processor._get_num_multimodal_tokens([size])
    assert counted.num_image_patches == [len(inputs["pixel_values"])]
    assert counted.num_image_tokens == [inputs["input_ids"].shape[1]]
    assert int((inputs["input_ids"] == processor.image_token_id).sum()) == len(inputs["pixel_values"]) // 4
    assert sorted(inputs) == ["attention_mask", "image_grid_thw", "input_ids", "pixel_values"]


def test_every_colour_mode_is_read_as_rgb(processor: SailVL2Processor) -> None:
    for mode in ("L", "RGBA", "P", "1"):
        inputs = processor(
            images=[[noise(40, 70).convert(mode)]], text=["<IMG_CONTEXT>"], return_tensors="pt"
        )
        assert inputs["image_grid_thw"].tolist() == [[1, 2, 4]]


def test_a_longest_side_of_no_whole_block_is_refused(processor: SailVL2Processor) -> None:
    processor.image_processor.size = {"longest_edge": 200}
    with pytest.raises(ValueError, match="longest side 200 px: images become whole blocks of 28 px"):
        processor(images=[[noise(40, 70)]], text=["<IMG_CONTEXT>"])
    with pytest.raises(ValueError, match="max_image_px=200 is not a multiple of 2 x patch_px=14"):
        TinySize(any_resolution=True, max_image_px=200)


def test_pictures_that_eight_bits_cannot_show_are_refused(processor: SailVL2Processor) -> None:
    negative = Image.fromarray(np.full((40, 70), -1, dtype=np.int32))
    with pytest.raises(ValueError, match="values from -1 to -1: they must be finite and not negative"):
        processor(images=[[negative]], text=["<IMG_CONTEXT>"])
    with pytest.raises(ValueError, match="ndarray and dtype float64: give a PIL image, or an array of bytes"):
        processor(images=[[np.zeros((40, 70, 3))]], text=["<IMG_CONTEXT>"])


def test_images_of_the_other_kind_of_core_are_refused(
    model: SailVL2ForConditionalGeneration, tmp_path: Path
) -> None:
    fixed = SailVL2ForConditionalGeneration.from_pretrained(build_tiny(tmp_path, words=["A"], seed=0))
    with pytest.raises(ValueError, match="any_resolution=True, but images came without image_grid_thw"):
        model(input_ids=torch.tensor([[5] * 9]), pixel_values=torch.zeros(1, 3, 84, 84))
    with pytest.raises(ValueError, match="any_resolution=False, but images came with image_grid_thw"):
        fixed.model.get_image_features(torch.zeros(4, 588), image_grid_thw=torch.tensor([[1, 2, 2]]))


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([[1, 2, 4]], "4 patches for images of"),
        ([[1, 1, 4]], r"an image of \(1, 4\) patches is not made of blocks"),
    ],
)
def test_grids_that_do_not_fit_the_patches_are_refused(
    model: SailVL2ForConditionalGeneration, grids: list, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        model.model.tower_features(torch.zeros(4, 588), torch.tensor(grids))


def test_another_downsampling_than_two_by_two_is_refused() -> None:
    with pytest.raises(ValueError, match="reads 2 by 2 patches as one image token"):
        SailVL2Config(any_resolution=True, downsample_ratio=0.25)
