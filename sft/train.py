"""Trains one SFT stage: a curriculum of phases on TRL's SFTTrainer, each from the previous phase's weights.

Differs from stock TRL:

- Rows are prepared once instead of once per epoch (sft/data.py). A row that is too long is refused, never truncated.
- Unless packing is off, a data set of packs and a collator replace padding (sft/packing.py). TRL refuses to pack rows
  with images.
- Updates with a loss or gradients that are not finite are skipped and counted, and a few in a row end the stage
  (core/training/finite.py).
Loss (token mean over the global batch), loop, optimizer and DeepSpeed are TRL's.

Differs from the report (arXiv:2509.14033, sections 4 and 5):

- Stream packing plans a whole run from the rows' lengths before it starts, and every rank derives its packs from the
  plan. The report packs online from a buffer per node. In both, a row waits for a bounded time and is never truncated,
  and `overlong: periodic` lets rows over the maximum in periodically. The report does not say how often.
- Visual packing balances image tokens over the ranks of an update, as the report does over devices.
- Hyper-parameters of basic SFT are not in the report: recipes mark them `ours:`.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from core.checkpoint.save import save_checkpoint
from core.checkpoint.shards import weights_hash
from core.files import append_jsonl, read_json, write_json
from core.training.finite import watch_finite
from core.training.job import Job
from core.training.model import apply_freeze, load_model, load_processor, peft_config
from core.training.ranks import join_process_group, training_arguments
from core.training.resume import FOLDER, Unfinished, drop_lines_after, forget, identity, marker
from sft.config import Phase, SFTConfig, Variant
from sft.data import Collator, Lesson, Lessons, Mixture, blank_lesson, fit, load_mixture
from sft.packed_rows import PackedCollator, attend_within_samples
from sft.packing import ByRows, ByTokens, Overlong, Plan
from sft.soup import START

if TYPE_CHECKING:
    from transformers import TrainerCallback

log = logging.getLogger(__name__)

METRICS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "num_tokens": "tokens",
    "mean_token_accuracy": "mean_token_accuracy",
    "entropy": "entropy",
    "nonfinite_updates": "nonfinite_updates",
}
"""TRL's log keys -> our keys in metrics.jsonl. Tokens are those read so far in the phase."""


def train(cfg: SFTConfig, job: Job) -> Path:
    """Run the phases from the checkpoint `job.model`; returns `job.out/checkpoint`, where the next stage starts.

    Writes `out/metrics.jsonl`, `out/data.json` (rows, dropped rows and packing, by phase) and, for every phase
    but the last, `out/phases/<number>_<name>`. Every rank calls it. With `save_every`, an interrupted call in the
    same `out` continues if the configuration, the start's weights, the seed and the rows' lengths are the same.
    """
    model, out, seed, sets = job.start, job.out, job.seed, job.sets
    join_process_group(cfg.learner)
    # Load all phases' data first, so that bad data of the last phase stops the stage before the first one trains.
    data = [phase_data(cfg, number, model, sets, seed) for number in range(len(cfg.phases))]
    plans = [phase_plan(cfg, *each, seed) for each in zip(cfg.phases, data, strict=True)]
    if int(os.environ.get("RANK", "0")) == 0:
        write_json(
            out / "data.json",
            {
                phase.name: {
                    "rows": len(mixture),
                    "dropped": dict(mixture.dropped),
                    "packing": plan and plan.summary(),
                }
                for phase, mixture, plan in zip(cfg.phases, data, plans, strict=True)
            },
        )
    start, steps = model, 0
    same = None
    if cfg.save_every:
        rows = [mixture.sizes for mixture in data]
        same = identity(config=cfg.model_dump(mode="json"), weights=weights_hash(start), seed=seed, rows=rows)
    with _imports_set_aside():
        for number, (mixture, plan) in enumerate(zip(data, plans, strict=True)):
            steps += run_phase(
                cfg,
                number,
                mixture,
                plan,
                start=start,
                out=out,
                seed=seed,
                steps_before=steps,
                same=same,
            )
            start = phase_folder(cfg, out, number)
            _release()
    return start


