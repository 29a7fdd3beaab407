"""Weights & Biases: one run per stage, grouped per chain. It never asks, and never stops a training.

Without an API key (WANDB_API_KEY, or the server's entry in netrc) runs are written offline, for `wandb sync`.
WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_DIR and WANDB_RUN_GROUP win over the recipe.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from chain.recipe import WandbConfig
from core.files import read_jsonl

Say = Callable[[str], None]
Mode = Literal["online", "offline", "disabled"]
INIT_TIMEOUT_S = 30


class Tracker:
    """Opens one W&B run per stage.

    Args:
        cfg: the recipe's `wandb`.
        group: the chain's id.
        run_dir: the run's folder; W&B's own files go to `wandb/` in it.
        sets: data set name -> place, for the pictures of sampled rows.
        say: takes a line for the user.
    """

    def __init__(
        self, cfg: WandbConfig, group: str, run_dir: Path, sets: Mapping[str, str], say: Say
    ) -> None:
        self.cfg, self.group, self.run_dir, self.sets, self.say = cfg, group, run_dir, sets, say
        self.mode = resolve_mode(cfg)
        self._complained = False

    @contextmanager
    def stage(self, name: str, config: Mapping[str, Any]) -> Iterator[StageTrack]:
        """A W&B run that lasts as long as the block; it ends as failed when the block does."""
        track = StageTrack(self._start(name, config), self)
        try:
            yield track
        except BaseException:
            track.finish(1)
            raise
        track.finish(0)

    def complain(self, error: Exception) -> None:
        """Tell the user, the first time only, that W&B does not work."""
        if not self._complained:
            self._complained = True
            self.say(f"W&B: {type(error).__name__}: {error}; the chain goes on without it")

    def _start(self, name: str, config: Mapping[str, Any]) -> Any:
        if self.mode == "disabled":
            return None
        env = os.environ
        try:
            import wandb

            settings = wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S)
            run = wandb.init(
                project=env.get("WANDB_PROJECT") or self.cfg.project,
                entity=env.get("WANDB_ENTITY") or self.cfg.entity,
                group=env.get("WANDB_RUN_GROUP") or self.group,
                name=f"{self.group}/{name}",
                job_type=name,
                config=dict(config),
                tags=list(self.cfg.tags),
                dir=env.get("WANDB_DIR") or str(self.run_dir),
                mode=self.mode,
                reinit="create_new",
                settings=settings,
            )
            run.define_metric("step")
            run.define_metric("*", step_metric="step")
        except Exception as error:  # whatever W&B raises, training matters more
            self.complain(error)
            return None
        return run


class StageTrack:
    """One stage's W&B run; every call is harmless when there is none."""

    def __init__(self, run: Any, tracker: Tracker) -> None:
        self._run, self._tracker = run, tracker

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one line of metrics.jsonl to the curves."""
        self._try(lambda run: run.log(dict(record)))

    def alert(self, title: str, text: str) -> None:
        """Send an alert to whoever follows the project."""
        self._try(lambda run: run.alert(title=title, text=text, level="WARN"))

    def results(self, scores: Mapping[str, Mapping[str, Any]], folder: Path) -> None:
        """Add a finished stage's held-out scores, and tables of completions with pictures and verdicts."""

        def add(run: Any) -> None:
            for mode, values in scores.items():
                for name, value in values.items():
                    run.summary[f"eval/{mode}/{name}"] = value
            rows = self._tracker.cfg.table_rows
            held_out = read_jsonl(folder / "samples.jsonl")[:rows]
            trained = read_jsonl(folder / "completions.jsonl")[-rows:] if rows else []
            pictures = {row["id"]: folder / row["image"] for row in held_out if row.get("image")}
            for name, samples, found in (
                ("held_out", held_out, pictures),
                ("rollouts", trained, _pictures(self._tracker.sets, [row["id"] for row in trained])),
            ):
                if samples:
                    run.log({name: _table(samples, found)})

        self._try(add)

    def finish(self, exit_code: int) -> None:
        """End the run."""
        self._try(lambda run: run.finish(exit_code=exit_code))
        self._run = None

    def _try(self, do: Callable[[Any], None]) -> None:
        if self._run is None:
            return
        try:
            do(self._run)
        except Exception as error:  # the network, the disk, W&B's own faults: none is worth a training
            self._run = None
            self._tracker.complain(error)


def resolve_mode(cfg: WandbConfig) -> Mode:
    """online, offline or disabled: WANDB_MODE, else the recipe's, where auto is online with a key."""
    mode = os.environ.get("WANDB_MODE") or cfg.mode
    if mode in ("dryrun", "offline"):
        return "offline"
    if mode == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true"):
        return "disabled"
    # Online without a key is a prompt, or a crash where nobody can answer it.
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        path = Path(file).expanduser() if file else None
        if path is not None and path.is_file():
            try:
                return netrc.netrc(str(path)).authenticators(host) is not None
            except (OSError, netrc.NetrcParseError):
                return False
    return False


def _table(samples: Sequence[Mapping[str, Any]], pictures: Mapping[str, Any]) -> Any:
    """A W&B table of completions; one column of score and reason per verdict."""
    import wandb

    names = list(dict.fromkeys(name for row in samples for name in row.get("verdicts") or {}))
    plain = ("id", "mode", "question", "answer", "completion", "reward")
    table = wandb.Table(columns=["image", *plain, *names])
    for row in samples:
        picture = pictures.get(row["id"])
        image = None
        if picture is not None:
            image = wandb.Image(str(picture) if isinstance(picture, Path) else picture)
        verdicts = [_verdict_text((row.get("verdicts") or {}).get(name)) for name in names]
        table.add_data(image, *(row.get(key) for key in plain), *verdicts)
    return table


def _verdict_text(verdict: Mapping[str, Any] | None) -> str | None:
    if verdict is None:
        return None
    return f"{verdict.get('score')} {verdict.get('status')}: {verdict.get('reason')}"


def _pictures(sets: Mapping[str, str], ids: Sequence[str]) -> dict[str, Any]:
    """First picture of the rows with these ids, wherever among the local sets they are."""
    if not ids:
        return {}
    import pyarrow.parquet as pq

    from corpus.records import picture_of

    found: dict[str, Any] = {}
    for place in {place for place in sets.values() if Path(place).is_file()}:
        table = pq.read_table(place, columns=["id", "images"], filters=[("id", "in", list(set(ids)))])
        for row in table.to_pylist():
            if row["images"] and row["id"] not in found:
                found[row["id"]] = picture_of(row["images"][0]).rgb()
    return found
