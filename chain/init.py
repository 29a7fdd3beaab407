"""`posttrain init`: a recipe folder of one's own, from a shipped recipe and optionally from one's own data.

The files are templates in chain/starter. With data, the folder gets sets that the recipe's stages need: prompts for RL,
direct answers, chains, and held-out rows.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from core.files import atomic_dir, write_text
from core.model.prompts import shown, target_text
from core.model.tokenizer import pieces
from core.strict import ConfigError
from corpus.records import Record, Records, load_records, write_records
from corpus.vocabulary import texts_of

BASES = ("demo", "smoke", "sailvl2_2b")
TINY = ("demo", "smoke")
"""Recipes that train the tiny core, whose tokenizer knows only the words of its data."""
STARTER = Path(__file__).with_name("starter")
SCHEMA = "recipe.schema.json"
HELD_OUT_SHARE, MOST_HELD_OUT = 0.1, 500
LEAST_ROWS = 16
"""Fewer gradable rows cannot fill a held-out set and a rollout batch."""
TINY_CONTEXT = 2048
"""Tokens; core.model.tiny.TinySize.max_tokens."""
IMAGE_TOKENS = 8
"""Tokens of a picture in the tiny core, its tags included, rounded up."""
_TEMPLATE_TOKENS = 24
"""Tokens of the chat template around a question, the thinking contract included, rounded up."""


@dataclass(frozen=True)
class OwnData:
    """The sets made from a user's file."""

    source: str
    sets: dict[str, int]
    """Set -> rows."""
    text: str
    """What was made and what was left out, in words."""
    max_tokens: int
    completion_tokens: int
    max_images: int


def init(folder: Path, base: str = "demo", data: Path | None = None) -> list[str]:
    """Make the recipe folder; return lines that tell what it holds and what to do next.

    Raises ConfigError if the folder exists, or if the data hold too few rows that a rule can grade.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from chain import reference

    if folder.exists():
        raise ConfigError(f"{folder} exists already; name a new folder, or remove it")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", folder.resolve().name):
        raise ConfigError(f"{folder}: the recipe's name may have letters, digits, '.', '_' and '-'")
    tiny = base in TINY
    templates = Environment(
        loader=FileSystemLoader(STARTER), undefined=StrictUndefined, keep_trailing_newline=True
    )
    with atomic_dir(folder) as draft:
        made = own_data(data, draft / "data", tiny) if data else None
        values = {
            "base": base,
            "folder": str(folder),
            "name": folder.resolve().name,
            "about": f"{base} with {'my data and ' if made else ''}my reward",
            "tiny": tiny,
            "own_data": made,
        }
        for template in sorted(STARTER.glob("*.jinja")):
            text = templates.get_template(template.name).render(values)
            write_text(draft / template.stem, text)
        write_text(draft / SCHEMA, json.dumps(reference.schema(), indent=2) + "\n")
    lines = [f"{folder}: a recipe that extends {base}", *([f"data: {made.text}"] if made else [])]
    return [*lines, *next_commands(folder / "README.md")]


def next_commands(readme: Path) -> list[str]:
    """The commands that a recipe's README shows."""
    block = readme.read_text(encoding="utf-8").split("```")[1]
    return ["next:", *(f"  {line}" for line in block.strip().splitlines())]


def own_data(file: Path, folder: Path, tiny: bool) -> OwnData:
    """Make the sets of a recipe from a file of records, or of a format that `posttrain data import` reads."""
    from chain.imports import imported
    from chain.recipe import ForeignSet

    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="posttrain-init-") as scratch:
        whole = Path(scratch) / "rows.parquet"
        imported(ForeignSet(path=str(file)), whole)
        records = load_records(whole)
        gradable = [row for row, record in enumerate(records) if record["verifier"] not in ("none", "judge")]
        fitting = [row for row in gradable if not tiny or tokens(records[row]) <= TINY_CONTEXT]
        if len(fitting) < LEAST_ROWS:
            raise ConfigError(
                f"{file}: {len(fitting)} of {len(records)} rows have an answer that a rule can check"
                + (f" and fit {TINY_CONTEXT} tokens" if tiny else "")
                + f"; at least {LEAST_ROWS} are needed. `posttrain data import` shows why rows do not fit"
            )
        return _split(file, records, fitting, len(records) - len(fitting), folder)


def _split(file: Path, records: Records, rows: list[int], left_out: int, folder: Path) -> OwnData:
    """Write the sets. Held-out rows are drawn at random, with the same draw each time."""
    held = max(4, min(MOST_HELD_OUT, round(HELD_OUT_SHARE * len(rows))))
    held_out = {*Random(0).sample(rows, held)}
    train = [row for row in rows if row not in held_out]
    chains = [row for row in train if records[row]["chain"]]
    plans: dict[str, tuple[list[int], Callable[[Record], Record]]] = {
        "prompts": (train, lambda row: {**row, "mode": "think", "chain": None, "response": None}),
        "direct": (train, lambda row: {**row, "mode": "direct", "chain": None, "response": None}),
        "chains": (chains, lambda row: {**row, "mode": "think", "response": None}),
        "heldout": (sorted(held_out), lambda row: row),
    }
    sets = {name: len(numbers) for name, (numbers, _) in plans.items() if numbers}
    for name in sets:
        numbers, change = plans[name]
        write_records(folder / f"{name}.parquet", _changed(records, numbers, change))
    longest = max(
        _pieces(target_text({**records[row], "mode": "think", "chain": records[row]["chain"] or "-"}))
        for row in rows
    )
    most = max(tokens(records[row]) for row in rows)
    parts = ", ".join(f"{name} {count}" for name, count in sets.items())
    dropped = f"; {left_out} rows left out (no answer that a rule can check, or too long)" if left_out else ""
    return OwnData(
        source=file.name,
        sets=sets,
        text=f"rows per set: {parts}{dropped}",
        max_tokens=min(TINY_CONTEXT, 32 * math.ceil((most + 32) / 32)),
        completion_tokens=min(TINY_CONTEXT // 2, max(32, longest + 16)),
        max_images=max(1, *(len(shown(records[row])) for row in rows)),
    )


def _changed(records: Records, rows: list[int], change: Callable[[Record], Record]) -> Iterator[Record]:
    for row in rows:
        yield change(records[row])


def tokens(record: Record) -> int:
    """Most tokens of a row's prompt and target in the tiny core: a word, a digit and a symbol are one token each."""
    target = target_text({**record, "mode": "think", "chain": record["chain"] or "-"})
    prompt, _ = texts_of(record)
    return _TEMPLATE_TOKENS + IMAGE_TOKENS * len(shown(record)) + _pieces(prompt) + _pieces(target) + 16


def _pieces(text: str) -> int:
    return len(pieces(text))
