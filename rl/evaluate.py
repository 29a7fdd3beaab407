"""Evaluation of the served policy on held-out sets: greedy, sampled and with blanked images. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from corpus.records import DataSource, Records, load_source
from rewards.answer import AnswerReward
from rewards.isolation import load_limited
from rewards.mix import Mixture, Reward, Term
from rewards.style.format import DirectFormat, ThinkFormat
from rewards.verdict import Verdict
from rl.blank import blanked
from rl.data import Record, example_of, gradable, prompt_messages
from rl.eval_config import EvalConfig, EvalSet
from rl.rollout.client import RolloutClient
from rl.rollout.messages import Completion, Prompt, Sampling
from rl.scores import summary

OnAnswer = Callable[[int], None]


@dataclass(frozen=True)
class Judged:
    """One completion with its verdicts."""

    completion: Completion
    answer: Verdict
    format: Verdict

    @property
    def correct(self) -> bool:
        return self.answer.score == 1

    def to_dict(self) -> dict[str, Any]:
        """The fields of a line of held_out.jsonl that come from the completion."""
        return {
            "completion": self.completion.text,
            "verdicts": {"answer": self.answer.to_dict(), "format": self.format.to_dict()},
            "correct": self.correct,
            "tokens": len(self.completion.token_ids),
            "truncated": not self.completion.finished,
        }


@dataclass(frozen=True)
class Scored:
    """One held-out row with the policy's completions."""

    record: Record
    name: str
    """Name of the evaluation set."""
    greedy: Judged
    drawn: tuple[Judged, ...] = ()
    """Sampled completions."""
    blind: Judged | None = None
    """The greedy completion with blanked images; None without images or without `eval.blind`."""

    @property
    def correct(self) -> bool:
        return self.greedy.correct

    def to_dict(self) -> dict[str, Any]:
        """A line of held_out.jsonl, which the report, the tracker and `posttrain compare` read."""
        row = self.record
        extra: dict[str, Any] = {}
        if self.drawn:
            extra["drawn"] = [one.to_dict() for one in self.drawn]
        if self.blind:
            extra["blind"] = self.blind.to_dict()
        return {
            "id": row["id"],
            "set": self.name,
            "mode": row["mode"],
            "source": row["source"],
            "kind": row["verifier"],
            "images": len(row["images"]),
            "question": row["question"],
            "answer": row["answer"],
            **self.greedy.to_dict(),
            **extra,
        }


def evaluate(
    cfg: EvalConfig,
    client: RolloutClient,
    sets: Mapping[str, Path],
    on_answer: Callable[[int, int], None] | None = None,
    askable: Callable[..., Records] = lambda source, records, length: records,
    folders: Sequence[Path] = (),
) -> tuple[dict[str, dict[str, Any]], list[Scored]]:
    """Score the policy that the pool currently serves.

    Args:
        cfg: the named sets, and the most tokens of a completion.
        client: the rollout pool.
        sets: data set name -> Parquet file.
        on_answer: called with (rows done, rows in total).
        askable: called with (source, records, length=longest completion in tokens); drops the rows beyond the servers'
            limits.
        folders: folders that are searched for users' rewards.

    Returns:
        Name of an evaluation set -> its figures (rl.scores.summary), and every judged row.
    """
    rows: dict[str, Sequence[Record]] = {}
    for name in cfg.sets:
        within = partial(askable, length=cfg.longest(name))
        rows[name] = held_out(cfg, name, sets, within)
    total = sum(map(len, rows.values()))
    judged: list[Scored] = []
    scores = {}
    for name, records in rows.items():
        one, before = cfg.sets[name], len(judged)
        report = (lambda done, before=before: on_answer(before + done, total)) if on_answer else None
        judge = Judge(client, cfg.longest(name), _reward(one, client, folders))
        part = [
            Scored(row, name, greedy)
            for row, greedy in zip(records, judge.greedy(records, report), strict=True)
        ]
        if one.draws:
            drawn = judge.drawn(records, one.draws, one.temperature)
            part = [replace(scored, drawn=tuple(found)) for scored, found in zip(part, drawn, strict=True)]
        if cfg.blind:
            part = _with_blind(part, judge)
        scores[name] = summary([scored.to_dict() for scored in part])
        judged += part
    return scores, judged


