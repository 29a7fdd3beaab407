"""The one record schema of all stages, and the rules of a row.

A record is a dict:

| field | type | meaning |
|---|---|---|
| id | str | unique within its set |
| images | list of pictures | shown before the question, or at its `<image>` marks; [] for a text-only row |
| question | str | without the thinking contract: core.model.prompts adds it by `mode` |
| answer | str | gold answer; may be "" only where verifier is "none" and a response is given |
| chain | str or None | the thought that leads to the answer, without tags |
| response | str or None | the assistant's turn verbatim; as an SFT target it overrides chain and answer |
| mode | "think", "direct" | the prompt contract of the row |
| verifier | one of VERIFIERS | how a completion is graded; rewards.answer describes each |
| source | str | origin of the row |
| meta | JSON object | further values for verifiers and judges; a JSON string in the file |

Data is untrusted. Text that a chat template would read as markup (image tokens, chat tokens) is refused, and so is a
picture that does not decode or lies outside the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

from pydantic import Field

from core.model.pictures import Picture
from core.model.prompts import IMAGE, THINK_CONTRACT
from core.strict import Name, Strict, nearest

Record = dict[str, Any]
MODES = ("think", "direct")
VERIFIERS = (
    *(
        "auto",
        "math",
        "integer",
        "number",
        "exact",
        "choice",
        "set",
        "list",
        "json",
        "box",
        "point",
        "quantity",
    ),
    *("judge", "none"),
)
"""Values of `verifier`: the kinds of rewards.answer."""
DEFAULTS: Record = {"images": [], "chain": None, "response": None, "source": "", "meta": {}}
"""Fields that a file may omit."""
REQUIRED = ("id", "question", "answer", "mode", "verifier")
FIELDS = ("id", "images", "question", "answer", "chain", "response", "mode", "verifier", "source", "meta")
TEXTS = tuple(name for name in FIELDS if name != "images")
MARKUP = re.compile(r"<IMG_CONTEXT>|</?img>|<\|[A-Za-z0-9_]+\|>")
"""Image tokens and chat tokens of the released vocabulary."""
PLACEHOLDER = re.compile(
    r"<\s*/?\s*(?:image|img|video|audio)s?(?:[ _-]?(?:\d+|here|placeholder|token|pad|start|end))?\s*/?>",
    re.IGNORECASE,
)
"""Marks that common data sets use for a picture, a video or a sound in a text."""
_THINK_TAG = re.compile(r"</?think>")

OnBad = Literal["raise", "drop"]


class DataSource(Strict):
    """A named set of records, and the rows of it that a stage takes."""

    set: Name
    """Name of a set: `<run>/data/<set>.parquet`, or an entry of the recipe's data.sets."""
    rows: int | None = Field(default=None, ge=1)
    """Number of rows, drawn by the stage's seed; None: all. A number above the size of the set is an error."""
    split: Name = "train"
    """Split of the set; ignored for a single Parquet file."""
    unaskable: Literal["refuse", "drop"] = "refuse"
    """For sets that are sent to the rollout servers: a row beyond their limits (pictures per prompt, tokens of prompt
    and completion) is refused before the first stage, or dropped and counted in the log."""
    on_bad_gold: OnBad = "raise"
    """RL only: a gold answer that its verifier cannot use stops the load, or its row is dropped and counted."""


class RecordError(ValueError):
    """Rows break a rule of the schema; the message names file, row, field, rule and remedy."""


class Problem(NamedTuple):
    """The broken rule of one row, with the found value and a remedy."""

    field: str
    rule: str
    """The broken rule. The text is the same for every row that breaks it, because drops are counted by it."""
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.rule} (found {self.found}); {self.remedy}"


def problem_of(record: Mapping[str, Any], look: Callable[[Picture], Any] = Picture.rgb) -> Problem | None:
    """The first rule that a record breaks, or None.

    Args:
        record: all FIELDS. Pictures may be `Picture`s, files' bytes, PIL images or {"bytes": ...}; they are decoded.
        look: decodes a picture, and raises if it is broken.

    It checks a single row, so it does not find duplicate ids.
    """
    checks: tuple[Callable[[Mapping[str, Any]], Problem | None], ...] = (
        *(_text_problem, _empty_problem, _kind_problem, _markup_problem),
        *(_placeholder_problem, _meta_problem, partial(_image_problem, look=look)),
    )
    return next((problem for check in checks if (problem := check(record))), None)


def completed(row: Mapping[str, Any]) -> Record:
    """The row in the schema's order, its missing fields filled in."""
    record = {name: row.get(name) for name in FIELDS}
    return {name: DEFAULTS.get(name) if value is None else value for name, value in record.items()}


