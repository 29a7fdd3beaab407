"""Progress of a running stage for the terminal and the trackers: step, metrics, and remaining time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chain.display import Display, Tail, duration
from chain.inputs import locate_sets, phase_updates, rows_of
from chain.recipe import Recipe, SFTStage
from chain.tracking import StageTrack
from core.files import read_json
from core.manifest import Manifest
from rl.config import RLConfig
from rl.watch import ALARMS
from sft.config import SFTConfig, SoupConfig

_SHOWN = ("reward", "rollout/correct", "mean_token_accuracy")
"""Metrics between 0 and 1 worth a place in the line, of those that a stage logs."""


class Outlook:
    """Estimates the remaining time of a chain from the paces of earlier stages in its run's folder.

    Args:
        recipe: the recipe.
        run_dir: the run's folder.
        names: names of the recipe's stages, in order.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, names: Sequence[str]) -> None:
        self.recipe, self.run_dir, self.names = recipe, run_dir, list(names)
        self._sets = locate_sets(recipe, run_dir)
        stages = [one for one in map(recipe.stage, names) if isinstance(one, SFTStage | RLConfig)]
        self._harvests = {
            one.prepare.harvest.into: one.prepare.harvest.keep for one in stages if one.prepare.harvest
        }

    def label(self, stage: str) -> str:
        """`stage 4/7 rlvr`."""
        return f"stage {self.names.index(stage) + 1}/{len(self.names)} {stage}"

    def updates(self, stage: str) -> int | None:
        """Optimizer updates of a stage; None if its data do not exist yet or the stage has no updates."""
        config = self.recipe.stage(stage)
        if isinstance(config, RLConfig):
            return config.max_steps
        if isinstance(config, SoupConfig) and self.recipe.basic_sft:
            phases = self.recipe.basic_sft.phases[-1:] * len(config.variants)
        elif isinstance(config, SFTConfig):
            phases = config.phases
        else:
            return None
        total = 0
        for phase in phases:
            count = phase_updates(phase, self._rows)
            if count is None:
                return None
            total += count
        return total

    def _rows(self, name: str) -> int | None:
        """Rows of a set; of a harvest that has not been made yet, the largest number that it may have."""
        try:
            rows = rows_of(self._sets[name])
        except (OSError, ValueError):  # the stage itself says what is wrong with the file
            return None
        return self._harvests.get(name) if rows is None else rows

    def later(self, stage: str, pace: float | None) -> float | None:
        """Estimated seconds of the later stages and all evaluations; None if a stage has no estimate.

        The estimate of a stage is the duration of its last run in this folder. Without such a run, it uses the pace of
        the last stage of the same kind. `pace` is this stage's pace in seconds per update.
        """
        paces = self._paces() | ({self._kind(stage): pace} if pace else {})
        left = self._evaluation() * (len(self.names) - self.names.index(stage))
        for name in self.names[self.names.index(stage) + 1 :]:
            manifest = Manifest.read(self.run_dir / name)
            if manifest is not None:
                left += manifest.seconds
                continue
            updates, known = self.updates(name), paces.get(self._kind(name))
            if updates is None or known is None:
                return None
            left += updates * known
        return left

    def _kind(self, stage: str) -> str:
        return "rl" if isinstance(self.recipe.stage(stage), RLConfig) else "sft"

    def _paces(self) -> dict[str, float]:
        """Seconds per update of the last finished stage of each kind."""
        found: dict[str, float] = {}
        for name in self.names:
            manifest, metrics = Manifest.read(self.run_dir / name), self.run_dir / name / "metrics.jsonl"
            steps = [record["step"] for record in Tail(metrics).new() if "step" in record] if manifest else []
            if manifest and steps:
                found[self._kind(name)] = manifest.seconds / max(steps)
        return found

    def _evaluation(self) -> float:
        """Mean seconds of the evaluations so far."""
        files = [self.run_dir / name / "eval.json" for name in self.names]
        seconds = [read_json(file)["seconds"] for file in files if file.exists()]
        return sum(seconds) / len(seconds) if seconds else 0.0


class Follower:
    """Reads a running stage's files, and passes new records to the trackers and a summary line to the terminal."""

    def __init__(
        self, stage: str, out: Path, display: Display, track: StageTrack, outlook: Outlook | None = None
    ) -> None:
        self.stage, self.display, self.track, self.outlook = stage, display, track, outlook
        self._metrics, self._alarms = Tail(out / "metrics.jsonl"), Tail(out / ALARMS)
        self._completions = Tail(out / "completions.jsonl")
        self._total = outlook.updates(stage) if outlook else None
        self._first: tuple[float, int] | None = None
        self._occurred: Counter[str] = Counter()
        self._known: dict[str, Any] = {}
        """The last values of _SHOWN: not every update has them, as an RL batch is for several updates."""
        self._text = "starting"

    def look(self) -> None:
        """Pass on the records that were written since the last call."""
        records = self._metrics.new()
        for record in records:
            self.track.log(record)
            self._known |= {name: record[name] for name in _SHOWN if name in record}
        self.track.completions(self._completions.new())
        for alarm in self._alarms.new():
            self._show(alarm["name"], alarm["text"])
        if records:
            shown = metrics_text(self._known | records[-1], self._total)
            self._text = " · ".join([shown, *self._left(records[-1])])
        self.display.passing(self._text, elapsed="left" not in self._text)

    def _show(self, name: str, text: str) -> None:
        """Show an alarm at its 1st, 2nd, 4th, 8th, ... occurrence: some occur in every batch. alarms.jsonl has all."""
        self._occurred[name] += 1
        count = self._occurred[name]
        if count & (count - 1) == 0:
            times = f" ({count} times)" if count > 1 else ""
            self.display.line(f"{self.stage}: ALARM {name}{times}: {text}")
            self.track.alert(f"{self.stage}: {name}{times}", text)

    def _left(self, record: Mapping[str, Any]) -> list[str]:
        """`1m12s left` and `chain 6m05s left`, each only if it is known."""
        step, now = record.get("step"), time.monotonic()
        if step is None:
            return []
        if self._first is None or step <= self._first[1]:
            self._first = now, step
            return []
        pace = (now - self._first[0]) / (step - self._first[1])
        if self._total is None:
            return []
        left = max(0, self._total - step) * pace
        later = self.outlook.later(self.stage, pace) if self.outlook else None
        chain = [f"chain {duration(left + later)} left"] if later is not None else []
        return [f"{duration(left)} left", *chain]


def metrics_text(record: Mapping[str, Any], total: int | None = None) -> str:
    """A summary of one metrics line: `phase general · step 12/80 · reward .85 · correct .91`."""
    words = [f"phase {record['phase']}"] if record.get("phase") else []
    if "step" in record:
        words.append(f"step {record['step']}" + (f"/{total}" if total else ""))
    if "reward" not in record and isinstance(record.get("loss"), int | float):
        words.append(f"loss {record['loss']:.3f}")
    for name in _SHOWN:
        if isinstance(record.get(name), int | float):
            label = name.rpartition("/")[2].removeprefix("mean_").replace("_", " ")
            words.append(f"{label} {record[name]:.2f}".replace(" 0.", " .").replace(" -0.", " -."))
    return " · ".join(words)
