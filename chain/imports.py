"""Imports sets of foreign formats as records, for a run or for the command, and describes the result."""

from __future__ import annotations

from pathlib import Path

from chain.recipe import ForeignSet
from corpus.importing import Summary, import_set


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
    places = f"records: {destination}; rejected rows: {destination.with_suffix('.rejected.jsonl')}"
    return [*lines(summary), places, _golds(destination)]


def lines(summary: Summary) -> list[str]:
    """Describe an import: format, mapping, three rows as the model sees them, counts of kinds and of reject reasons."""
    from core.model.prompts import user_text
    from rewards.offline.rows import printable

    said = [
        f"format {summary.format}: " + ", ".join(f"{name} = {of}" for name, of in summary.mapping.items())
    ]
    for row in summary.first:
        media = [f"[{image.width}x{image.height}]" for image in row["images"]]
        media += [f"[video: {len(video.frames)} frames]" for video in row["videos"]]
        pictures = " ".join([*media, *[f"[{len(row['history'])} earlier turns]"] * bool(row["history"])])
        asked = printable(f"{pictures} {user_text(row['question'], row['mode'])}".strip(), 160)
        gold = f"gold {row['answer']!r}, {row['verifier']}" if row["answer"] else "no gold"
        said.append(f"  {row['id']}, {row['mode']}: {asked}")
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


def _golds(path: Path) -> str:
    """A line with the share of sampled gold answers that the RL stages' verifier can use."""
    from corpus.records import load_records
    from rewards.answer import gold_problem
    from rl.data import example_of

    records = load_records(path)
    sample = [
        row for row in records[:: max(1, len(records) // 200)] if row["verifier"] not in ("none", "judge")
    ]
    bad = [f"{row['id']}: {problem}" for row in sample if (problem := gold_problem(example_of(row)))]
    first = f"; the first unusable one: {bad[0]}" if bad else ""
    return f"{len(sample) - len(bad)} of {len(sample)} sampled gold answers are usable for grading{first}"
