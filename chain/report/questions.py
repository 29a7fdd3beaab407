"""The questions of a report with every stage's completions: held-out rows, benchmark samples and rollouts.

A question is `{"set", "id", "mode", "source", "kind", "question", "gold", "pictures", "answers"}`. `pictures` are
places in the page's list of data URLs. An answer is one completion: `{"stage", "label", "text", "right", "tokens",
"cut", "verdicts": [[component, score, status, reason], ...]}`, for rollouts with `reward` and `advantage`. `right` is
true, false, or null where nothing could be judged; of a rollout it says whether every component gave full marks.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from chain.display import Tail
from chain.report.curves import is_number
from chain.report.data import BENCH
from chain.report.pictures import BYTES, Thumbnails
from chain.report.sets import Sets
from chain.tracking.content import with_advantages
from core.files import PARTIAL, read_json
from core.model.prompts import THINK_CONTRACT

log = logging.getLogger(__name__)

CHARACTERS, NAME = 6000, 200
"""Longer texts, and longer names of rows, sets and components, lose their middle."""
TEXT_BYTES = 16 << 20
"""Most characters of a page's held-out questions and benchmark samples, and of its rollouts, as JSON."""
READ_BYTES = 256 << 20
"""Most of one file that is read: the first held-out rows, or the newest rollouts. A large run's rollouts have
gigabytes."""
DECODED = 2000
"""Most questions of each origin whose pictures are decoded."""
Question = dict[str, Any]
Key = tuple[str, ...]


@dataclass
class Found:
    """Questions of one origin, by their key, and where their pictures are."""

    rows: dict[Key, Question] = field(default_factory=dict)
    places: dict[Key, tuple[tuple[str, ...], str]] = field(default_factory=dict)
    """Key -> places of the sets that may hold the question, and id of its row there."""
    files: dict[Key, tuple[Path, list[Any]]] = field(default_factory=dict)
    """Key -> folder and names of picture files."""

    def add(self, key: Key, head: Question, answer: dict[str, Any]) -> None:
        """Add an answer to the question of that key."""
        self.rows.setdefault(key, {**head, "answers": []})["answers"].append(answer)


def questions(
    run_dir: Path,
    stages: Sequence[str],
    unfinished: Sequence[str],
    sets: Sets,
    thumbnails: Thumbnails,
) -> dict[str, Any]:
    """The questions of a run, for the page.

    Args:
        run_dir: the run's folder.
        stages: finished stages, in order.
        unfinished: stages whose rollouts lie in their partial folders.
        sets: of the run's recipe; their rows hold the pictures.
        thumbnails: makes the pictures.

    Returns:
        `rows`, `pictures` (data URLs), `contract` (the words that follow a question in thinking mode), and `left`, a
        line for everything that the page has no room for.
    """
    asked, rolled, left = Found(), Found(), list[str]()
    for stage in stages:
        _held_out(asked, run_dir / stage, sets, left)
        _bench(asked, run_dir / stage)
    folders = {stage: run_dir / stage for stage in stages}
    for stage, folder in {**folders, **{one: run_dir / f"{one}{PARTIAL}" for one in unfinished}}.items():
        _rollouts(rolled, folder, stage, sets.places, left)
    shown = {id(found): _within(found, left) for found in (asked, rolled)}
    urls: dict[str, int] = {}
    missing = sum(_add_pictures(found, shown[id(found)], thumbnails, urls) for found in (asked, rolled))
    if missing:
        left.append(
            f"{missing:,} questions are shown without their pictures: a page holds {BYTES >> 20} MiB of them"
        )
    rows = [found.rows[key] for found in (asked, rolled) for key in shown[id(found)]]
    return {"rows": rows, "pictures": list(urls), "contract": THINK_CONTRACT, "left": left}


def _held_out(found: Found, folder: Path, sets: Sets, left: list[str]) -> None:
    """The rows of held_out.jsonl. The evaluation keeps the picture of some of them beside samples.jsonl."""
    kept = {(_set(row), str(row.get("id"))): row.get("image") for row in Tail(folder / "samples.jsonl").new()}
    rows, all_read = _records(folder / "held_out.jsonl")
    if not all_read:
        left.append(f"{folder.name}: held-out rows after the first {len(rows):,}")
    for row in rows:
        name, row_id = _set(row), str(row.get("id"))
        key = ("held-out", name, row_id)
        answer = {**_answer(row, folder.name), "right": _verdict_right(row)}
        blind, drawn = row.get("blind"), row.get("drawn") or ()
        more = [("blind", blind), *((f"sample {at}", one) for at, one in enumerate(drawn, start=1))]
        answer["more"] = [{**_answer(one, label), "right": _verdict_right(one)} for label, one in more if one]
        found.add(key, _head(row, f"held-out: {name}"), answer)
        if image := kept.get((name, row_id)):
            found.files.setdefault(key, (folder, [image]))
        if place := sets.place(name):
            found.places.setdefault(key, ((place,), row_id))


def _bench(found: Found, folder: Path) -> None:
    """The samples of `posttrain bench`."""
    file = folder / BENCH
    for name, task in (read_json(file)["tasks"] if file.exists() else {}).items():
        for sample in task.get("samples", ()):
            key = ("bench", name, str(sample.get("id")))
            score = _number(sample.get("score"))
            extracted = ["extracted", score, "", _text(sample.get("extracted"), NAME)]
            answer = {**_answer(sample, folder.name), "verdicts": [extracted]}
            answer["right"] = None if score is None else score >= 1
            row = {**sample, "question": sample.get("prompt"), "answer": sample.get("gold")}
            found.add(key, _head(row, f"benchmark: {name}"), answer)
            found.files.setdefault(key, (file.parent, list(sample.get("pictures") or ())))


