"""`posttrain data show`: statistics of a set, some of its rows with pictures, and one row as the model sees it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from chain.inputs import locate_sets
from chain.recipe import STAGE_NAMES, Recipe
from core.strict import ConfigError, nearest
from corpus.records import Record, Records, load_records
from rl.config import RLConfig
from sft.config import SFTConfig

SAMPLE = 2000
"""Rows whose tokens are counted and whose pictures are measured, drawn by a fixed seed."""
_TOP = 10
_QUANTILES = (("median", 0.5), ("90%", 0.9), ("99%", 0.99), ("largest", 1.0))
Rows = list[tuple[str, str]]


class Shown:
    """A set, its statistics and its rows.

    Args:
        place: Parquet file, folder or address on the hub; or the name of a set of the recipe.
        recipe: gives the sets' places, the stages' limits and the core; None: only `place`.
        model: checkpoint whose processor counts tokens; None: the recipe's core if it exists.
        split: split of the set.
        runs_dir: folder of runs, for sets that a run makes.
    """

    def __init__(
        self,
        place: str,
        recipe: Recipe | None = None,
        model: Path | None = None,
        split: str = "train",
        runs_dir: Path = Path("runs"),
    ) -> None:
        self.recipe, self.name = recipe, place
        sets = locate_sets(recipe, (runs_dir / recipe.name).resolve()) if recipe else {}
        if recipe and place not in sets and not Path(place).exists():
            raise ConfigError(f"set {place!r}: the recipe has no such set; {nearest(place, sets)}")
        self.records: Records = load_records(sets.get(place, place), split, on_bad="drop")
        self.model = model or _core(recipe, runs_dir)
        order = random.Random(0).sample(range(len(self.records)), len(self.records))
        self.sample = sorted(order[:SAMPLE])

    def statistics(self) -> dict[str, Rows]:
        """Title of a table -> its rows of name and value."""
        rows = [self.records[number] for number in self.sample]
        found = {"set": self._counts(), **self._kinds(rows), "pictures": _pictures(rows)}
        if self.model is None:
            found["tokens"] = [
                ("not counted", "name a checkpoint with --model, or a recipe whose core exists")
            ]
            return found
        return {**found, **self._lengths(rows)}

    def _counts(self) -> Rows:
        dropped = [(f"bad: {rule}", f"{count:,}") for rule, count in self.records.dropped.items()]
        sampled = [("sampled below", f"{len(self.sample):,}")] if len(self.sample) < len(self.records) else []
        return [("rows", f"{len(self.records):,}"), *dropped, *sampled]

    def _kinds(self, rows: Sequence[Record]) -> dict[str, Rows]:
        from corpus.formats.gold import kind_of

        targets = [
            "response" if row["response"] else "chain and answer" if row["chain"] else "answer alone"
            for row in rows
        ]
        golds = [kind_of(row["answer"], row["verifier"] == "choice")[0] for row in rows]
        columns = {
            "modes": [row["mode"] for row in rows],
            "verifiers": [row["verifier"] for row in rows],
            "gold answers": golds,
            "targets": targets,
            "turns": [str(len(row["history"]) + 1) for row in rows],
            "videos": [str(len(row["videos"])) for row in rows],
            "sources": [row["source"] or "(none)" for row in rows],
        }
        return {name: _shares(values) for name, values in columns.items()}

    def _lengths(self, rows: Sequence[Record]) -> dict[str, Rows]:
        """Tokens of the rows, and the share of rows above each stage's limit."""
        from core.training.model import load_processor
        from sft.data import count_tokens

        assert self.model
        processor = load_processor(self.model)
        sizes = [count_tokens(_with_target(row), processor) for row in rows]
        totals = [text + image for text, image in sizes]
        table = [*_quantiles("tokens", totals), *_quantiles("image tokens", [image for _, image in sizes])]
        limits = [
            (f"{name}, above {limit:,}", f"{sum(total > limit for total in totals) / len(totals):.1%}")
            for name, limit in _limits(self.recipe)
        ]
        return {"tokens": table, **({"rows above a stage's limit": limits} if limits else {})}

    def page(self, count: int, statistics: Mapping[str, Rows]) -> str:
        """The page with statistics and `count` rows, drawn by a fixed seed."""
        from chain.report.rows import card, rows_page

        drawn = random.Random(1).sample(range(len(self.records)), min(count, len(self.records)))
        cards = [card(self.records[number]) for number in sorted(drawn)]
        tables = [
            {"title": title, "heads": ["", ""], "rows": [list(pair) for pair in rows]}
            for title, rows in statistics.items()
        ]
        part = {"name": "rows", "about": "", "settings": "", "tables": [], "open": True}
        parts = [{**part, "cards": [(f"{len(cards)} rows, drawn at random", cards)]}]
        return rows_page(self.name, "", [f"{len(self.records):,} rows"], tables, parts)

    def tokens(self, row: str) -> Iterator[Text]:
        """One row (its id or number) as the model sees it, trained tokens green; runs of image tokens as one word."""
        from core.checkpoint.shards import printable
        from core.training.model import load_processor
        from sft.data import IGNORED, prepare

        if self.model is None:
            raise ConfigError(
                "--tokens needs a processor: name a checkpoint with --model, or a recipe whose core exists"
            )
        record, processor = self._row(row), load_processor(self.model)
        lesson = prepare(_with_target(record), processor)
        trained = (lesson["labels"] != IGNORED).tolist()
        pieces = [printable(processor.tokenizer.decode([token])) for token in lesson["input_ids"].tolist()]
        yield Text(f"{printable(record['id'])}: {len(pieces)} tokens, {sum(trained)} trained")
        line, images = Text(), 0
        for piece, learns in zip(pieces, trained, strict=True):
            if piece == processor.image_token:
                images += 1
                continue
            if images:
                line.append(f"[{images} image tokens]", "cyan")
                images = 0
            line.append(piece.replace("\n", "⏎\n"), "black on green" if learns else "dim")
        yield line

    def _row(self, row: str) -> Record:
        if row.isdigit() and int(row) < len(self.records):
            return self.records[int(row)]
        for record in self.records:
            if record["id"] == row:
                return record
        raise ConfigError(
            f"--tokens {row}: no row has this id, and the set has {len(self.records)} rows, from 0"
        )


