"""`posttrain init`: makes a user's recipe folder from a shipped recipe and, optionally, the user's data.

The files are templates in chain/starter. With data, the folder gets sets that the recipe's stages need: prompts for RL,
direct answers, chains, and held-out rows.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from core.files import atomic_dir, write_text
from core.model.prompts import shown, target_text
from core.model.tokenizer import pieces
from core.strict import ConfigError
from corpus.importing import import_set
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
    """Make the recipe folder; return lines that describe its contents and the next steps.

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
    with tempfile.TemporaryDirectory(prefix="posttrain-init-") as scratch:
        whole = Path(scratch) / "rows.parquet"
        summary = import_set(str(file), whole)
        dropped = Counter({f"rejected ({rule})": count for rule, count in summary.rejected.items()})
        records = load_records(whole)
        lengths: dict[int, int] = {}
        for row, record in enumerate(records):
            length = tokens(record) if tiny else 0
            if record["verifier"] in ("none", "judge"):
                dropped["no answer that a rule can check"] += 1
            elif length > TINY_CONTEXT:
                dropped[f"more than {TINY_CONTEXT} tokens"] += 1
            else:
                lengths[row] = length
        why = "".join(f"; left out {count} rows: {reason}" for reason, count in dropped.most_common())
        if len(lengths) < LEAST_ROWS:
            raise ConfigError(
                f"{file}: {len(lengths)} of {summary.read} rows can be used, at least {LEAST_ROWS} are needed{why}. "
                "`posttrain data import` shows each rejected row"
            )
        sets = _split(records, [*lengths], folder)
        return OwnData(
            source=file.name,
            sets=sets,
            text="rows per set: " + ", ".join(f"{name} {count}" for name, count in sets.items()) + why,
            max_tokens=min(TINY_CONTEXT, 32 * math.ceil((max(lengths.values()) + 32) / 32)),
            completion_tokens=min(
                TINY_CONTEXT // 2, max(32, 16 + max(_target(records[row]) for row in lengths))
            ),
            max_images=max(1, *(len(shown(records[row])) for row in lengths)),
        )


def _split(records: Records, rows: list[int], folder: Path) -> dict[str, int]:
    """Write the sets; return their sizes. Held-out rows are drawn at random, with the same draw each time."""
    held_out = {*Random(0).sample(rows, max(4, min(MOST_HELD_OUT, round(HELD_OUT_SHARE * len(rows)))))}
    train = [row for row in rows if row not in held_out]
    plans: dict[str, tuple[list[int], dict[str, Any]]] = {
        "prompts": (train, {"mode": "think", "chain": None, "response": None}),
        "direct": (train, {"mode": "direct", "chain": None, "response": None}),
        "chains": ([row for row in train if records[row]["chain"]], {"mode": "think", "response": None}),
        "heldout": (sorted(held_out), {}),
    }
    for name, (numbers, changes) in plans.items():
        if numbers:
            write_records(folder / f"{name}.parquet", ({**records[row], **changes} for row in numbers))
    return {name: len(numbers) for name, (numbers, _) in plans.items() if numbers}


def tokens(record: Record) -> int:
    """Most tokens of a row's prompt and target in the tiny core: a word, a digit and a symbol are one token each."""
    prompt, _ = texts_of(record)
    images = IMAGE_TOKENS * len(shown(record))
    return _TEMPLATE_TOKENS + images + len(pieces(prompt)) + _target(record) + 16


def _target(record: Record) -> int:
    """Tokens of a row's target in thinking mode, without its tags."""
    return len(pieces(target_text({**record, "mode": "think", "chain": record["chain"] or "-"})))
