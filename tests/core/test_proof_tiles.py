"""Our processor cuts images as InternVL's rule says (tests/core/internvl_tiles.py), pixel for pixel."""

from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import core
from core import SailVL2ImageProcessor, SailVL2Processor, build_tiny
from corpus.records import RecordError, write_records

from . import internvl_tiles as internvl

SIDE = 28
# Both sides do float32 arithmetic on the same byte, in another order: an ulp of values up to 2.7. A byte more or
# less would be 0.017.
ROUNDING = 1e-6


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    random = np.random.default_rng(width * 10_007 + height)
    channels = len(Image.new(mode, (1, 1)).getbands())
    pixels = random.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.frombytes(mode, (width, height), pixels.tobytes())


def processor(side: int = SIDE, **kwargs: object) -> SailVL2ImageProcessor:
    return SailVL2ImageProcessor(size={"height": side, "width": side}, **kwargs)


def assert_cut_alike(how: SailVL2ImageProcessor, picture: Image.Image, *, least: int, most: int) -> None:
    side = how.size["height"]
    rule = internvl.two_scale_tiles if how.use_msac else internvl.tiles
    expected = rule(picture, least, most, side, how.use_thumbnail)
    got = how([picture], return_tensors="np")
    assert got["num_patches"].tolist() == [len(expected)]
    assert got["pixel_values"].dtype == np.float32
    assert got["pixel_values"].shape == (len(expected), 3, side, side)
    assert np.abs(got["pixel_values"] - internvl.normalized(expected)).max() < ROUNDING
    assert how.get_number_of_image_patches(picture.height, picture.width) == len(expected)


@pytest.mark.parametrize("thumbnail", [True, False])
@pytest.mark.parametrize("most", [10, 12])
def test_tiles_are_internvls_pixel_for_pixel(most: int, thumbnail: bool) -> None:
    how = processor(min_patches=1, max_patches=most, use_thumbnail=thumbnail)
    for width, height in internvl.random_sizes(160, seed=most + thumbnail, longest=400):
        assert_cut_alike(how, noise(width, height), least=1, most=most)


@pytest.mark.parametrize("thumbnail", [True, False])
def test_tiles_at_two_scales_are_the_wrappers_pixel_for_pixel(thumbnail: bool) -> None:
    how = processor(min_patches=1, max_patches=10, use_thumbnail=thumbnail, use_msac=True)
    for width, height in internvl.random_sizes(360 if thumbnail else 40, seed=7, longest=400):
        assert_cut_alike(how, noise(width, height), least=1, most=10)


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 2), (2, 2), (3, 12), (1, 24)])
def test_tiles_at_two_scales_are_the_wrappers_for_other_numbers_of_tiles(least: int, most: int) -> None:
    how = processor(min_patches=least, max_patches=most, use_msac=True)
    for width, height in internvl.random_sizes(20, seed=least, longest=400):
        assert_cut_alike(how, noise(width, height), least=least, most=most)


def test_a_batch_at_two_scales_is_its_images_in_turn() -> None:
    how = processor(max_patches=4, use_msac=True)
    pictures = [noise(90, 30), noise(20, 20), noise(28, 80)]
    whole = how(pictures, return_tensors="np")
    each = [how([picture], return_tensors="np") for picture in pictures]
    assert whole["num_patches"].tolist() == [int(one["num_patches"][0]) for one in each]
    assert np.array_equal(whole["pixel_values"], np.concatenate([one["pixel_values"] for one in each]))
    without = how(pictures, use_msac=False, return_tensors="np")
    assert without["num_patches"].tolist() == [4, 1, 4]


@pytest.mark.parametrize(("least", "most"), [(1, 1), (1, 2), (2, 6), (3, 12)])
def test_tiles_are_internvls_for_other_numbers_of_tiles(least: int, most: int) -> None:
    how = processor(min_patches=least, max_patches=most)
    for width, height in internvl.random_sizes(30, seed=least, longest=400):
        assert_cut_alike(how, noise(width, height), least=least, most=most)


def test_tiles_are_internvls_at_the_released_tile_size() -> None:
    how = SailVL2ImageProcessor(max_patches=10)
    assert how.size == {"height": 448, "width": 448}
    for width, height in [(448, 448), (1920, 1080), (640, 481), (300, 2000), (1, 1), (5000, 1), (1, 5000)]:
        assert_cut_alike(how, noise(width, height), least=1, most=10)


