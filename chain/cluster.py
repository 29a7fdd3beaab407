"""A run on a Ray cluster: reserves nodes, starts ranks and rollout servers there, and replaces what is lost.

`posttrain run --ray` is the driver: it runs the loop (chain/run.py) on one of the cluster's machines. A placement group
reserves the nodes of chain/placement.py for the whole run. Everything else is as on one host: actors (chain/actors.py)
start the same child processes, and the run's folder, on a file system that all nodes share, carries configurations,
logs, metrics and checkpoints. The actors' own output streams to the driver.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from chain import actors
from chain.display import Display
from chain.placement import Placement, check_weights_reach
from chain.ranks import Meeting
from core.files import write_json
from core.processes import GRACE_S
from core.strict import ConfigError
from rl.rollout import access
from rl.rollout.config import PoolConfig, on_this_machine
from rl.rollout.server import ServerFailed, in_environment

ADDRESSES = ".servers.json"
"""File in the run's folder during the run: the servers' current URLs."""
NODES_S = 600.0
"""Seconds that the run waits for free nodes, at its start and after a loss."""
LOOK_S = 0.5
"""Seconds between two looks at the servers' actors."""
MOST_LOSSES = 3
"""How often a stage starts again after it has lost a node."""


class NodeLost(RuntimeError):
    """A node with ranks of a stage is gone."""


class Cluster:
    """The Ray cluster of a run. A context manager; at its end nothing of the run is left on the nodes.

    Args:
        address: `auto` for the cluster of this machine or of RAY_ADDRESS, else HOST:PORT of the head.
        place: nodes, ranks and servers of the run.
        pool: the recipe's servers.
        run_dir: the run's folder.
        display: shows the nodes.

    Raises ConfigError if Ray is missing, no cluster answers, the nodes do not come, or one of them differs.
    """

    def __init__(
        self, address: str, place: Placement, pool: PoolConfig | None, run_dir: Path, display: Display
    ) -> None:
        self.address, self.place, self.pool, self.run_dir = address, place, pool, run_dir
        self.display = display
        self.addresses = run_dir / ADDRESSES if place.servers else None
        check_weights_reach(pool, place)

    def __enter__(self) -> Cluster:
        self._ray = _connect(self.address)
        try:
            self._group = self._reserve()
            self._check_nodes()
        except BaseException:
            self._ray.shutdown()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(Exception):  # the cluster may be gone
            self._ray.util.remove_placement_group(self._group)
        self._ray.shutdown()
        if self.addresses:
            self.addresses.unlink(missing_ok=True)

    def start(self, job_file: Path, processes: int, threads: int) -> RayRanks:
        """Start a job's ranks on the nodes. Raises NodeLost if a node is lost and none takes its place."""
        stage = job_file.parent.name.removesuffix(".partial")
        counts = self.place.ranks.get(stage, (processes,))
        gpus = "GPU" in self.place.bundles[0]
        hosts = [
            self.actor(
                actors.RanksOfNode,
                node,
                {"num_cpus": count * threads, "num_gpus": count if gpus else 0},
                _environment(),
            )
            for node, count in enumerate(counts)
        ]
        ranks = RayRanks(self._ray, hosts)
        try:
            ranks.start(job_file, counts, threads)
        except BaseException:
            ranks.stop()
            raise
        return ranks

    @contextmanager
    def open_pool(self, cfg: PoolConfig, model: Path, logs: Path) -> Iterator[Callable[[], list[str]]]:
        """Start the servers as actors; as rl.rollout.server.starting_pool does on one host."""
        started: list[Any] = []
        assert self.addresses, "a pool with urls is not started here"
        keeper = AddressKeeper(self._ray, started, self.addresses, cfg.startup_timeout_s)
        with in_environment(access.TOKEN, access.pool_token(cfg.token_file)):
            try:
                for server, node in enumerate(self.place.servers):
                    needs = {
                        "num_cpus": cfg.threads,
                        "num_gpus": 0 if cfg.share_gpus or not cfg.starts_on_gpus else cfg.gpus_per_server,
                        # A restarted server would take GPU memory that a learner may be using.
                        "max_restarts": 0 if cfg.share_gpus else cfg.max_restarts,
                    }
                    given = (
                        cfg,
                        model,
                        logs / f"rollout-server-{server}",
                        self.place.slot(server),
                        _environment(),
                    )
                    started.append(self.actor(actors.ServerOfNode, node, needs, *given))
                yield keeper.urls
            finally:
                keeper.end()
                _end(self._ray, started)

    def actor(self, kind: type, node: int, needs: dict[str, Any], *args: Any) -> Any:
        """An actor on one of the run's nodes. Two threads: `stop` is served while another call waits."""
        return self._ray.remote(kind).options(max_concurrency=2, **needs, **self._on(node)).remote(*args)

    def _on(self, node: int) -> dict[str, Any]:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._group, node)}

    def _reserve(self) -> Any:
        """The placement group: one bundle per node. Waits until the cluster has the nodes."""
        strategy = "STRICT_SPREAD" if self.place.nodes > 1 else "STRICT_PACK"
        group = self._ray.util.placement_group(list(self.place.bundles), strategy=strategy)
        with self.display.step("Ray"):
            deadline = time.monotonic() + NODES_S
            while not group.wait(timeout_seconds=2):
                free = self._ray.available_resources()
                has = ", ".join(f"{free.get(kind, 0):g} {kind}" for kind in ("CPU", "GPU"))
                text = (
                    f"waiting for {self.place.nodes} nodes with {list(self.place.bundles)}; free now: {has}"
                )
                if time.monotonic() > deadline:
                    self._ray.util.remove_placement_group(group)
                    raise ConfigError(
                        f"{text}. Nothing came within {NODES_S:g} s: add nodes to the cluster, or change "
                        "hardware.nodes and hardware.gpus_per_node"
                    )
                self.display.passing(text)
        return group

    def _check_nodes(self) -> None:
        """Show the nodes; raise ConfigError if one has other code or packages, or does not see the run's folder."""
        ask = self._ray.remote(num_cpus=0)(actors.node_facts)
        found = self._ray.get(
            [ask.options(**self._on(node)).remote(self.run_dir) for node in range(self.place.nodes)]
        )
        for facts, line in zip(found, self.place.lines(), strict=True):
            self.display.line(f"{line} ({facts['host']})")
            if not facts["sees"]:
                raise ConfigError(
                    f"{facts['host']} does not see {self.run_dir}: the run's folder must be on a file system that all "
                    "nodes share, under the same path (--runs-dir)"
                )
            for name, ours in actors.agreed().items():
                if facts[name] != ours:
                    raise ConfigError(
                        f"{facts['host']}: {name}: {facts[name]!r} there, {ours!r} here; it must be the same everywhere"
                    )


