"""What the terminal and the trackers get of a running stage: its step, its figures, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from chain.display import Display, Tail, duration
from chain.inputs import locate_sets, phase_updates, rows_of
from chain.recipe import Recipe
from chain.tracking import StageTrack
from core.files import read_json
from core.manifest import Manifest
from rl.config import RLConfig
from rl.watch import ALARMS
from sft.config import SFTConfig, SoupConfig

_SHOWN = ("reward", "rollout/correct", "mean_token_accuracy")
"""Metrics between 0 and 1 worth a place in the line, of those that a stage logs."""


class Outlook:
    """How long a chain still takes, from the paces seen in its run's folder.

    Args:
        recipe: the recipe.
        run_dir: the run's folder.
        names: the stages that the recipe has, in order.
    """

    def __init__(self, recipe: Recipe, run_dir: Path, names: Sequence[str]) -> None:
        self.recipe, self.run_dir, self.names = recipe, run_dir, list(names)
        self._sets = locate_sets(recipe, run_dir)

    def label(self, stage: str) -> str:
        """`stage 4/7 rlvr`."""
        return f"stage {self.names.index(stage) + 1}/{len(self.names)} {stage}"

    def updates(self, stage: str) -> int | None:
        """Optimizer updates of a stage; None while its data is not there, and for stages without any."""
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
        try:
            return rows_of(self._sets[name])
        except (OSError, ValueError):  # the stage itself says what is wrong with the file
            return None

    def later(self, stage: str, pace: float | None) -> float | None:
        """Seconds that the stages after this one take, all evaluations included; None if one cannot be told.

        A stage takes as long as its last run in this folder. Without one, it goes at the pace of the last stage of
        its kind; `pace` is that of this stage, in seconds per update.
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
        """Mean seconds of a stage's evaluation so far."""
        files = [self.run_dir / name / "eval.json" for name in self.names]
        seconds = [read_json(file)["seconds"] for file in files if file.exists()]
        return sum(seconds) / len(seconds) if seconds else 0.0


class Follower:
    """Follows a running stage's files: what is new goes to the trackers, and a line of it to the terminal."""

    def __init__(
        self, stage: str, out: Path, display: Display, track: StageTrack, outlook: Outlook | None = None
    ) -> None:
        self.stage, self.display, self.track, self.outlook = stage, display, track, outlook
        self._metrics, self._alarms = Tail(out / "metrics.jsonl"), Tail(out / ALARMS)
        self._completions = Tail(out / "completions.jsonl")
        self._total = outlook.updates(stage) if outlook else None
        self._first: tuple[float, int] | None = None
        self._text = "starting"

    def look(self) -> None:
        """Pass on what was written since the last look."""
        records = self._metrics.new()
        for record in records:
            self.track.log(record)
        self.track.completions(self._completions.new())
        for alarm in self._alarms.new():
            self.display.line(f"{self.stage}: ALARM {alarm['name']}: {alarm['text']}")
            self.track.alert(f"{self.stage}: {alarm['name']}", alarm["text"])
        if records:
            self._text = " · ".join([metrics_text(records[-1], self._total), *self._left(records[-1])])
        self.display.passing(self._text, elapsed="left" not in self._text)

    def _left(self, record: Mapping[str, Any]) -> list[str]:
        """`1m12s left` and `chain 6m05s left`, as far as they are known."""
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
    """One metrics line in few words: `phase general · step 12/80 · reward .85 · correct .91`."""
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
