"""This host's place among a run's hosts: from the command line, else from torchrun's or SLURM's variables."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from core.strict import ConfigError


@dataclass(frozen=True)
class Placement:
    """One host's place among the hosts of a run."""

    nodes: int
    """Number of hosts, at least two."""
    node: int
    """This host's number; 0 is the leader."""
    address: str
    """Name or address under which followers reach the leader. Only the leader uses it, and tells the followers."""
    port: int | None = None
    """Port on which the leader listens; None: a free port."""


def placement(
    environment: Mapping[str, str] = os.environ,
    nodes: int | None = None,
    node: int | None = None,
    master: str | None = None,
) -> Placement | None:
    """This host's place; None for a run on one host.

    `nodes`, `node` and `master` (HOST or HOST:PORT) come from the command line and override the environment.
    Raises ConfigError with the right command if `posttrain run` was started more than once per host.
    """
    _check_once_per_host(environment)
    if nodes is None and (node is not None or master is not None):
        raise ConfigError("--node-rank and --master need --nnodes, the number of hosts")
    found = _explicit(nodes, node) or _torchrun(environment) or _slurm(environment)
    if found is None or found[0] == 1:
        return None
    count, place, address = found
    host, port = _host_and_port(master) if master else (address or socket.gethostname(), None)
    return Placement(count, place, host, port)


def _explicit(nodes: int | None, node: int | None) -> tuple[int, int, str | None] | None:
    if nodes is None:
        return None
    if nodes > 1 and node is None:
        raise ConfigError(f"--nnodes {nodes} needs --node-rank: 0 on the host that leads, up to {nodes - 1}")
    if not 0 <= (node or 0) < nodes:
        raise ConfigError(f"--node-rank {node}: with --nnodes {nodes} it must be between 0 and {nodes - 1}")
    return nodes, node or 0, None


def _torchrun(environment: Mapping[str, str]) -> tuple[int, int, str | None] | None:
    """The place from torchrun's variables, which accelerate also sets. One process per host: the rank is the host."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return None
    return _number(environment, "WORLD_SIZE"), _number(environment, "RANK"), environment.get("MASTER_ADDR")


def _slurm(environment: Mapping[str, str]) -> tuple[int, int, str | None] | None:
    if "SLURM_JOB_ID" not in environment:
        return None
    if not _in_step(environment):
        nodes = _number(environment, "SLURM_NNODES", 1)
        if nodes > 1:
            raise ConfigError(
                f"this SLURM job has {nodes} nodes, but posttrain was started on one of them: start it on each with "
                "`srun --ntasks-per-node=1 posttrain run ...`, or use this node alone with --nnodes 1"
            )
        return None
    return (
        _step_nodes(environment),
        _number(environment, "SLURM_NODEID", 0),
        environment.get("SLURMD_NODENAME"),
    )


def _in_step(environment: Mapping[str, str]) -> bool:
    """Whether srun started this process. A batch script's own processes do not belong to a job step."""
    return "SLURM_STEP_ID" in environment or "SLURM_STEPID" in environment


def _check_once_per_host(environment: Mapping[str, str]) -> None:
    local = _number(environment, "LOCAL_WORLD_SIZE", 1)
    if "RANK" in environment and (local > 1 or _number(environment, "LOCAL_RANK", 0) > 0):
        nodes = max(1, _number(environment, "WORLD_SIZE", 1) // max(local, 1))
        command = (
            f"accelerate launch --num_machines {nodes} --num_processes {nodes} ... --no_python posttrain run ..."
            if any(name.startswith("ACCELERATE_") for name in environment)
            else f"torchrun --nnodes {nodes} --nproc-per-node 1 ... --no-python posttrain run ..."
        )
        raise ConfigError(
            f"{max(local, 2)} processes were started on this host: start `posttrain run` once per host; it starts the "
            f"ranks itself (learner.processes). "
            + (command if nodes > 1 else "On one host: posttrain run ...")
        )
    # With torchrun under srun, torchrun's variables determine the place.
    if not _in_step(environment) or "RANK" in environment:
        return
    nodes = _step_nodes(environment)
    tasks = _number(environment, "SLURM_STEP_NUM_TASKS", _number(environment, "SLURM_NTASKS", nodes))
    if tasks > nodes or _number(environment, "SLURM_LOCALID", 0) > 0:
        raise ConfigError(
            f"srun started {tasks} tasks on {nodes} nodes: start `posttrain run` once per node; it starts the ranks "
            f"itself (learner.processes): srun --nodes={nodes} --ntasks-per-node=1 posttrain run ..."
        )


def _step_nodes(environment: Mapping[str, str]) -> int:
    return _number(environment, "SLURM_STEP_NUM_NODES", _number(environment, "SLURM_NNODES", 1))


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A launcher's variable as an integer; `default` if it is unset or empty."""
    text = environment.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError(
            f"{name}={environment.get(name)!r} is not a whole number; unset it, or give --nnodes"
        )
    return int(text)


def _host_and_port(master: str) -> tuple[str, int | None]:
    host, colon, port = master.rpartition(":")
    if not colon:
        return master, None
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--master {master!r}: write HOST or HOST:PORT")
    return host, int(port)
