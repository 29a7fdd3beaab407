"""The one record schema of all stages, and the rules of a row.

A record is a dict:

| field | type | meaning |
|---|---|---|
| id | str | unique within its set |
| images | list of pictures | shown first, or at the `<image>` marks of the user's turns; [] for a row without images |
| videos | list of videos | shown after the images, or at the `<video>` marks; as files, bytes, or lists of frames |
| system | str or None | the system message |
| history | list of {"user", "assistant"} | the turns before the question, earliest first; a JSON string in the file |
| question | str | the last user's turn, without the thinking contract: core.model.prompts adds it by `mode` |
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
from core.model.prompts import IMAGE, THINK_CONTRACT, VIDEO
from core.model.videos import Caps, Clip
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
DEFAULTS: Record = {
    **{"images": [], "videos": [], "system": None, "history": [], "chain": None, "response": None},
    **{"source": "", "meta": {}},
}
"""Fields that a file may omit."""
REQUIRED = ("id", "question", "answer", "mode", "verifier")
FIELDS = (
    *("id", "images", "videos", "system", "history", "question", "answer", "chain", "response"),
    *("mode", "verifier", "source", "meta"),
)
MEDIA = ("images", "videos")
TEXTS = tuple(name for name in FIELDS if name not in MEDIA)
"""Columns of text; JSON_FIELDS hold JSON."""
JSON_FIELDS = ("history", "meta")
_OPTIONAL = ("system", "chain", "response")
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
    system: Literal["keep", "strip"] = "keep"
    """The rows' system messages: kept, or stripped (the report strips them from chains)."""
    frames: int = Field(default=16, ge=1)
    """Most frames that are sampled from a video; the report evaluates with 16."""
    fps: float | None = Field(default=None, gt=0)
    """Most frames that are sampled per second of a video; None: no such limit."""
    on_bad_gold: OnBad = "raise"
    """RL and evaluation: a gold answer that its verifier cannot use stops the load, or its row is dropped and
    counted."""


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


def problem_of(
    record: Mapping[str, Any],
    look: Callable[[Picture], Any] = Picture.rgb,
    watch: Callable[[Clip], Any] = Clip.decode,
) -> Problem | None:
    """The first rule that a record breaks, or None.

    Args:
        record: missing fields have their defaults. Pictures may be `Picture`s, files' bytes, PIL images or
            {"bytes": ...}; they are decoded.
        look: decodes a picture; it raises an exception for a broken one.
        watch: decodes a video; it raises an exception for a broken one.

    It checks a single row, so it does not find duplicate ids.
    """
    checks: tuple[Callable[[Mapping[str, Any]], Problem | None], ...] = (
        *(_text_problem, _empty_problem, _kind_problem, _history_problem, _markup_problem),
        *(_placeholder_problem, _meta_problem, partial(_media_problem, look=look, watch=watch)),
    )
    whole = completed(record)
    return next((problem for check in checks if (problem := check(whole))), None)


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


def clip_of(stored: Any, caps: Caps = Caps()) -> Clip:  # noqa: B008
    """The video of one item of a videos column: {"bytes": ...}, bytes or a Clip.

    Raises TypeError for anything else: a path in a file is never followed.
    """
    if isinstance(stored, Mapping):
        stored = stored.get("bytes") or f"only a path, {stored.get('path')!r}"
    if isinstance(stored, Clip):
        return stored
    if not isinstance(stored, bytes):
        raise TypeError(f"expected the bytes of an encoded video, got {stored!r:.80}")
    return Clip(stored, caps)


def json_of(value: Any) -> Any:
    """The value of a field in JSON_FIELDS, which holds it directly or as JSON. Raises ValueError for invalid JSON."""
    return json.loads(value, parse_constant=_no_number) if isinstance(value, str) else value


def users_of(record: Mapping[str, Any]) -> list[str]:
    """The texts of the user's turns, the question last."""
    return [*(turn["user"] for turn in json_of(record["history"])), record["question"]]


def _no_number(word: str) -> Any:
    raise ValueError(f"JSON has no {word}")


def _text_problem(record: Mapping[str, Any]) -> Problem | None:
    for name in TEXTS:
        value, optional = record.get(name), name in _OPTIONAL
        if name in JSON_FIELDS or (optional and value is None):
            continue
        if not isinstance(value, str):
            remedy = f"write it as text{' or leave it null' if optional else ''}"
            return Problem(name, "must be a string", f"{value!r:.60}", remedy)
        if problem := _unicode_problem(name, value):
            return problem
    return None


def _unicode_problem(name: str, value: str) -> Problem | None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        found = f"{value[error.start]!r} at {error.start}"
        return Problem(
            name, "must be valid Unicode", found, "remove half surrogates, or decode the text again"
        )
    return None


