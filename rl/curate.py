"""Data that the current policy produces between stages: pass@k filter, rejection sampling, hard cases.

Each function writes a set of records and returns the counts of kept and dropped rows with the reasons.
Imports no torch.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.files import read_jsonl
from core.model.prompts import shown
from core.model.videos import Decoded
from corpus.curation.difficulty import unlearnable
from corpus.records import DataSource, Records, load_source, write_records
from rewards.answer import AnswerReward
from rewards.extract import parse_thinking
from rewards.style.format import ThinkFormat
from rl.config import HardCases, Harvest, PassAtK
from rl.data import Record, example_of, prompt_messages
from rl.rollout.client import RolloutClient
from rl.rollout.messages import Completion, Prompt, Sampling

Progress = Callable[[int, int], None] | None
Askable = Callable[[DataSource, Records], Records]
"""A filter that drops the rows beyond the servers' limits (rl.limits)."""


def every_row(source: DataSource, records: Records) -> Records:
    """The filter that keeps every row."""
    return records


class TooFewRows(RuntimeError):
    """A filter kept fewer rows than the recipe asks for."""


def pass_at_k(
    cfg: PassAtK,
    client: RolloutClient,
    sets: Mapping[str, Path],
    out: Path,
    *,
    seed: int,
    max_tokens: int,
    progress: Progress = None,
    askable: Askable = every_row,
) -> dict[str, Any]:
    """Write the prompts that the served policy can learn from to `out/<into>.parquet`.

    Always-solved prompts are dropped; never-solved prompts are dropped too if they need reasoning (report, section 4).
    The rows' meta keeps the pass rate as `pass_rate`.
    """
    kept: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for row, completions in _sampled(cfg, client, sets, seed, max_tokens, progress, askable):
        rate = _pass_rate(row, completions, client.core.thought_open)
        if rate is None:
            dropped["unscorable"] += 1
        elif reason := unlearnable(rate, row["mode"], cfg.drop_always_solved, cfg.drop_never_solved):
            dropped[reason] += 1
        else:
            kept.append({**row, "meta": {**(row["meta"] or {}), "pass_rate": rate}})
    return _finish(f"pass@{cfg.samples} filter", kept, dropped, cfg.min_rows, out / f"{cfg.into}.parquet")


def harvest(
    cfg: Harvest,
    client: RolloutClient,
    sets: Mapping[str, Path],
    out: Path,
    *,
    seed: int,
    max_tokens: int,
    progress: Progress = None,
    askable: Askable = every_row,
) -> dict[str, Any]:
    """Write correct, well-formed chains of the served policy to `out/<into>.parquet`, at most one per prompt."""
    opened = client.core.thought_open
    answer, well_formed = AnswerReward(thought_open=opened), ThinkFormat(opened)
    kept: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    seen = set()
    for row, completions in _sampled(cfg, client, sets, seed, max_tokens, progress, askable):
        example = example_of(row)
        good = [c for c in completions if c.finished and well_formed(c.text, example).score == 1]
        right = [c for c in good if answer(c.text, example).score == 1]
        if not right:
            dropped["no correct completion" if good else "no well-formed completion"] += 1
            continue
        key = (row["question"], right[0].text, _image_key(row))
        if key in seen:
            dropped["duplicate"] += 1
            continue
        seen.add(key)
        thought = parse_thinking(right[0].text, opened).thought or ""
        kept.append({**row, "chain": thought.strip(), "response": right[0].text.strip(), "source": "harvest"})
    over = max(0, len(kept) - cfg.keep)
    if over:
        dropped["more than keep"] = over
        kept = random.Random(seed).sample(kept, cfg.keep)
    return _finish("rejection sampling", kept, dropped, cfg.min_rows, out / f"{cfg.into}.parquet")


def hard_cases(cfg: HardCases, records: Sequence[Record], record_file: Path, out: Path) -> dict[str, Any]:
    """Write the prompts on which an RL stage was unreliable to `out/<into>.parquet`, hardest first.

    Args:
        cfg: the stage, and the largest pass rate.
        records: the rows that the stage trained on.
        record_file: the stage's record.jsonl; the last group of a prompt counts.
        out: folder for the set.
    """
    last: dict[str, float] = {}
    for line in read_jsonl(record_file):
        if line["of"]:
            last[line["id"]] = line["correct"] / line["of"]
    kept: list[dict[str, Any]] = []
    dropped: Counter[str] = Counter()
    for row in records:
        rate = last.get(row["id"])
        if rate is None:
            dropped["not visited"] += 1
        elif rate > cfg.max_pass_rate:
            dropped[f"solved more than {cfg.max_pass_rate:.0%} of the time"] += 1
        else:
            kept.append({**row, "meta": {**(row["meta"] or {}), "pass_rate": rate}})
    kept.sort(key=lambda row: row["meta"]["pass_rate"])
    if cfg.rows and len(kept) > cfg.rows:
        dropped["more than rows"] = len(kept) - cfg.rows
        kept = kept[: cfg.rows]
    return _finish("hard cases", kept, dropped, cfg.min_rows, out / f"{cfg.into}.parquet")


def _sampled(
    cfg: PassAtK | Harvest,
    client: RolloutClient,
    sets: Mapping[str, Path],
    seed: int,
    max_tokens: int,
    progress: Progress,
    askable: Askable,
) -> list[tuple[Record, list[Completion]]]:
    """The source's rows, each with `cfg.samples` completions of the served policy."""
    source, samples = cfg.source, cfg.samples
    rows = askable(source, load_source(source, sets, seed))
    prompts = [Prompt(prompt_messages(row), seed=(seed << 32) + at * samples) for at, row in enumerate(rows)]
    sampling = Sampling(max_tokens=max_tokens, n=samples, temperature=cfg.temperature)
    report = (lambda done: progress(done, len(rows))) if progress else None
    answers = client.generate(prompts, sampling, report)
    return [(row, answer.completions) for row, answer in zip(rows, answers, strict=True)]


def _pass_rate(row: Record, completions: Sequence[Completion], thought_open: bool) -> float | None:
    example = example_of(row)
    answer = AnswerReward(thought_open=thought_open)
    verdicts = [answer(completion.text, example) for completion in completions]
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    return math.fsum(scores) / len(scores) if scores else None


def _image_key(row: Record) -> tuple[bytes, ...]:
    """A hash of the pixels of each picture and frame."""
    return tuple(hashlib.sha256(image.tobytes()).digest() for image in Decoded(shown(row)))


def _finish(what: str, kept: list[dict], dropped: Counter, min_rows: int, path: Path) -> dict[str, Any]:
    report = {"kept": len(kept), "dropped": dict(dropped)}
    if len(kept) < min_rows:
        raise TooFewRows(
            f"{what}: kept {len(kept)} rows, min_rows is {min_rows} (dropped: {dict(dropped)}). "
            "Give it more prompts, or a policy that solves some of them but not all."
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_records(path, kept)
    return report
