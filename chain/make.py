"""The two steps before training: the recipe's own data, and the core. Both call a function that the recipe names."""

from __future__ import annotations

from pathlib import Path

from chain.job import load
from chain.recipe import CoreConfig, GenerateConfig
from core.checkpoint.check import check_checkpoint
from core.training.job import Job


def generate(cfg: GenerateConfig, job: Job) -> Path:
    """Call the recipe's generator, which writes the data sets to `job.out`; return that folder."""
    load(cfg.by)(job.out, seed=job.seed, **cfg.params)
    return job.out


def core(cfg: CoreConfig, job: Job) -> Path:
    """Build the core, or link to the one that the recipe names; return its checkpoint folder.

    Raises LayoutError for a core that brings code or holds NaN or infinity.
    """
    checkpoint = job.out / "checkpoint"
    if cfg.path is not None:
        check_checkpoint(Path(cfg.path))
        # A link, not a copy: a released core is gigabytes, and no stage writes to the one it starts from.
        checkpoint.symlink_to(Path(cfg.path).resolve())
    else:
        assert cfg.build, "CoreConfig has one of the two"
        load(cfg.build)(checkpoint, seed=job.seed, **cfg.params)
    return checkpoint
