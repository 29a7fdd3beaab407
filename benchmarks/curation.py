"""Curation without models: rows/s and peak memory on processes and on Ray Data, and found planted defects.

    python -P -m benchmarks.curation [--rows 10000 100000] [--engines local ray] [--workers 2]
    python -P -m benchmarks.curation --planted 2000

Each run is a fresh process over the same Parquet files of rows with a JPEG of 200 px. CPU seconds are those of the
workers' threads, so rows/s a core do not depend on other programs. Memory is resident memory, of the process that
decides and of the largest worker.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.common import emit, show
from benchmarks.curation_rows import near, restating, row

FILE_ROWS = 5000
PICTURES = 10_000
"""Different pictures; later rows ask other questions about them."""
STEPS: list[dict[str, Any]] = [
    {"op": "strip_instructions"},
    {"op": "unify_format"},
    {"op": "duplicates"},
    {"op": "decontaminate"},
    {"op": "redundancy"},
    {"op": "balance_lengths", "keep_share": 0.9},
    {"op": "latent_classes", "keep_share": 0.9},
]


def main() -> None:
    """Print a table for speed and memory, or for planted defects."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--engines", nargs="+", default=["local", "ray"])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--planted", type=int, help="good rows of the test with planted defects")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(_one(options.one[0], Path(options.one[1]), Path(options.one[2]), options.workers)))
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.planted:
            found = planted(options.planted, Path(folder))
            heads = ("defect", "planted", "found", "recall", "precision")
            show(
                f"planted defects among {options.planted} good rows",
                heads,
                [list(one.values()) for one in found],
            )
            emit("curation-planted", rows=options.planted, found=found)
            return
        _speed(options, Path(folder))


