r"""Prompts and targets as chat messages, by the model card's prompt contract.

The rule is the same in every stage and in evaluation. A chat is the row's system message if it has one, the earlier
turns of its `history`, and the question. A user's turn in thinking mode ends with a newline and the contract; an
earlier turn is in thinking mode if its reply opens with `<think>`.

Images, then videos, precede the text of the first user's turn. If the user's turns contain `<image>` once per image,
the images stand at those places; the same holds for `<video>`. A video is its sampled frames, each an image behind its
label, "Frame-1: " and so on, and before a newline.

Differs from the model card, which joins question and contract without a separator ("describe the imageYou FIRST ..."):
some tokenizers would merge the question's last word and the contract's first into one token, so the question's tokens
would differ between the modes. Source of the newline and of the frames' labels: the authors' VLMEvalKit wrapper
(vlmeval/vlm/sail_vl.py), which shows one video before the question.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

THINK_CONTRACT = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. "
    r"The final answer MUST BE put in \boxed{}."
)
"""The model card's words (SAIL-VL2-2B-Thinking, Quick Start), verbatim."""

IMAGE = "<image>"
"""Marks the place of an image in a user's turn, as in the data sets of LLaVA."""
VIDEO = "<video>"
"""Marks the place of a video in a user's turn, as in the data sets of LLaVA."""

Message = dict[str, Any]


def user_text(question: str, mode: str) -> str:
    r"""The text of the user's turn: the question, and in mode "think" a newline and the contract.

    >>> user_text("2+2?", "direct")
    '2+2?'
    >>> user_text("2+2?", "think").splitlines()[1][:14]
    'You FIRST thin'
    """
    if mode == "think":
        return f"{question}\n{THINK_CONTRACT}"
    if mode == "direct":
        return question
    raise ValueError(f'mode={mode!r}: a row is either "think" or "direct"')


def target_text(record: Mapping[str, Any]) -> str:
    r"""The assistant's turn that SFT trains on: the row's `response` verbatim, else built from its parts.

    >>> target_text({"mode": "think", "chain": "2 + 2 = 4", "answer": "4"})
    '<think>2 + 2 = 4</think>\\boxed{4}'
    >>> target_text({"mode": "direct", "answer": "4"})
    '4'

    Raises ValueError for a thinking row with neither chain nor response: SFT cannot train on it.
    """
    if record.get("response"):
        return record["response"]
    if record["mode"] == "direct":
        return record["answer"]
    if not record.get("chain"):
        raise ValueError(
            f"row {record.get('id')!r}: SFT needs a chain (or a response) in a think row; "
            "add one, or use the row in the RL stages only"
        )
    return f"<think>{record['chain']}</think>\\boxed{{{record['answer']}}}"


def messages(record: Mapping[str, Any], with_target: bool = False) -> list[Message]:
    """The chat of one record up to its last user's turn, and the assistant's turn `with_target`.

    An image part holds its picture under "image". The content of a turn is always a list of parts, never a bare
    string, so that templates of vision-language models and TRL read it alike.
    """
    history = record.get("history") or ()
    asked = [
        user_text(turn["user"], "think" if turn["assistant"].startswith("<think>") else "direct")
        for turn in history
    ]
    asked.append(user_text(record["question"], record["mode"]))
    turns = user_turns(asked, record.get("images") or (), record.get("videos") or ())
    said = [turn["assistant"] for turn in history] + ([target_text(record)] if with_target else [])
    chat = [_message("system", [_text(record["system"])])] if record.get("system") else []
    for number, parts in enumerate(turns):
        chat.append(_message("user", parts))
        if number < len(said):
            chat.append(_message("assistant", [_text(said[number])]))
    return chat


def shown(record: Mapping[str, Any]) -> list[Any]:
    """The record's images and frames of videos in the order in which the model sees them."""
    return [
        part["image"]
        for message in messages(record)
        for part in message["content"]
        if part["type"] == "image"
    ]


def user_turns(
    texts: Sequence[str], images: Sequence[Any], videos: Sequence[Any] = ()
) -> list[list[Message]]:
    """The user's turns as parts, with images and videos (each with its `frames`) in their places.

    >>> (turn,) = user_turns(["Is <image> like <image>?"], [1, 2])
    >>> [part["type"] for part in turn]
    ['text', 'image', 'text', 'image', 'text']

    Raises ValueError if the texts mark some but not all of the images, or of the videos.
    """
    marked: dict[str, Iterator[list[Message]]] = {}
    first: list[Message] = []
    for mark, media in ((IMAGE, [_image(one) for one in images]), (VIDEO, [_frames(one) for one in videos])):
        count = sum(text.count(mark) for text in texts)
        if count not in (0, len(media)):
            raise ValueError(f"{count} {mark} in the text for {len(media)}: write one for each, or none")
        if count:
            marked[mark] = iter(media)
        else:
            first += [part for parts in media for part in parts]
    turns = []
    for text in texts:
        parts = first
        for piece in re.split(f"({IMAGE}|{VIDEO})", text):
            parts = [*parts, *(next(marked[piece]) if piece in marked else [_text(piece)] if piece else [])]
        turns.append(parts)
        first = []
    return turns


def _frames(video: Any) -> list[Message]:
    """The parts of a video: each frame between its label and a newline."""
    labelled = ((_text(f"Frame-{n}: "), *_image(one), _text("\n")) for n, one in enumerate(video.frames, 1))
    return [part for parts in labelled for part in parts]


def _image(image: Any) -> list[Message]:
    return [{"type": "image", "image": image}]


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


def _message(role: str, parts: list[Message]) -> Message:
    return {"role": role, "content": parts}
