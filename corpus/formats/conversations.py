"""Rows that hold a conversation: LLaVA and ShareGPT, OpenAI's messages, ms-swift's messages with an images column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from core.model.pictures import Picture
from core.model.prompts import IMAGE, THINK_CONTRACT
from corpus.formats.columns import NAMES, of_reply, system_of
from corpus.formats.fields import Rejected, named, pictures, questions, text
from corpus.formats.gold import choice_of, listed_options
from corpus.schema import PLACEHOLDER, Record

ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"},
    **{"chatgpt": "assistant", "system": "system", "developer": "system"},
}
"""Names that data sets give the roles of a conversation -> our role."""


class Turn(NamedTuple):
    """One turn: its role, its text with marks for pictures, and the pictures."""

    role: str
    text: str
    images: list[Picture]


def records_of_turns(
    row: Mapping[str, Any], root: Path, *, system: str = "keep", turns: str = "keep"
) -> Iterator[Record]:
    """The records of one row's conversation: one, or with turns="split" one per exchange.

    Args:
        row: has `conversations` or `messages`, and the system message there or in `system`.
        root: folder of the pictures.
        system: how to treat a system message: "keep" it as the record's, "strip" it, or "refuse" the row.
        turns: how to treat several exchanges: "keep" them (the earlier ones become the record's history), keep the
            "first" one, "split" the row into one record per exchange with those before it as history, or "refuse" it.

    Raises Rejected.
    """
    said = _turns(row, root)
    first = said.pop(0).text if said and said[0].role == "system" else row.get("system")
    own = system_of(first, system)
    pairs = list(zip(said[::2], said[1::2], strict=False))
    if not pairs or len(said) % 2 or any((a.role, b.role) != ("user", "assistant") for a, b in pairs):
        roles = [turn.role for turn in said]
        raise Rejected("messages", "user and assistant must take turns", roles, "leave the row out")
    if len(pairs) > 1 and turns == "refuse":
        raise Rejected("messages", "has several turns", f"{len(pairs)} exchanges", "--turns keep")
    ends = {"first": [1], "split": range(1, len(pairs) + 1)}.get(turns, [len(pairs)])
    for end in ends:
        yield _record(row, own, pairs[:end])


def _record(row: Mapping[str, Any], system: str | None, pairs: Sequence[tuple[Turn, Turn]]) -> Record:
    asked = [(turn.text.replace(THINK_CONTRACT, ""), len(turn.images)) for turn, _ in pairs]
    *earlier, words = questions(asked)
    replies = [reply.text.strip() for _, reply in pairs]
    record = {
        "images": [image for turn, _ in pairs for image in turn.images],
        "system": system,
        "history": [
            {"user": user, "assistant": reply} for user, reply in zip(earlier, replies, strict=False)
        ],
        "question": words,
        **of_reply(replies[-1]),
    }
    source = named(row, NAMES["source"])
    record["source"] = row[source] if source and isinstance(row[source], str) else ""
    options = listed_options(words)
    if options and record["answer"]:
        try:
            letter = choice_of(record["answer"], options)
        except Rejected:  # the answer is not an option: the question lists something else
            return record
        if record["answer"] != letter and record["mode"] == "direct":
            record["response"] = record["response"] or replies[-1]
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
