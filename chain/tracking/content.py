"""Content for trackers: the numbers of a metrics line, and a table of completions with their pictures."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from core.model.pictures import Picture
from core.model.prompts import user_text

log = logging.getLogger(__name__)

PICTURES_AT_MOST = 4
"""Most pictures shown per row."""
_PLAIN = ("id", "mode", "gold", "completion", "reward", "advantage")


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a metrics line, `step` left out."""
    return {
        name: float(value)
        for name, value in record.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


@dataclass(frozen=True)
class Table:
    """Completions, one per row. Column names are unique."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]
    pictures: int
    """Number of picture columns, which come first. Their cells are PIL images in mode RGB, or None."""


def with_advantages(rows: Sequence[Mapping[str, Any]], algorithm: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Lines of completions.jsonl with each completion's `advantage` within its group, as TRL computes it.

    The advantage is the reward minus the group's mean. If the algorithm scales rewards, it is divided by the group's
    standard deviation + 1e-4. It is 0 without a reward. Source: TRL 1.16,
    GRPOTrainer._generate_and_score_completions. Rows of gdpo get no advantage, as gdpo normalises each reward
    separately.

    Args:
        rows: whole groups of one batch.
        algorithm: the stage's `algorithm`.
    """
    if algorithm.get("name") == "gdpo":
        return [dict(row) for row in rows]
    scale = algorithm.get("scale_by_std")
    divides = algorithm.get("name") != "dr_grpo" if scale is None else scale
    rewards: dict[str, list[float]] = {}
    for row in rows:
        if row.get("reward") is not None:
            rewards.setdefault(row["id"], []).append(row["reward"])
    found = []
    for row in rows:
        known = rewards.get(row["id"], [])
        spread = stdev(known) + 1e-4 if divides and len(known) > 1 else 1.0
        advantage = 0.0 if row.get("reward") is None else (row["reward"] - fmean(known)) / spread
        found.append({"advantage": advantage, **row})
    return found


def table_of(rows: Sequence[Mapping[str, Any]], pictures: Mapping[str, Sequence[Any]]) -> Table:
    """The table of lines from completions.jsonl or samples.jsonl.

    Args:
        rows: the lines.
        pictures: row id -> its pictures.
    """
    names = list(dict.fromkeys(name for row in rows for name in row.get("verdicts") or {}))
    count = min(PICTURES_AT_MOST, max((len(pictures.get(row["id"], ())) for row in rows), default=0))
    columns = (
        *(f"picture {number + 1}" for number in range(count)),
        "prompt",
        *_PLAIN,
        *(f"{kind}/{name}" for name in names for kind in ("score", "why")),
    )
    return Table(columns, tuple(_row(row, pictures.get(row["id"], ()), count, names) for row in rows), count)


def _row(
    row: Mapping[str, Any], pictures: Sequence[Any], count: int, names: Sequence[str]
) -> tuple[Any, ...]:
    shown = [*pictures, *[None] * count][:count]
    values = {**row, "gold": row.get("answer")}
    verdicts = row.get("verdicts") or {}
    graded = [part for name in names for part in _verdict(verdicts.get(name))]
    return (*shown, user_text(row["question"], row["mode"]), *(values.get(key) for key in _PLAIN), *graded)


def _verdict(verdict: Mapping[str, Any] | None) -> tuple[float | None, str | None]:
    if verdict is None:
        return None, None
    return verdict.get("score"), f"{verdict.get('status')}: {verdict.get('reason')}"


def held_out_pictures(rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, list[Any]]:
    """Row id -> picture that the evaluation saved beside samples.jsonl."""
    return {
        row["id"]: [Picture((folder / row["image"]).read_bytes()).rgb()] for row in rows if row.get("image")
    }


def bench_rows(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The samples of a benchmark in bench.json as rows of a table; the verdict's reason is the extracted answer."""
    return [
        {
            "id": str(sample["id"]),
            "question": sample["prompt"],
            "mode": "think" if task["mode"] == "thinking" else "direct",
            "answer": sample["gold"],
            "completion": sample["completion"],
            "verdicts": {
                "bench": {"score": sample["score"], "status": "extracted", "reason": sample["extracted"]}
            },
            "pictures": sample["pictures"],
        }
        for sample in task["samples"]
    ]


def bench_pictures(rows: Sequence[Mapping[str, Any]], folder: Path) -> dict[str, list[Any]]:
    """Row id -> its first pictures, which the bench keeps in `folder`."""
    return {
        row["id"]: [
            Picture((folder / name).read_bytes()).rgb() for name in row["pictures"][:PICTURES_AT_MOST]
        ]
        for row in rows
    }


class PictureIndex:
    """Pictures of rows by id, read on request.

    The ids of a file are read once. A request reads only the row groups that hold the requested rows.

    Args:
        places: Parquet files, or folders of Parquet files; other places are ignored.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self.places = places
        self._where: dict[str, tuple[Path, int]] | None = None

    def of(self, ids: Collection[str]) -> dict[str, list[Any]]:
        """Row id -> pictures of the row as PIL images in mode RGB. Unknown and unreadable rows are left out."""
        return dict(self.each(ids))

    def each(self, ids: Collection[str]) -> Iterator[tuple[str, list[Any]]]:
        """The rows of `of` one by one, in the order of the file, so that few pictures are in memory at once."""
        import pyarrow.parquet as pq

        from core.model.videos import Caps, Decoded
        from corpus.schema import clip_of, picture_of

        if self._where is None:
            self._where = self._indexed()
        wanted = set(ids) & self._where.keys()
        for file, group in sorted({self._where[row_id] for row_id in wanted}):
            rows = pq.ParquetFile(file).read_row_group(group, columns=["id", "images", "videos"]).to_pylist()
            for row in rows:
                if row["id"] not in wanted:
                    continue
                try:
                    clips = [clip_of(one, Caps(PICTURES_AT_MOST)) for one in row.get("videos") or ()]
                    frames = [frame for clip in clips for frame in clip.frames]
                    pictures = [picture_of(one) for one in row["images"] or ()]
                    decoded = list(Decoded([*pictures, *frames]))
                except Exception as error:  # Pillow passes on any exception of a decoder
                    log.warning("%s: row %s: no picture: %s", file, row["id"], error)
                    continue
                wanted.discard(row["id"])
                yield row["id"], decoded

    def _indexed(self) -> dict[str, tuple[Path, int]]:
        import pyarrow.parquet as pq

        where: dict[str, tuple[Path, int]] = {}
        for place in map(Path, self.places):
            for file in sorted(place.rglob("*.parquet")) if place.is_dir() else [place]:
                if not file.is_file():
                    continue
                parquet = pq.ParquetFile(file)
                for group in range(parquet.num_row_groups):
                    for row_id in parquet.read_row_group(group, columns=["id"])["id"].to_pylist():
                        where.setdefault(row_id, (file, group))
        return where
