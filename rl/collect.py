"""Collects rollout batches: samples and grades groups, and replaces groups without spread (DAPO's dynamic sampling)."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from rewards.components import component_metrics
from rewards.example import Example
from rewards.mix import Graded, Mixture, Term
from rewards.verdict import Verdict
from rl.config import RLConfig
from rl.data import PromptStream, Record, example_of, prompt_messages
from rl.distill import TeacherClient
from rl.ledger import Ledger
from rl.rollout.client import RolloutClient
from rl.rollout.messages import Answer, Completion, Prompt, Sampling

SPREAD = 1e-6
"""A group whose rewards differ by less has no advantage to learn from."""


@dataclass
class Sample:
    """One graded completion of a group."""

    completion: Completion
    graded: Graded
    penalty: float
    """Soft overlong punishment, at most 0."""
    correct: Verdict
    """The answer verifier's verdict, independent of the reward's terms."""
    teacher: list[float] | None = None
    """Distillation: the teacher's log-probabilities of the completion's tokens."""

    @property
    def reward(self) -> float | None:
        """Weighted sum of the terms plus the punishment; None if a term could not score the completion."""
        return None if self.graded.total is None else self.graded.total + self.penalty


@dataclass
class Group:
    """The graded completions of one prompt."""

    row: Record
    prompt_ids: list[int]
    samples: list[Sample]
    version: int = 0
    """Number of weight updates that the servers had received when the group was sampled."""
    staleness: int = 0
    """Number of weight updates between sampling the group and training on it."""
    experts: Any = None
    """Routing replay: the experts of the prompt's tokens, as in rl.rollout.messages.Answer."""

    @property
    def kind(self) -> str:
        """`spread`, or the reason why the group has no advantages: solved, failed, flat, unscorable."""
        rewards = [sample.reward for sample in self.samples if sample.reward is not None]
        if len(rewards) < 2:
            return "unscorable"
        if max(rewards) - min(rewards) > SPREAD:
            return "spread"
        correct = [sample.correct.score for sample in self.samples]
        if all(score == 1 for score in correct):
            return "solved"
        return "failed" if all(score == 0 for score in correct) else "flat"


@dataclass
class Batch:
    """The groups of one training step, and all groups that were sampled for it."""

    groups: list[Group]
    sampled: list[Group]
    """Every group sampled for the batch, including dropped and carried ones."""
    metrics: dict[str, float]