def _empty_problem(record: Mapping[str, Any]) -> Problem | None:
    for name in ("id", "question", "system"):
        if record[name] is not None and not record[name].strip():
            remedy = "write null" if name == "system" else f"give the row its {name} or remove it"
            return Problem(name, "must not be empty", repr(record[name]), remedy)
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


def _history_problem(record: Mapping[str, Any]) -> Problem | None:
    remedy = 'write [{"user": text, "assistant": text}, ...], or [] for a row of one turn'
    try:
        history = json_of(record["history"])
    except ValueError as error:
        return Problem("history", "must be JSON", f"{record['history']!r:.60}: {error}", remedy)
    if not isinstance(history, list):
        return Problem("history", "must be a list", f"{history!r:.60}", remedy)
    for turn in history:
        if not isinstance(turn, Mapping) or set(turn) != {"user", "assistant"}:
            return Problem("history", "a turn has user and assistant", f"{turn!r:.60}", remedy)
        for said in turn.values():
            if not isinstance(said, str) or not said.strip():
                return Problem("history", "a turn's texts must not be empty", f"{turn!r:.60}", remedy)
            if problem := _unicode_problem("history", said):
                return problem
        if turn["assistant"] != turn["assistant"].strip():
            # Its first token could merge with the template's newline in a rollout's prompt, but not in a lesson.
            rule = "a reply must not begin or end with white space"
            return Problem("history", rule, f"{turn['assistant']!r:.60}", "strip it")
    return None


def _markup_problem(record: Mapping[str, Any]) -> Problem | None:
    said = [(name, record[name] or "") for name in ("system", "question", "answer", "chain", "response")]
    said += [("history", text) for turn in json_of(record["history"]) for text in turn.values()]
    for name, text in said:
        found = MARKUP.search(text)
        if found:
            remedy = "remove it: pictures come from the images column, turns from the chat template"
            return Problem(name, "holds an image placeholder or chat token", repr(found[0]), remedy)
    for name in ("answer", "chain"):
        found = _THINK_TAG.search(record[name] or "")
        if found:
            return Problem(
                name, "holds a think tag", repr(found[0]), "remove it, or put the whole turn in response"
            )
    for name, text in zip(_user_fields(record), users_of(record), strict=True):
        if THINK_CONTRACT in text:
            remedy = 'remove it: mode "think" adds it, and so does a reply in history that opens with <think>'
            return Problem(name, "holds the thinking contract", repr(THINK_CONTRACT[:20] + "..."), remedy)
    return None


def _user_fields(record: Mapping[str, Any]) -> list[str]:
    return ["history"] * len(json_of(record["history"])) + ["question"]


def _placeholder_problem(record: Mapping[str, Any]) -> Problem | None:
    """The problem of user's turns that mark some but not all media, or contain other data sets' marks."""
    texts = users_of(record)
    for name, text in zip(_user_fields(record), texts, strict=True):
        other = next((mark[0] for mark in PLACEHOLDER.finditer(text) if mark[0] not in (IMAGE, VIDEO)), None)
        if other:
            remedy = f"write {IMAGE} or {VIDEO}, or import the file: posttrain data import"
            return Problem(name, "holds the placeholder of another data set", repr(other), remedy)
    for mark, name in ((IMAGE, "images"), (VIDEO, "videos")):
        marks, media = sum(text.count(mark) for text in texts), record[name]
        if marks and isinstance(media, list) and marks != len(media):
            remedy = f"write one for each, or none: {name} then come first"
            found = f"{marks} {mark} for {len(media)} {name}"
            return Problem("question", f"placeholders ({mark}) and {name} differ in number", found, remedy)
    return None


def _meta_problem(record: Mapping[str, Any]) -> Problem | None:
    meta, rule = record["meta"], "must be a JSON object"
    remedy = 'write {} or {"key": value}, with values of text, numbers, lists and objects'
    try:
        known = json_of(meta)
        if not isinstance(known, dict):
            return Problem("meta", rule, f"{meta!r:.60}", remedy)
        json.dumps(known, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        return Problem("meta", rule, f"{meta!r:.60}: {error}", remedy)
    return None


def _media_problem(
    record: Mapping[str, Any], look: Callable[[Picture], Any], watch: Callable[[Clip], Any]
) -> Problem | None:
    decoders: dict[str, Callable[[Any], Any]] = {
        "images": lambda image: look(picture_of(image)),
        "videos": lambda video: watch(clip_of(video)),
    }
    for name, decode in decoders.items():
        media = record[name]
        if not isinstance(media, list):
            return Problem(name, "must be a list", f"{media!r:.60}", f"write [] for a row without {name}")
        for place, one in enumerate(media):
            try:
                decode(one)
            except Exception as error:  # Pillow and PyAV pass on errors of any type from their decoders
                found = f"{name}[{place}]: {type(error).__name__}: {error}"
                remedy = "put the encoded file itself in the row, or remove the row"
                return Problem(name, "must decode", f"{found:.240}", remedy)
    return None
