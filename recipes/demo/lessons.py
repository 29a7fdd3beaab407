"""Rows for the tiny core's pre-training: pieces of text, each trained or only read, about newly drawn scenes.

Scenes of the held-out and validation splits are never drawn, neither as pictures nor as text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from recipes.demo.drawing import scans_of
from recipes.demo.scenes import CELLS, REASONING, TRAIN, Scene, ask, draw_digits, draw_scene, read

MIXTURES: dict[str, dict[str, int]] = {
    "reading": {"reading": 48, "sums": 12, "story": 12},
    "mixed": {"reading": 12, "sums": 16, "story": 16, "caption": 24, "question": 16},
}
"""Number of rows of each kind per step, by phase."""

Pieces = list[tuple[str, bool]]


@dataclass(frozen=True)
class Lesson:
    """One row: pieces of text in order, each trained (True) or only read, and the scene of its picture, if any."""

    pieces: Sequence[tuple[str, bool]]
    scene: Scene | None = None


@dataclass(frozen=True)
class Frame:
    """The text that a core's processor writes around a lesson's words."""

    picture: str
    """A picture's tokens."""
    before: str
    """Text from the start of a chat to its picture."""
    after: str
    """Text from the end of the question to the answer."""
    turn_end: str
    """Ends an answer in a chat."""
    text_end: str
    """Ends a text that is not a chat."""


def frame_of(processor: Any) -> Frame:
    """The frame of a native core's processor; its chat template decides, as in every stage."""
    from core.model.prompts import messages
    from core.model.tokenizer import IMAGE_TOKEN, PAD, TURN_END

    probe = {"images": [None], "question": "?", "mode": "direct"}
    chat = processor.apply_chat_template(messages(probe), add_generation_prompt=True, tokenize=False)
    before, after = chat.split(f"{IMAGE_TOKEN}?")
    picture = processor.replace_image_token({"num_patches": [1]}, 0)
    return Frame(picture, before, after, TURN_END, PAD)


def draw_lessons(phase: str, frame: Frame, rng: Random) -> list[Lesson]:
    """The rows of one step of a phase."""
    return [MAKERS[kind](frame, rng) for kind, count in MIXTURES[phase].items() for _ in range(count)]


def _reading(frame: Frame, rng: Random) -> Lesson:
    """The digits of all cells in random order, C9A0B5D1. The order is unpredictable, so only digits are trained.

    After 160 steps the digits' loss is 0.15; with digits after "C=" it is 0.84 (batch 48, seed 0).
    """
    scene = _scene(rng)
    pieces: Pieces = [(frame.picture, False)]
    for cell in rng.sample(CELLS, len(CELLS)):
        pieces += [(cell, False), (str(scene.digit(cell)), True)]
    return Lesson(pieces, scene)


def _caption(frame: Frame, rng: Random) -> Lesson:
    """Every cell in random order, in the notation of chains: C=9;A=0;B=5;D=1."""
    scene = _scene(rng)
    pieces: Pieces = [(frame.picture, False)]
    for reading in read(scene.digits, rng.sample(CELLS, len(CELLS))):
        pieces += [(reading[:-1], False), (reading[-1], True), (";", True)]
    return Lesson([*pieces[:-1], (frame.text_end, True)], scene)


def _question(frame: Frame, rng: Random) -> Lesson:
    """A general question in a chat, answered directly."""
    scene = _scene(rng)
    question = ask(rng, "digit", scene.digits)
    asked = f"{frame.before}{frame.picture}{question.text}{frame.after}"
    return Lesson([(asked, False), (question.answer + frame.turn_end, True)], scene)


def _sums(frame: Frame, rng: Random) -> Lesson:
    """Five sums; only the results are trained."""
    pieces: Pieces = []
    for _ in range(5):
        left, right = rng.randrange(rng.choice((10, 19))), rng.randrange(10)
        sign = rng.choice("+-") if right <= left else "+"
        result = left + right if sign == "+" else left - right
        pieces += [(f"{left}{sign}{right}=", False), (str(result), True), (";", True)]
    return Lesson(pieces)


def _story(frame: Frame, rng: Random) -> Lesson:
    """A scene in words, a reasoning question about it, and the chain that answers."""
    digits = draw_digits(rng, TRAIN)
    question = ask(rng, rng.choice(REASONING), digits)
    told = "".join(f"{cell}{digit}" for cell, digit in zip(CELLS, digits, strict=True))
    return Lesson([(f"{told};{question.text}:", False), (question.chain + frame.text_end, True)])


def _scene(rng: Random) -> Scene:
    return draw_scene(rng, TRAIN, scans_of(TRAIN))


MAKERS: dict[str, Callable[[Frame, Random], Lesson]] = {
    "reading": _reading,
    "caption": _caption,
    "question": _question,
    "sums": _sums,
    "story": _story,
}