def tables(statistics: Mapping[str, Rows]) -> Iterator[Table]:
    """The statistics for the terminal."""
    from core.checkpoint.shards import printable

    for title, rows in statistics.items():
        table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(overflow="fold")
        table.add_column(justify="right")
        for pair in rows:
            table.add_row(*(Text(printable(cell)) for cell in pair))
        yield table


def _with_target(row: Record) -> Record:
    """The row with a target: think rows for RL have none, so their gold answer stands in."""
    if row["mode"] == "think" and not row["chain"] and not row["response"]:
        return {**row, "response": row["answer"]}
    return row


def _core(recipe: Recipe | None, runs_dir: Path) -> Path | None:
    if recipe is None:
        return None
    places = [runs_dir / recipe.name / "core" / "checkpoint"]
    places += [Path(recipe.core.path).expanduser()] if recipe.core.path else []
    return next((place for place in places if (place / "config.json").exists()), None)


def _limits(recipe: Recipe | None) -> Iterator[tuple[str, int]]:
    """Name of a stage or phase, and the most tokens of its rows."""
    for name in STAGE_NAMES if recipe else ():
        config = recipe.stage(name) if recipe else None
        if isinstance(config, SFTConfig):
            own = [(phase.name, getattr(phase, "max_tokens", None)) for phase in config.phases]
            yield from (
                ((f"{name}, {phase}", limit) for phase, limit in own if limit)
                if any(limit for _, limit in own)
                else [(name, config.max_tokens)]
            )
        elif isinstance(config, RLConfig) and recipe and recipe.servers:
            yield f"{name}, prompt", recipe.servers.max_model_tokens - config.rollout.max_completion_tokens


def _shares(values: Sequence[str]) -> Rows:
    counts = Counter(values)
    rows = [(name, f"{count / len(values):.1%}") for name, count in counts.most_common(_TOP)]
    rest = len(counts) - _TOP
    return [*rows, (f"and {rest} more", "")] if rest > 0 else rows


def _pictures(rows: Sequence[Record]) -> Rows:
    numbers = Counter(len(row["images"]) for row in rows)
    table = [(f"rows with {count}", f"{number / len(rows):.1%}") for count, number in sorted(numbers.items())]
    sizes = [image.size for row in rows for image in row["images"]]
    if not sizes:
        return table
    return [
        *table,
        *_quantiles("width", [width for width, _ in sizes]),
        *_quantiles("height", [height for _, height in sizes]),
    ]


def _quantiles(name: str, values: Sequence[int]) -> Rows:
    ordered = sorted(values)
    return [
        (f"{name}, {word}", f"{ordered[round(share * (len(ordered) - 1))]:,}") for word, share in _QUANTILES
    ]
