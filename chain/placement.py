"""The placement of a run on the nodes of a Ray cluster, from the recipe's `hardware`. Imports neither ray nor torch.

Ranks fill nodes from the first one on: as few nodes as their GPUs allow, with equal shares. Servers take the GPUs that
no stage's ranks use, or all GPUs if they share them in turns. Without GPUs, ranks and servers are spread over all
nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from chain.recipe import Recipe
from chain.stages import STAGES, Stage
from core.strict import ConfigError
from rl.rollout.config import PoolConfig


@dataclass(frozen=True)
class Placement:
    """Nodes of a run, and the ranks and servers on each of them."""

    ranks: dict[str, tuple[int, ...]]
    """Stage -> number of ranks on each node that the stage uses; equal numbers."""
    servers: tuple[int, ...]
    """Node of each server that the run starts."""
    bundles: tuple[dict[str, float], ...]
    """Resources that the run reserves on each node, in Ray's terms."""

    @property
    def nodes(self) -> int:
        """Number of nodes that the run uses."""
        return len(self.bundles)

    def slot(self, server: int) -> int:
        """The server's number among the servers of its node."""
        return self.servers[:server].count(self.servers[server])

    def lines(self) -> list[str]:
        """One line per node."""
        found = []
        for node in range(self.nodes):
            most = max((counts[node] for counts in self.ranks.values() if node < len(counts)), default=0)
            here = [str(server) for server, place in enumerate(self.servers) if place == node]
            parts = [f"up to {most} rank{'s' if most > 1 else ''}"] if most else []
            parts += [f"server{'s' if len(here) > 1 else ''} {', '.join(here)}"] if here else []
            found.append(f"Ray node {node}: {'; '.join(parts)}")
        return found


def placement(recipe: Recipe, stages: Sequence[Stage] = STAGES) -> Placement:
    """The placement of the recipe's stages and servers.

    Raises ConfigError with a line per stage whose ranks, or pool whose servers, do not fit the recipe's `hardware`.
    """
    nodes, gpus = recipe.hardware.nodes, recipe.hardware.gpus_per_node or 0
    learners = {stage.name: stage.learner(recipe) for stage in stages if stage.config(recipe) is not None}
    ranks, problems = {}, []
    for name, (processes, _) in learners.items():
        used = -(-processes // gpus) if gpus else min(processes, nodes)
        if used > nodes or processes % used:
            problems.append(
                f"{name}.learner.processes={processes}: hardware has {_machine(nodes, gpus)}, and ranks need equal "
                f"shares of {min(used, nodes)}; change learner.processes, hardware.nodes or hardware.gpus_per_node"
            )
        else:
            ranks[name] = (processes // used,) * used
    if problems:
        raise ConfigError("\n".join(problems))
    most = [
        max(counts[node] if node < len(counts) else 0 for counts in ranks.values()) for node in range(nodes)
    ]
    servers = _servers(recipe, most, gpus)
    bundles = []
    for node in range(1 + max([*servers, *(len(counts) - 1 for counts in ranks.values())])):
        threads = (
            max(counts[0] * learners[name][1] for name, counts in ranks.items() if node < len(counts))
            if (most[node])
            else 0
        )
        own = servers.count(node) * (recipe.servers.threads if recipe.servers else 0)
        bundles.append({"CPU": float(threads + own), **({"GPU": float(gpus)} if gpus else {})})
    return Placement(ranks, servers, tuple(bundles))


def check_one_host(recipe: Recipe, stages: Sequence[Stage] = STAGES) -> None:
    """Raise ConfigError if the recipe needs several nodes, which only a Ray cluster has."""
    if recipe.hardware.nodes > 1 and (needed := placement(recipe, stages)).nodes > 1:
        raise ConfigError(
            f"hardware.nodes={recipe.hardware.nodes}: the recipe's ranks and servers take {needed.nodes} nodes. "
            "Start a Ray cluster and add --ray (docs/several-hosts.md), or use this host alone with --set "
            "hardware.nodes=1"
        )


def check_weights_reach(pool: PoolConfig | None, place: Placement) -> None:
    """Raise ConfigError if the policy's weights cannot reach the servers that Ray starts."""
    if pool and place.servers and pool.sends_files and pool.weights_dir is None:
        raise ConfigError(
            "servers.weights=shm with --ray: learner and servers may be on different nodes; set servers.weights_dir to "
            "a folder on a file system that all nodes share, or servers.weights=nccl between GPUs"
        )


def _servers(recipe: Recipe, ranks: Sequence[int], gpus: int) -> tuple[int, ...]:
    """The node of each server. `ranks`: the largest number of ranks on each node."""
    pool = recipe.servers
    if pool is None or pool.urls:
        return ()
    if pool.device == "cpu":
        return tuple(server % len(ranks) for server in range(pool.count))
    free = [(gpus if pool.share_gpus else gpus - busy) // pool.gpus_per_server for busy in ranks]
    places = [node for node, room in enumerate(free) for _ in range(room)]
    if pool.count > len(places):
        raise ConfigError(
            f"servers.count={pool.count}: {_machine(len(ranks), gpus)} have room for {len(places)} servers of "
            f"{pool.gpus_per_server} GPUs"
            + ("" if pool.share_gpus else " beside the learners' ranks")
            + "; lower servers.count or learner.processes, or raise hardware.nodes"
        )
    return tuple(places[: pool.count])


def _machine(nodes: int, gpus: int) -> str:
    return f"{nodes} node{'s' if nodes > 1 else ''}" + (f" of {gpus} GPUs" if gpus else "")
