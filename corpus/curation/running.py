"""Runs the steps of a curation over shards. Each step is a folder of small files, one per shard; all can be resumed.

    work/00_read/part-00000.parquet    texts of the rows, dropped ones with their reasons (corpus.curation.shards)
    work/00_read/part-00000.json       counts of the shard; written last
    work/00_read/step.json             counts of the step; written last
    work/01_ids/...                    repeated ids
    work/02_<first operator>/...

Memory holds one shard per worker, and for set operators the arrays of all rows' signatures.
"""

from __future__ import annotations

import hashlib
import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.files import atomic_dir, read_json, write_json
from core.manifest import hash_config
from corpus.curation.base import Decision, Dropped, Operator, Parts, RowOperator, SetOperator, Signs, Tools
from corpus.curation.engine import Engine
from corpus.curation.shards import Shard, checked, plain, read_outcomes, write_outcomes
from corpus.schema import TEXTS, Record
from corpus.writing import RecordFile

EXAMPLES = 20
"""Dropped and kept rows of each step that the report shows."""
READ, IDS = "read", "ids"
STEP = "step.json"
_GROUP = 256
Progress = Callable[[str, int, int, float], None]
"""(step, rows done, rows in all, seconds)."""


class UniqueIds(SetOperator):
    """Drop rows whose id an earlier row has. It runs after reading, because no single shard sees all ids."""

    op: Literal["ids"] = "ids"

    def sign(self, rows: Sequence[Record], tools: Tools) -> Signs:
        import numpy as np
        import xxhash

        return {
            "id": np.array([xxhash.xxh3_128_hexdigest(row["id"].encode()).encode() for row in rows], "S32")
        }

    def decide(self, parts: Parts, seed: int) -> Decision:
        import numpy as np

        first = np.unique(parts.column("id"), return_index=True)[1]
        drops: list[Dropped | None] = [Dropped("id: must be unique")] * parts.rows()
        for row in first.tolist():
            drops[row] = None
        return Decision(drops)


@dataclass(frozen=True)
class Work:
    """One shard of one step."""

    do: Literal["read", "rows", "sign", "mark", "write"]
    shard: Shard
    number: int
    before: Path | None
    """The former step's file."""
    after: Path
    """The file to write, without suffix."""
    step: Operator | None = None
    tools: Any = None
    drops: tuple[Dropped | None, ...] = ()


