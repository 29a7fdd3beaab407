"""Rollout server processes: starts, health checks, restarts after an end or a hang, and stops.

Importing vLLM patches transformers' classes in the process, so a learner never shares a process with an engine.
"""

from __future__ import annotations

import logging
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

from core import processes
from core.strict import ConfigError
from rl.rollout import access
from rl.rollout.command import command, environment
from rl.rollout.config import PoolConfig
from rl.rollout.http import Http

log = logging.getLogger(__name__)

GRACE_S = 10.0
"""Seconds until a server that was asked to end is killed."""
KEEP_S, PROBE_S = 1.0, 10.0
"""Seconds between two checks that the servers run, and between two checks that they answer."""


class ServerFailed(RuntimeError):
    """A rollout server did not start, or ended while it was needed. The message holds the end of its log."""


class RolloutServer:
    """One rollout server process. It ends with this process at the latest.

    Args:
        cfg: the pool's configuration.
        model: checkpoint folder whose architecture, tokenizer and template the server loads.
        log: file that takes its output.
        index: position in the pool, which picks the GPUs.
        token: the run's token, which requests must carry and the server proves to know.
        temporary: folder of mode 0700 for its temporary files and sockets.

    Raises ConfigError if its port is taken.
    """

    def __init__(
        self, cfg: PoolConfig, model: Path, log: Path, index: int, token: str, temporary: Path
    ) -> None:
        self.cfg, self.model, self.log = cfg, model, log
        self.port = processes.free_port(cfg.host) if cfg.first_port is None else cfg.first_port + index
        if not processes.port_is_free(cfg.host, self.port):
            raise ConfigError(
                f"servers.first_port={cfg.first_port}: another program listens on {cfg.host}:{self.port}; choose a "
                "free port, or leave first_port out"
            )
        self.url = f"http://{cfg.host}:{self.port}"
        self.http = Http(token, PROBE_S)
        secret = {access.TOKEN: token, "TMPDIR": str(temporary), "VLLM_RPC_BASE_PATH": str(temporary)}
        self.environment = environment(cfg, index) | secret
        log.parent.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        """Start the process, or restart one that has ended under the same URL."""
        self.process: subprocess.Popen = processes.start(
            command(self.cfg, self.model, self.port),
            log=self.log,
            environment=self.environment,
            grace_s=GRACE_S,
        )
        self.answers_until = time.monotonic() + self.cfg.startup_timeout_s
        """Time after which the server counts as hanging, unless it reports to be healthy before."""

    def wait_until_healthy(self) -> None:
        """Return once the server answers; raise ServerFailed if it ends or takes too long."""
        while time.monotonic() < self.answers_until:
            self.check_alive()
            if self.http.healthy(self.url):
                return
            time.sleep(0.25)
        processes.kill(self.process)
        raise ServerFailed(
            f"rollout server not healthy after startup_timeout_s={self.cfg.startup_timeout_s:g}\n{self._log_end()}"
        )

    def check_alive(self) -> None:
        """Raise ServerFailed if the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise ServerFailed(f"rollout server {self.url} {processes.how_it_ended(code)}\n{self._log_end()}")

    def hangs(self) -> bool:
        """Ask the server for its health; return whether it has not been healthy for `hang_timeout_s` seconds."""
        if self.http.healthy(self.url, busy=True):
            self.answers_until = time.monotonic() + self.cfg.hang_timeout_s
        return time.monotonic() > self.answers_until

    def _log_end(self) -> str:
        return f"last lines of {self.log}:\n{processes.last_lines(self.log)}"


@contextmanager
def rollout_pool(cfg: PoolConfig, model: Path, log_dir: Path) -> Iterator[list[str]]:
    """Yield the URLs of healthy rollout servers for `model`'s architecture; stop the started ones at the end."""
    with starting_pool(cfg, model, log_dir) as wait:
        yield wait()


