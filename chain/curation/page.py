"""The page of a curation: rows in and out of each step, reasons, examples of dropped and kept rows with pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chain.curation.config import Curation
from chain.curation.inputs import Inputs
from chain.display import duration
from chain.report.rows import card, rows_page
from corpus.curation.base import Operator
from corpus.curation.running import IDS, READ, Runner, StepResult
from corpus.curation.shards import DETAIL, REASON, ROW, Shard, Source
from corpus.curation.steps import OPERATORS

_OURS = {
    READ: "Read the records and check them: the rules of the schema, and every picture decodes. Imported rows that did "
    "not fit their format are in the .rejected.jsonl files.",
    IDS: "Drop rows whose id an earlier row has.",
}


def page(curation: Curation, inputs: Inputs, runner: Runner, incremental: Mapping[str, Any] | None) -> str:
    """The whole page."""
    results = runner.results
    imports = [
        [
            name,
            f"{read:,}",
            f"{written:,}",
            ", ".join(f"{count:,} x {rule}" for rule, count in rules.items()) or "–",
        ]
        for name, read, written, rules in inputs.rejected()
    ]
    tables = [{"title": "Steps", "heads": _HEADS, "rows": [_row(result) for result in results]}]
    if imports:
        heads = ["set", "rows", "records", "rejected"]
        tables.insert(0, {"title": "Imported sets", "heads": heads, "rows": imports})
    if incremental:
        tables.append({"title": "Incremental check", "heads": ["result"], "rows": [[incremental["text"]]]})
    settings = [None, None, *curation.steps]
    parts = [
        _part(result, results[at - 1] if at else None, step, runner.shards)
        for at, (result, step) in enumerate(zip(results, settings, strict=True))
    ]
    facts = [
        f"seed {curation.seed}",
        f"{results[-1].outline.kept:,} of {results[0].outline.rows:,} rows kept",
    ]
    return rows_page(f"{curation.name}: curation", curation.about, facts, tables, parts)


_HEADS = ["step", "rows in", "rows out", "dropped", "changed", "time", "rows/s", "rows/s a core"]


def _row(result: StepResult) -> list[str]:
    counts = result.outline
    dropped = counts.rows - counts.kept
    share = f" ({dropped / counts.rows:.1%})" if counts.rows else ""
    return [
        result.op,
        f"{counts.rows:,}",
        f"{counts.kept:,}",
        f"{dropped:,}{share}",
        f"{counts.changed:,}",
        duration(result.seconds),
        f"{counts.rows / result.seconds:,.0f}" if result.seconds else "–",
        f"{counts.rows / counts.cpu_s:,.0f}" if counts.cpu_s else "–",
    ]


def _part(
    result: StepResult, before: StepResult | None, step: Any, shards: Sequence[Shard]
) -> dict[str, Any]:
    counts, kind = result.outline, OPERATORS.get(result.op)
    about = _OURS.get(result.op) or " ".join((kind.__doc__ or "").partition(">>>")[0].split())
    tables = []
    if counts.reasons:
        rows = [[reason, f"{count:,}"] for reason, count in counts.reasons.most_common()]
        tables.append({"heads": ["reason", "rows"], "rows": rows})
    if result.facts:
        tables.append(
            {
                "heads": ["figure", "value"],
                "rows": [[name, str(value)] for name, value in result.facts.items()],
            }
        )
    old = before.folder if before else None
    return {
        "name": result.op,
        "about": about,
        "settings": _settings(step) if step else "",
        "tables": tables,
        "open": False,
        "cards": [
            (
                f"{len(places)} of {of:,} {name} rows",
                [_example(place, result.folder, old, shards) for place in places],
            )
            for name, of, places in (
                ("dropped", counts.rows - counts.kept, counts.dropped_examples),
                ("kept", counts.kept, counts.kept_examples),
            )
        ],
    }


def _settings(step: Operator) -> str:
    values = step.model_dump(mode="json", exclude={"op"})
    return ", ".join(f"{name}: {value}" for name, value in values.items() if value not in (None, [], {}))


def _example(
    place: tuple[int, int, int], folder: Path, before: Path | None, shards: Sequence[Shard]
) -> dict[str, Any]:
    """The card of one row of a step, with the step's changes."""
    _, shard, number = place
    row = _stored(folder, shard, number)
    reason, detail = row.pop(REASON) or "", row.pop(DETAIL) or ""
    media = Source(shards[shard]).media(number)
    old = _stored(before, shard, number) if before and not reason else None
    return card({**row, **media}, old, reason, detail)


def _stored(folder: Path, shard: int, number: int) -> dict[str, Any]:
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    table = pq.read_table(folder / f"part-{shard:05d}.parquet", use_threads=False)
    (row,) = table.filter(pc.equal(table[ROW], number)).to_pylist()
    return row
