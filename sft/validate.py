"""The loss of a checkpoint on rows that it was not trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from core.files import write_json
from core.strict import Strict
from core.training.config import LearnerConfig
from core.training.job import Job
from corpus.records import DataSource

LOSSES = "losses.json"


class Validation(Strict):
    """The rows, and the longest row in tokens."""

    data: DataSource
    max_tokens: int
    learner: LearnerConfig = LearnerConfig()


def validate(cfg: Validation, job: Job) -> Path:
    """Write each row's mean loss per trained token, in nats, to `out/losses.json`; return the file.

    Rows longer than `max_tokens` are left out. One row is computed at a time.
    """
    import torch

    from core.training.model import load_model, load_processor
    from sft.data import Collator, Lessons, fit, load_mixture

    processor, model = load_processor(job.start), load_model(job.start, cfg.learner).eval()
    mixture = fit(load_mixture((cfg.data,), job.sets, job.seed), processor, cfg.max_tokens, "drop")
    collate = Collator(Lessons(mixture, processor), processor.tokenizer.pad_token_id)
    device: Any = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    losses = []
    with torch.no_grad():
        for row in range(len(mixture)):
            batch = {name: value.to(device) for name, value in collate([{"row": row}]).items()}
            losses.append(float(model(**batch).loss))
    write_json(job.out / LOSSES, {"losses": losses})
    return job.out / LOSSES
