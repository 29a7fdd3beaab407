"""Watches an RL stage for reward hacking: signs that the reward rises although answers do not improve.

Each check compares one rollout batch with earlier ones and describes its finding in words. An alarm is written to the
stage's alarms.jsonl and metrics, sent to W&B, and stops the run if the recipe says so. Imports no torch.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, pstdev
from typing import Any

from core.files import append_jsonl
from rewards.mix import Reward
from rewards.verdict import Status, as_verdict
from rl.blank import blanked
from rl.collect import Group, Sample
from rl.config import AlarmName, Watch
from rl.data import Record, example_of

HISTORY = 5
"""Number of batches from which a component's usual mean and spread are estimated."""
LEAST_SPREAD = 0.02
"""Lower bound of a component's spread, so that a constant component may still change a little."""
LEAST_SAMPLES = 16
"""Fewest completions over which a share can raise an alarm."""
ALARMS = "alarms.jsonl"
"""File in the stage's folder with a line `{"batch", "name", "text"}` per alarm."""
JUDGED = (Status.CORRECT, Status.WRONG)


@dataclass(frozen=True)
class Alarm:
    """One sign of reward hacking."""

    name: AlarmName
    text: str
    """The finding, with its figures and the bound."""


class RewardAlarm(RuntimeError):
    """An alarm that ends the run because the recipe names it."""


@dataclass(frozen=True)
class Look:
    """Greedy accuracy on the watched rows, and the mean reward of the batches since the previous look."""

    reward: float
    accuracy: float
    blanked: float | None
    """Accuracy with every image replaced by a flat one; None if no row has an image."""
    n: int
    n_blanked: int


