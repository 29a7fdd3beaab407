"""The chain's single rollout pool: it starts when a stage first needs it, and then receives new weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from core.checkpoint.check import check_checkpoint
from core.strict import ConfigError
from rl.rollout.config import PoolConfig

OpenPool = Callable[[PoolConfig, Path, Path], AbstractContextManager[Callable[[], list[str]]]]
"""(configuration, model, log folder) -> context manager that yields a function. That function waits for the servers and
returns their URLs. rl.rollout.server.starting_pool has this type."""

TOKEN_FILE = "servers.token"
"""File in a run's folder: the token of servers that `posttrain rollout-server` started for the run."""


class Pool:
    """Rollout servers that start on first use and serve one checkpoint after another.

    Args:
        cfg: the recipe's `servers`; None for a recipe without servers.
        logs: folder for the servers' output.
        open_pool: starts the servers; default: rl.rollout.server.starting_pool. A Ray cluster has its own, and tests
            pass a substitute.
        addresses: file with the current URLs of servers that may be started again elsewhere.
    """

    def __init__(
        self,
        cfg: PoolConfig | None,
        logs: Path,
        open_pool: OpenPool | None = None,
        addresses: Path | None = None,
    ) -> None:
        self.cfg, self.logs, self.addresses = cfg, logs, addresses
        self._open, self._stack = open_pool, ExitStack()
        self._wait: Callable[[], list[str]] | None = None
        self._client: Any = None
        self._started_with: Path | None = None
        """The checkpoint that the servers have loaded; None after their weights were changed."""

    @property
    def share_gpus(self) -> bool:
        """Whether servers and learners take turns."""
        return self.cfg is not None and self.cfg.share_gpus

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def start(self, model: Path) -> None:
        """Start the servers with `model` unless they have been started. Does not wait for them."""
        if self.cfg is None:
            raise ConfigError("servers is missing from the recipe: this step needs rollout servers")
        if self._wait is not None:
            return
        if self._open is None:
            from rl.rollout.server import starting_pool

            self._open = starting_pool
        shared = self.logs.parent / TOKEN_FILE
        if self.cfg.urls and self.cfg.token_file is None and shared.exists():
            self.cfg = self.cfg.model_copy(update={"token_file": str(shared)})
        self._wait = self._stack.enter_context(self._open(self.cfg, model, self.logs))
        # Servers that were started elsewhere hold unknown weights.
        self._started_with = None if self.cfg.urls else model.resolve()

    def urls(self, model: Path) -> list[str]:
        """Wait for the servers and return their URLs. The first call starts them with `model`. Later they may serve
        other weights."""
        self.start(model)
        assert self._wait is not None
        return self._wait()

    def serve(self, model: Path) -> Any:
        """Load the checkpoint folder `model` into the servers and return a RolloutClient.

        Raises ForeignCode or NonFinite for a checkpoint that must not be served.
        """
        client = self._connected(model)
        if not client.served.holds(model.resolve()):
            check_checkpoint(model)
            client.load_checkpoint(model)
        return client

    def rest(self, model: Path | None) -> None:
        """Put servers that share the learner's GPUs to sleep until the next `serve`. Called before a learner starts.

        `model` is the learner's initial checkpoint, or None. Servers that have not been started are not started.
        """
        if not self.share_gpus or model is None:
            return
        assert self.cfg is not None
        if self._wait is None and not self.cfg.urls:
            return
        self._connected(model).sleep()

    def _connected(self, model: Path) -> Any:
        """The client of the servers. Starts the servers with `model` if they have not been started."""
        urls = self.urls(model)
        if self._client is None:
            from rl.rollout.client import RolloutClient

            assert self.cfg is not None
            self._client = RolloutClient.of_pool(self.cfg, urls, model, addresses=self.addresses)
            self._client.served.what = self._started_with
            self._stack.callback(self._client.close)
        return self._client

    def weights_changed(self) -> None:
        """Record that an RL stage has updated the servers' weights. The next `serve` loads its checkpoint."""
        self._started_with = None
        if self._client is not None:
            self._client.served.forget()
