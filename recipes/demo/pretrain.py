"""The tiny core's pre-training: about 75 seconds on a CPU core, so that the chain starts from a core that reads digits.

It has two phases with newly drawn pictures and texts in every step. *reading* teaches digits and sums; *mixed* adds
captions and questions with direct answers, in the form that every stage uses. Captions alone do not teach digits in so
few steps (the project's study of the demo task). The training loop is plain on purpose: pre-training is not a subject
of this project.

Axes: R rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from recipes.demo.lessons import Lesson, draw_lessons, frame_of
from recipes.demo.scenes import WORDS

if TYPE_CHECKING:
    import torch

LOG_EVERY = 20
_BLOCK = 10
"""Number of steps whose rows are drawn, rendered and tokenized together."""
_MAX_GRAD_NORM = 1.0

Batch = dict[str, "torch.Tensor"]


def build(
    out: Path,
    *,
    seed: int,
    reading_steps: int = 150,
    mixed_steps: int = 250,
    learning_rate: float = 2e-3,
    warmup_steps: int = 20,
    words: Sequence[str] = (),
) -> Path:
    """Write a pre-trained tiny core to the folder `out`, and its metrics to `metrics.jsonl` beside it; return `out`.

    The tokenizer knows the demo's words and also `words`. The learning rate rises over the first `warmup_steps`, is
    constant in the reading phase, and falls to 0 as a cosine in the mixed phase. The same seed, steps and number of
    threads give the same weights.
    """
    import torch
    from torch.utils.data import DataLoader

    from core.files import append_jsonl, atomic_dir
    from core.model.tiny import build_tiny
    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor

    out = Path(out)
    metrics = out.with_name("metrics.jsonl")
    metrics.unlink(missing_ok=True)
    with atomic_dir(out) as folder:
        build_tiny(folder, words=[*WORDS, *words], seed=seed)
        model = load_model(folder, LearnerConfig(threads=torch.get_num_threads()))
        processor = load_processor(folder)
        optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
        phases = ["reading"] * reading_steps + ["mixed"] * mixed_steps
        losses: list[torch.Tensor] = []
        # Drawing takes a seventh of the time; a process of its own draws ahead on the other CPU core.
        drawn = DataLoader(_drawn(phases, processor, seed), batch_size=None, num_workers=1)
        for step, parts in enumerate(drawn, start=1):
            mixed = max(0, step - reading_steps)
            rate = learning_rate * (1 + math.cos(math.pi * mixed / max(1, mixed_steps))) / 2
            rate *= min(1.0, step / max(1, warmup_steps))
            losses.append(_update(model, optimizer, parts, rate))
            if step % LOG_EVERY == 0 or step == len(phases):
                loss = float(torch.stack(losses).mean())
                losses = []
                append_jsonl(
                    metrics, {"step": step, "phase": phases[step - 1], "loss": loss, "learning_rate": rate}
                )
        model.save_pretrained(folder)
    return out


def _update(model: Any, optimizer: Any, parts: Sequence[Batch], rate: float) -> torch.Tensor:
    """One optimizer update on all parts together; returns the mean loss of their trained tokens."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = rate
    hidden, targets = [], []
    for part in parts:
        trained = part.pop("trained")[:, 1:]
        hidden.append(model.model(**part, use_cache=False).last_hidden_state[:, :-1][trained])
        targets.append(part["input_ids"][:, 1:][trained])
    loss = torch.nn.functional.cross_entropy(model.lm_head(torch.cat(hidden)), torch.cat(targets))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def _drawn(*arguments: Any) -> Any:
    """`_batches` as a data set."""
    from torch.utils.data import IterableDataset

    class Drawn(IterableDataset):
        def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
            return _batches(*arguments)

    return Drawn()


def _batches(phases: Sequence[str], processor: Any, seed: int) -> Iterator[tuple[Batch, Batch]]:
    """Per step one batch with pictures and one without: their rows differ in length, and padding costs time.

    A batch holds input_ids, attention_mask and trained (R, T), and pixel_values (R, 3, side, side).
    """
    import numpy as np

    from recipes.demo.drawing import render

    rng, noise, frame = Random(f"{seed} pretraining"), np.random.default_rng([seed, 1]), frame_of(processor)
    for start in range(0, len(phases), _BLOCK):
        steps = [draw_lessons(phase, frame, rng) for phase in phases[start : start + _BLOCK]]
        panels = iter(render([one.scene for step in steps for one in step if one.scene], noise))
        for step in steps:
            shown = [one for one in step if one.scene]
            pixels = normalized(np.stack([next(panels) for _ in shown]), processor)
            told = [one for one in step if not one.scene]
            yield (
                {**tokens(shown, processor.tokenizer), "pixel_values": pixels},
                tokens(told, processor.tokenizer),
            )


def normalized(panels: Any, processor: Any) -> torch.Tensor:
    """Bytes (pictures, side, side, 3), normalised as by the processor: (pictures, 3, side, side)."""
    import numpy as np
    import torch

    how = processor.image_processor
    mean, std = (np.asarray(value, np.float32) for value in (how.image_mean, how.image_std))
    scaled = (panels * np.float32(how.rescale_factor) - mean) / std
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())


def tokens(lessons: Sequence[Lesson], tokenizer: Any) -> Batch:
    """The rows as input_ids, attention_mask and trained (R, T), padded on the right.

    A token is trained if its first character lies in a trained piece.
    """
    import torch

    texts = ["".join(piece for piece, _ in lesson.pieces) for lesson in lessons]
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_offsets_mapping=True,
        padding=True,
        padding_side="right",
        return_tensors="pt",
    )
    starts, ends = encoded["offset_mapping"].unbind(-1)
    by_character = torch.zeros(len(lessons), 1 + int(ends.max()), dtype=torch.bool)
    for row, lesson in enumerate(lessons):
        place = 0
        for piece, trained in lesson.pieces:
            by_character[row, place : place + len(piece)] = trained
            place += len(piece)
    real = encoded["attention_mask"].bool()
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "trained": by_character.gather(1, starts) & real,
    }
