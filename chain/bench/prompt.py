"""From a request of the harness to a request to the servers: images, frames and labels as the authors send them.

Source of the labels, the enlarged image, the tile caps and their sum: the SAIL-VL2 authors' public VLMEvalKit wrapper
(vlmeval/vlm/sail_vl.py).
"""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chain.bench.suite import Benchmark
from core.model.prompts import user_text, user_turns
from core.model.videos import Caps, Clip
from rl.blank import GREY
from rl.rollout.messages import openai_messages

PICTURES = "pictures"
"""Folder of a benchmark's pictures."""
MOST_TILES = 64
"""Most tiles of all images of a prompt."""
ENLARGED = 2
"""Factor from the sides of an enlarged picture to those that are sent."""
_DATA_URL = re.compile(r"data:image/[^;,]*;base64,")
Part = str | bytes
"""Text, or the file of a picture."""


@dataclass(frozen=True)
class Rules:
    """How the prompts of one benchmark in one mode are sent.

    Args:
        benchmark: `tiles`, `enlarge_first` and `frames` of it.
        mode: "think" or "direct".
        frame_px: side in pixels of the tile that a frame of a video is.
        folder: the pictures go to its subfolder `pictures`.
        video: a text part of the harness that starts with it names a video's file. It is a secret of relay and harness,
            so that no data set can name a file.
        blind: whether images are replaced by grey ones.
        own_tiles: the checkpoint's tile cap, for a benchmark without one; None: requests name no tile cap.
    """

    benchmark: Benchmark
    mode: str
    frame_px: int
    folder: Path
    video: str
    blind: bool = False
    own_tiles: int | None = None


@dataclass
class Asked:
    """One conversation for the servers."""

    messages: list[dict[str, Any]]
    text: str = ""
    """Text of the last turn, without the thinking contract."""
    pictures: list[str] = field(default_factory=list)
    """Files of all pictures, relative to the benchmark's folder."""
    processor: dict[str, Any] = field(default_factory=dict)
    """Settings of the image processor for this request."""


def asked(given: Sequence[dict[str, Any]], rules: Rules) -> Asked:
    """The harness's conversation as the servers get it. Raises ValueError for an unreadable picture or video."""
    turns = [_opened(message["content"], rules) for message in given]
    images = sum(isinstance(part, bytes) for turn in turns for part in turn)
    if rules.benchmark.tiles and not rules.benchmark.frames:
        turns = _labelled(turns, images)
    if rules.benchmark.enlarge_first:
        turns = _first_enlarged(turns)
    if rules.blind:
        turns = [[_grey(part) if isinstance(part, bytes) else part for part in turn] for turn in turns]
    found = Asked([], "".join(part for part in turns[-1] if isinstance(part, str)))
    if rules.mode == "think":
        last = max(place for place, part in enumerate(turns[-1]) if isinstance(part, str))
        turns[-1][last] = user_text(str(turns[-1][last]), "think")
    for message, turn in zip(given, turns, strict=True):
        parts = [_sent(part, rules.folder, found.pictures) for part in turn]
        found.messages.append({"role": message["role"], "content": parts})
    found.processor = _processor(rules, images)
    return found


def _processor(rules: Rules, images: int) -> dict[str, Any]:
    """Settings of the image processor for a prompt with so many images."""
    cap = rules.benchmark.tiles
    if not images or rules.own_tiles is None:
        return {}
    if cap is None:
        return {"max_patches": rules.own_tiles}
    if images == 1:
        return {"max_patches": cap}
    # The wrapper uses the second scale for prompts with one image only.
    return {"max_patches": max(1, min(cap, MOST_TILES // images)), "use_msac": False}


def _opened(content: Any, rules: Rules) -> list[Part]:
    """The parts of one turn; a video becomes its frames with their labels, as in training."""
    if isinstance(content, str):
        return [content]
    parts: list[Part] = []
    videos = []
    for part in content:
        if part["type"] == "image_url":
            parts.append(_data(part["image_url"]["url"]))
        elif rules.benchmark.frames and part["text"].startswith(rules.video):
            file = Path(part["text"].removeprefix(rules.video))
            videos.append(Clip(file.read_bytes(), Caps(rules.benchmark.frames)))
        else:
            parts.append(part["text"])
    if not videos:
        return parts
    text = "".join(part for part in parts if isinstance(part, str))
    (message,) = openai_messages(
        [{"role": "user", "content": user_turns([text], [], videos)[0]}], rules.frame_px
    )
    return [
        part["text"] if part["type"] == "text" else _data(part["image_url"]["url"])
        for part in message["content"]
    ]


def _labelled(turns: list[list[Part]], images: int) -> list[list[Part]]:
    """All images at the start of the first turn; several have labels, and `<Image-N>` marks the place of each.

    As in the wrapper, marks are left out if no text is between them.
    """
    front: list[Part] = []
    texts: list[str] = []
    number = 0
    for turn in turns:
        text = ""
        for part in turn:
            if isinstance(part, str):
                text += part
                continue
            number += 1
            front += [f"Image-{number}: ", part, "\n"] if images > 1 else [part]
            text += f"<Image-{number}>"
        texts.append(text)
    marks = "".join(f"<Image-{number + 1}>" for number in range(images))
    texts[0] = texts[0].replace(marks, "")
    rest: list[list[Part]] = [[text] for text in texts[1:]]
    return [[*front, texts[0]], *rest]


def _first_enlarged(turns: list[list[Part]]) -> list[list[Part]]:
    """The turns with the first picture at twice its width and height, bilinear."""
    from PIL.Image import Resampling

    from core.model.pictures import Picture

    for turn in turns:
        for place, part in enumerate(turn):
            if isinstance(part, bytes):
                image = Picture(part).rgb()
                size = (ENLARGED * image.width, ENLARGED * image.height)
                turn[place] = Picture.of(image.resize(size, Resampling.BILINEAR)).data
                return turns
    return turns


def _data(url: str) -> bytes:
    return base64.b64decode(_DATA_URL.sub("", url, count=1), validate=True)


def _grey(data: bytes) -> bytes:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        buffer = io.BytesIO()
        Image.new("RGB", picture.size, GREY).save(buffer, format="PNG")
    return buffer.getvalue()


def _sent(part: Part, folder: Path, pictures: list[str]) -> dict[str, Any]:
    """The part in the API's form; a picture is also kept as a file."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    name = f"{PICTURES}/{hashlib.sha256(part).hexdigest()[:32]}.png"
    if not (folder / name).exists():
        (folder / name).write_bytes(part)
    pictures.append(name)
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/*;base64,{base64.b64encode(part).decode()}"},
    }