def phase_folder(cfg: SFTConfig, out: Path, number: int) -> Path:
    """The folder of a phase's checkpoint; the last phase's is the stage's checkpoint."""
    last = number == len(cfg.phases) - 1
    return out / "checkpoint" if last else out / "phases" / f"{number}_{cfg.phases[number].name}"


def variant_of(cfg: SFTConfig, variant: Variant) -> SFTConfig:
    """The configuration that repeats the last phase with the variant's settings, for the soup."""
    phase = cfg.phases[-1]
    if variant.learning_rate is not None:
        optim = phase.optim.model_copy(update={"learning_rate": variant.learning_rate})
        phase = phase.model_copy(update={"optim": optim})
    return cfg.model_copy(update={"phases": (phase,)})


def variant_start(cfg: SFTConfig, out: Path, model: Path) -> Path:
    """The checkpoint from which the last phase started, for a stage in `out` that started from `model`."""
    return phase_folder(cfg, out, len(cfg.phases) - 2) if len(cfg.phases) > 1 else model


def phase_data(cfg: SFTConfig, number: int, model: Path, sets: Mapping[str, Path], seed: int) -> Mixture:
    """The rows of one phase that pass the checks and are not too long."""
    phase = cfg.phases[number]
    mixture = load_mixture(phase.data, sets, seed, cfg.on_bad)
    overlong: Literal["refuse", "drop"] = "refuse" if cfg.overlong == "refuse" else "drop"
    return fit(mixture, load_processor(model), cfg.longest_row(phase), overlong)


def phase_plan(cfg: SFTConfig, phase: Phase, mixture: Mixture, seed: int) -> Plan | None:
    """The packs of one phase; None if packing is off."""
    if not cfg.packing:
        return None
    import numpy as np

    optim, packing = phase.optim, cfg.packing
    updates_by: ByRows | ByTokens
    if packing.update_tokens:
        updates_by = ByTokens(packing.update_tokens, packing.buffer, packing.max_wait)
    else:
        assert optim.global_batch_size
        updates_by = ByRows(optim.global_batch_size)
    return Plan(
        np.array(mixture.sizes),
        updates_by,
        budget=cfg.micro_batch_tokens(phase),
        ranks=cfg.learner.processes,
        seed=seed,
        epochs=optim.epochs,
        max_updates=optim.max_steps,
        overlong=Overlong(cfg.row_tokens(phase), cfg.periodic.every) if cfg.overlong == "periodic" else None,
    )


def run_phase(
    cfg: SFTConfig,
    number: int,
    mixture: Mixture,
    plan: Plan | None,
    *,
    start: Path,
    out: Path,
    seed: int,
    steps_before: int,
    same: str | None,
) -> int:
    """Train one phase with a fresh optimizer and write its checkpoint; returns its optimizer updates.

    With `same`, the stage's identity, the phase resumes from the checkpoints that an interrupted run left in `out`.
    """
    phase, target = cfg.phases[number], phase_folder(cfg, out, number)
    if same and (target / START).exists() and (facts := read_json(target / START))["stage"] == same:
        log.info("phase %s: finished before the interruption", phase.name)
        return facts["updates"]
    unfinished = Unfinished(out / FOLDER / f"{phase.name}-{same}" if same else target.parent, "tokens")
    processor = load_processor(start)
    trainer = phase_trainer(
        cfg, phase, Lessons(mixture, processor), plan, start=start, folder=unfinished.folder, seed=seed
    )
    if trainer.accelerator.is_main_process:
        drop_lines_after(out / "metrics.jsonl", "step", steps_before + unfinished.done["updates"])
    trainer.add_callback(_metrics_writer(out / "metrics.jsonl", phase.name, steps_before))
    trainer.add_callback(marker(lambda: {"tokens": trainer._total_train_tokens}))
    trainer._total_train_tokens = unfinished.done["tokens"]  # for the log; TRL would count from 0
    log.info("phase %s: %d rows from %s", phase.name, len(mixture), start)
    if plan:
        log.info("phase %s: packed: %s", phase.name, plan.summary())
    watch_finite(trainer)
    unfinished.train(trainer)
    steps = trainer.state.global_step
    save_checkpoint(trainer, processor, target)
    if trainer.accelerator.is_main_process:
        facts = {"weights": weights_hash(start), "phase": phase.name, "seed": seed}
        write_json(target / START, {**facts, "updates": steps, "stage": same})
        forget(out)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.free_memory()
    return steps


