r"""Prompts and targets as chat messages, by the model card's prompt contract.

The rule is the same in every stage and in evaluation. The user's turn is the images, then the question; in thinking
mode a newline and the contract follow. If a question contains `<image>` once per image, the images stand at those
places. Differs from the model card, which joins question and contract without a separator ("describe the imageYou
FIRST ..."): some tokenizers would merge the question's last word and the contract's first into one token, so the
question's tokens would differ between the modes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

THINK_CONTRACT = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. "
    r"The final answer MUST BE put in \boxed{}."
)
"""The model card's words (SAIL-VL2-2B-Thinking, Quick Start), verbatim."""

IMAGE = "<image>"
"""Marks the place of an image in a question, as in the data sets of LLaVA."""

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
    """The chat of one record: a user turn of image parts and a text part, and the assistant's turn `with_target`.

    An image part holds its picture under "image". The content of a turn is always a list of parts, never a bare
    string, so that templates of vision-language models and TRL read it alike.
    """
    parts = user_parts(user_text(record["question"], record["mode"]), record.get("images") or ())
    chat = [{"role": "user", "content": parts}]
    if with_target:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": target_text(record)}]})
    return chat


def user_parts(text: str, images: Sequence[Any]) -> list[Message]:
    """The images and the text of a user's turn as parts: images first, or at the places that `<image>` marks.

    >>> [part["type"] for part in user_parts("Is <image> like <image>?", [1, 2])]
    ['text', 'image', 'text', 'image', 'text']

    Raises ValueError if the number of marks differs from the number of images.
    """
    marks = text.count(IMAGE)
    if not marks:
        return [*({"type": "image", "image": image} for image in images), {"type": "text", "text": text}]
    if marks != len(images):
        raise ValueError(
            f"{marks} {IMAGE} in the question for {len(images)} images: write one per image, or none"
        )
    first, *others = text.split(IMAGE)
    parts: list[Message] = [{"type": "text", "text": first}]
    for image, words in zip(images, others, strict=True):
        parts += [{"type": "image", "image": image}, {"type": "text", "text": words}]
    return [part for part in parts if part["type"] == "image" or part["text"]]