class RayRanks:
    """The ranks of one job on several nodes, with the methods of chain.ranks.Ranks."""

    def __init__(self, ray: Any, hosts: list[Any]) -> None:
        self._ray, self._hosts = ray, hosts
        self._looks: list[tuple[bool, str | None]] = [(False, None)] * len(hosts)
        self._failed_at = 0.0

    def start(self, job_file: Path, counts: tuple[int, ...], threads: int) -> None:
        """Start `counts[n]` ranks on node n. Raises NodeLost."""
        place = self._ask([self._hosts[0].meeting_place.remote()], NODES_S)[0]
        several = len(self._hosts) > 1
        self._ask(
            [
                host.start.remote(
                    job_file, count, threads, Meeting(place, len(counts), node) if several else None
                )
                for node, (host, count) in enumerate(zip(self._hosts, counts, strict=True))
            ],
            NODES_S,
        )

    def ended(self, patience_s: float) -> bool:
        """Whether, within `patience_s`, all ranks have ended, or those of one node have failed. Raises NodeLost."""
        deadline = time.monotonic() + patience_s
        while True:
            self._looks = self._ask([host.look.remote() for host in self._hosts], NODES_S)
            if all(ended for ended, _ in self._looks):
                return True
            if any(failure for _, failure in self._looks):
                # The other nodes' ranks fail by themselves as their connections close, or hang.
                self._failed_at = self._failed_at or time.monotonic()
                if time.monotonic() - self._failed_at > GRACE_S:
                    return True
            if (left := deadline - time.monotonic()) <= 0:
                return False
            time.sleep(min(LOOK_S, left))

    def failure(self) -> str | None:
        """How the ranks failed, one paragraph per node; None if they did not."""
        failures = [
            f"node {node}: {failure}" if len(self._hosts) > 1 else failure
            for node, (_, failure) in enumerate(self._looks)
            if failure
        ]
        return "\n".join(failures) or None

    def stop(self) -> None:
        """End every rank and its actor."""
        _end(self._ray, self._hosts)

    def _ask(self, calls: list[Any], patience_s: float) -> list[Any]:
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        try:
            return self._ray.get(calls, timeout=patience_s)
        except GetTimeoutError:
            raise NodeLost(f"a node did not answer within {patience_s:g} s") from None
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise NodeLost(f"a node with ranks is lost: {str(error).splitlines()[0]}") from None


