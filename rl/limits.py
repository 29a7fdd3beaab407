"""The rollout servers' limits: pictures per prompt, and tokens of a prompt with its completion.

A server refuses a request beyond its limits (HTTP 400), and the refusal would end a stage at the batch that draws the
row. So `check` compares every row with the limits before the first stage trains. Rows beyond them are refused, or
dropped if their source says so.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from core.files import write_json
from core.model.prompts import messages, shown
from core.strict import ConfigError, Strict
from core.training.job import Job
from corpus.records import DataSource, Records, load_source
from corpus.vocabulary import check_words
from rl.rollout.config import PoolConfig

log = logging.getLogger(__name__)

FOUND = "unaskable.json"
"""File in the check's folder: {"problems": [a line per set], "dropped": {key: {reason: rows}}}."""


class Asked(Strict):
    """One set whose rows are sent to the servers."""

    key: str
    """Key path in the recipe, such as `rlvr.data[0]`."""
    source: DataSource
    max_completion_tokens: int
    seed: int | None = None
    """Seed of the draw, if the source limits its rows."""


class Limits(Strict):
    """All sets that are sent to the servers, and the servers' limits."""

    max_images: int
    max_model_tokens: int
    asked: tuple[Asked, ...]
    read: tuple[DataSource, ...] = ()
    """All sets that the policy reads or writes, whose words its tokenizer should know."""
    max_unknown: float = 1.0
    """Largest share of tokens of these sets that the tokenizer may not know."""


def check(cfg: Limits, job: Job) -> Path:
    """Compare every row with the limits and write FOUND to `job.out`; return that folder.

    Without `job.model` there is no tokenizer, and only pictures are counted.
    """
    processor = _processor(job.model) if job.model else None
    problems: list[str] = []
    dropped: dict[str, dict[str, int]] = {}
    for one in cfg.asked:
        source = one.source
        records = load_source(source, job.sets, one.seed)
        room = cfg.max_model_tokens - one.max_completion_tokens
        found = _unaskable(records, processor, cfg.max_images, room)
        if found and (source.unaskable == "refuse" or len(found) == len(records)):
            problems.append(_refusal(one, records, found, cfg))
        elif found:
            dropped[one.key] = dict(Counter(kind for kind, _ in found.values()))
    warnings: list[str] = []
    for source in cfg.read:
        assert processor, "words are checked by the tokenizer of `job.model`"
        records = load_source(source.model_copy(update={"rows": None}), job.sets, None, on_bad="drop")
        try:
            warnings += check_words(source.set, records, processor.tokenizer, cfg.max_unknown)
        except ConfigError as error:
            problems.append(str(error))
    write_json(job.out / FOUND, {"problems": problems, "dropped": dropped, "warnings": warnings})
    return job.out


def askable(
    records: Records, source: DataSource, pool: PoolConfig, model: Path, max_completion_tokens: int
) -> Records:
    """The records within the limits of `pool` with the core at `model`; the others are dropped and counted.

    A source without `unaskable: drop` is returned unchanged, because `check` has refused it if it has such rows.
    """
    if source.unaskable == "refuse":
        return records
    room = pool.max_model_tokens - max_completion_tokens
    found = _unaskable(records, _processor(model), pool.max_images, room)
    if not found:
        return records
    counts = dict(Counter(kind for kind, _ in found.values()))
    log.warning(
        "%s: dropped %d of %d rows beyond the servers' limits: %s",
        source.set, len(found), len(records), counts,
    )  # fmt: skip
    return records.only([row for row in range(len(records)) if row not in found])


def prompt_tokens(record: Mapping[str, Any], processor: Any) -> int:
    """Tokens of a record's prompt as a server counts them, including image tokens; pixels are not read."""
    text = processor.apply_chat_template([messages(record)], add_generation_prompt=True, tokenize=False)[0]
    tokens = len(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    # Each expansion replaces its one placeholder.
    return tokens + sum(count - 1 for count in processor.image_lengths(shown(record)))


def _unaskable(
    records: Sequence[Mapping[str, Any]], processor: Any, max_images: int, room: int
) -> dict[int, tuple[str, str]]:
    """Rows beyond a limit: row number -> (kind of limit, the row's value in words)."""
    found: dict[int, tuple[str, str]] = {}
    for row, record in enumerate(records):
        if (images := len(shown(record))) > max_images:
            frames = ", frames of videos included" if record.get("videos") else ""
            found[row] = ("pictures", f"{images} pictures{frames}")
        elif processor is not None and (tokens := prompt_tokens(record, processor)) > room:
            found[row] = ("tokens", f"a prompt of {tokens} tokens")
    return found


def _refusal(one: Asked, records: Records, found: Mapping[int, tuple[str, str]], limits: Limits) -> str:
    row, (kind, what) = next(iter(found.items()))
    rules = {
        "pictures": f"servers.max_images={limits.max_images}",
        "tokens": f"servers.max_model_tokens={limits.max_model_tokens} less {one.max_completion_tokens} for the "
        f"completion leaves {limits.max_model_tokens - one.max_completion_tokens}",
    }
    more = f" ({len(found)} such rows of {len(records)})" if len(found) > 1 else ""
    return (
        f"{one.key}: {records.place(row)} ({records[row]['id']!r}): {what}, {rules[kind]}{more}; raise the limit, "
        "remove the row, or set unaskable: drop for the set to leave such rows out"
    )


def _processor(model: Path) -> Any:
    from core.training.model import load_processor

    return load_processor(model)