@dataclass
class Outline:
    """Counts of a step or of one of its shards."""

    rows: int = 0
    kept: int = 0
    changed: int = 0
    cpu_s: float = 0.0
    """CPU seconds of the workers, and of the decision of a set operator."""
    reasons: Counter[str] = field(default_factory=Counter)
    dropped_examples: list[tuple[int, int, int]] = field(default_factory=list)
    """(random number, shard, row): a sample that does not depend on the engine or on the order."""
    kept_examples: list[tuple[int, int, int]] = field(default_factory=list)

    def add(self, other: Outline) -> None:
        """Add a shard's counts."""
        self.rows += other.rows
        self.kept += other.kept
        self.changed += other.changed
        self.cpu_s += other.cpu_s
        self.reasons += other.reasons
        self.dropped_examples = heapq.nsmallest(EXAMPLES, self.dropped_examples + other.dropped_examples)
        self.kept_examples = heapq.nsmallest(EXAMPLES, self.kept_examples + other.kept_examples)

    @classmethod
    def read(cls, path: Path) -> Outline:
        """The counts in a file."""
        found = read_json(path)
        found["reasons"] = Counter(found["reasons"])
        for name in ("dropped_examples", "kept_examples"):
            found[name] = [tuple(one) for one in found[name]]
        return cls(**{name: found[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class StepResult:
    """A finished step."""

    op: str
    folder: Path
    outline: Outline
    seconds: float
    facts: Mapping[str, Any]


class NothingLeft(RuntimeError):
    """A step dropped every row."""


class Runner:
    """Runs steps in order; `folder` is the work folder.

    Args:
        folder: the work folder.
        shards: the rows.
        held_out: rows that `decontaminate` compares with.
        tools: reaches models; only steps that ask get it.
        engine: runs shards.
        seed: seed of draws and clusters.
        origin: hash of the inputs and their contents.
        progress: called after each shard.
        finished: called after each step.
    """

    def __init__(
        self,
        folder: Path,
        shards: Sequence[Shard],
        held_out: Sequence[Shard],
        tools: Tools,
        engine: Engine,
        seed: int,
        origin: str,
        progress: Progress = lambda *told: None,
        finished: Callable[[StepResult], None] = lambda result: None,
    ) -> None:
        self.folder, self.shards, self.held_out = folder, list(shards), list(held_out)
        self.tools, self.engine, self.seed = tools, engine, seed
        self.progress, self.finished = progress, finished
        self.results: list[StepResult] = []
        self._same = hash_config(
            {"inputs": origin, "seed": seed, "shards": [list(one) for one in self.shards]}
        )

    def run(self, steps: Sequence[Operator]) -> list[StepResult]:
        """Bring every step up to date. Steps that are finished and unchanged are not run again.

        Raises NothingLeft if a step drops every row.
        """
        if self.held_out:
            self._step("held_out", None, self.held_out)
        self._step(READ, None, self.shards)
        for step in (UniqueIds(), *steps):
            self._step(step.op, step, self.shards)
        return self.results

    def _step(self, op: str, step: Operator | None, shards: Sequence[Shard]) -> None:
        before = self.results[-1].folder if self.results else None
        folder = self.folder / (op if op == "held_out" else f"{len(self.results):02d}_{op}")
        held = (
            [list(one) for one in self.held_out]
            if isinstance(step, SetOperator) and step.reads_held_out()
            else []
        )
        same = hash_config(
            {"before": self._same, "step": step.model_dump(mode="json") if step else op, "held": held}
        )
        if op != "held_out":
            self._same = same
        if not (folder / STEP).exists() or read_json(folder / STEP)["same"] != same:
            began = time.monotonic()
            with atomic_dir(folder, same=same) as partial:
                outline, facts = self._made(op, step, shards, before, partial)
                seconds = time.monotonic() - began
                told = {"op": op, "same": same, "seconds": round(seconds, 3), "workers": self.engine.workers}
                write_json(partial / STEP, {**told, "facts": facts, **vars(outline)})
        if op != "held_out":
            found = read_json(folder / STEP)
            result = StepResult(op, folder, Outline.read(folder / STEP), found["seconds"], found["facts"])
            self.results.append(result)
            self.finished(result)
            if not result.outline.kept:
                counts = ", ".join(
                    f"{count} x {reason}" for reason, count in result.outline.reasons.most_common()
                )
                raise NothingLeft(f"{op} dropped every row: {counts}; the rows: {folder}")

    def _made(
        self, op: str, step: Operator | None, shards: Sequence[Shard], before: Path | None, out: Path
    ) -> tuple[Outline, Mapping[str, Any]]:
        if step is None:
            return self._pass(op, "read", shards, None, out), {}
        if isinstance(step, RowOperator):
            return self._pass(op, "rows", shards, before, out, step), {}
        assert isinstance(step, SetOperator)
        outline = self._pass(op, "sign", shards, before, out, step)
        own = len(shards)
        if step.reads_held_out() and self.held_out:
            outline.add(self._pass(op, "sign", self.held_out, self.folder / "held_out", out, step, first=own))
        count = own + (len(self.held_out) if step.reads_held_out() else 0)
        parts = StoredParts([out / f"sign-{number:05d}.npz" for number in range(count)], own)
        began = time.process_time()  # with the threads of numerical libraries; nothing else runs now
        decision = step.decide(parts, self.seed)
        outline.cpu_s += time.process_time() - began
        outline.add(self._pass(op, "mark", shards, before, out, step, drops=decision.drops, parts=parts))
        for file in parts.files:
            file.unlink()
        return outline, decision.facts

    def _pass(
        self,
        op: str,
        do: Any,
        shards: Sequence[Shard],
        before: Path | None,
        out: Path,
        step: Operator | None = None,
        drops: Sequence[Dropped | None] = (),
        parts: StoredParts | None = None,
        first: int = 0,
    ) -> Outline:
        """Run one kind of work over all shards that it has not finished yet; returns the counts of all of them."""
        total, todo, at, whole = sum(shard.rows for shard in shards), list[Work](), 0, Outline()
        done = 0
        stem = "sign" if do == "sign" else "part"
        asks = do in ("rows", "sign") and bool(step and step.models())
        for number, shard in enumerate(shards):
            after = out / f"{stem}-{number + first:05d}"
            size = parts.size(number) if parts else 0
            mine, at = tuple(drops[at : at + size]), at + size
            if after.with_suffix(".json" if stem == "part" else ".npz").exists():
                done += shard.rows
                if stem == "part":
                    whole.add(Outline.read(after.with_suffix(".json")))
                continue
            file = before / f"part-{number:05d}.parquet" if before else None
            todo.append(Work(do, shard, number, file, after, step, self.tools if asks else None, mine))
        began = time.monotonic()
        for rows, outline in self.engine.each(run_work, todo, asks):
            whole.add(outline)
            done += rows
            self.progress(op, done, total, time.monotonic() - began)
        return whole

    def write(self, out: Path) -> int:
        """Write the rows that are left as records with their pictures to `out/train-<shard>.parquet`; their number."""
        last, todo = self.results[-1].folder, []
        for number, shard in enumerate(self.shards):
            after = out / f"train-{number:05d}"
            if not after.with_suffix(".json").exists():
                todo.append(Work("write", shard, number, last / f"part-{number:05d}.parquet", after))
        began, done, total = time.monotonic(), 0, self.results[-1].outline.kept
        for rows, _ in self.engine.each(run_work, todo):
            done += rows
            self.progress("write", done, total, time.monotonic() - began)
        kept = 0
        for file in sorted(out.glob("train-*.json")):
            kept += read_json(file)["rows"]
            file.unlink()
        return kept


class StoredParts(Parts):
    """Arrays in .npz files."""

    def __init__(self, files: Sequence[Path], own_files: int) -> None:
        import numpy as np

        self.files = list(files)
        self._sizes = []
        for file in self.files:
            with np.load(file) as arrays:
                self._sizes.append(len(arrays["ids"]))
        self.own = sum(self._sizes[:own_files])

    def __len__(self) -> int:
        return len(self.files)

    def __iter__(self) -> Iterator[Signs]:
        """The batches that have rows."""
        return (self[number] for number, size in enumerate(self._sizes) if size)

    def __getitem__(self, index: Any) -> Any:
        import numpy as np

        with np.load(self.files[index]) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def column(self, name: str) -> Any:
        import numpy as np

        columns = []
        for file, size in zip(self.files, self._sizes, strict=True):
            if size:
                with np.load(file) as arrays:
                    columns.append(arrays[name])
        return np.concatenate(columns)

    def rows(self) -> int:
        return sum(self._sizes)

    def size(self, number: int) -> int:
        """Rows of one part."""
        return self._sizes[number]

    def ids(self, rows: Sequence[int]) -> dict[int, str]:
        """The ids of some rows."""
        import numpy as np

        wanted, found, start = sorted(set(rows)), dict[int, str](), 0
        edges = np.cumsum([0, *self._sizes])
        places = np.searchsorted(edges, wanted, side="right") - 1
        for number in np.unique(places):
            start = int(edges[number])
            with np.load(self.files[number]) as arrays:
                ids = arrays["ids"]
            for row in (one for one, place in zip(wanted, places, strict=True) if place == number):
                found[row] = str(ids[row - start])
        return found


def run_work(work: Work) -> tuple[int, Outline]:
    """Do one shard's work in a worker; returns its number of rows and its counts."""
    began = time.thread_time()
    rows, outline = _done(work)
    outline.cpu_s = time.thread_time() - began
    if outline.rows:
        write_json(work.after.with_suffix(".json"), vars(outline))
    return rows, outline


def _done(work: Work) -> tuple[int, Outline]:
    if work.do == "read":
        rows, after = checked(work.shard)
        return _finished(work, list(range(len(rows))), rows, after)
    assert work.before
    numbers, rows = read_outcomes(work.before, work.shard)
    if work.do == "sign":
        assert isinstance(work.step, SetOperator)
        _write_signs(work.after, rows, work.step.sign(rows, work.tools) if rows else {})
        return work.shard.rows, Outline()
    if work.do == "write":
        _write_records(work.after, rows)
        return len(rows), Outline()
    if work.do == "mark":
        return _finished(
            work, numbers, rows, [drop or row for drop, row in zip(work.drops, rows, strict=True)]
        )
    assert isinstance(work.step, RowOperator)
    return _finished(work, numbers, rows, work.step.run(rows, work.tools) if rows else [])


def _finished(
    work: Work, numbers: Sequence[int], before: Sequence[Record], after: Sequence[Record | Dropped]
) -> tuple[int, Outline]:
    """Write a shard's outcomes, then its counts."""
    outline = Outline(rows=len(after))
    for number, old, new in zip(numbers, before, after, strict=True):
        chance = int.from_bytes(hashlib.sha256(f"{work.number} {number}".encode()).digest()[:6], "big")
        if isinstance(new, Dropped):
            outline.reasons[new.reason] += 1
            outline.dropped_examples.append((chance, work.number, number))
            continue
        changed = work.do == "rows" and any(old.get(name) != new.get(name) for name in TEXTS)
        outline.kept += 1
        outline.changed += changed
        # Changed rows come first, because their examples show the step's effect.
        outline.kept_examples.append((chance if changed else chance + (1 << 48), work.number, number))
    whole = Outline()
    whole.add(outline)
    write_outcomes(work.after.with_suffix(".parquet"), numbers, before, after)
    return work.shard.rows, whole


def _write_signs(after: Path, rows: Sequence[Record], signs: Signs) -> None:
    import numpy as np

    arrays: dict[str, Any] = {**signs, "ids": np.array([row["id"] for row in rows], str)}
    draft = after.with_suffix(".draft")
    with draft.open("wb") as file:
        np.savez(file, **arrays)
    draft.replace(after.with_suffix(".npz"))


def _write_records(after: Path, rows: Sequence[Record]) -> None:
    """Write the records, then their number."""
    if rows:
        with RecordFile(after.with_suffix(".parquet")) as file:
            for start in range(0, len(rows), _GROUP):
                file.add([plain(row) for row in rows[start : start + _GROUP]])
    write_json(after.with_suffix(".json"), {"rows": len(rows)})
