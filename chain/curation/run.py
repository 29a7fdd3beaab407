"""Runs a curation: inputs, steps, the written set, the incremental check, report and manifest.

<output>/train-00000.parquet ...    the curated records
<output>/report.html                rows in and out of each step, reasons, examples with pictures
<output>/dropped.jsonl              every dropped row: id, step, reason, detail
<output>/steps.json, curation.json  counts of each step; the resolved configuration
<output>/manifest.json              hashes of the inputs, versions, seed; written last
<output>.work/                      the steps' files, which a later run continues from; may be removed
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chain.curation.config import Curation
from chain.curation.incremental import check as incremental_check
from chain.curation.inputs import Inputs
from chain.curation.page import page
from chain.curation.serving import Servers
from chain.curation.tools import Models, costs
from chain.display import Display, duration
from core.files import atomic_dir, write_json, write_text
from core.manifest import Began, Manifest, hash_config
from core.strict import ConfigError
from corpus.curation.engine import Engine
from corpus.curation.running import Runner, StepResult

REPORT = "report.html"


def curate(curation: Curation, display: Display | None = None) -> Path:
    """Bring a curation's output up to date; return its folder. Raises ConfigError before anything runs."""
    display, began = display or Display(), Began()
    output = Path(curation.output).expanduser().resolve()
    work = output.with_name(output.name + ".work")
    engine = Engine(curation.engine, curation.workers or os.cpu_count() or 1, curation.ray_address)
    with _locked(work), engine, Servers(curation, work) as servers, display.step(curation.name):
        inputs = Inputs(curation, work, engine)
        inputs.prepare()
        for name, place in inputs.places.items():
            display.line(f"set {name}: {place}")
        fingerprint = hash_config(
            {"config": curation.model_dump(mode="json", exclude=_NOT_RESULTS), "inputs": inputs.hashes}
        )
        made = Manifest.read(output)
        if made and made.fingerprint == fingerprint:
            display.line(f"{output}: up to date")
            return output
        runner = Runner(
            work / "steps",
            inputs.shards(curation.sets),
            inputs.shards(curation.held_out),
            Models(curation.models, work / "replies.sqlite3", servers.start),
            engine,
            curation.seed,
            hash_config({name: inputs.hashes[name] for name in curation.sets}),
            _progress(display),
            lambda result: display.line(line(result)),
        )
        results = runner.run(curation.steps)
        with atomic_dir(output, same=fingerprint) as out:
            kept = runner.write(out)
            _write_dropped(results, out / "dropped.jsonl")
            checked = incremental_check(curation, inputs, out, work) if curation.incremental else None
            told = {"kept": kept, "import": inputs.rejected(), "steps": [_told(one) for one in results]}
            write_json(out / "steps.json", {**told, "incremental": checked, "models": costs(curation.models)})
            write_json(out / "curation.json", curation)
            write_text(out / REPORT, page(curation, inputs, runner, checked))
            began.manifest(
                stage="curation",
                fingerprint=fingerprint,
                config_hash=hash_config(curation.model_dump(mode="json")),
                inputs=inputs.hashes,
                seed=curation.seed,
            ).write(out)
    if checked:
        display.line(checked["text"])
    display.line(f"{kept} rows in {output}; report: {output / REPORT}; {work} may be removed")
    return output


_NOT_RESULTS = {"engine", "ray_address", "workers", "about", "rows"}
"""Keys that do not change the curated rows."""


def line(result: StepResult) -> str:
    """One line about a finished step."""
    counts = result.outline
    reasons = ", ".join(f"{count} {reason}" for reason, count in counts.reasons.most_common(4))
    changed = f", {counts.changed} changed" if counts.changed else ""
    rate = f"{counts.rows / result.seconds:,.0f} rows/s, " if result.seconds else ""
    return (
        f"{result.op}: {counts.rows:,} -> {counts.kept:,} rows{changed} ({rate}{duration(result.seconds)})"
        f"{': ' + reasons if reasons else ''}"
    )


def _told(result: StepResult) -> dict[str, Any]:
    counts = result.outline
    told = {"op": result.op, "rows": counts.rows, "kept": counts.kept, "changed": counts.changed}
    return {
        **told,
        "reasons": counts.reasons,
        "facts": result.facts,
        "seconds": result.seconds,
        "cpu_s": counts.cpu_s,
    }


def _progress(display: Display) -> Any:
    def tell(op: str, done: int, total: int, seconds: float) -> None:
        rate = done / seconds if seconds else 0.0
        left = f", {duration((total - done) / rate)} left" if rate else ""
        display.passing(f"{op}: {done:,} of {total:,} rows, {rate:,.0f} rows/s{left}", elapsed=False)

    return tell


def _write_dropped(results: list[StepResult], path: Path) -> None:
    """Write a line for each dropped row, shard by shard."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with path.open("w", encoding="utf-8") as file:
        for result in results:
            for part in sorted(result.folder.glob("part-*.parquet")):
                table = pq.read_table(part, columns=["id", "reason", "detail"])
                for row in table.filter(pc.is_valid(table["reason"])).to_pylist():
                    file.write(json.dumps({"step": result.op, **row}, ensure_ascii=False) + "\n")


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    work.mkdir(parents=True, exist_ok=True)
    with (work / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"{work} is in use by another curation; wait for it to end") from None
        yield
