"""The machine that a plan is compared with: GPUs, host memory and disk, as found here or as given in a recipe."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from chain.recipe import Recipe
from core.training.memory import GIB


@dataclass(frozen=True)
class Machine:
    """The machines that a recipe is compared with."""

    gpu_gib: float | None
    """Memory of one GPU; None: training runs on CPUs."""
    gpus_per_node: int
    nodes: int
    host_gib: float | None
    disk_gib: float | None
    origin: str
    """The source of these figures, for messages."""

    def __str__(self) -> str:
        if self.gpu_gib is None:
            return f"CPUs with {self.host_gib:.0f} GiB ({self.origin})"
        gpus = f"{self.gpus_per_node} GPU{'s' if self.gpus_per_node > 1 else ''} of {self.gpu_gib:g} GiB"
        return f"{self.nodes} x {gpus} ({self.origin})" if self.nodes > 1 else f"{gpus} ({self.origin})"

    @property
    def gpus(self) -> int:
        return self.gpus_per_node * self.nodes


def machine_of(recipe: Recipe, runs_dir: Path, gpu_gib: float | None = None) -> Machine:
    """The machine for `plan`: --gpu-gib, else the local GPUs, else the recipe's `hardware`, else the local CPUs."""
    hardware = recipe.hardware
    here = _gpus_here()
    if gpu_gib is not None or here or hardware.gpu_gib is not None:
        memory, origin = hardware.gpu_gib, "the recipe's hardware"
        if here:
            memory, origin = min(here), "this machine's GPUs"
        if gpu_gib is not None:
            memory, origin = gpu_gib, "--gpu-gib"
        return Machine(
            gpu_gib=memory,
            gpus_per_node=hardware.gpus_per_node or len(here) or 1,
            nodes=hardware.nodes,
            host_gib=hardware.host_gib or (_host_gib() if here else None),
            disk_gib=hardware.disk_gib or (_disk_gib(runs_dir) if here else None),
            origin=origin,
        )
    return Machine(
        None,
        0,
        hardware.nodes,
        hardware.host_gib or _host_gib(),
        hardware.disk_gib or _disk_gib(runs_dir),
        "this machine",
    )


def _gpus_here() -> list[float]:
    """Memory of this machine's GPUs, GiB; [] without any."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    asked = [tool, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=False)
    return [float(line) / 1024 for line in done.stdout.split() if line.replace(".", "").isdigit()]


def _host_gib() -> float:
    import psutil

    return psutil.virtual_memory().total / GIB


def _disk_gib(folder: Path) -> float:
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free / GIB
