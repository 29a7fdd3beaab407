r"""What the model reads and what it is taught to say: the model card's prompt contract, as chat messages.

Rule, the same in every stage and in evaluation: the user's turn is the images, then the question; in thinking
mode a newline and the contract follow. Differs from the model card, which joins the two without a separator
("describe the imageYou FIRST ..."): there the last word of the question and the first of the contract would
share a token in some tokenizers, and the two modes would then disagree about how the question itself is read.
"""

from collections.abc import Mapping
from typing import Any

THINK_CONTRACT = (
    "You FIRST think about the reasoning process as an internal monologue and then provide the final answer. "
    "The reasoning process MUST BE enclosed within <think> </think> tags. "
    r"The final answer MUST BE put in \boxed{}."
)
"""The model card's words (SAIL-VL2-2B-Thinking, Quick Start), verbatim."""

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

    Raises ValueError for a thinking row with neither chain nor response: it is a prompt, not a lesson.
    """
    if record.get("response"):
        return record["response"]
    if record["mode"] == "direct":
        return record["answer"]
    if not record.get("chain"):
        raise ValueError(
            f"row {record.get('id')!r}: a think row needs a chain (or a response) to be trained on; "
            "add one, or keep the row for the RL stages"
        )
    return f"<think>{record['chain']}</think>\\boxed{{{record['answer']}}}"


def messages(record: Mapping[str, Any], with_target: bool = False) -> list[Message]:
    """The chat of one record: a user turn of image parts and a text part, and the assistant's turn if asked.

    An image part carries its picture under "image". Text is always a list of parts, never a bare string, so
    that templates of vision-language models and TRL read it alike.
    """
    parts: list[Message] = [{"type": "image", "image": image} for image in record.get("images") or ()]
    parts.append({"type": "text", "text": user_text(record["question"], record["mode"])})
    chat = [{"role": "user", "content": parts}]
    if with_target:
        chat.append({"role": "assistant", "content": [{"type": "text", "text": target_text(record)}]})
    return chat
