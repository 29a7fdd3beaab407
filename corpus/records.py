"""The one record schema of all stages, its rules, and its Parquet files.

A record is a dict:

| field | type | meaning |
|---|---|---|
| id | str | unique within its set |
| images | list of pictures | shown before the question; [] for a text-only row |
| question | str | without the thinking contract: core.model.prompts adds it by `mode` |
| answer | str | gold answer; may be "" only where verifier is "none" and a response is given |
| chain | str or None | the thought that leads to the answer, without tags |
| response | str or None | the assistant's turn verbatim; as an SFT target it overrides chain and answer |
| mode | "think", "direct" | which prompt contract the row is asked under |
| verifier | one of VERIFIERS | how a completion is graded: rewards.answer says what each means |
| source | str | where the row comes from |
| meta | JSON object | whatever a generator or a judge wants to keep; a JSON string in the file |

Data is untrusted: text that a chat template would read as markup (image placeholders, chat tokens) is
refused, as is a picture that does not decode or lies outside the file. A bad row stops the load with its
file, row number (from 0), field, rule and remedy, or, with on_bad="drop", is left out, counted by rule and
logged. Nothing is dropped silently.
"""

from __future__ import annotations

import io
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import Field

from core.model.pictures import as_rgb
from core.model.prompts import THINK_CONTRACT
from core.strict import Strict, nearest

log = logging.getLogger(__name__)

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
"""The kinds of rewards.answer."""
DEFAULTS: Record = {"images": [], "chain": None, "response": None, "source": "", "meta": {}}
"""What a file may leave out."""
REQUIRED = ("id", "question", "answer", "mode", "verifier")
FIELDS = ("id", "images", "question", "answer", "chain", "response", "mode", "verifier", "source", "meta")
MARKUP = re.compile(r"<IMG_CONTEXT>|</?img>|<\|[A-Za-z0-9_]+\|>")
"""Image placeholders and chat tokens of the released vocabulary."""
_THINK_TAG = re.compile(r"</?think>")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_SCAN_ROWS = 256
_SHOWN_PROBLEMS = 5

OnBad = Literal["raise", "drop"]


class DataSource(Strict):
    """A named set of records, and how much of it a stage takes."""

    set: str = Field(min_length=1)
    """Name of a set: `<run>/data/<set>.parquet`, or an entry of the recipe's data.sets."""
    rows: int | None = Field(default=None, ge=1)
    """So many rows, drawn by the stage's seed; None takes all. More than the set has is an error."""
    split: str = "train"
    """Split of the set; a single Parquet file is its own."""
    unaskable: Literal["refuse", "drop"] = "refuse"
    """Sets that are sent to the rollout servers: a row beyond their limits (pictures per prompt, tokens of prompt and
    completion) is refused before the first stage, or dropped and counted in the log."""
    on_bad_gold: OnBad = "raise"
    """RL only: a gold answer that cannot be graded against stops the load, or drops its row, counted in the log."""


class RecordError(ValueError):
    """Rows break a rule of the schema; the message names file, row, field, rule and remedy."""


class Problem(NamedTuple):
    """What is wrong with one row."""

    field: str
    rule: str
    """The rule broken, the same text for every row that breaks it: drops are counted by it."""
    found: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.field}: {self.rule} (found {self.found}); {self.remedy}"


