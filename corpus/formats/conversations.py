"""Rows that hold a conversation: LLaVA and ShareGPT, OpenAI's messages, ms-swift's messages with an images column."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from core.model.pictures import Picture
from core.model.prompts import IMAGE, THINK_CONTRACT, VIDEO
from core.model.videos import Clip
from corpus.formats.columns import NAMES, of_reply, system_of
from corpus.formats.fields import Asked, Rejected, Root, named, pictures, questions, reply_text, text, videos
from corpus.formats.gold import choice_of, listed_options
from corpus.schema import PLACEHOLDER, Record

ROLES = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"},
    **{"chatgpt": "assistant", "system": "system", "developer": "system"},
}
"""Names that data sets give the roles of a conversation -> our role."""


class Turn(NamedTuple):
    """One turn: its role, its text with marks for pictures and videos, and these."""

    role: str
    text: str
    images: list[Picture]
    videos: list[Clip]


def records_of_turns(
    row: Mapping[str, Any], root: Root, *, system: str = "keep", turns: str = "keep"
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
    asked = [
        Asked(turn.text.replace(THINK_CONTRACT, ""), len(turn.images), len(turn.videos)) for turn, _ in pairs
    ]
    *earlier, words = questions(asked)
    replies = [reply.text.strip() for _, reply in pairs]
    record = {
        "images": [image for turn, _ in pairs for image in turn.images],
        "videos": [video for turn, _ in pairs for video in turn.videos],
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


def _turns(row: Mapping[str, Any], root: Root) -> list[Turn]:
    given = row.get("conversations") if row.get("conversations") is not None else row.get("messages")
    if not isinstance(given, list) or not all(isinstance(turn, Mapping) for turn in given):
        raise Rejected("messages", "must be a list of turns", given, "write role and content for each")
    turns = []
    for turn in given:
        name = turn.get("from", turn.get("role"))
        if name not in ROLES:
            raise Rejected("messages", f"a role is one of {', '.join(ROLES)}", name, "rename it")
        turns.append(_said(turn.get("value", turn.get("content")), root)._replace(role=ROLES[name]))
        if ROLES[name] == "assistant":
            reply_text(turns[-1].text, "messages")
    column = named(row, NAMES["images"])
    if column:
        turns = _dealt(turns, "images", pictures(row[column], root, column))
    column = named(row, NAMES["videos"])
    return _dealt(turns, "videos", videos(row[column], root, column)) if column else turns


def _dealt(turns: list[Turn], kind: str, waiting: list[Any]) -> list[Turn]:
    """The turns with the row's pictures or videos: each turn gets as many as it marks; the first, unmarked ones."""
    out = []
    for turn in turns:
        marks = (
            [mark[0].casefold() for mark in PLACEHOLDER.finditer(turn.text)] if turn.role == "user" else []
        )
        own: list[Any] = getattr(turn, kind)
        count = max(0, sum(("video" in mark) == (kind == "videos") for mark in marks) - len(own))
        given: dict[str, Any] = {kind: [*own, *waiting[:count]]}
        out.append(turn._replace(**given))
        waiting = waiting[count:]
    if waiting:  # unmarked ones come first, as in LLaVA
        if any(getattr(turn, kind) for turn in out):
            found = f"{len(waiting)} left"
            raise Rejected(kind, f"placeholders and {kind} differ in number", found, "mark each")
        at = next((at for at, turn in enumerate(out) if turn.role == "user"), 0)
        rest: dict[str, Any] = {kind: waiting}
        out[at : at + 1] = [turn._replace(**rest) for turn in out[at : at + 1]]
    return out


def _said(content: Any, root: Root) -> Turn:
    """Text, pictures and videos of a turn's content, which is a text or OpenAI's list of parts."""
    turn = Turn("", "", [], [])
    if isinstance(content, str):
        return turn._replace(text=content)
    if not isinstance(content, Sequence):
        raise Rejected("messages", "a turn needs a text or parts", content, "write content")
    words = ""
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text":
            words += text(part.get("text"), "messages")
        elif kind in ("image_url", "image"):
            value = part.get("image_url", part.get("image", part.get("url", part.get("path"))))
            turn.images.extend(pictures(value, root, "messages"))
            words += IMAGE
        elif kind in ("video_url", "video"):  # Qwen gives a list of frames as one video
            value = part.get("video_url", part.get("video", part.get("url", part.get("path"))))
            turn.videos.extend(videos([value], root, "messages"))
            words += VIDEO
        else:
            raise Rejected("messages", "a part is a text, an image or a video", part, "leave the row out")
    return turn._replace(text=words)