class Watcher:
    """Checks every batch of one stage. It exists only on rank 0.

    Args:
        cfg: the bounds.
        out: the stage's folder, in which alarms.jsonl is written.
        second: the stricter verifier, or None.
        rows: the held-out rows; [] turns off their evaluation.
        accuracy: a function from rows to the current policy's greedy accuracy in [0, 1].
    """

    def __init__(
        self,
        cfg: Watch,
        out: Path,
        second: Reward | None,
        rows: Sequence[Record],
        accuracy: Callable[[Sequence[Record]], float],
    ) -> None:
        self.cfg, self.out, self.second, self.rows, self.accuracy = cfg, out, second, rows, accuracy
        self.shown = [row for row in rows if row["images"] or row.get("videos")]
        self._blank: list[Record] = []
        self._batches = 0
        self._unscorable: deque[tuple[int, int]] = deque(maxlen=cfg.window)
        self._means: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=20))
        self._looks: list[Look] = []
        self._rewards: list[float] = []

    def batch(self, groups: Sequence[Group]) -> tuple[dict[str, float], list[Alarm]]:
        """Check all groups sampled for one batch.

        Returns the metrics to log (with `alarm/<name>` = 1 for every alarm) and the alarms, which are on disk already.
        """
        samples = [sample for group in groups for sample in group.samples]
        metrics: dict[str, float] = {}
        alarms = [
            *self._check_unscorable(samples, metrics),
            *self._check_components(samples),
            *self._check_repeats(groups, metrics),
            *self._check_second(groups, metrics),
            *self._check_held_out(samples, metrics),
        ]
        for alarm in alarms:
            metrics[f"alarm/{alarm.name}"] = 1.0
            append_jsonl(self.out / ALARMS, {"batch": self._batches, "name": alarm.name, "text": alarm.text})
        self._batches += 1
        return metrics, alarms

    def state(self) -> dict[str, Any]:
        """The history of the checks, for `restore`."""
        return {
            "batches": self._batches,
            "unscorable": self._unscorable,
            "means": dict(self._means),
            "looks": self._looks,
            "rewards": self._rewards,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue where another watcher of the same stage stopped."""
        self._batches, self._unscorable = state["batches"], state["unscorable"]
        self._means.update(state["means"])
        self._looks, self._rewards = state["looks"], state["rewards"]

    def stop_for(self, alarms: Sequence[Alarm]) -> None:
        """Raise RewardAlarm if `watch.stop_on` names one of the alarms."""
        fatal = [f"{alarm.name}: {alarm.text}" for alarm in alarms if alarm.name in self.cfg.stop_on]
        if fatal:
            raise RewardAlarm(
                f"{'; '.join(fatal)}. This ends the run because watch.stop_on names it; the batch's completions are "
                f"the last ones in {self.out / 'completions.jsonl'}"
            )

    def _check_unscorable(self, samples: Sequence[Sample], metrics: dict[str, float]) -> Iterable[Alarm]:
        """Alarm if grading fails often: the scored completions are then a biased sample."""
        missing = [sample for sample in samples if sample.reward is None]
        causes = Counter(
            f"{name} {verdict.status.value}"
            for sample in missing
            for name, verdict in sample.graded.verdicts.items()
            if verdict.score is None
        )
        for cause, count in causes.items():
            metrics[f"unscorable/{cause.replace(' ', '/')}"] = count
        self._unscorable.append((len(missing), len(samples)))
        lost, of = (sum(column) for column in zip(*self._unscorable, strict=True))
        if of >= LEAST_SAMPLES and not lost / of <= self.cfg.max_unscorable:
            verdicts = [v for sample in missing for v in sample.graded.verdicts.values() if v.score is None]
            listed = ", ".join(f"{cause} {count}" for cause, count in causes.most_common(3))
            now = f"{listed}, the first: {verdicts[0].reason}" if verdicts else "none of them in this batch"
            yield Alarm(
                "unscorable",
                f"{lost} of the last {of} completions could not be judged, above max_unscorable="
                f"{self.cfg.max_unscorable:g} ({now})",
            )

    def _check_components(self, samples: Sequence[Sample]) -> Iterable[Alarm]:
        """Alarm if one status dominates or a mean jumps: both indicate a hole in a reward."""
        names = dict.fromkeys(name for sample in samples for name in sample.graded.verdicts)
        for name in names:
            verdicts = [s.graded.verdicts[name] for s in samples if name in s.graded.verdicts]
            for status, count in Counter(verdict.status for verdict in verdicts).items():
                if (
                    status not in JUDGED
                    and len(verdicts) >= LEAST_SAMPLES
                    and count > self.cfg.max_status * len(verdicts)
                ):
                    yield Alarm(
                        "status",
                        f"{count} of {len(verdicts)} verdicts of {name} are {status.value}, above max_status="
                        f"{self.cfg.max_status:g}",
                    )
            scores = [verdict.score for verdict in verdicts if verdict.score is not None]
            if len(scores) < LEAST_SAMPLES:
                continue
            mean, before = fmean(scores), self._means[name]
            if len(before) >= HISTORY:
                change, spread = mean - fmean(before), max(pstdev(before), LEAST_SPREAD)
                if not abs(change) <= max(self.cfg.max_jump, 6 * spread):
                    yield Alarm(
                        "jump",
                        f"the mean of {name} went from {fmean(before):.3f} to {mean:.3f} within a batch, more than "
                        f"max_jump={self.cfg.max_jump:g} and six times its usual spread of {spread:.3f}",
                    )
            if math.isfinite(mean):  # a non-finite mean would disable all later comparisons
                before.append(mean)

    def _check_repeats(self, groups: Sequence[Group], metrics: dict[str, float]) -> Iterable[Alarm]:
        """Alarm if the same text answers several prompts."""
        asked: dict[str, set[str]] = defaultdict(set)
        long = [
            (group.row["id"], " ".join(sample.completion.text.split()))
            for group in groups
            for sample in group.samples
            if len(sample.completion.token_ids) >= self.cfg.repeat_tokens
        ]
        for prompt, text in long:
            asked[text].add(prompt)
        repeated = [text for _, text in long if len(asked[text]) > 1]
        if len(long) < LEAST_SAMPLES:
            return
        share = len(repeated) / len(long)
        metrics["watch/repeats"] = share
        if share > self.cfg.max_repeats:
            text, count = Counter(repeated).most_common(1)[0]
            yield Alarm(
                "repeats",
                f"{share:.0%} of the completions also answer another prompt, above max_repeats="
                f"{self.cfg.max_repeats:g}; {count} times: {text[:120]!r}",
            )

    def _check_second(self, groups: Sequence[Group], metrics: dict[str, float]) -> Iterable[Alarm]:
        """Alarm if the answer verifier accepts answers that a stricter verifier rejects."""
        if self.second is None:
            return
        credited = [
            (group.row, sample) for group in groups for sample in group.samples if sample.correct.score == 1
        ]
        step = max(1, len(credited) // self.cfg.second_rows)
        chosen = credited[::step][: self.cfg.second_rows]
        verdicts = [
            (row, sample, as_verdict(self.second(sample.completion.text, example_of(row)), "second_verifier"))
            for row, sample in chosen
        ]
        refused = [(r, s, v) for r, s, v in verdicts if v.score is not None and v.score < 1]
        if not verdicts:
            return
        share = len(refused) / len(verdicts)
        metrics["watch/disagreement"] = share
        if len(verdicts) >= LEAST_SAMPLES and share > self.cfg.max_disagreement:
            row, sample, verdict = refused[0]
            yield Alarm(
                "disagreement",
                f"{len(refused)} of {len(verdicts)} answers that passed do not pass {self.cfg.second_verifier}, above "
                f"max_disagreement={self.cfg.max_disagreement:g}; the first: row {row['id']!r}, gold "
                f"{row['answer']!r}, answer {sample.correct.answer!r} ({verdict.reason})",
            )

    def _check_held_out(self, samples: Sequence[Sample], metrics: dict[str, float]) -> Iterable[Alarm]:
        rewards = [sample.reward for sample in samples if sample.reward is not None]
        self._rewards += [fmean(rewards)] if rewards else []
        if not self.rows or self._batches % self.cfg.every or not self._rewards:
            return
        if self.shown and not self._blank:
            self._blank = [blanked(row) for row in self.shown]
        look = Look(
            reward=fmean(self._rewards),
            accuracy=self.accuracy(self.rows),
            blanked=self.accuracy(self._blank) if self._blank else None,
            n=len(self.rows),
            n_blanked=len(self._blank),
        )
        self._rewards = []
        metrics["watch/held_out_accuracy"] = look.accuracy
        if look.blanked is not None:
            metrics["watch/held_out_accuracy_blanked"] = look.blanked
        yield from _compare(look, self._looks)
        self._looks.append(look)


def _compare(look: Look, earlier: Sequence[Look]) -> Iterable[Alarm]:
    """Alarms of one look against earlier ones; differences within two standard errors are ignored."""
    if not earlier:
        return
    best = max(earlier, key=lambda one: one.accuracy)
    lost = best.accuracy - look.accuracy
    chance = 2 * _error(best.accuracy, look.accuracy, look.n)
    if not lost <= chance and not look.reward <= best.reward:
        yield Alarm(
            "held_out",
            f"the reward rose from {best.reward:.3f} to {look.reward:.3f} while held-out accuracy fell from "
            f"{best.accuracy:.3f} to {look.accuracy:.3f} ({look.n} rows)",
        )
    seeing = [one for one in earlier if one.blanked is not None]
    if look.blanked is None or not seeing:
        return
    gap = max(one.accuracy - (one.blanked or 0.0) for one in seeing)
    chance = 2 * _error(look.accuracy, look.blanked, look.n_blanked)
    if gap > chance and look.accuracy - look.blanked <= min(chance, gap / 2):
        yield Alarm(
            "blind",
            f"with blanked images the policy answers {look.blanked:.3f} of the held-out rows, with the images "
            f"{look.accuracy:.3f}; the difference was {gap:.3f} before: the policy has stopped using the images",
        )


def _error(first: float, second: float, n: int) -> float:
    """Standard error of the difference of two accuracies on n rows each."""
    return math.sqrt(max(first * (1 - first) + second * (1 - second), 1 / n) / n)