def _speed(options: argparse.Namespace, folder: Path) -> None:
    results = []
    for count in options.rows:
        data = folder / f"rows-{count}"
        make_rows(count, data)
        for engine in options.engines:
            command = [
                sys.executable,
                "-P",
                "-m",
                "benchmarks.curation",
                "--workers",
                str(options.workers),
                "--one",
            ]
            out = folder / f"{engine}-{count}"
            done = subprocess.run(
                [*command, engine, str(data), str(out)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise SystemExit(done.stderr)
            results.append({"engine": engine, "rows": count, **json.loads(done.stdout.splitlines()[-1])})
            print(json.dumps(results[-1]), file=sys.stderr, flush=True)  # a run takes minutes
    heads = ("engine", "rows", "rows/s", "main MiB", "worker MiB")
    show(
        f"all steps, {options.workers} workers",
        heads,
        [
            [one["engine"], one["rows"], round(one["rows_per_s"]), one["main_mib"], one["worker_mib"]]
            for one in results
        ],
    )
    steps = list(results[0]["steps"])
    rows = [[step, *(round(one["steps"][step]) for one in results)] for step in steps]
    show("rows/s a core", ("step", *(f"{one['engine']} {one['rows']}" for one in results)), rows)
    emit("curation", workers=options.workers, results=results)


def make_rows(count: int, folder: Path) -> None:
    """Write rows with pictures of 200 px to Parquet files of 5,000 rows, and 1,000 held-out rows."""
    from corpus.records import write_records

    rng, pictures = random.Random(0), list[list[bytes]]()
    for start in range(0, count, FILE_ROWS):
        some = []
        for number in range(start, min(count, start + FILE_ROWS)):
            made = row(rng, number, 200 if number < PICTURES else 8)
            pictures += [made["images"]] if number < PICTURES else []
            some.append({**made, "images": pictures[number % PICTURES]})
        write_records(folder / "rows" / f"{start:07d}.parquet", some)
    held = [{**row(rng, number, 200), "id": f"held-{number}"} for number in range(1000)]
    write_records(folder / "held.parquet", held)


def _one(engine: str, data: Path, out: Path, workers: int) -> dict[str, Any]:
    """Run one curation in this process, and measure it."""
    from chain.curation.config import Curation
    from chain.curation.run import curate
    from chain.display import Display
    from core.console import Console
    from core.files import read_json

    curation = Curation.model_validate(
        {
            "name": "benchmark",
            "sets": {"rows": str(data / "rows")},
            "held_out": {"held": str(data / "held.parquet")},
            "output": str(out),
            "steps": STEPS,
            "engine": engine,
            "workers": workers,
        }
    )
    peaks, done = {"main": 0, "worker": 0}, threading.Event()
    watcher = threading.Thread(target=_watch, args=(peaks, done))
    watcher.start()
    began = time.monotonic()
    curate(curation, Display(Console(stderr=True)))
    seconds = time.monotonic() - began
    done.set()
    watcher.join()
    told = read_json(out / "steps.json")["steps"]
    return {
        "rows_per_s": told[0]["rows"] / seconds,
        "main_mib": peaks["main"] >> 20,
        "worker_mib": peaks["worker"] >> 20,
        "kept": told[-1]["kept"],
        "steps": {step["op"]: step["rows"] / step["cpu_s"] for step in told},
    }


def _watch(peaks: dict[str, int], done: threading.Event) -> None:
    """Note the largest resident memory of this process and of a descendant that runs our code."""
    import psutil

    mine = psutil.Process()
    while not done.wait(0.1):
        peaks["main"] = max(peaks["main"], mine.memory_info().rss)
        for child in mine.children(recursive=True):
            try:
                words = " ".join(child.cmdline()[:5])
                if "spawn_main" in words or "ray::" in words:
                    peaks["worker"] = max(peaks["worker"], child.memory_info().rss)
            except psutil.Error:
                continue


def planted(good: int, folder: Path) -> list[dict[str, Any]]:
    """Curate good rows with planted defects of a tenth each; for each defect: planted, found, recall, precision.

    Precision is the share of rows dropped for that reason that were planted with that defect.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from chain.curation.config import Curation
    from chain.curation.run import curate
    from chain.display import Display
    from core.console import Console
    from corpus.records import write_records

    rng, part = random.Random(1), max(1, good // 10)
    rows = [row(rng, number) for number in range(good)]
    held = [{**row(rng, number), "id": f"held-{number}"} for number in range(part)]
    defects = {
        "duplicate": [{**one, "id": f"duplicate-{n}"} for n, one in enumerate(rng.sample(rows, part))],
        "near-duplicate": [
            {**near(rng, one, n), "id": f"near-duplicate-{n}"} for n, one in enumerate(rng.sample(rows, part))
        ],
        "leak": [{**near(rng, one, n), "id": f"leak-{n}"} for n, one in enumerate(held)],
        "restating": [restating(rng, n) for n in range(part)],
        "broken": [_broken(rng, n) for n in range(part)],
    }
    every = [*rows, *(one for some in defects.values() for one in some)]
    stored = [{**one, "images": [{"bytes": data, "path": None} for data in one["images"]]} for one in every]
    pq.write_table(pa.Table.from_pylist(stored), folder / "rows.parquet", row_group_size=500)
    write_records(folder / "held.parquet", held)
    (folder / "wrong.jsonl").write_text("".join(json.dumps(_wrong(rng, n)) + "\n" for n in range(part)))
    curation = Curation.model_validate(
        {
            "name": "planted",
            "sets": {"rows": str(folder / "rows.parquet"), "wrong": {"path": str(folder / "wrong.jsonl")}},
            "held_out": {"held": str(folder / "held.parquet")},
            "output": str(folder / "out"),
            "steps": STEPS[:5],
            "workers": 1,
        }
    )
    curate(curation, Display(Console(stderr=True)))
    return _found(folder, defects, part)


def _found(folder: Path, defects: dict[str, list[dict[str, Any]]], part: int) -> list[dict[str, Any]]:
    """The planted rows that a curation found, by defect."""
    from core.files import read_jsonl

    dropped = {
        one["id"].partition("/")[2]: one["step"] for one in read_jsonl(folder / "out" / "dropped.jsonl")
    }
    steps = {"duplicate": "duplicates", "near-duplicate": "duplicates", "leak": "decontaminate"}
    steps |= {"restating": "redundancy", "broken": "read"}
    found = []
    for name, some in defects.items():
        caught = sum(one["id"] in dropped for one in some)
        by_step = [key for key, step in dropped.items() if step == steps[name]]
        lost = sum(key.startswith("row-") for key in by_step)
        share = 1 - lost / len(by_step) if by_step else 1.0
        found.append(
            {"defect": name, "planted": part, "found": caught, "recall": caught / part, "precision": share}
        )
    (rejects,) = (folder / "out.work").rglob("*wrong.rejected.jsonl")
    rejected = len(read_jsonl(rejects))
    kept = part - part // 2
    recall, share = rejected / max(1, part // 2), kept / (part - rejected) if part > rejected else 0.0
    found.append(
        {
            "defect": "wrong column",
            "planted": part // 2,
            "found": rejected,
            "recall": recall,
            "precision": share,
        }
    )
    return found


def _broken(rng: random.Random, number: int) -> dict[str, Any]:
    made = row(rng, number)
    data = made["images"][0]
    broken = rng.choice(
        (data[: len(data) // 2], b"", b"not a picture", data[:100] + bytes(200) + data[300:-400])
    )
    return {**made, "id": f"broken-{number}", "images": [broken]}


def _wrong(rng: random.Random, number: int) -> dict[str, Any]:
    """A row in another format; every second one has its answer in a column that nothing maps."""
    made = row(rng, number)
    name = "note" if number % 2 else "answer"
    return {"question": f"{made['question']} ({number})", name: made["answer"], "image": None}


if __name__ == "__main__":
    main()
