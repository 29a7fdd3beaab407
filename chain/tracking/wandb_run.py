"""Weights & Biases: one run per stage, grouped per chain. The runner never prompts for a key.

Without an API key (WANDB_API_KEY, or the server's entry in netrc) runs are written offline, for `wandb sync`.
WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_DIR and WANDB_RUN_GROUP override the recipe.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

from chain.recipe import WandbConfig
from chain.tracking.content import Table

Mode = Literal["online", "offline", "disabled"]
INIT_TIMEOUT_S = 30


def open_wandb(
    cfg: WandbConfig, group: str, stage: str, config: Mapping[str, Any], run_dir: Path
) -> WandbRun | None:
    """A new W&B run; None if W&B is disabled. Passes on any exception of W&B."""
    mode = resolve_mode(cfg)
    if mode == "disabled":
        return None
    import wandb

    env = os.environ
    run = wandb.init(
        project=env.get("WANDB_PROJECT") or cfg.project,
        entity=env.get("WANDB_ENTITY") or cfg.entity,
        group=env.get("WANDB_RUN_GROUP") or group,
        name=f"{group}/{stage}",
        job_type=stage,
        config=dict(config),
        tags=list(cfg.tags),
        dir=env.get("WANDB_DIR") or str(run_dir),
        mode=mode,
        reinit="create_new",
        settings=wandb.Settings(silent=True, console="off", init_timeout=INIT_TIMEOUT_S),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return WandbRun(run)


class WandbRun:
    """One stage's run at W&B."""

    def __init__(self, run: Any) -> None:
        self._run = run

    def log(self, record: Mapping[str, Any], step: int) -> None:
        self._run.log({**record, "step": step})

    def table(self, name: str, table: Table, step: int) -> None:
        import wandb

        shown = wandb.Table(columns=list(table.columns))
        for row in table.rows:
            pictures = [
                None if picture is None else wandb.Image(picture) for picture in row[: table.pictures]
            ]
            shown.add_data(*pictures, *row[table.pictures :])
        self._run.log({name: shown, "step": step})

    def summary(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._run.summary[name] = value

    def alert(self, title: str, text: str) -> None:
        self._run.alert(title=title, text=text, level="WARN")

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


def resolve_mode(cfg: WandbConfig) -> Mode:
    """online, offline or disabled: WANDB_MODE, else the recipe's mode. `auto` is online if there is a key."""
    mode = os.environ.get("WANDB_MODE") or cfg.mode
    if mode in ("dryrun", "offline"):
        return "offline"
    if mode == "disabled" or os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true"):
        return "disabled"
    # Online mode without a key would prompt, or crash without a terminal.
    return "online" if has_key() else "offline"


def has_key() -> bool:
    """Whether W&B can log in without a prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    for file in (os.environ.get("NETRC"), "~/.netrc", "~/_netrc"):
        try:
            path = Path(file).expanduser() if file else None
            if path is not None and path.is_file():
                return netrc.netrc(str(path)).authenticators(host) is not None
        except (OSError, ValueError, RuntimeError, netrc.NetrcParseError):  # the file is unreadable
            return False
    return False
