"""The two steps before training: generating data and building the core. Both call a function that the recipe names."""

from __future__ import annotations

from pathlib import Path

from chain.job import load
from chain.recipe import CoreConfig, GenerateConfig
from core.checkpoint.check import check_checkpoint
from core.model.tokenizer import pieces
from core.training.job import Job
from corpus.records import load_records
from corpus.vocabulary import texts_of


def generate(cfg: GenerateConfig, job: Job) -> Path:
    """Call the recipe's generator, which writes the data sets to `job.out`; return that folder."""
    load(cfg.by, job.folders)(job.out, seed=job.seed, **cfg.params)
    return job.out


def core(cfg: CoreConfig, job: Job) -> Path:
    """Build the core, or link to the core that the recipe names; return its checkpoint folder.

    Raises LayoutError for a core that contains code, NaN or infinity.
    """
    checkpoint = job.out / "checkpoint"
    if cfg.path is not None:
        check_checkpoint(Path(cfg.path))
        # A link instead of a copy: a released core has gigabytes, and stages never write to their initial checkpoint.
        checkpoint.symlink_to(Path(cfg.path).resolve())
    else:
        assert cfg.build, "CoreConfig has one of the two"
        words = {"words": vocabulary(cfg, job)} if cfg.vocabulary else {}
        load(cfg.build, job.folders)(checkpoint, seed=job.seed, **words, **cfg.params)
    return checkpoint


def vocabulary(cfg: CoreConfig, job: Job) -> list[str]:
    """The words of the sets in `cfg.vocabulary`, for a builder with a word-level tokenizer."""
    rows = (row for name in cfg.vocabulary for row in load_records(job.sets[name]))
    return list(dict.fromkeys(word for row in rows for text in texts_of(row) for word in pieces(text)))