def phase_trainer(
    cfg: SFTConfig,
    phase: Phase,
    lessons: Sequence[Lesson],
    plan: Plan | None,
    *,
    start: Path,
    folder: Path,
    seed: int,
) -> Any:
    """TRL's trainer of one phase, on packs if there is a plan, else on padded batches."""
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from core.model.modeling import no_images

    freeze = cfg.learner.freeze if phase.freeze is None else phase.freeze
    processor = load_processor(start)
    args = trl_config(
        cfg, phase, plan, folder, seed
    )  # before the model, because ZeRO-3 splits the model while it loads
    policy = load_model(start, cfg.learner)
    if cfg.learner.lora is None:
        apply_freeze(policy, freeze)
    sees = not {"tower", "adapter"} <= set(freeze)
    collator: Collator | PackedCollator
    if plan:
        attend_within_samples(policy)
        nothing = no_images(policy.config) if sees else None
        collator = PackedCollator(lessons, plan, processor.tokenizer.pad_token_id, nothing)
    else:
        blank = blank_lesson(processor) if sees else None
        collator = Collator(lessons, processor.tokenizer.pad_token_id, blank)
    trainer = SFTTrainer(
        model=policy,
        args=args,
        train_dataset=_numbers("pack", len(plan)) if plan else _numbers("row", len(lessons)),
        data_collator=collator,
        processing_class=processor,
        peft_config=peft_config(cfg.learner),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def trl_config(cfg: SFTConfig, phase: Phase, plan: Plan | None, folder: Path, seed: int) -> Any:
    """TRL's configuration of one phase.

    TRL reads a plan as one epoch, in order; the plan itself shuffles and repeats the rows. Each micro-batch is an item
    of the data set, and TRL distributes the items to the ranks in turn.
    """
    from trl import SFTConfig as TRLConfig

    optim = phase.optim
    arguments = training_arguments(optim, cfg.learner, seed=seed)
    if cfg.save_every:
        arguments |= {"save_strategy": "steps", "save_steps": cfg.save_every}
    if plan:
        arguments |= {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": plan.steps,
            "max_steps": plan.updates,
            "train_sampling_strategy": "sequential",
        }
    else:
        arguments |= {
            "gradient_accumulation_steps": optim.gradient_accumulation(cfg.learner.processes),
            "num_train_epochs": optim.epochs or 1,
            "max_steps": optim.max_steps or -1,
        }
    return TRLConfig(
        output_dir=str(folder),
        **arguments,
        logging_steps=cfg.log_every,
        logging_first_step=True,
        max_length=None,  # `fit` has refused or dropped longer rows
        dataset_kwargs={"skip_prepare_dataset": True},
        remove_unused_columns=False,
    )


def _numbers(name: str, count: int) -> Any:
    """The data set that TRL distributes to the ranks: numbers of rows or packs, which the collator looks up."""
    from datasets import Dataset

    return Dataset.from_dict({name: range(count)})


def _metrics_writer(path: Path, phase: str, offset: int) -> TrainerCallback:
    """A callback that appends what the trainer logs to metrics.jsonl, with steps counted over all phases."""
    from transformers import TrainerCallback

    class MetricsWriter(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == state.max_steps:
                control.should_log = True  # the curve ends where the phase ends

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
        ) -> None:
            if not state.is_world_process_zero or not logs or "loss" not in logs:
                return
            line = {"step": offset + state.global_step, "phase": phase}
            append_jsonl(
                path, line | {ours: logs[theirs] for theirs, ours in METRICS.items() if theirs in logs}
            )

    return MetricsWriter()


@contextmanager
def _imports_set_aside() -> Iterator[None]:
    """Exclude the imported modules' objects from garbage collection, which takes 0.4 s with them."""
    import trl.trainer.sft_trainer  # noqa: F401

    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _release() -> None:
    """Free the last phase's weights and optimizer states before the next phase loads its own."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
