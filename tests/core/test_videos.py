"""Which frames of a video are seen, as which tiles; and which files are refused."""

import io
import pickle
import zipfile

import av
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.Image import Resampling

import core
from core.model.image_tiles import SailVL2ImageProcessor
from core.model.pictures import Picture
from core.model.prompts import messages, shown
from core.model.tiny import TinySize, build_tiny
from core.model.videos import Caps, Clip, Decoded, Frame, sampled, tiles
from core.training.model import load_processor
from rl.rollout.messages import CoreFacts, openai_messages

from .films import film, shown_numbers, sound

ROW = {"id": "a", "question": "What?", "answer": "4", "mode": "direct"}


@pytest.mark.parametrize(
    ("container", "codec"),
    [
        ("mp4", "libx264"),
        ("webm", "libvpx-vp9"),
        ("matroska", "libx264"),
        ("avi", "mpeg4"),
        ("mpegts", "mpeg4"),
    ],
)
def test_the_sampled_frames_are_the_middles_of_equal_parts(container, codec):
    clip = Clip(film(40, codec=codec, container=container), Caps(frames=4))
    images = clip.decode()
    assert len(clip.frames) == 4
    assert sampled(40, None, Caps(frames=4)) == [5, 15, 25, 35]
    for found, wanted in zip(shown_numbers(images), [5, 15, 25, 35], strict=True):
        assert abs(found - wanted) <= 1  # lossy
    assert images[0].size == (64, 48)
    assert images[0].mode == "RGB"


@pytest.mark.parametrize(
    ("caps", "count"),
    [
        (Caps(), 16),
        (Caps(frames=99), 40),
        (Caps(fps=5.0), 8),
        (Caps(frames=3, fps=5.0), 3),
        (Caps(fps=0.1), 1),
    ],
)
def test_frames_are_capped_by_number_and_by_second(caps, count):
    assert len(Clip(film(40), caps).frames) == count  # 1.6 seconds


def test_a_folder_of_frames_keeps_their_order_and_has_no_time():
    frames = [Picture.of(Image.new("RGB", (10 + n, 8), (5 * n,) * 3)) for n in range(20)]
    clip = Clip.of_frames(frames, Caps(frames=5, fps=0.1))
    assert shown_numbers(clip.decode()) == [2, 6, 10, 14, 18]
    assert clip.decode()[1].size == (16, 8)


def test_frames_of_a_clip_decode_once_while_iterated(monkeypatch):
    clip, decoded = Clip(film(), Caps(frames=3)), []
    stock = Clip.decode
    monkeypatch.setattr(Clip, "decode", lambda self: decoded.append(self) or stock(self))
    assert shown_numbers(Decoded(clip.frames)) == shown_numbers(stock(clip))
    tiles(clip.frames, 28)
    assert len(decoded) == 2


def test_a_frame_survives_pickling_as_a_frame():
    frame = pickle.loads(pickle.dumps(Clip(film(), Caps(frames=3)).frames[1]))
    assert isinstance(frame, Frame)
    assert (frame.number, frame.clip.caps.frames, frame.size) == (1, 3, (64, 48))


def test_a_phones_film_is_turned_upright():
    target = io.BytesIO()
    with av.open(target, "w", format="mp4") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_rotation(-90)  # clockwise
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:, :32] = 200
        out.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        out.mux(stream.encode())
    (image,) = Clip(target.getvalue()).decode()
    assert image.size == (48, 64)
    assert image.getpixel((24, 8))[0] > 150 > 50 > image.getpixel((24, 56))[0]


def bad_files(folder):
    whole = film(noise=True, to=folder / "a.mp4", movflags="faststart")
    with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0", b"x" * 1000)
    return {
        "half of it": (whole[: len(whole) // 2], "truncated"),
        "its last bytes are missing": (whole[:-5], "truncated"),
        "a few bytes": (whole[:20], "does not decode"),
        "no bytes": (b"", "empty"),
        "sound": (sound(), "no video stream"),
        "a playlist": (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "does not decode, or its format"),
        "a list of files": (b"ffconcat version 1.0\nfile '/etc/passwd'\n", "does not decode, or its format"),
        "a text": (b"hello", "does not decode"),
        "a broken zip": (b"PK\x03\x04", "does not decode"),
        "a compressed zip": ((folder / "a.zip").read_bytes(), "without compression"),
    }


def test_incomplete_and_foreign_files_are_refused(tmp_path):
    for name, (data, words) in bad_files(tmp_path).items():
        with pytest.raises(ValueError, match=words):
            Clip(data).decode()
        assert name


@pytest.fixture(scope="module", params=["tiles", "any resolution"])
def folder(request, tmp_path_factory):
    size = TinySize(any_resolution=request.param == "any resolution")
    return build_tiny(tmp_path_factory.mktemp("core") / "tiny", words=["What"], seed=0, size=size)


def test_processor_and_server_see_a_frame_as_the_same_single_tile(folder):
    core.register()
    processor, facts = load_processor(folder), CoreFacts.of(folder)
    if not processor.any_resolution:
        processor.image_processor.max_patches = 12  # a film of 2 : 1 would make two tiles and a thumbnail
    assert processor.frame_px == facts.frame_px == 56
    row = {**ROW, "videos": [Clip(film(noise=True, size=(192, 96)), Caps(frames=3))]}
    asked = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    seen = processor.apply_chat_template([messages(row)], **asked)
    sent = [
        {**message, "content": [received(part) for part in message["content"]]}
        for message in openai_messages(messages(row), facts.frame_px)
    ]
    served = processor.apply_chat_template([sent], **asked)
    assert torch.equal(seen["input_ids"], served["input_ids"])
    assert torch.equal(seen["pixel_values"], served["pixel_values"])
    assert seen["input_ids"].eq(processor.image_token_id).sum() == 3 * processor.image_seq_length
    assert processor.image_lengths(shown(row)) == [processor.image_seq_length + 2] * 3


def received(part):
    """A part as a server reads it."""
    if part["type"] == "text":
        return part
    return {"type": "image", "image": part["image_url"]["url"]}


def test_a_frame_is_resized_as_one_tile_of_the_released_size():
    frame = Clip(film(noise=True, size=(192, 96)), Caps(frames=1)).frames[0]
    processor = SailVL2ImageProcessor(min_patches=1, max_patches=1)
    direct = processor([frame.rgb()], return_tensors="pt")["pixel_values"]
    whole = SailVL2ImageProcessor(min_patches=1, max_patches=12)
    (tile,) = tiles([frame], 448)
    assert tile.tobytes() == frame.rgb().resize((448, 448), Resampling.BICUBIC).tobytes()
    assert torch.equal(whole([tile], return_tensors="pt")["pixel_values"], direct)
    assert whole.get_number_of_image_patches(448, 448) == 1


def test_frames_are_labelled_and_stand_where_the_video_is_marked():
    clip = Clip(film(), Caps(frames=2))
    row = {**ROW, "videos": [clip], "images": ["picture"], "question": "See <video>and <image>?"}
    (turn,) = messages(row)
    text = "".join(part.get("text", "#") for part in turn["content"])
    assert text == "See Frame-1: #\nFrame-2: #\nand #?"
    assert shown(row) == [*clip.frames, "picture"]
    (turn,) = messages({**row, "question": "What?"})
    assert "".join(part.get("text", "#") for part in turn["content"]) == "#Frame-1: #\nFrame-2: #\nWhat?"
