"""Imports sets of foreign formats as records, for a run or for the command, and describes the result."""

from __future__ import annotations

from pathlib import Path

from chain.recipe import ForeignSet
from core.model.prompts import user_text
from corpus.importing import Summary, import_set
from corpus.schema import Record

SAMPLE = 200
"""Rows whose gold answers are tested."""


def imported(given: ForeignSet, destination: Path, rows: int | None = None) -> list[str]:
    """Import a set into a Parquet file; return lines that describe the result.

    Args:
        given: the set and its import options.
        destination: the Parquet file; rejected rows go to a .rejected.jsonl beside it.
        rows: number of leading rows to import; None: all.

    Raises ConfigError and RecordError as `corpus.importing.import_set` does.
    """
    from corpus.formats.files import files_of, root_of
    from corpus.formats.table import Options

    root = root_of(given.path, files_of(given.path, given.split), given.images)
    options = Options(root=root, columns=given.columns, system=given.system, turns=given.turns)
    summary = import_set(
        given.path,
        destination,
        format_=given.format,
        options=options,
        split=given.split,
        rows=rows,
        strict=given.strict,
    )
    notes = destination.with_suffix(".rejected.jsonl")
    places = f"records: {destination}" + (f"; rejected rows: {notes}" if summary.rejected else "")
    return [*lines(summary), places, *_golds(destination)]


def _asked(row: Record) -> str:
    """A row's prompt: system message, pictures, earlier turns, question."""
    before = [f"[system: {row['system']}]"] if row["system"] else []
    before += [f"[{image.width}x{image.height}]" for image in row["images"]]
    before += [f"[video: {len(video.frames)} frames]" for video in row["videos"]]
    before += [f"[{turn['user']} -> {turn['assistant']}]" for turn in row["history"]]
    return " ".join([*before, user_text(row["question"], row["mode"])])


def lines(summary: Summary) -> list[str]:
    """Describe an import: format, mapping, three rows as the model sees them, counts of kinds and of reject reasons."""
    from rewards.offline.rows import printable

    said = [
        f"format {summary.format}: " + ", ".join(f"{name} = {of}" for name, of in summary.mapping.items())
    ]
    for row in summary.first:
        said.append(f"  {row['id']}, {row['mode']}: {printable(_asked(row), 160)}")
        gold = f"gold {row['answer']!r}, {row['verifier']}" if row["answer"] else "no gold"
        said.append(
            f"    -> {printable(row['response'] or row['chain'] or row['answer'], 120)} ({printable(gold)})"
        )
    said.append(
        f"{summary.written} records of {summary.read} rows, {sum(summary.rejected.values())} rejected"
    )
    said += [f"  {number} x {reason}" for reason, number in summary.rejected.most_common()]
    kinds = ", ".join(
        f"{kind} {number / summary.written:.0%}" for kind, number in summary.kinds.most_common()
    )
    said.append(f"gold answers: {kinds}")
    if summary.animated:
        said.append(f"{summary.animated} rows have an animation; the model sees its first frame")
    return said


def _golds(path: Path) -> list[str]:
    """The result of `posttrain rewards test answer` on a sample: do its gold answers score 1, and corrupted ones 0?"""
    from rewards.offline.gold_test import tested

    found = tested("answer", str(path), {}, rows=SAMPLE, seed=0, mode=None, split="train")
    said = [found.summary, found.failures[0]] if found.failures else found.claims
    return [f"rewards test, answer: {line}" for line in said]
