"""One rollout batch: groups of completions, graded, with groups of no spread replaced (DAPO's dynamic sampling)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rewards.example import Example
from rewards.mix import Graded, Mixture
from rewards.verdict import Verdict
from rl.config import RLConfig
from rl.data import PromptStream, Record, example_of, prompt_messages
from rl.rollout.client import Completion, Prompt, RolloutClient, Sampling

GRADERS = 16
"""Completions that are graded at once."""
SPREAD = 1e-6
"""Rewards of a group that differ by less carry no advantage."""


@dataclass
class Sample:
    """One graded completion of a group."""

    completion: Completion
    graded: Graded
    penalty: float
    """Soft overlong punishment, at most 0."""
    correct: Verdict
    """The answer's own verdict, whatever the reward is made of."""

    @property
    def reward(self) -> float | None:
        """Weighted sum of the terms plus the punishment; None when a term could not judge it."""
        return None if self.graded.total is None else self.graded.total + self.penalty


@dataclass
class Group:
    """The completions of one prompt."""

    row: Record
    prompt_ids: list[int]
    samples: list[Sample]

    @property
    def kind(self) -> str:
        """spread, or why the group teaches nothing: solved, failed, flat, unscorable."""
        rewards = [sample.reward for sample in self.samples if sample.reward is not None]
        if len(rewards) < 2:
            return "unscorable"
        if max(rewards) - min(rewards) > SPREAD:
            return "spread"
        correct = [sample.correct.score for sample in self.samples]
        if all(score == 1 for score in correct):
            return "solved"
        return "failed" if all(score == 0 for score in correct) else "flat"


class Collector:
    """Samples and grades rollout batches. Lives on rank 0 alone; the other ranks receive its groups.

    Args:
        cfg: the stage's configuration.
        client: the rollout pool.
        stream: prompts, drawn without repeats within an epoch.
        mixture: the reward.
        answer: the answer verifier behind `Sample.correct`.
        overlong: punishment by completion length, or None.
        seed: the stage's seed; every completion's own seed comes from it, so that a batch does not depend on how
            many ranks or servers there are.
    """

    def __init__(
        self,
        cfg: RLConfig,
        client: RolloutClient,
        stream: PromptStream,
        mixture: Mixture,
        answer: Callable[[str, Example], Verdict],
        overlong: Callable[[int], float] | None,
        seed: int,
    ) -> None:
        self.cfg, self.client, self.stream, self.mixture = cfg, client, stream, mixture
        self.answer, self.overlong, self.seed = answer, overlong, seed
        # Judges answer over HTTP: many wait at once. Rewards that compute lose nothing by it.
        self._graders = ThreadPoolExecutor(GRADERS, thread_name_prefix="grade")
        self.drawn = 0
        self.metrics: dict[str, float] = {}

    def collect(self) -> tuple[list[Group], list[Group]]:
        """One batch of `prompts_per_batch` groups, and every group sampled for it (dropped ones included).

        Groups without spread are replaced for up to `dynamic_sampling.max_rounds` rounds; if some are still missing
        then, the latest such groups fill the batch (their advantage is 0), and the metrics count them.
        """
        started = time.monotonic()
        wanted = self.cfg.rollout.prompts_per_batch
        kept: list[Group] = []
        spare: list[Group] = []
        sampled: list[Group] = []
        rounds = 0
        while len(kept) < wanted and rounds <= self.cfg.dynamic_sampling.max_rounds:
            groups = self._sample(self.stream.take(wanted - len(kept)))
            sampled += groups
            kept += [group for group in groups if group.kind == "spread"]
            spare += [group for group in groups if group.kind != "spread"]
            rounds += 1
        filled = wanted - len(kept)
        batch = kept + spare[len(spare) - filled :]
        self._measure(batch, sampled, rounds, filled, time.monotonic() - started)
        return batch, sampled

    def _sample(self, rows: Sequence[Record]) -> list[Group]:
        rollout = self.cfg.rollout
        sampling = Sampling(
            max_tokens=rollout.max_completion_tokens,
            n=rollout.group_size,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
        )
        prompts = []
        for row in rows:
            # vLLM gives completion i of a request the seed + i: leave room between the prompts.
            prompts.append(
                Prompt(prompt_messages(row), seed=(self.seed << 32) + self.drawn * rollout.group_size)
            )
            self.drawn += 1
        answers = self.client.generate(prompts, sampling)
        pairs = [(example_of(row), c) for row, a in zip(rows, answers, strict=True) for c in a.completions]
        samples = iter(self._graders.map(self._grade, pairs))
        return [
            Group(row, answer.prompt_ids, [next(samples) for _ in answer.completions])
            for row, answer in zip(rows, answers, strict=True)
        ]

    def _grade(self, pair: tuple[Example, Completion]) -> Sample:
        example, completion = pair
        return Sample(
            completion=completion,
            graded=self.mixture.grade(completion.text, example),
            penalty=self.overlong(len(completion.token_ids)) if self.overlong else 0.0,
            correct=self.answer(completion.text, example),
        )

    def _measure(
        self, batch: list[Group], sampled: list[Group], rounds: int, filled: int, seconds: float
    ) -> None:
        kinds = Counter(group.kind for group in sampled)
        samples = [sample for group in sampled for sample in group.samples]
        self.metrics = {
            "rollout/seconds": seconds,
            "rollout/rounds": rounds,
            "rollout/groups_sampled": len(sampled),
            **{
                f"rollout/groups_{kind}": kinds[kind]
                for kind in ("spread", "solved", "failed", "flat", "unscorable")
            },
            "rollout/groups_without_spread_kept": filled,
            "rollout/truncated": _mean(not sample.completion.finished for sample in samples),
            "rollout/correct": _mean(sample.correct.score == 1 for sample in samples),
            "rollout/unscorable": sum(sample.reward is None for sample in samples),
            "rollout/prompt_epoch": self.stream.epoch,
        }


def _mean(values) -> float:
    values = [float(value) for value in values]
    return sum(values) / len(values)
