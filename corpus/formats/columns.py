"""Rows with one column per field: Parquet from the hub, CSV, VLMEvalKit's TSV, flat JSON lines, WebDataset shards.

Columns are found by the names that public data sets give them (geometry3k, ChartQA, CLEVR, MMPR, VisualWebInstruct,
ScienceQA, MMMU, MMBench), or named in `columns`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from core.model.prompts import THINK_CONTRACT
from corpus.formats.fields import (
    Asked,
    Rejected,
    Root,
    gold_of,
    named,
    pictures,
    questions,
    reply_text,
    text,
    videos,
)
from corpus.formats.gold import choice_of, listed_options, options_of, with_options
from corpus.schema import Record

NAMES: dict[str, tuple[str, ...]] = {
    "images": (
        "images",
        "image",
        "image_path",
        "image_paths",
        "img",
        "file_name",
        "jpg",
        "jpeg",
        "png",
        "webp",
    ),
    "videos": ("videos", "video", "video_path", "mp4", "webm", "avi", "mov", "mkv"),
    "question": ("question", "problem", "query", "prompt", "instruction", "txt"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "options": ("options", "choices"),
    "hint": ("hint", "context"),
    "answer": (
        *("short_answer", "answer", "label", "labels", "solution", "gt_answer", "ground_truth", "gt"),
        *("response", "chosen", "output", "cls"),
    ),
    "response": ("response", "chosen", "output"),
    "chain": ("chain", "rationale", "reasoning", "cot"),
    "source": ("source", "data_source", "dataset", "category"),
}
"""Field of a record -> names of columns that may hold it, in order of preference."""
_NUMBERED = re.compile(r"image_\d+")
_SECTION = re.compile(r"<(SUMMARY|CAPTION|REASONING|CONCLUSION)>\s*(.*?)\s*</\1>", re.DOTALL)
_THINK = re.compile(r"\s*<think>\s*(.*?)\s*</think>\s*(.*)", re.DOTALL)


def mapping_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, str]:
    """Field -> column, from `columns` or else by name. Raises Rejected without a question or an answer."""
    for field, column in columns.items():
        if column not in row:
            raise Rejected(field, "its column is missing", column, f"the file has {', '.join(map(str, row))}")
    found: dict[str, str] = {}
    for field, names in NAMES.items():
        if own := columns.get(field) or named(row, names):
            found[field] = own
    numbered = sorted(
        (name for name in row if _NUMBERED.fullmatch(str(name))), key=lambda name: int(name[6:])
    )
    if numbered and "images" not in found:
        found["images"] = ",".join(numbered)
    for field in ("question", "answer"):
        if field not in found:
            there = ", ".join(map(str, row))
            raise Rejected(field, "no column holds it", there, f"name one: --columns {field}=COLUMN")
    return found


def record_of_columns(
    row: Mapping[str, Any], root: Root, columns: Mapping[str, str], system: str = "keep"
) -> Record:
    """The record of one row; `system` as in corpus.formats.conversations. Raises Rejected."""
    found = mapping_of(row, columns)
    shown = [
        picture
        for name in found.get("images", "").split(",")
        if name
        for picture in pictures(row[name], root, name)
    ]
    words = text(row[found["question"]], found["question"]).replace(THINK_CONTRACT, "").strip()
    if "hint" in found and row.get(found["hint"]):
        words = f"{text(row[found['hint']], 'hint')}\n{words}"
    options = options_of(row, found.get("options"))
    earlier = _history(row, found)
    own = found.get("videos")
    clips = videos(row[own], root, own) if own else []
    *users, words = questions(
        [*(Asked(user, 0) for user, _ in earlier), Asked(words, len(shown), len(clips))]
    )
    words = with_options(words, options)
    record: Record = {"images": shown, "videos": clips, "question": words, "source": _source(row, found)}
    record["history"] = [
        {"user": user, "assistant": reply.strip()} for user, (_, reply) in zip(users, earlier, strict=True)
    ]
    record["system"] = system_of(row.get(found["system"]) if "system" in found else None, system)
    value = row[found["answer"]]
    if options or (options := listed_options(words)):
        letters = choice_of(_single(value), options)
        return {**record, "answer": letters, "mode": "direct", "options": True}
    if found["answer"] in NAMES["response"]:
        return {**record, **of_reply(reply_text(value, found["answer"]))}
    said = reply_text(_single(value), found["answer"])
    answer = gold_of(said) or said.strip()
    chain = row.get(found["chain"]) if "chain" in found else None
    if chain:
        return {**record, "answer": answer, "chain": reply_text(chain, found["chain"]), "mode": "think"}
    reply = row.get(found["response"]) if "response" in found else None
    if found["answer"] == "short_answer" and row.get("answer"):
        reply = row["answer"]
    if reply:
        return {**record, **of_reply(reply_text(reply, "response")), "answer": answer}
    return {**record, "answer": answer, "mode": "direct"}


def of_reply(reply: str) -> Record:
    """The fields of a record that come from an assistant's turn: answer, response or chain, mode.

    `<think>` and LLaVA-CoT's sections become a chain; other text is a direct response.
    """
    sections = dict(_SECTION.findall(reply))
    if "CONCLUSION" in sections:
        thought = "\n".join(words for name, words in sections.items() if name != "CONCLUSION" and words)
        return {"answer": sections["CONCLUSION"], "chain": thought, "mode": "think"}
    if split := _THINK.fullmatch(reply):
        return {
            "answer": gold_of(split[2]),
            "response": reply.strip(),
            "chain": split[1],
            "mode": "think",
        }
    gold = gold_of(reply)
    return {"answer": gold, "mode": "direct", "response": None if gold == reply.strip() else reply.strip()}


def _single(value: Any) -> Any:
    """The value of a list with one item; a longer list as text with commas (ChartQA's label)."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return value
    return value[0] if len(value) == 1 else ", ".join(text(one, "answer") for one in value)


def system_of(value: Any, rule: str) -> str | None:
    """The record's system message under a rule: keep, strip, or refuse. Raises Rejected."""
    said = text(value or "", "system").strip()
    if said and rule == "refuse":
        raise Rejected("system", "there is a system message", said, "--system keep, or --system strip")
    return said if said and rule == "keep" else None


def _history(row: Mapping[str, Any], found: Mapping[str, str]) -> list[tuple[str, str]]:
    """The earlier turns in a column of pairs (ms-swift's `history`)."""
    value = row.get(found["history"]) if "history" in found else None
    if not isinstance(value or [], list) or any(
        not isinstance(pair, list | tuple) or len(pair) != 2 for pair in value or []
    ):
        raise Rejected(
            "history", "must be pairs of question and reply", value, "write [[question, reply], ...]"
        )
    return [(text(user, "history"), reply_text(reply, "history")) for user, reply in value or []]


def _source(row: Mapping[str, Any], found: Mapping[str, str]) -> str:
    value = row.get(found["source"]) if "source" in found else None
    return value if isinstance(value, str) else ""