class Collector:
    """Samples and grades rollout batches. It exists only on rank 0; the other ranks receive its groups.

    Args:
        cfg: the stage's configuration.
        client: the rollout pool.
        rows: prompts, drawn without repeats within an epoch.
        mixture: the reward.
        answer: the answer verifier behind `Sample.correct`.
        overlong: punishment by completion length, or None.
        teacher: scores completions for distillation, or None.
        seed: the stage's seed. Each completion's seed is derived from it, so a batch does not depend on the number of
            ranks or servers.
    """

    def __init__(
        self,
        cfg: RLConfig,
        client: RolloutClient,
        rows: Sequence[Record],
        mixture: Mixture,
        answer: Callable[[str, Example], Verdict],
        overlong: Callable[[int], float] | None,
        seed: int,
        teacher: TeacherClient | None = None,
    ) -> None:
        self.cfg, self.client, self.mixture, self.teacher = cfg, client, mixture, teacher
        self.answer = Mixture([Term("answer", answer, 1.0)])
        self.overlong, self.seed = overlong, seed
        self.ledger = Ledger(cfg.rollout.group_size)
        self.stream = PromptStream(rows, seed, self._passes_over, cfg.dynamic_sampling.retry_share)
        self.drawn = 0
        self.version = 0
        """Number of weight updates that the servers have received; rl.feed counts them."""
        self._generating_s = self._grading_s = 0.0
        self._waiting: list[Record] = []
        self._carried: list[Group] = []

    def state(self) -> dict[str, Any]:
        """The state on which the next batch depends beside the policy, for `restore`."""
        return {
            "stream": self.stream.state(),
            "ledger": self.ledger,
            "waiting": self._waiting,
            "carried": self._carried,
            "errors": self.mixture.errors,
            "drawn": self.drawn,
            "version": self.version,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where another collector of the same stage stopped."""
        self.stream.restore(state["stream"])
        self.ledger, self._waiting, self._carried = state["ledger"], state["waiting"], state["carried"]
        self.mixture.errors.update(state["errors"])
        self.drawn, self.version = state["drawn"], state["version"]

    def collect(self) -> Batch:
        """One batch of `prompts_per_batch` groups.

        Groups without spread are replaced for up to `dynamic_sampling.max_rounds` rounds. If the batch is still not
        full then, the latest groups without spread fill it (their advantage is 0), and the metrics count them.
        """
        started, passed_over = time.monotonic(), self.stream.passed_over
        self._generating_s = self._grading_s = 0.0
        wanted = self.cfg.rollout.prompts_per_batch
        kept, too_old = self._young(self._carried)
        carried = len(kept)
        spare: list[Group] = []
        sampled: list[Group] = []
        rounds = 0
        while len(kept) < wanted and rounds <= self.cfg.dynamic_sampling.max_rounds:
            groups = self._sample(self._draw(wanted - len(kept)))
            sampled += groups
            kept += [group for group in groups if group.kind == "spread"]
            spare += [group for group in groups if group.kind != "spread"]
            rounds += 1
        self._carried = kept[wanted:] if self.cfg.dynamic_sampling.carry else []
        kept = kept[:wanted]
        filled = wanted - len(kept)
        batch = kept + spare[len(spare) - filled :]
        metrics = {
            "rollout/seconds": time.monotonic() - started,
            "rollout/generating_seconds": self._generating_s,
            "rollout/grading_seconds": self._grading_s,
            "rollout/rounds": rounds,
            "rollout/groups_without_spread_kept": filled,
            "rollout/groups_carried": carried,
            "rollout/groups_too_old": too_old,
            "rollout/prompts_passed_over": self.stream.passed_over - passed_over,
            **self._measures(sampled),
            **self._taught(batch),
        }
        return Batch(batch, sampled, metrics)

    def _taught(self, groups: list[Group]) -> dict[str, float]:
        """Let the teacher score the batch's completions; returns the reverse KL divergence per token."""
        if self.teacher is None:
            return {}
        started = time.monotonic()
        tokens = [[sample.completion.token_ids for sample in group.samples] for group in groups]
        prompts = [Prompt(prompt_messages(group.row)) for group in groups]
        scores = self.teacher.score(prompts, [group.prompt_ids for group in groups], tokens)
        gaps = []
        for group, of_group in zip(groups, scores, strict=True):
            for sample, logprobs in zip(group.samples, of_group, strict=True):
                sample.teacher = logprobs
                gaps += [own - its for own, its in zip(sample.completion.logprobs, logprobs, strict=True)]
        return {"distill/reverse_kl": _mean(gaps), "distill/seconds": time.monotonic() - started}

    def _young(self, groups: list[Group]) -> tuple[list[Group], int]:
        """The carried groups that are not too stale to train on, and the number of dropped ones."""
        rollout = self.cfg.rollout
        young = [g for g in groups if self.version - g.version + rollout.overlap <= rollout.max_staleness]
        return young, len(groups) - len(young)

    def _draw(self, missing: int) -> list[Record]:
        """Prompts for one round: enough to expect `missing` groups with spread."""
        cfg = self.cfg.dynamic_sampling
        most = math.ceil(missing * cfg.oversample) if cfg.max_rounds else missing
        self._waiting += self.stream.take(most - len(self._waiting))
        count = max(missing, self.ledger.take([row["id"] for row in self._waiting[:most]], missing))
        drawn, self._waiting = self._waiting[:count], self._waiting[count:]
        return drawn

    def _passes_over(self, prompt: str, epoch: int) -> bool:
        cfg = self.cfg.dynamic_sampling
        return cfg.max_rounds > 0 and self.ledger.settled(prompt, epoch=epoch, rest_epochs=cfg.rest_epochs)

    def _sample(self, rows: Sequence[Record]) -> list[Group]:
        rollout = self.cfg.rollout
        sampling = Sampling(
            max_tokens=rollout.max_completion_tokens,
            n=rollout.group_size,
            temperature=rollout.temperature,
        )
        prompts = []
        for row in rows:
            # vLLM gives completion i of a request the seed + i, so the prompts' seeds must lie further apart.
            prompts.append(
                Prompt(prompt_messages(row), seed=(self.seed << 32) + self.drawn * rollout.group_size)
            )
            self.drawn += 1
        started = time.monotonic()
        answers = self.client.generate(prompts, sampling)
        sampled = time.monotonic()
        samples = iter(self._grade(rows, answers))
        groups = [
            Group(
                row,
                answer.prompt_ids,
                [next(samples) for _ in answer.completions],
                self.version,
                experts=answer.experts,
            )
            for row, answer in zip(rows, answers, strict=True)
        ]
        self._generating_s += sampled - started
        self._grading_s += time.monotonic() - sampled
        for group in groups:
            scores = [s.correct.score for s in group.samples if s.correct.score is not None]
            self.ledger.record(
                group.row["id"],
                correct=math.fsum(scores),
                of=len(scores),
                epoch=self.stream.epoch,
                spread=group.kind == "spread",
            )
        return groups

    def _grade(self, rows: Sequence[Record], answers: Sequence[Answer]) -> list[Sample]:
        completions = [completion for answer in answers for completion in answer.completions]
        texts = [completion.text for completion in completions]
        examples = [
            example
            for row, answer in zip(rows, answers, strict=True)
            for example in [example_of(row)] * len(answer.completions)
        ]
        graded = self.mixture.grade_batch(texts, examples)
        correct = self.answer.grade_batch(texts, examples)
        return [
            Sample(
                completion=completion,
                graded=reward,
                penalty=self.overlong(len(completion.token_ids)) if self.overlong else 0.0,
                correct=verdicts.verdicts["answer"],
            )
            for completion, reward, verdicts in zip(completions, graded, correct, strict=True)
        ]

    def _measures(self, sampled: list[Group]) -> dict[str, float]:
        """Metrics of the groups sampled for one batch."""
        kinds = Counter(group.kind for group in sampled)
        samples = [sample for group in sampled for sample in group.samples]
        figures: dict[str, float] = {
            "rollout/groups_sampled": len(sampled),
            **{
                f"rollout/groups_{kind}": kinds[kind]
                for kind in ("spread", "solved", "failed", "flat", "unscorable")
            },
            "rollout/unscorable": sum(sample.reward is None for sample in samples),
            "rollout/prompt_epoch": self.stream.epoch,
            **component_metrics([[sample.graded for sample in group.samples] for group in sampled]),
            **{f"sampled/{name}/errors": count for name, count in self.mixture.errors.items()},
        }
        if samples:  # a batch may consist of carried groups only
            figures |= {
                "rollout/useful_groups_per_1000": 1000 * kinds["spread"] / len(samples),
                "rollout/truncated": _mean(not sample.completion.finished for sample in samples),
                "rollout/correct": _mean(sample.correct.score == 1 for sample in samples),
            }
        return figures


class Pipeline:
    """A sequence of batches. With overlap, the next batch is sampled while the learner trains on the current one.

    Args:
        collector: samples the batches.
        batches: number of batches of the stage.
        overlap: whether to sample one batch ahead.
    """

    def __init__(self, collector: Collector, batches: int, overlap: bool) -> None:
        self.collector, self.left, self.overlap = collector, batches, overlap
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="rollouts-ahead")
        self._next: Future[Batch] | None = None

    def settle(self) -> None:
        """Wait until the running batch is sampled: the servers' weights must not change while they sample."""
        if self._next:
            self._next.result()

    def take(self) -> Batch:
        """The next batch; sets the staleness of its groups."""
        batch = self._next.result() if self._next else self.collector.collect()
        self._next = None
        self.left -= 1
        for group in batch.groups:
            group.staleness = self.collector.version - group.version
        batch.metrics["rollout/staleness"] = _mean(group.staleness for group in batch.groups)
        return batch

    def sample_ahead(self) -> None:
        """Start sampling the next batch if batches may overlap and a batch remains."""
        if self.overlap and self.left > 0:
            self._next = self._ahead.submit(self.collector.collect)


def _mean(values: Iterable[float]) -> float:
    found = [float(value) for value in values]
    return sum(found) / len(found)