@contextmanager
def starting_pool(cfg: PoolConfig, model: Path, log_dir: Path) -> Iterator[Callable[[], list[str]]]:
    """Start the servers, and yield a function that waits until they are healthy and returns their URLs.

    Servers that end or hang after that are restarted, each up to `max_restarts` times; the function raises
    ServerFailed once none is left. A restarted server has the weights of `model`, which a RolloutClient notices. At the
    end of the block the servers are stopped; a thread that still waits for them then gets ServerFailed. Within the
    block the environment has the servers' token, for clients here and in child processes.
    """
    if cfg.urls:
        known = access.known_token(cfg.token_file)
        with in_environment(access.TOKEN, known) if known else nullcontext():
            yield lambda: [url.rstrip("/") for url in cfg.urls]
        return
    servers: list[RolloutServer] = []
    # A restarted server would take GPU memory that a learner may be using.
    keeper = Keeper(servers, 0, "servers.share_gpus") if cfg.share_gpus else Keeper(servers, cfg.max_restarts)

    def wait() -> list[str]:
        if keeper.ident is None:  # the keeper has not been started
            for server in servers:
                server.wait_until_healthy()
            keeper.start()
        if len(keeper.given_up) == len(servers):
            servers[-1].check_alive()
        return [server.url for server in servers]

    processes.remove_leftovers()
    token = access.pool_token(cfg.token_file)
    with processes.held_folder(Path(tempfile.gettempdir())) as temporary, in_environment(access.TOKEN, token):
        try:
            for index in range(cfg.count):
                # Started one by one, so that the first is stopped if the second fails to start.
                file = log_dir / f"rollout-server-{index}.log"
                servers.append(RolloutServer(cfg, model, file, index, token, temporary))
            yield wait
        finally:
            keeper.end()
            processes.stop(*(server.process for server in servers), grace_s=GRACE_S)


class Keeper(threading.Thread):
    """Restarts servers that have ended, and kills and restarts servers that hang.

    Args:
        servers: the servers; all have been healthy.
        max_restarts: most restarts of each server.
        limited_by: the setting that limits the restarts, for messages.
    """

    def __init__(
        self, servers: list[RolloutServer], max_restarts: int, limited_by: str = "servers.max_restarts"
    ) -> None:
        super().__init__(name="rollout-server-keeper", daemon=True)
        self.servers, self.max_restarts, self.limited_by = servers, max_restarts, limited_by
        self.given_up: set[str] = set()
        """URLs of servers that have used up their restarts and ended again."""
        self._restarts: dict[str, int] = {}
        self._over = threading.Event()

    def run(self) -> None:
        """Check and restart the servers until `end`."""
        next_probe = 0.0
        while not self._over.wait(KEEP_S):
            probe = time.monotonic() >= next_probe
            for server in self.servers:
                if server.url in self.given_up:
                    continue
                code = server.process.poll()
                if code is not None:
                    self._restart(server, f"{processes.how_it_ended(code)}")
                elif probe and server.hangs():
                    processes.kill(server.process)
                    self._restart(
                        server, f"did not answer for {server.cfg.hang_timeout_s:g} s and was killed"
                    )
            if probe:
                next_probe = time.monotonic() + PROBE_S

    def end(self) -> None:
        """Stop restarting servers."""
        self._over.set()
        if self.is_alive():
            self.join()

    def _restart(self, server: RolloutServer, what: str) -> None:
        done = self._restarts.get(server.url, 0)
        if done == self.max_restarts:
            self.given_up.add(server.url)
            log.warning(
                "rollout server %s %s; it was restarted %d times and stays down (%s). See %s",
                *(server.url, what, done, self.limited_by, server.log),
            )
            return
        log.warning("rollout server %s %s: starting it again. See %s", server.url, what, server.log)
        self._restarts[server.url] = done + 1
        server.start()


@contextmanager
def in_environment(name: str, value: str) -> Iterator[None]:
    """Set an environment variable of this process within the block."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