def held_out(
    cfg: EvalConfig,
    name: str,
    sets: Mapping[str, Path],
    askable: Callable[[DataSource, Records], Records] = lambda source, records: records,
) -> Sequence[Record]:
    """The rows of one evaluation set, with the set's mode and verifier in place of their own.

    Raises ValueError for rows of several modes in a set without a mode, and GoldError for a gold answer that the
    verifier cannot use, unless the set drops such rows (`on_bad_gold`).
    """
    source = cfg.sets[name]
    records = askable(source, load_source(source, sets, None))
    if source.mode is None:
        modes = {row["mode"]: row["id"] for row in records}
        if len(modes) > 1:
            first = ", ".join(f"{mode} in row {row!r}" for mode, row in sorted(modes.items()))
            raise ValueError(
                f"eval.sets.{name}: set {source.set!r} holds rows of several modes ({first}); say mode: think or "
                "mode: direct to ask every row in one mode"
            )
    asked = {"mode": source.mode, "verifier": source.verifier}
    return gradable(source, records, {key: value for key, value in asked.items() if value})


@dataclass(frozen=True)
class Judge:
    """Asks the served policy about rows, and grades its completions."""

    client: RolloutClient
    max_tokens: int
    answer: Reward

    def greedy(self, records: Sequence[Record], on_answer: OnAnswer | None = None) -> list[Judged]:
        """The greedy completion of each row."""
        sampling = Sampling(max_tokens=self.max_tokens, temperature=0.0)
        return [first for (first,) in self._judged(records, sampling, on_answer)]

    def drawn(self, records: Sequence[Record], count: int, temperature: float) -> list[list[Judged]]:
        """`count` sampled completions of each row. The seeds depend on the row's place alone."""
        return self._judged(records, Sampling(max_tokens=self.max_tokens, n=count, temperature=temperature))

    def _judged(
        self, records: Sequence[Record], sampling: Sampling, on_answer: OnAnswer | None = None
    ) -> list[list[Judged]]:
        seeds = (place * sampling.n if sampling.temperature else None for place in range(len(records)))
        prompts = [Prompt(prompt_messages(row), seed) for row, seed in zip(records, seeds, strict=True)]
        answers = self.client.generate(prompts, sampling, on_answer)
        given = [
            (row, one) for row, answer in zip(records, answers, strict=True) for one in answer.completions
        ]
        texts, examples = [one.text for _, one in given], [example_of(row) for row, _ in given]
        formats: dict[str, Reward] = {
            "think": ThinkFormat(self.client.core.thought_open),
            "direct": DirectFormat(),
        }
        graded = Mixture([Term("answer", self.answer, 1.0)]).grade_batch(texts, examples)
        judged = [
            Judged(one, found.verdicts["answer"], formats[row["mode"]](one.text, example))
            for (row, one), found, example in zip(given, graded, examples, strict=True)
        ]
        return [judged[start : start + sampling.n] for start in range(0, len(judged), sampling.n)]


def accuracy(records: Sequence[Record], client: RolloutClient, max_tokens: int) -> float:
    """The share of rows in [0, 1] that the served policy answers correctly with greedy decoding."""
    judge = Judge(client, max_tokens, AnswerReward(thought_open=client.core.thought_open))
    return sum(one.correct for one in judge.greedy(records)) / len(records)


def _reward(cfg: EvalSet, client: RolloutClient, folders: Sequence[Path]) -> Reward:
    """The reward that decides whether a completion of the set is right."""
    if cfg.use is None:
        return AnswerReward(thought_open=client.core.thought_open)
    return load_limited(cfg.use, cfg.params, folders)


def _with_blind(scored: Sequence[Scored], judge: Judge) -> list[Scored]:
    """The rows, those with images with a completion for grey images."""
    seeing = [one for one in scored if one.record["images"] or one.record.get("videos")]
    blind = dict(
        zip(
            map(id, seeing),
            judge.greedy([blanked(one.record) for one in seeing]) if seeing else [],
            strict=True,
        )
    )
    return [replace(one, blind=blind.get(id(one))) for one in scored]
