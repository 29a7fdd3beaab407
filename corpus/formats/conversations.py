"""Rows that hold a conversation: LLaVA and ShareGPT, OpenAI's messages, ms-swift's messages with an images column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.model.pictures import Picture
from core.model.prompts import IMAGE, THINK_CONTRACT
from corpus.formats.columns import NAMES, of_reply
from corpus.formats.fields import Rejected, named, pictures, question, text
from corpus.formats.gold import choice_of, listed_options
from corpus.schema import PLACEHOLDER, Record

ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"},
    **{"chatgpt": "assistant", "system": "system", "developer": "system"},
}
"""Names that data sets give the roles of a conversation -> our role."""
SYSTEM = ("strip", "keep", "refuse")
TURNS = ("refuse", "first", "split")


class Turn(NamedTuple):
    """One turn: its role, its text with marks for pictures, and the pictures."""

    role: str
    text: str
    images: list[Picture]


def records_of_turns(
    row: Mapping[str, Any], root: Path, *, system: str = "strip", turns: str = "refuse"
) -> Iterator[Record]:
    """The records of one row's conversation: one, or with turns="split" one per exchange.

    Args:
        row: has `conversations` or `messages`.
        root: folder of the pictures.
        system: how to treat a system message: "strip", "keep" (in front of the question) or "refuse".
        turns: how to treat several exchanges: "refuse" the row, take the "first" exchange, or "split" the row into one
            record per exchange, each with all pictures shown so far.

    Raises Rejected.
    """
    said = _turns(row, root)
    first = said[0].text if said and said[0].role == "system" else ""
    if first:
        said = said[1:]
        if system == "refuse":
            raise Rejected("messages", "there is a system message", first, "--system strip, or --system keep")
    pairs = list(zip(said[::2], said[1::2], strict=False))
    if not pairs or len(said) % 2 or any((a.role, b.role) != ("user", "assistant") for a, b in pairs):
        roles = [turn.role for turn in said]
        raise Rejected("messages", "user and assistant must take turns", roles, "leave the row out")
    if len(pairs) > 1 and turns == "refuse":
        remedy = "--turns first, or --turns split (one row per exchange)"
        raise Rejected("messages", "has several turns", f"{len(pairs)} exchanges", remedy)
    shown: list[Picture] = []
    for asked, reply in pairs[: 1 if turns == "first" else None]:
        words = asked.text if not shown else IMAGE * len(shown) + asked.text
        shown = shown + asked.images
        words = question(words.replace(THINK_CONTRACT, ""), len(shown))
        if first and system == "keep":
            words = f"{first}\n{words}"
        yield _record(row, words, shown, reply.text)


def _record(row: Mapping[str, Any], words: str, shown: list[Picture], reply: str) -> Record:
    source = named(row, NAMES["source"])
    record = {"images": shown, "question": words, **of_reply(reply)}
    record["source"] = row[source] if source and isinstance(row[source], str) else ""
    options = listed_options(words)
    if options and record["answer"]:
        try:
            letter = choice_of(record["answer"], options)
        except Rejected:  # the answer is not an option: the question lists something else
            return record
        if record["answer"] != letter and record["mode"] == "direct":
            record["response"] = record["response"] or reply.strip()
        return {**record, "answer": letter, "options": True}
    return record


def _turns(row: Mapping[str, Any], root: Path) -> list[Turn]:
    given = row.get("conversations") if row.get("conversations") is not None else row.get("messages")
    if not isinstance(given, list) or not all(isinstance(turn, Mapping) for turn in given):
        raise Rejected("messages", "must be a list of turns", given, "write role and content for each")
    own = named(row, NAMES["images"])
    waiting = pictures(row[own], root, own) if own else []
    turns = []
    for turn in given:
        name = turn.get("from", turn.get("role"))
        if name not in ROLES:
            raise Rejected("messages", f"a role is one of {', '.join(ROLES)}", name, "rename it")
        said = _said(turn.get("value", turn.get("content")), root)
        marks = len(PLACEHOLDER.findall(said.text)) if ROLES[name] == "user" else 0
        taken, waiting = waiting[: marks - len(said.images)], waiting[max(0, marks - len(said.images)) :]
        turns.append(Turn(ROLES[name], said.text, said.images + (taken if marks > len(said.images) else [])))
    if waiting:  # unmarked pictures come first, as in LLaVA
        if any(turn.images for turn in turns):
            raise Rejected(
                "images", "placeholders and pictures differ in number", f"{len(waiting)} left", "mark each"
            )
        at = next((at for at, turn in enumerate(turns) if turn.role == "user"), 0)
        turns[at : at + 1] = [turn._replace(images=waiting) for turn in turns[at : at + 1]]
    return turns


def _said(content: Any, root: Path) -> Turn:
    """Text and pictures of a turn's content, which is a text or OpenAI's list of parts."""
    if isinstance(content, str):
        return Turn("", content, [])
    if not isinstance(content, Sequence):
        raise Rejected("messages", "a turn needs a text or parts", content, "write content")
    words, shown = "", []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            words += text(part.get("text"), "messages")
        elif kind in ("image_url", "image"):
            value = part.get("image_url", part.get("image", part.get("url", part.get("path"))))
            shown += pictures(value, root, "messages")
            words += IMAGE
        else:
            raise Rejected("messages", "a part is a text or an image", part, "leave the row out")
    return Turn("", words, shown)