@pytest.mark.slow
@pytest.mark.parametrize("most", [10, 12])
def test_tiles_are_internvls_at_the_released_tile_size_for_hundreds_of_sizes(most: int) -> None:
    how = SailVL2ImageProcessor(max_patches=most)
    for width, height in internvl.random_sizes(260, seed=most, longest=4000):
        assert_cut_alike(how, noise(width, height), least=1, most=most)


@pytest.mark.parametrize("most", [10, 12])
def test_the_grid_is_internvls_for_thousands_of_sizes(most: int) -> None:
    how = SailVL2ImageProcessor(max_patches=most)
    for width, height in internvl.random_sizes(3000, seed=0, longest=6000):
        columns, rows = internvl.grid(width, height, 1, most, 448)
        tiles = columns * rows
        assert how.get_number_of_image_patches(height, width) == tiles + (tiles > 1), (width, height)


@pytest.mark.parametrize("most", range(1, 17))
def test_no_size_leaves_the_choice_to_the_order_of_grids_of_one_area(most: int) -> None:
    # The published code takes that order from a Python set; ours need not repeat it, because between two such
    # grids of another shape there is always one that is closer. (So it is only for grids of one tile and more.)
    shapes = [(i, j) for i in range(1, most + 1) for j in range(1, most + 1) if i * j <= most]
    ratios = {Fraction(*shape) for shape in shapes}
    for one, other in combinations(shapes, 2):
        if one[0] * one[1] == other[0] * other[1]:
            midway = (Fraction(*one) + Fraction(*other)) / 2
            assert min(abs(midway - ratio) for ratio in ratios) < abs(midway - Fraction(*one))


def test_several_images_of_one_call_keep_their_tiles_apart() -> None:
    how = processor(max_patches=6, use_thumbnail=False)
    pictures = [noise(90, 30), noise(28, 28), noise(30, 80)]
    expected = [internvl.tiles(picture, 1, 6, SIDE, thumbnail=False) for picture in pictures]
    got = how(pictures, return_tensors="np")
    assert got["num_patches"].tolist() == [len(cut) for cut in expected] == [3, 1, 3]
    everything = internvl.normalized([tile for cut in expected for tile in cut])
    assert np.abs(got["pixel_values"] - everything).max() < ROUNDING


def test_a_call_may_ask_for_another_number_of_tiles_or_no_thumbnail() -> None:
    how = processor(max_patches=6)
    picture = noise(90, 30)
    assert how([picture])["num_patches"] == [4]
    assert how([picture], use_thumbnail=False)["num_patches"] == [3]
    assert how.get_number_of_image_patches(30, 90, {"use_thumbnail": False}) == 3
    assert how([picture], max_patches=2)["num_patches"] == [3]


def test_the_switches_are_saved_with_a_checkpoint_and_found_by_the_auto_classes(tmp_path: Path) -> None:
    from transformers import AutoProcessor
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    core.register()
    build_tiny(tmp_path, words=["A"], seed=0)
    ours = SailVL2Processor.from_pretrained(tmp_path)
    ours.image_processor = processor(side=56, max_patches=5, use_thumbnail=False)
    ours.save_pretrained(tmp_path)
    for found in (
        AutoProcessor.from_pretrained(tmp_path).image_processor,
        AutoImageProcessor.from_pretrained(tmp_path),
    ):
        assert type(found) is SailVL2ImageProcessor
        assert (found.max_patches, found.use_thumbnail, found.size["height"]) == (5, False, 56)
        assert found.to_dict() == ours.image_processor.to_dict()


REFUSED = {
    "negative": (
        lambda: Image.fromarray(np.array([[-1, 3]], np.int32)),
        "values from -1 to 3: they must be finite",
    ),
    "nothing": (lambda: Image.new("RGB", (0, 7)), "the image has 0x7 pixels: it shows nothing"),
    "float array": (
        lambda: np.zeros((4, 4, 3), np.float32),
        "dtype float32: give a PIL image, or an array of bytes",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_an_image_that_eight_bits_cannot_show_is_refused(kind: str) -> None:
    make, message = REFUSED[kind]
    with pytest.raises(ValueError, match=message):
        processor()([make()])


def test_an_image_that_eight_bits_cannot_show_is_refused_with_its_row(tmp_path: Path) -> None:
    row = {"id": "a", "question": "what?", "answer": "3", "mode": "direct", "verifier": "exact"}
    problem = r"row 0: images: must decode \(found images\[0\]: .*must be finite and not negative; scale"
    with pytest.raises(RecordError, match=problem):
        write_records(tmp_path / "rows.parquet", [{**row, "images": [REFUSED["negative"][0]()]}])
