"""The incremental check: is the loss on validation rows lower if a small SFT run also sees the new data?"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from chain.curation.config import Curation
from chain.curation.inputs import Inputs
from chain.curation.serving import core_of
from chain.job import Task
from chain.launch import run_job
from core.files import atomic_dir, read_json
from core.manifest import hash_config
from core.training.job import Job
from corpus.records import DataSource
from sft.config import Phase, SFTConfig
from sft.validate import LOSSES, Validation

NEW = "curated"
"""Name of the curated rows among the sets of the check's runs."""


class NotBetter(RuntimeError):
    """The curated rows do not lower the validation loss."""


def check(curation: Curation, inputs: Inputs, new: Path, work: Path) -> dict[str, Any]:
    """Train both runs from one core with equal updates; return their losses, the difference and its 95% interval.

    The difference is over the validation rows, pair by pair. Raises NotBetter with `on_worse: refuse`.
    """
    cfg = curation.incremental
    assert cfg
    core = core_of(cfg.core, curation, work)
    sets = {cfg.base: inputs.files(cfg.base), NEW: new}
    without = _losses(curation, core, sets, (cfg.base,), inputs, work)
    with_new = _losses(curation, core, sets, (cfg.base, NEW), inputs, work)
    gains = [old - now for old, now in zip(without, with_new, strict=True)]
    mean = math.fsum(gains) / len(gains)
    spread = math.sqrt(math.fsum((gain - mean) ** 2 for gain in gains) / max(1, len(gains) - 1) / len(gains))
    low, high = mean - 1.96 * spread, mean + 1.96 * spread
    better = low > 0
    text = (
        f"incremental check: validation loss {math.fsum(without) / len(gains):.4f} without and "
        f"{math.fsum(with_new) / len(gains):.4f} with the curated rows; lower by {mean:.4f} [{low:.4f}, {high:.4f}] "
        f"over {len(gains)} rows: {'better' if better else 'not better'}"
    )
    if not better and cfg.on_worse == "refuse":
        raise NotBetter(text)
    return {"gain": mean, "ci95": [low, high], "rows": len(gains), "better": better, "text": text}


def _losses(
    curation: Curation,
    core: Path,
    sets: dict[str, Path],
    names: tuple[str, ...],
    inputs: Inputs,
    work: Path,
) -> list[float]:
    """The validation rows' losses after SFT on some sets. Equal runs are not repeated."""
    cfg, seed = curation.incremental, curation.seed
    assert cfg
    data = tuple(DataSource(set=name) for name in names)
    phase = Phase(name="check", data=data, optim=cfg.optim)
    config = SFTConfig(phases=(phase,), max_tokens=cfg.max_tokens, overlong="drop", learner=cfg.learner)
    made_by = curation.model_dump(mode="json", include={"steps"}) if NEW in names else None
    same = hash_config(
        {"config": config, "core": str(core), "sets": inputs.hashes, "seed": seed, "made_by": made_by}
    )
    folder = work / "incremental" / f"{'-'.join(names)}-{same[:12]}"
    if not folder.exists():
        with atomic_dir(folder) as out:
            job = Job(
                stage=f"incremental check, {' and '.join(names)}", model=core, out=out, seed=seed, sets=sets
            )
            learner = cfg.learner
            run_job(
                Task.of("sft.train:train", config, job),
                out,
                processes=learner.processes,
                threads=learner.threads,
            )
            validation = Validation(
                data=DataSource(set=cfg.validation), max_tokens=cfg.max_tokens, learner=learner
            )
            its_sets = {cfg.validation: inputs.files(cfg.validation)}
            job = Job(stage="validation", model=out / "checkpoint", out=out, seed=seed, sets=its_sets)
            run_job(Task.of("sft.validate:validate", validation, job), out, threads=learner.threads)
    return read_json(folder / LOSSES)["losses"]
