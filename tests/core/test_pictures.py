"""One rule turns a file into pixels, and all code that reads pictures follows it."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from core.model.pictures import MAX_PIXELS, Picture, as_rgb
from core.model.videos import Decoded

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 10, 3), dtype=np.uint8)
RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def oriented(orientation: int, kind: str = "PNG") -> bytes:
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = orientation
    return encoded(Image.fromarray(PIXELS), kind, exif=exif)


def sixteen(values: np.ndarray, kind: str = ".png") -> bytes:
    import cv2

    return cv2.imencode(kind, values.astype(np.uint16))[1].tobytes()


def animation() -> bytes:
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, (0, 0, 255))]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def half_transparent() -> Image.Image:
    image = Image.new("RGBA", (8, 4), (*RED, 255))
    image.paste((0, 0, 0, 0), (0, 0, 4, 4))
    return image


# What EXIF's orientation means, in numpy's words (JEITA CP-3451: where row 0 and column 0 of the stored image are).
TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_the_orientation_is_applied(orientation: int, kind: str) -> None:
    picture = Picture(oriented(orientation, kind))
    size = picture.size  # from the header alone
    seen = picture.rgb()
    assert np.array_equal(np.asarray(seen), TURNS[orientation](PIXELS))
    assert seen.size == size
    assert as_rgb(seen) is seen  # and not a second time
    assert np.array_equal(np.asarray(as_rgb(Image.open(io.BytesIO(picture.data)))), np.asarray(seen))


def test_broken_exif_data_counts_as_none() -> None:
    data = encoded(Image.fromarray(PIXELS), "JPEG", exif=b"Exif\0\0broken")
    assert Picture(data).rgb().size == Picture(data).size == (10, 6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_alpha_is_laid_over_white(mode: str) -> None:
    image = half_transparent()
    image = image.convert("LA").convert(mode) if mode == "La" else image.convert(mode)
    seen = as_rgb(image)
    assert seen.getpixel((0, 0)) == WHITE
    assert seen.getpixel((6, 0)) == (RED if "L" not in mode else (76, 76, 76))


def test_a_transparent_colour_is_white_too() -> None:
    image = Image.new("RGB", (4, 4), RED)
    assert Picture(encoded(image, transparency=RED)).rgb().getpixel((0, 0)) == WHITE
    assert Picture(encoded(image.quantize(4), transparency=0)).rgb().getpixel((0, 0)) == WHITE


@pytest.mark.parametrize(
    ("top", "seen"),
    # 128 of 255; 512 of 1,023; 2,048 of 4,095; 32,768 of 65,535
    [((128, 255), 128), ((512, 1023), 128), ((2048, 4095), 128), ((32768, 65535), 128)],
)
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("kind", [".png", ".tiff"])
def test_more_than_eight_bits_are_scaled(top: tuple[int, int], seen: int, channels: int, kind: str) -> None:
    values = np.zeros((2, 2, channels))
    values[0, :, 0] = top
    values[..., 3:] = 65535
    pixels = np.asarray(Picture(sixteen(values if channels > 1 else values[..., 0], kind)).rgb())
    blue = pixels[..., 2]  # OpenCV writes blue first
    assert blue[0].tolist() == [seen, 255]
    assert blue[1].tolist() == [0, 0]


@pytest.mark.parametrize("orientation", [1, 6])
def test_sixteen_bits_are_turned_too(orientation: int) -> None:
    exif = Image.Exif()
    exif[Image.ExifTags.Base.Orientation] = orientation
    data = sixteen(PIXELS[..., ::-1].astype(int) * 257)
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    import zlib

    chunk = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    picture = Picture(data[:33] + chunk + data[33:])  # behind the header
    assert np.array_equal(np.asarray(picture.rgb()), TURNS[orientation](PIXELS))
    assert Picture(picture.data).size == picture.rgb().size


def test_floats_are_scaled() -> None:
    assert as_rgb(Image.fromarray(np.array([[0, 0.5, 1]], np.float32))).getpixel((1, 0)) == (128, 128, 128)
    assert as_rgb(Image.fromarray(np.array([[0, 300]], np.int32))).getpixel((1, 0)) == (
        75,
        75,
        75,
    )  # of 1,023


@pytest.mark.parametrize("values", [[-1, 3], [0, float("nan")], [0, float("inf")]])
def test_values_without_a_scale_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match="must be finite and not negative; scale them to"):
        as_rgb(Image.fromarray(np.array([values], np.float32)))


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("CMYK", (0, 255, 255, 0), RED),
        ("YCbCr", (76, 85, 255), (254, 0, 0)),
        ("HSV", (0, 255, 255), RED),
        ("LAB", (128, 128, 128), (119, 119, 119)),
        ("RGBX", (*RED, 0), RED),
        ("1", 1, WHITE),
    ],
)
def test_other_modes_are_converted(mode: str, colour: object, seen: tuple[int, int, int]) -> None:
    assert as_rgb(Image.new(mode, (2, 2), colour)).getpixel((0, 0)) == seen


def test_an_animation_shows_its_first_frame_and_says_so() -> None:
    picture = Picture(animation())
    assert picture.rgb().getpixel((0, 0)) == RED
    assert picture.animated
    still = Picture(encoded(Image.fromarray(PIXELS)))
    still.rgb()
    assert still.animated is False


def test_no_program_is_started_for_a_format(monkeypatch: pytest.MonkeyPatch) -> None:
    import subprocess

    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a program was started"))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    with pytest.raises(ValueError, match="its format is not one of PNG, JPEG"):
        Picture(eps).rgb()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_460, 20_000])
def test_a_bomb_is_refused_before_it_is_decoded(side: int) -> None:
    assert side**2 > MAX_PIXELS
    data = encoded(Image.new("1", (side, side)))
    assert len(data) < 1 << 18
    with pytest.raises(ValueError, match=f"at most {MAX_PIXELS}.*scale it down"):
        Picture(data).rgb()


@pytest.mark.parametrize("size", [(1, 1), (20_000, 20), (20, 20_000)])
def test_tiny_and_long_pictures_are_seen(size: tuple[int, int]) -> None:
    assert Picture(encoded(Image.new("RGB", size, RED))).rgb().size == size


@pytest.mark.parametrize("data", [b"", b"GIF89a", encoded(Image.fromarray(PIXELS))[:60]])
def test_broken_files_are_refused(data: bytes) -> None:
    with pytest.raises((ValueError, OSError)):
        Picture(data).rgb()


def test_a_picture_travels_between_processes_as_its_file() -> None:
    data = encoded(Image.fromarray(PIXELS))
    (copy,) = pickle.loads(pickle.dumps(Decoded([Picture(lambda: data)])))
    assert np.array_equal(np.asarray(copy), PIXELS)


FILES = {
    **{f"orientation {n}": oriented(n, "JPEG") for n in TURNS},
    "CMYK": encoded(Image.new("CMYK", (12, 6), (90, 20, 0, 0)), "JPEG"),
    "palette": encoded(Image.fromarray(PIXELS).quantize(16)),
    "16 bits": sixteen(PIXELS.astype(int) * 16),
    "16 bits of grey": sixteen(PIXELS[..., 0].astype(int) * 16),
    "alpha": encoded(half_transparent()),
    "1x1": encoded(Image.new("RGB", (1, 1), RED)),
    "20,000x20": encoded(Image.new("RGB", (20_000, 20), RED)),
    "animation": animation(),
}


@pytest.mark.parametrize("kind", FILES)
def test_trained_rolled_out_evaluated_judged_and_reported_pictures_are_the_same_pixels(
    kind: str, tmp_path: Path
) -> None:
    import base64

    from vllm.multimodal.media.image import ImageMediaIO

    from chain.evaluate import write_samples
    from chain.tracking.content import PictureIndex
    from core.model.image_tiles import SailVL2ImageProcessor
    from core.model.vllm_plugin import _decode_pictures_as_the_learner_does
    from corpus.records import load_records, write_records
    from rl.data import example_of, prompt_messages
    from rl.rollout.hf import _messages
    from rl.rollout.messages import openai_messages

    file = tmp_path / "set.parquet"
    row = {"id": "a", "question": "what?", "answer": "3", "mode": "direct", "verifier": "exact"}
    write_records(file, [{**row, "images": [FILES[kind]]}])
    (record,) = load_records(file)
    (picture,) = record["images"]
    expected = np.asarray(as_rgb(picture))
    assert picture.size == (expected.shape[1], expected.shape[0])

    tiles = SailVL2ImageProcessor()
    trained = tiles([picture], return_tensors="np")["pixel_values"]
    assert np.array_equal(trained, tiles([Image.fromarray(expected)], return_tensors="np")["pixel_values"])

    sent = openai_messages(prompt_messages(record), 448)
    data = base64.b64decode(sent[0]["content"][0]["image_url"]["url"].split(",", 1)[1])
    assert data == FILES[kind]
    _decode_pictures_as_the_learner_does()
    write_samples(tmp_path, [({"set": "direct", "mode": "direct"}, record["images"])], 1)
    sample = json.loads((tmp_path / "samples.jsonl").read_text())["image"]
    shown = {
        "vLLM": ImageMediaIO().load_bytes(data).media,
        "the transformers server": _messages({"messages": sent})[0]["content"][0]["image"],
        "a reward": example_of(record).images[0],
        "the report": Image.open(tmp_path / sample),
        "the trackers": PictureIndex([str(file)]).of(["a"])["a"][0],
    }
    for who, image in shown.items():
        assert np.array_equal(np.asarray(image), expected), who


def test_vllm_refuses_what_the_learner_refuses() -> None:
    from vllm.multimodal.media.image import ImageMediaIO

    from core.model.vllm_plugin import _decode_pictures_as_the_learner_does

    _decode_pictures_as_the_learner_does()
    with pytest.raises(ValueError, match=r"Failed to load image: .*its format is not one of"):
        ImageMediaIO().load_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n")
