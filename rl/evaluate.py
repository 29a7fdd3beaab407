"""Greedy evaluation of the served policy on held-out rows, in thinking and in direct mode. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.stats import wilson
from corpus.records import DataSource, Records, load_source
from rewards.answer import AnswerReward
from rewards.mix import Reward
from rewards.style.format import DirectFormat, ThinkFormat
from rewards.verdict import Verdict
from rl.config import EvalConfig
from rl.data import Record, example_of, prompt_messages
from rl.rollout.client import RolloutClient
from rl.rollout.messages import Completion, Prompt, Sampling

MODES = {"thinking": "think", "direct": "direct"}
"""Name in the report -> mode of the rows."""


@dataclass(frozen=True)
class Scored:
    """One held-out row with the policy's greedy completion and its verdicts."""

    record: Record
    completion: Completion
    answer: Verdict
    format: Verdict

    @property
    def correct(self) -> bool:
        return self.answer.score == 1

    def to_dict(self) -> dict[str, Any]:
        """The fields that the report and the tracker show; the image is passed separately."""
        return {
            "id": self.record["id"],
            "mode": self.record["mode"],
            "question": example_of(self.record).question,
            "answer": self.record["answer"],
            "completion": self.completion.text,
            "verdicts": {"answer": self.answer.to_dict(), "format": self.format.to_dict()},
            "correct": self.correct,
        }


def evaluate(
    cfg: EvalConfig,
    client: RolloutClient,
    sets: Mapping[str, Path],
    on_answer: Callable[[int, int], None] | None = None,
    askable: Callable[[DataSource, Records], Records] = lambda source, records: records,
) -> tuple[dict[str, dict[str, Any]], list[Scored]]:
    """Score the policy that the pool currently serves.

    Args:
        cfg: the sets, and the most tokens of a completion.
        client: the rollout pool.
        sets: data set name -> Parquet file.
        on_answer: called with (rows done, rows in total).
        askable: drops the rows beyond the servers' limits.

    Returns:
        `{"thinking": {accuracy, n, ci95, format_rate, mean_tokens}, "direct": {...}}`, accuracies and rates in
        [0, 1], and every judged row.
    """
    rows = {name: askable(getattr(cfg, name), held_out(cfg, name, sets)) for name in MODES}
    total = sum(map(len, rows.values()))
    judged: list[Scored] = []
    scores = {}
    for name, records in rows.items():
        before = len(judged)
        report = (lambda done, before=before: on_answer(before + done, total)) if on_answer else None
        part = answer_greedily(records, client, cfg.max_completion_tokens, report)
        scores[name] = summary(part)
        judged += part
    return scores, judged


def held_out(cfg: EvalConfig, name: str, sets: Mapping[str, Path]) -> Records:
    """The rows of one mode; a row of another mode in the set is an error."""
    source = getattr(cfg, name)
    records = load_source(source, sets, None)
    wrong = [row["id"] for row in records if row["mode"] != MODES[name]]
    if wrong:
        raise ValueError(
            f"eval.{name}: set {source.set!r} holds {len(wrong)} rows of another mode (first: {wrong[0]!r}); "
            f"it must hold mode={MODES[name]!r} alone"
        )
    return records


def answer_greedily(
    records: Sequence[Record],
    client: RolloutClient,
    max_tokens: int,
    on_answer: Callable[[int], None] | None = None,
) -> list[Scored]:
    """Greedy completions of the rows with their answer and format verdicts, in the rows' order."""
    answer = AnswerReward(thought_open=client.core.thought_open)
    formats: dict[str, Reward] = {"think": ThinkFormat(client.core.thought_open), "direct": DirectFormat()}
    prompts = [Prompt(prompt_messages(row)) for row in records]
    answers = client.generate(prompts, Sampling(max_tokens=max_tokens, temperature=0.0), on_answer)
    judged = []
    for row, given in zip(records, answers, strict=True):
        completion, example = given.completions[0], example_of(row)
        judged.append(
            Scored(
                row,
                completion,
                answer=answer(completion.text, example),
                format=formats[row["mode"]](completion.text, example),
            )
        )
    return judged


def accuracy(records: Sequence[Record], client: RolloutClient, max_tokens: int) -> float:
    """The share of rows in [0, 1] that the served policy answers correctly with greedy decoding."""
    return sum(row.correct for row in answer_greedily(records, client, max_tokens)) / len(records)


def summary(judged: Sequence[Scored]) -> dict[str, Any]:
    """Accuracy with its 95% Wilson interval, format rate and mean completion length in tokens."""
    n = len(judged)
    if not n:
        raise ValueError("there are no rows to evaluate")
    correct = sum(row.correct for row in judged)
    return {
        "accuracy": correct / n,
        "n": n,
        "ci95": list(wilson(correct, n)),
        "format_rate": sum(row.format.score == 1 for row in judged) / n,
        "mean_tokens": sum(len(row.completion.token_ids) for row in judged) / n,
    }