class Records(Sequence[Record]):
    """Checked records, read from disk when indexed; pictures decode when they are first used.

    `dropped` counts the rows left out, by the rule they broke ({} unless on_bad="drop").
    """

    def __init__(
        self,
        table: Any,
        indices: Sequence[int],
        dropped: Mapping[str, int],
        locate: Callable[[int], tuple[str, int]],
    ) -> None:
        self._table, self._indices, self.dropped, self._locate = table, indices, dict(dropped), locate

    def place(self, index: int) -> str:
        """Where a record comes from, for messages: its file and its row there, from 0."""
        file, row = self._locate(self._indices[index])
        return f"{file}: row {row}"

    def only(self, kept: Sequence[int]) -> Records:
        """The records of these indices."""
        indices = [self._indices[index] for index in kept]
        return Records(self._table, indices, self.dropped, self._locate)

    @property
    def numbers(self) -> Sequence[int]:
        """Each record's row number in the file, from 0."""
        return self._indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._row(row) for row in self._indices[index]]
        return self._row(self._indices[index])

    def __iter__(self) -> Iterator[Record]:
        return (self._row(row) for row in self._indices)

    def _row(self, row: int) -> Record:
        record = _completed(self._table[row].to_pylist()[0])
        return {
            **record,
            "images": [_picture(image) for image in record["images"]],
            "meta": _meta(record["meta"]),
        }


def load_records(
    source: str | Path,
    split: str = "train",
    rows: int | None = None,
    seed: int | None = None,
    on_bad: OnBad = "raise",
) -> Records:
    """The records of a Parquet file, a folder of Parquet files, or a dataset on the hub.

    Args:
        source: path or hub id. In a folder the files `<split>*.parquet` are read, else (for "train") all.
        rows: take so many: the first ones, or with a seed a random draw; their order is the file's.
        on_bad: "raise" stops at bad rows, "drop" leaves them out and counts them in `Records.dropped`.

    Raises RecordError for bad rows, unknown columns, or fewer good rows than asked for; FileNotFoundError if
    there is nothing under that name.
    """
    table, locate = _open(str(source), split)
    _check_columns(table.column_names, str(source))
    order: Sequence[int] = range(len(table))
    if rows is not None and seed is not None:
        order = _shuffled(len(table), seed)
    good, bad = _scan(table, order, rows)
    dropped = Counter(f"{problem.field}: {problem.rule}" for _, problem in bad)
    if bad and on_bad == "raise":
        raise RecordError(_report(bad, locate))
    if bad:
        log.warning("%s: dropped %d rows: %s", source, len(bad), dict(dropped))
    if rows is not None and len(good) < rows:
        raise RecordError(
            f"{source}: rows={rows} were asked for, {len(good)} usable ones are there "
            f"({len(table)} rows, {len(bad)} dropped); ask for fewer or bring more data"
        )
    if not good:
        raise RecordError(f"{source}: split {split!r} holds no usable row")
    return Records(table, sorted(good), dropped, locate)


