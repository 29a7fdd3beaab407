"""The job of a stage that samples from the rollout servers: RL, and the soup. Imports no torch."""

from pathlib import Path
from typing import Any

from core.strict import Strict
from core.training.job import Job
from rl.rollout.config import PoolConfig


class Look(Strict):
    """A function that looks at the served policy while an RL stage trains."""

    call: str
    """`package.module:function`, called `function(client, out, params)`; returns metrics (name -> value)."""
    params: dict[str, Any]
    batches: int
    """Rollout batches between two calls; the first call is at the first batch."""


class ServedJob(Job):
    """A job with rollout servers."""

    pool: PoolConfig
    """Configuration of the servers behind `urls`."""
    urls: tuple[str, ...]
    """Running rollout servers, which serve a core of the policy's architecture."""
    addresses: Path | None = None
    """File with the current URLs of servers that may be started again elsewhere; None: `urls` do not change."""
    weights: Path
    """Folder through which the policy's weights reach the servers: the learner writes files, the servers read them."""
    look: Look | None = None
    """RL stages only."""
