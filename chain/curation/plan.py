"""The estimate of `posttrain data curate --plan`: hours, requests and memory of each step."""

from __future__ import annotations

import os
from pathlib import Path

from chain.curation.config import GENERATED, Curation
from chain.inputs import rows_of
from chain.recipe import ForeignSet
from core.strict import ConfigError
from corpus.curation.asking import Score
from corpus.curation.base import Operator, SetOperator
from corpus.curation.difficulty import PassAtK
from corpus.curation.running import IDS, READ

ROWS_PER_CORE_S = {
    READ: 1800,
    IDS: 10_000,
    "strip_instructions": 18_000,
    "unify_format": 20_000,
    "duplicates": 5700,
    "decontaminate": 6300,
    "redundancy": 5800,
    "balance_lengths": 11_000,
    "latent_classes": 1600,
}
"""Rows per CPU second of each step without a model: python -P -m benchmarks.curation, benchmarks/RESULTS.md."""
SIGNATURE_BYTES = {
    "duplicates": 200,
    "decontaminate": 200,
    IDS: 40,
    "balance_lengths": 4,
    "latent_classes": 1050,
}
"""Bytes per row of the arrays on which a set operator decides. Those of latent_classes stay on disk."""


def plan(curation: Curation, rows: int | None = None) -> str:
    """The estimate as text. It counts every row in every step, so it is an upper bound.

    Raises ConfigError if the number of rows is not known and not given.
    """
    rows = rows or _rows(curation)
    cores = curation.workers or os.cpu_count() or 1
    lines = [f"{curation.name}: {rows:,} rows, {cores} cores, engine {curation.engine}"]
    total, unknown = 0.0, []
    for op, step in ((READ, None), (IDS, None), *((step.op, step) for step in curation.steps)):
        if step is not None and step.models():
            words, seconds = _asked(curation, step, rows)
        else:
            seconds = rows / ROWS_PER_CORE_S[op] / cores
            words = f"{ROWS_PER_CORE_S[op]:,} rows/s a core"
        held = SIGNATURE_BYTES.get(op, 0) * rows if op != "latent_classes" else 0
        memory = f", {held / 2**30:.1f} GiB to decide" if held > 2**28 else ""
        lines.append(f"  {op}: {_hours(seconds)} ({words}{memory})")
        total += seconds or 0.0
        unknown += [op] if seconds is None else []
    rest = f", and {', '.join(unknown)}: give models.NAME.requests_per_s, as measured" if unknown else ""
    return "\n".join([*lines, f"  in all: at most {_hours(total)}{rest}"])


def requests_per_row(step: Operator) -> int:
    """Requests that a step sends for a row, at most."""
    if isinstance(step, Score):
        return len(step.used())
    return step.samples if isinstance(step, PassAtK) else 1


def _asked(curation: Curation, step: Operator, rows: int) -> tuple[str, float | None]:
    """The requests of a step in words, and its seconds if the server's rate is known."""
    rate = curation.models[step.models()[0]].requests_per_s
    count = rows * requests_per_row(step)
    if isinstance(step, SetOperator):  # embeddings, 64 to a request
        count = -(-rows // 64)
    return f"{count:,} requests" + (f" at {rate:g}/s" if rate else ""), count / rate if rate else None


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds:,.0f} s"


def _rows(curation: Curation) -> int:
    total = 0
    for name, given in curation.sets.items():
        foreign = isinstance(given, ForeignSet)
        count = None if foreign or given == GENERATED else rows_of(str(Path(str(given)).expanduser()))
        if count is None:
            raise ConfigError(
                f"set {name}: the number of its rows is not known yet; give it: --plan --rows 20000000"
            )
        total += count
    return total