def picture_of(stored: Any) -> Picture:
    """The picture of one item of an images column: {"bytes": ...}, bytes, a PIL image or a Picture.

    Raises TypeError for anything else: a path in a file is never followed.
    """
    if isinstance(stored, Mapping):
        stored = stored.get("bytes") or f"only a path, {stored.get('path')!r}"
    return Picture.of(stored)


def meta_of(meta: Any) -> Any:
    """The object in a meta field, which holds it directly or as JSON. Raises ValueError for invalid JSON."""
    return json.loads(meta, parse_constant=_no_number) if isinstance(meta, str) else meta


def _no_number(word: str) -> Any:
    raise ValueError(f"JSON has no {word}")


def _text_problem(record: Mapping[str, Any]) -> Problem | None:
    for name in TEXTS:
        value, optional = record.get(name), name in ("chain", "response")
        if name == "meta" or (optional and value is None):
            continue
        if not isinstance(value, str):
            remedy = f"write it as text{' or leave it null' if optional else ''}"
            return Problem(name, "must be a string", f"{value!r:.60}", remedy)
        try:
            value.encode()
        except UnicodeEncodeError as error:
            found = f"{value[error.start]!r} at {error.start}"
            return Problem(
                name, "must be valid Unicode", found, "remove half surrogates, or decode the text again"
            )
    return None


def _empty_problem(record: Mapping[str, Any]) -> Problem | None:
    for name in ("id", "question"):
        if not record[name].strip():
            return Problem(
                name, "must not be empty", repr(record[name]), f"give the row its {name} or remove it"
            )
    if not record["answer"].strip() and not (record["verifier"] == "none" and record["response"]):
        remedy = 'add it, or give a response and set verifier "none" if the row is never graded'
        return Problem("answer", "gold answer is missing", repr(record["answer"]), remedy)
    return None


def _kind_problem(record: Mapping[str, Any]) -> Problem | None:
    for name, known in (("mode", MODES), ("verifier", VERIFIERS)):
        if record[name] not in known:
            return Problem(
                name, f"must be one of {', '.join(known)}", repr(record[name]), nearest(record[name], known)
            )
    return None


def _markup_problem(record: Mapping[str, Any]) -> Problem | None:
    for name in ("question", "answer", "chain", "response"):
        found = MARKUP.search(record[name] or "")
        if found:
            remedy = "remove it: pictures come from the images column, turns from the chat template"
            return Problem(name, "holds an image placeholder or chat token", repr(found[0]), remedy)
    for name in ("answer", "chain"):
        found = _THINK_TAG.search(record[name] or "")
        if found:
            return Problem(
                name, "holds a think tag", repr(found[0]), "remove it, or put the whole turn in response"
            )
    if THINK_CONTRACT in record["question"]:
        remedy = 'remove it: mode "think" adds it'
        return Problem("question", "holds the thinking contract", repr(THINK_CONTRACT[:20] + "..."), remedy)
    return None


def _placeholder_problem(record: Mapping[str, Any]) -> Problem | None:
    """The problem of a question that marks some but not all pictures with `<image>`, or contains other marks."""
    question, images = record["question"], record["images"]
    other = next((mark[0] for mark in PLACEHOLDER.finditer(question) if mark[0] != IMAGE), None)
    if other:
        remedy = f"write {IMAGE}, or import the file: posttrain data import"
        return Problem("question", "holds the placeholder of another data set", repr(other), remedy)
    marks = question.count(IMAGE)
    if marks and isinstance(images, list) and marks != len(images):
        remedy = "write one for each picture, or none: pictures then come before the question"
        found = f"{marks} {IMAGE} for {len(images)} pictures"
        return Problem("question", f"placeholders ({IMAGE}) and pictures differ in number", found, remedy)
    return None


def _meta_problem(record: Mapping[str, Any]) -> Problem | None:
    meta, rule = record["meta"], "must be a JSON object"
    remedy = 'write {} or {"key": value}, with values of text, numbers, lists and objects'
    try:
        known = meta_of(meta)
        if not isinstance(known, dict):
            return Problem("meta", rule, f"{meta!r:.60}", remedy)
        json.dumps(known, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return Problem("meta", rule, f"{meta!r:.60}: {error}", remedy)
    return None


def _image_problem(record: Mapping[str, Any], look: Callable[[Picture], Any]) -> Problem | None:
    images = record["images"]
    if not isinstance(images, list):
        return Problem("images", "must be a list", f"{images!r:.60}", "write [] for a text-only row")
    for place, image in enumerate(images):
        try:
            look(picture_of(image))
        except Exception as error:  # Pillow passes on errors of any type from its decoders
            found = f"images[{place}]: {type(error).__name__}: {error}"
            remedy = "put the encoded picture itself in the file, or remove the row"
            return Problem("images", "must decode", f"{found:.240}", remedy)
    return None
