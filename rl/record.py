"""The files that an RL stage writes while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.files import append_jsonl
from core.training.resume import drop_lines_after
from rl.collect import Group, Sample
from rl.config import RLConfig
from rl.data import example_of
from rl.watch import ALARMS

if TYPE_CHECKING:
    from transformers import TrainerCallback

log = logging.getLogger(__name__)


class RunLog:
    """The stage's files, written by rank 0.

    metrics.jsonl: a line per optimizer update; `elapsed` counts seconds since the start. completions.jsonl: graded
    completions with every verdict. record.jsonl: a line per sampled group with the number of its correct completions
    (the mixed stage's hard cases come from it).
    """

    def __init__(self, cfg: RLConfig, out: Path) -> None:
        self.cfg, self.out = cfg, out
        self.batches = 0
        self.started = time.monotonic()
        self.pending: dict[str, float] = {}
        out.mkdir(parents=True, exist_ok=True)

    def batch(
        self,
        batch: Sequence[Group],
        sampled: Sequence[Group],
        metrics: Mapping[str, float],
        with_completions: bool = False,
    ) -> None:
        """Record one rollout batch, with its completions every `log_completions_every` batches or on request."""
        self.pending |= metrics
        kept = {id(group) for group in batch}
        for group in sampled:
            scores = [sample.correct.score for sample in group.samples if sample.correct.score is not None]
            line = {
                "batch": self.batches,
                "id": group.row["id"],
                "correct": sum(scores),
                "of": len(scores),
                "kind": group.kind,
                "trained": id(group) in kept,
            }
            append_jsonl(self.out / "record.jsonl", line)
        if with_completions or self.batches % self.cfg.log_completions_every == 0:
            for group in batch:
                for number, sample in enumerate(group.samples):
                    # The row's meta may be large, so only a group's first line has it (rewards.offline expects that).
                    meta = {} if number else {"meta": group.row["meta"]}
                    append_jsonl(self.out / "completions.jsonl", self._completion(group, sample) | meta)
        self.batches += 1

    def state(self) -> dict[str, Any]:
        """Progress, for `restore`."""
        return {"batches": self.batches, "seconds": time.monotonic() - self.started}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where another record of the same stage stopped."""
        self.batches, self.started = state["batches"], time.monotonic() - state["seconds"]

    def drop_after(self, updates: int, batches: int) -> None:
        """Drop lines of later updates and batches, which will be repeated."""
        drop_lines_after(self.out / "metrics.jsonl", "step", updates)
        for name in ("record.jsonl", "completions.jsonl", ALARMS):
            drop_lines_after(self.out / name, "batch", batches - 1)

    def alarm_of_servers(self, text: str) -> None:
        """Log that a rollout server was lost or came back."""
        log.warning("%s", text)
        append_jsonl(self.out / ALARMS, {"batch": self.batches, "name": "rollout_server", "text": text})

    def _completion(self, group: Group, sample: Sample) -> dict[str, Any]:
        return {
            "batch": self.batches,
            "id": group.row["id"],
            "mode": group.row["mode"],
            "question": example_of(group.row).question,
            "answer": group.row["answer"],
            "verifier": group.row["verifier"],
            "completion": sample.completion.text,
            "tokens": len(sample.completion.token_ids),
            "finished": sample.completion.finished,
            "reward": sample.reward,
            "staleness": group.staleness,
            "verdicts": {name: verdict.to_dict() for name, verdict in sample.graded.verdicts.items()},
        }

    def metrics(self, step: int, logs: Mapping[str, Any]) -> None:
        """Record an optimizer update, with the pending metrics of its batch."""
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        line = {"step": step, "elapsed": time.monotonic() - self.started, **numbers, **self.pending}
        append_jsonl(self.out / "metrics.jsonl", line)
        self.pending = {}

    def callback(self) -> TrainerCallback:
        """A trainer's callback that records each update."""
        from transformers import TrainerCallback

        record = self

        class WriteMetrics(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **_):
                # The trainer's last log line summarises the run and does not belong to a step.
                if state.is_world_process_zero and "train_runtime" not in logs:
                    record.metrics(state.global_step, logs)

        return WriteMetrics()