class AddressKeeper(threading.Thread):
    """Knows the servers' URLs and writes them to a file. Ray starts a lost actor again, which then has another URL.

    Args:
        ray: the module.
        servers: the actors.
        file: JSON file for the URLs.
        patience_s: seconds in which every server must have answered once.
    """

    def __init__(self, ray: Any, servers: list[Any], file: Path, patience_s: float) -> None:
        super().__init__(name="rollout-server-addresses", daemon=True)
        self._ray, self._servers, self._file, self._patience_s = ray, servers, file, patience_s
        self._urls: list[str] = []
        self._failures: dict[int, Exception] = {}
        self._over = threading.Event()

    def urls(self) -> list[str]:
        """The servers' latest URLs; the first call waits for all. Raises ServerFailed once none is left."""
        if self.ident is None:
            self._urls = self._first()
            write_json(self._file, self._urls)
            self.start()
        if len(self._failures) == len(self._servers):
            raise next(iter(self._failures.values()))
        return list(self._urls)

    def run(self) -> None:
        """Ask each actor for its URL until `end`; a call to an actor that starts again waits until it serves."""
        asked = {server.url.remote(): number for number, server in enumerate(self._servers)}
        while not self._over.wait(LOOK_S):
            done, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=0)
            for call in done:
                number = asked.pop(call)
                self._note(number, call)
                asked[self._servers[number].url.remote()] = number

    def end(self) -> None:
        """Stop asking."""
        self._over.set()
        if self.is_alive():
            self.join()

    def _first(self) -> list[str]:
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        try:
            return self._ray.get(
                [server.url.remote() for server in self._servers], timeout=NODES_S + self._patience_s
            )
        except RayTaskError as error:
            raise error.cause from None
        except RayActorError as error:
            raise ServerFailed(f"a rollout server's actor ended while it started: {error}") from None
        except GetTimeoutError:
            raise ServerFailed("the rollout servers' actors did not start; see Ray's dashboard") from None

    def _note(self, number: int, call: Any) -> None:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            url = self._ray.get(call)
        except RayTaskError as error:  # its restarts in place are used up
            self._failures[number] = error.cause
            return
        except RayActorError as error:  # Ray starts the actor again, unless its restarts are used up
            self._failures[number] = ServerFailed(f"rollout server {self._urls[number]}: {error}")
            return
        self._failures.pop(number, None)
        if url != self._urls[number]:
            self._urls[number] = url
            write_json(self._file, self._urls)


def _connect(address: str) -> Any:
    """The ray module, connected to the cluster. Raises ConfigError."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray {address}: the run needs a process on the cluster. Start it on one of its machines, or with "
            "`ray job submit -- posttrain run RECIPE --ray`"
        )
    if on_this_machine(f"http://{address}"):
        # By default Ray turns a loopback address into that of another interface, where such a cluster does not listen.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError("--ray: Ray is not installed; pip install 'sailvl2-posttrain[ray]'") from None
    # Ray replaces the handler by one that exits without stopping the run.
    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--ray {address}: no Ray cluster answers: {str(error).splitlines()[0]}. Start one with "
            "`ray start --head --node-ip-address=ADDRESS` on this machine"
        ) from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)
    return ray


def _environment() -> dict[str, str]:
    """The driver's variables, for the nodes. Ray's own and the choice of GPUs differ by node."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and name != "CUDA_VISIBLE_DEVICES"
    }


def _end(ray: Any, actors_: list[Any]) -> None:
    """Let actors stop their children, then end the actors."""
    with suppress(Exception):  # an actor or its node may be gone
        ray.wait([one.stop.remote() for one in actors_], num_returns=len(actors_), timeout=2 * GRACE_S)
    for one in actors_:
        with suppress(Exception):
            ray.kill(one)
