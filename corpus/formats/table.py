"""The table of formats: how to recognise a row of each format, and how to convert it to records."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.strict import ConfigError, nearest
from corpus.formats.columns import mapping_of, record_of_columns
from corpus.formats.conversations import records_of_turns
from corpus.formats.fields import Rejected, Root, pictures, videos
from corpus.schema import FIELDS, REQUIRED, Record


@dataclass(frozen=True)
class Options:
    """The user's options for a file."""

    root: Root
    """Folder of the pictures; file names that lead out of it are refused."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Field of a record -> column of the file, for columns with unknown names."""
    system: Literal["keep", "strip", "refuse"] = "keep"
    turns: Literal["keep", "first", "split", "refuse"] = "keep"


Converter = Callable[[Mapping[str, Any]], Iterator[Record]]


@dataclass(frozen=True)
class Format:
    """One format of rows."""

    about: str
    fits: Callable[[Mapping[str, Any]], bool]
    converter: Callable[[Options], Converter]
    """Builds the function from a row to its records; that function raises Rejected."""
    mapping: Callable[[Mapping[str, Any], Options], Mapping[str, str]]
    """Description of the mapping from a row's values to fields, for display."""


def _conversation(options: Options) -> Converter:
    return lambda row: records_of_turns(row, options.root, system=options.system, turns=options.turns)


def _columns(options: Options) -> Converter:
    return lambda row: iter([record_of_columns(row, options.root, options.columns, options.system)])


def _vlmeval(options: Options) -> Converter:
    """A picture is base64, or the index of an earlier row that has it: pictures stay in memory."""
    seen: dict[str, str] = {}

    def convert(row: Mapping[str, Any]) -> Iterator[Record]:
        row, image = dict(row), row.get("image") or ""
        if len(image) > 64:  # VLMEvalKit's own rule (its `TSV` data sets)
            seen[row["index"]] = image
        elif image and "image_path" not in row:
            if image not in seen:
                raise Rejected(
                    "image", "is not the index of an earlier row", image, "write base64, or an earlier index"
                )
            image = seen[image]
        if "image_path" not in row and image:
            row["image"] = f"data:image/*;base64,{image}"
        yield record_of_columns(row, options.root, options.columns)

    return convert


def _records(options: Options) -> Converter:
    def convert(row: Mapping[str, Any]) -> Iterator[Record]:
        media = {
            "images": pictures(row.get("images"), options.root),
            "videos": videos(row.get("videos"), options.root),
        }
        yield {**row, **media}

    return convert


def _turns_mapping(row: Mapping[str, Any], options: Options) -> Mapping[str, str]:
    turns = "conversations" if "conversations" in row else "messages"
    return {"question": f"{turns}, user", "response": f"{turns}, assistant", "answer": "end of the response"}


FORMATS: dict[str, Format] = {
    "records": Format(
        "this suite's own schema",
        lambda row: set(REQUIRED) <= set(row) <= set(FIELDS),
        _records,
        lambda row, options: {name: name for name in row},
    ),
    "llava": Format(
        "LLaVA and ShareGPT: conversations of from and value, image or images",
        lambda row: isinstance(row.get("conversations"), list),
        _conversation,
        _turns_mapping,
    ),
    "openai": Format(
        "OpenAI: messages whose content has parts, text and image_url",
        lambda row: (
            _has_turns(row) and any(isinstance(turn.get("content"), list) for turn in row["messages"])
        ),
        _conversation,
        _turns_mapping,
    ),
    "swift": Format(
        "Qwen and ms-swift: messages of texts, pictures in images",
        lambda row: _has_turns(row),
        _conversation,
        _turns_mapping,
    ),
    "vlmeval": Format(
        "VLMEvalKit's TSV: index, image in base64, question, A, B, C, ..., answer",
        lambda row: {"index", "question"} <= set(row) and bool({"image", "image_path"} & set(row)),
        _vlmeval,
        lambda row, options: mapping_of(row, options.columns),
    ),
    "columns": Format(
        "one column per field: geometry3k, ChartQA, MMPR, ScienceQA, CSV, WebDataset, ...",
        lambda row: True,
        _columns,
        lambda row, options: mapping_of(row, options.columns),
    ),
}
"""Name -> format; the first that fits a row is its format under `auto`."""


def _has_turns(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("messages"), list) and all(
        isinstance(turn, Mapping) for turn in row["messages"]
    )


def recognised(rows: Sequence[Mapping[str, Any]], file: Path) -> str:
    """Name of the format that the first rows of a file have. Raises ConfigError if there are no rows."""
    if not rows:
        raise ConfigError(f"{file}: has no rows")
    return next(name for name, one in FORMATS.items() if all(one.fits(row) for row in rows))


def known(name: str) -> Format:
    """The format with this name. For an unknown name, raises ConfigError with the nearest known one."""
    if name not in FORMATS:
        raise ConfigError(f"format {name!r} is unknown; {nearest(name, ['auto', *FORMATS])}")
    return FORMATS[name]
