"""The estimate of `posttrain data curate --plan` and `posttrain plan`: hours, requests and memory of each step."""

from __future__ import annotations

import os
from dataclasses import dataclass

from chain.curation.config import GENERATED, Curation
from chain.curation.inputs import missing
from chain.inputs import is_on_hub, rows_of, set_place
from chain.recipe import ForeignSet
from core.strict import ConfigError
from corpus.curation.asking import Score
from corpus.curation.base import Operator, SetOperator
from corpus.curation.difficulty import PassAtK
from corpus.curation.running import IDS, READ

ROWS_PER_CORE_S = {
    READ: 2600,
    IDS: 13_000,
    "strip_instructions": 19_000,
    "unify_format": 21_000,
    "duplicates": 6400,
    "decontaminate": 6700,
    "redundancy": 12_000,
    "balance_lengths": 11_000,
    "latent_classes": 7500,
}
"""Rows per CPU second of each step without a model, over 100,000 rows: python -P -m benchmarks.curation."""
SIGNATURE_BYTES = {
    "duplicates": 200,
    "decontaminate": 200,
    IDS: 40,
    "balance_lengths": 4,
    "latent_classes": 1050,
}
"""Bytes per row of the arrays on which a set operator decides. Those of latent_classes stay on disk."""
BASIS = (
    "every row in every step; rows with one JPEG of 200 px, larger pictures and videos take longer to read"
)


@dataclass(frozen=True)
class StepTime:
    """The estimate of one step."""

    op: str
    words: str
    """The rate, or the requests."""
    seconds: float | None
    """None: the rate of the step's model is not known."""
    requests: int = 0


@dataclass(frozen=True)
class Estimate:
    """The estimate of a curation. It counts every row in every step, so it is an upper bound."""

    rows: int
    cores: int
    steps: tuple[StepTime, ...]

    @property
    def seconds(self) -> float:
        """The sum of the known times."""
        return sum(step.seconds or 0.0 for step in self.steps)

    def total(self) -> str:
        """The sum in words, with the steps whose time is not known."""
        unknown = [step for step in self.steps if step.seconds is None]
        if not unknown:
            return f"at most {_hours(self.seconds)}"
        requests, ops = sum(step.requests for step in unknown), ", ".join(step.op for step in unknown)
        remedy = "their time needs models.NAME.requests_per_s, as measured"
        return f"at most {_hours(self.seconds)}, and {requests:,} requests of {ops} ({remedy})"


def estimate(curation: Curation, rows: int | None = None) -> Estimate:
    """The estimate for `rows`, or else for the rows of the input, or else for the curation's own number.

    Raises ConfigError if the number of rows is not known.
    """
    rows = rows or _rows(curation)
    cores = curation.workers or os.cpu_count() or 1
    steps = []
    for op, step in ((READ, None), (IDS, None), *((step.op, step) for step in curation.steps)):
        if step is not None and step.models():
            steps.append(_asked(curation, step, rows))
            continue
        held = SIGNATURE_BYTES.get(op, 0) * rows if op != "latent_classes" else 0
        memory = f", {held / 2**30:.1f} GiB to decide" if held > 2**28 else ""
        rate = ROWS_PER_CORE_S[op]
        steps.append(StepTime(op, f"{rate:,} rows/s a core{memory}", rows / rate / cores))
    return Estimate(rows, cores, tuple(steps))


def plan(curation: Curation, rows: int | None = None) -> str:
    """The sets and the estimate as text. Raises ConfigError as `estimate`."""
    found = estimate(curation, rows)
    return "\n".join(
        [
            f"{curation.name}: {found.rows:,} rows, {found.cores} cores, engine {curation.engine}",
            *(f"  set {name}: {_state(curation, name, given)}" for name, given in curation.every().items()),
            *(f"  {step.op}: {_hours(step.seconds)} ({step.words})" for step in found.steps),
            f"  in all: {found.total()}",
            f"  counted: {BASIS}",
        ]
    )


def requests_per_row(step: Operator) -> int:
    """Requests that a step sends for a row, at most."""
    if isinstance(step, Score):
        return len(step.used())
    return step.samples if isinstance(step, PassAtK) else 1


def _asked(curation: Curation, step: Operator, rows: int) -> StepTime:
    """The requests of a step, and its seconds if the server's rate is known."""
    rate = curation.models[step.models()[0]].requests_per_s
    count = rows * requests_per_row(step)
    if isinstance(step, SetOperator):  # embeddings, 64 to a request
        count = -(-rows // 64)
    words = f"{count:,} requests" + (f" at {rate:g}/s" if rate else "")
    return StepTime(step.op, words, count / rate if rate else None, count)


def _hours(seconds: float | None) -> str:
    if seconds is None:
        return "unknown"
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds:,.0f} s"


def _state(curation: Curation, name: str, given: str | ForeignSet) -> str:
    """Where a set is, and whether it exists."""
    text = given.path if isinstance(given, ForeignSet) else given
    if text.partition("/")[0] == GENERATED:
        return "generated"
    place = set_place(curation, text)
    if is_on_hub(place):
        return f"{place} on the hub"
    return f"{place} ({'MISSING' if missing(curation, name, given) else 'found'})"


def _rows(curation: Curation) -> int:
    """The rows of the input. Raises ConfigError for a set whose rows are not known."""
    total = 0
    for name, given in curation.sets.items():
        known = isinstance(given, str) and given.partition("/")[0] != GENERATED and not is_on_hub(given)
        count = rows_of(set_place(curation, str(given))) if known else None
        if count is None:
            if curation.rows:
                return curation.rows
            raise ConfigError(
                f"set {name}: the number of its rows is not known yet; give it: --plan --rows 20000000, or `rows` in "
                "the file"
            )
        total += count
    return total