def _rollouts(found: Found, folder: Path, stage: str, sets: Mapping[str, str], left: list[str]) -> None:
    """The logged completions of an RL stage, a question per group."""
    lines, all_read = _records(folder / "completions.jsonl", newest=True)
    if not all_read:
        # The first batch that was read may have lost completions, which would change its advantages.
        lines = [line for line in lines if line.get("batch") != lines[0].get("batch")]
        left.append(f"{stage}: older rollouts than the last {len(lines):,}")
    if not lines:
        return
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    sources = [source.get("set") for source in config.get("data") or ()]
    places = tuple(sets[name] for name in sources if name in sets)
    for batch, rows in groupby(lines, lambda line: str(line.get("batch"))):
        graded = with_advantages(list(rows), config.get("algorithm") or {})
        for number, row in enumerate(graded, start=1):
            key = ("rollout", stage, batch, str(row.get("id")))
            answer = {**_answer(row, stage), "label": f"batch {batch}, completion {number}"}
            scores = [verdict[1] for verdict in answer["verdicts"] if verdict[1] is not None]
            answer["right"] = all(score >= 1 for score in scores) if scores else None
            answer |= {name: _number(row.get(name)) for name in ("reward", "advantage")}
            head = {**row, "source": f"batch {batch}", "kind": row.get("verifier")}
            found.add(key, _head(head, f"rollouts: {stage}"), answer)
            found.places.setdefault(key, (places, str(row.get("id"))))


def _records(file: Path, newest: bool = False) -> tuple[list[dict[str, Any]], bool]:
    """The records of a JSONL file, at most READ_BYTES from its start or its end, and whether these are all."""
    size = file.stat().st_size if file.exists() else 0
    if size <= READ_BYTES:
        return Tail(file).new(), True
    with file.open("rb") as opened:
        if newest:
            opened.seek(size - READ_BYTES)
            opened.readline()
        lines = opened.read(READ_BYTES).split(b"\n")
    records = []
    for line in lines[:-1]:
        try:
            records.append(json.loads(line))
        except ValueError:
            log.warning("%s: a line is not JSON; skipped", file)
    return records, False


def _head(row: Mapping[str, Any], name: str) -> Question:
    plain = {key: _text(row.get(key), NAME) for key in ("id", "mode", "source", "kind")}
    plain["question"] = _text(row.get("question"))
    return {"set": _text(name, NAME), **plain, "gold": _text(row.get("answer")), "pictures": []}


def _answer(row: Mapping[str, Any], stage: str) -> dict[str, Any]:
    cut = row.get("truncated")
    verdicts = row.get("verdicts") or {}
    return {
        "stage": stage,
        "label": stage,
        "text": _text(row.get("completion")),
        "tokens": _number(row.get("tokens")),
        "cut": bool(not row.get("finished", True) if cut is None else cut),
        "verdicts": [
            [_text(name, NAME), _number(one.get("score")), _text(one.get("status")), _text(one.get("reason"))]
            for name, one in verdicts.items()
        ],
    }


def _verdict_right(row: Mapping[str, Any]) -> bool | None:
    """Whether the answer is right; None if it could not be judged."""
    answer = (row.get("verdicts") or {}).get("answer")
    return None if answer and answer.get("score") is None else bool(row.get("correct"))


def _set(row: Mapping[str, Any]) -> str:
    return str(row.get("set") or row.get("mode"))


def _text(value: Any, most: int = CHARACTERS) -> str:
    text = "" if value is None else str(value)
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]}\n[{len(text) - 2 * half:,} characters are left out here]\n{text[-half:]}"


def _number(value: Any) -> float | None:
    return float(f"{value:.6g}") if is_number(value) else None


def _within(found: Found, left: list[str]) -> list[Key]:
    """The keys of the questions for which the page has room, spread evenly over all; a line for the rest."""
    sizes = [len(json.dumps(row)) for row in found.rows.values()]
    share = min(1.0, TEXT_BYTES / max(1, sum(sizes)))
    kept = [
        key
        for number, key in enumerate(found.rows)
        if math.floor((number + 1) * share) > math.floor(number * share)
    ]
    shown = Counter(found.rows[key]["set"] for key in kept)
    for name, total in Counter(row["set"] for row in found.rows.values()).items():
        if shown[name] < total:
            left.append(
                f"{name}: {shown[name]:,} of {total:,} questions; a page holds {TEXT_BYTES >> 20} MiB"
            )
    return kept


def _add_pictures(found: Found, shown: Sequence[Key], thumbnails: Thumbnails, urls: dict[str, int]) -> int:
    """Put the questions' pictures into `urls`; return how many questions have pictures that found no room."""
    wanted: dict[tuple[str, ...], list[str]] = {}
    asked = [key for key in shown if key in found.places and key not in found.files]
    for key in asked[:DECODED]:
        places, row_id = found.places[key]
        wanted.setdefault(places, []).append(row_id)
    by_row = {places: thumbnails.of_rows(places, dict.fromkeys(ids)) for places, ids in wanted.items()}
    missing, used = len(asked[DECODED:]), sum(map(len, urls))
    for key in shown:
        places, row_id = found.places.get(key, ((), ""))
        own = by_row.get(places, {}).get(row_id, [])
        if key in found.files:
            own = thumbnails.of_files(*found.files[key])
        size = sum(len(url) for url in own if url not in urls)
        if used + size > BYTES:
            missing += 1
            continue
        used += size
        found.rows[key]["pictures"] = [urls.setdefault(url, len(urls)) for url in own]
    return missing