def write_records(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write records to one Parquet file, whole or not at all; returns how many.

    Pictures may be PIL images (stored as PNG, without loss) or encoded bytes. `datasets` reads the images
    column as pictures. Raises RecordError if a row breaks a rule: what is written can be loaded.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = [_storable(row) for row in rows]
    good, bad = _check_all(list(enumerate(plain)))
    if bad:
        raise RecordError(_report(bad, lambda row: (str(path), row)))
    if not good:
        raise RecordError(f"{path}: no row to write")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # Small row groups: a reader of single rows decompresses no more than it must.
        table = pa.Table.from_pylist(plain, schema=_schema())
        pq.write_table(table, draft, row_group_size=_SCAN_ROWS)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return len(plain)


def problem_of(record: Mapping[str, Any]) -> Problem | None:
    """The first rule that a record breaks, or None. Does not see other rows, so not duplicate ids."""
    for check in (_text_problem, _kind_problem, _markup_problem, _meta_problem, _image_problem):
        problem = check(record)
        if problem:
            return problem
    return None


def _text_problem(record: Mapping[str, Any]) -> Problem | None:
    for name in FIELDS:
        value, text = record.get(name), name not in ("images", "meta")
        optional = name in ("chain", "response")
        if text and not isinstance(value, str) and not (optional and value is None):
            remedy = f"write it as text{' or leave it null' if optional else ''}"
            return Problem(name, "must be a string", f"{value!r:.60}", remedy)
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


def _meta_problem(record: Mapping[str, Any]) -> Problem | None:
    meta = record["meta"]
    try:
        known = _meta(meta)
    except ValueError as error:
        return Problem(
            "meta", "must be a JSON object", f"{meta!r:.60}: {error}", 'write {} or {"key": value}'
        )
    if not isinstance(known, dict):
        return Problem("meta", "must be a JSON object", f"{meta!r:.60}", 'write {} or {"key": value}')
    return None


def _image_problem(record: Mapping[str, Any]) -> Problem | None:
    images = record["images"]
    if not isinstance(images, list):
        return Problem("images", "must be a list", f"{images!r:.60}", "write [] for a text-only row")
    for place, image in enumerate(images):
        try:
            picture = _picture(image)
            picture.load()
        except Exception as error:  # Pillow raises whatever the broken decoder raised
            found = f"images[{place}]: {type(error).__name__}: {error}"
            return Problem(
                "images",
                "must decode",
                f"{found:.160}",
                "put the encoded picture itself in the file, or remove the row",
            )
        try:
            as_rgb(picture)
        except ValueError as error:
            found = f"images[{place}]: {error}"
            return Problem("images", "must fit eight bits of RGB", found, "convert it, or remove the row")
    return None


def _picture(image: Any) -> Any:
    """A PIL image, still undecoded, from what the file holds."""
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if isinstance(image, Mapping):
        image = image.get("bytes") or f"only a path, {image.get('path')!r}"
    if not isinstance(image, bytes):
        raise TypeError(f"expected the bytes of an encoded picture, got {image!r:.80}")
    return Image.open(io.BytesIO(image))


def _meta(meta: Any) -> Any:
    return json.loads(meta) if isinstance(meta, str) else meta


def _completed(row: Mapping[str, Any]) -> Record:
    """The row in the schema's order, with what it may leave out filled in."""
    record = {name: row.get(name) for name in FIELDS}
    return {name: DEFAULTS.get(name) if value is None else value for name, value in record.items()}


def _storable(row: Mapping[str, Any]) -> Record:
    """The row as Parquet holds it: pictures encoded, meta as a JSON string."""
    unknown = [name for name in row if name not in FIELDS]
    if unknown:
        raise RecordError(
            f"row {row.get('id')!r}: unknown field {unknown[0]!r}; {nearest(unknown[0], FIELDS)}"
        )
    record = _completed(row)
    images = [_encoded(image) for image in record["images"]]
    meta = record["meta"]
    if not isinstance(meta, str):
        meta = json.dumps(meta, ensure_ascii=False, allow_nan=False, sort_keys=True)
    return {**record, "images": images, "meta": meta}


def _encoded(image: Any) -> Mapping[str, Any]:
    if isinstance(image, Mapping):
        return image
    if isinstance(image, bytes):
        return {"bytes": image, "path": None}
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def _schema() -> Any:
    """The Arrow schema, with the metadata by which `datasets` knows the images for pictures."""
    from datasets import Features, Image, List, Value

    kinds = {name: List(Image()) if name == "images" else Value("string") for name in FIELDS}
    return Features(kinds).arrow_schema


def _open(source: str, split: str) -> tuple[Any, Any]:
    """The rows, memory-mapped in Arrow format, and a function from a row number to its file and row there."""
    import datasets

    path = Path(source)
    if path.exists():
        files = _files(path, split)
        table = _quietly(
            lambda: datasets.load_dataset(
                "parquet", data_files={split: [str(f) for f in files]}, split=split
            ),
            f"{source}: not readable as Parquet; write it with corpus.records.write_records",
        )
        return table.with_format("arrow"), _locator(files)
    if not _HUB_ID.fullmatch(source) or source.endswith(".parquet"):
        raise FileNotFoundError(f"{source}: no such file or folder, and no hub id (owner/name) either")
    table = _quietly(
        lambda: datasets.load_dataset(source, split=split),
        f"{source}: no file or folder here, and the hub does not serve split {split!r} of it",
    )
    return table.with_format("arrow"), lambda row: (f"{source}[{split}]", row)


def _quietly(load: Any, complaint: str) -> Any:
    """What `load` returns, without progress bars in the log; its failure, with the complaint in front."""
    import datasets

    shown = datasets.are_progress_bars_disabled() is False
    datasets.disable_progress_bars()
    try:
        return load()
    except (
        Exception
    ) as error:  # datasets wraps Arrow's, the network's and the hub's errors in kinds of its own
        cause = error.__cause__ or error
        raise RecordError(f"{complaint} ({type(cause).__name__}: {cause})") from error
    finally:
        if shown:
            datasets.enable_progress_bars()


def _files(path: Path, split: str) -> list[Path]:
    if path.is_file():
        return [path]
    every = sorted(path.glob("*.parquet"))
    named = [file for file in every if re.match(rf"{re.escape(split)}([-.]|$)", file.stem)]
    files = named or (every if split == "train" else [])
    if not files:
        there = ", ".join(file.name for file in every) or "no Parquet file"
        raise FileNotFoundError(f"{path}: no file for split {split!r} ({there}); name it {split}.parquet")
    return files


def _locator(files: Sequence[Path]) -> Any:
    import pyarrow.parquet as pq

    def locate(row: int) -> tuple[str, int]:
        for file in files:
            count = pq.read_metadata(file).num_rows
            if row < count:
                return str(file), row
            row -= count
        raise IndexError(row)

    return locate


def _check_columns(columns: Iterable[str], source: str) -> None:
    names = list(columns)
    for name in names:
        if name not in FIELDS:
            raise RecordError(
                f"{source}: unknown column {name!r}; {nearest(name, FIELDS)}. Rename or remove it"
            )
    missing = [name for name in REQUIRED if name not in names]
    if missing:
        raise RecordError(f"{source}: columns missing: {', '.join(missing)}; the file has {', '.join(names)}")


def _shuffled(count: int, seed: int) -> list[int]:
    import random

    return random.Random(seed).sample(range(count), count)


def _scan(
    table: Any, order: Sequence[int], wanted: int | None
) -> tuple[list[int], list[tuple[int, Problem]]]:
    """Numbers of good rows, and (number, problem) of bad ones, in that order until enough are good."""
    good: list[int] = []
    bad: list[tuple[int, Problem]] = []
    seen: set[str] = set()
    goal, looked_at = len(order) if wanted is None else wanted, 0
    while looked_at < len(order) and len(good) < goal:
        numbers = list(order[looked_at : looked_at + min(_SCAN_ROWS, goal - len(good))])
        looked_at += len(numbers)
        rows = [_completed(row) for row in table[numbers].to_pylist()]
        ok, broken = _check_all(list(zip(numbers, rows, strict=True)), seen)
        good += ok
        bad += broken
    return good, bad


def _check_all(
    rows: Sequence[tuple[int, Record]], seen: set[str] | None = None
) -> tuple[list[int], list[tuple[int, Problem]]]:
    """Splits numbered rows into good ones and problems; `seen` collects ids across calls."""
    seen = set() if seen is None else seen
    good, bad = [], []
    # Decoding pictures is most of the work and releases the interpreter lock.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        problems = list(pool.map(problem_of, (record for _, record in rows)))
    for (number, record), problem in zip(rows, problems, strict=True):
        if problem is None and record["id"] in seen:
            problem = Problem("id", "must be unique", repr(record["id"]), "rename one of the two rows")
        if problem is None:
            seen.add(record["id"])
            good.append(number)
        else:
            bad.append((number, problem))
    return good, bad


def _report(bad: Sequence[tuple[int, Problem]], locate: Any) -> str:
    lines = []
    for number, problem in bad[:_SHOWN_PROBLEMS]:
        file, row = locate(number)
        lines.append(f"{file}: row {row}: {problem}")
    if len(bad) > _SHOWN_PROBLEMS:
        counts = Counter(f"{problem.field}: {problem.rule}" for _, problem in bad)
        lines.append(f"... and {len(bad) - _SHOWN_PROBLEMS} more bad rows; all of them: {dict(counts)}")
    return "\n".join(lines)
