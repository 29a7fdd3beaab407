"""A tiny core that reads charts, trained from scratch on one CPU core with the public interface and transformers.

Three phases, with new charts in every step: *ordered* teaches to read from left to right, *reading* to look a label
up, *mixed* the notation of chains and questions with direct answers.

Axes: R rows, T tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from chart_drawing import SIDE, draw
from chart_lessons import Lesson, draw_lessons
from chart_scenes import WORDS

from sailvl2_posttrain import TinySize, build_tiny, messages, register

PATCH = 20
"""Side of a patch in pixels: 8 x 8 patches, 4 x 4 image tokens."""
MEAN, STD = [0.96] * 3, [0.12] * 3
"""Normalisation that makes paper 0. With ImageNet's, paper is 2.5, and after 340 steps answers did not depend on the
picture; with paper 0 the loss per digit was at 0.95 after 120 steps (chance: 2.2)."""
POSITIONS, POSITION_SCALE = "model.vision_tower.embeddings.position_embedding.weight", 4.0
"""The tower normalises a patch to size 1 and adds its place, which starts at 0.06. Eight times that taught heights
sooner and labels later (120 steps of 16 charts: loss 1.9 instead of 2.1 per digit); 4 lies between, untested alone."""
LOG_EVERY = 20
Batch = dict[str, torch.Tensor]


def build(
    out: Path,
    *,
    seed: int,
    ordered_steps: int = 120,
    reading_steps: int = 140,
    mixed_steps: int = 300,
    learning_rate: float = 2e-3,
    warmup_steps: int = 20,
) -> None:
    """Write a pre-trained tiny core to the folder `out`, and its metrics to `metrics.jsonl` beside it.

    The learning rate rises over the first `warmup_steps`, stays constant, and falls to 0 as a cosine in the mixed
    phase. The same seed, steps and number of threads give the same weights.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    register()
    build_tiny(out, words=WORDS, seed=seed, size=TinySize(image_px=SIDE, patch_px=PATCH))
    processor = AutoProcessor.from_pretrained(out)
    processor.image_processor.image_mean, processor.image_processor.image_std = MEAN, STD
    processor.save_pretrained(out)
    model = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    model.get_parameter(POSITIONS).data.mul_(POSITION_SCALE)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, fused=True)
    phases = ["ordered"] * ordered_steps + ["reading"] * reading_steps + ["mixed"] * mixed_steps
    lines, losses = [], []
    for step, phase in enumerate(phases, start=1):
        done = max(0, step - ordered_steps - reading_steps) / max(1, mixed_steps)
        rate = learning_rate * min(1.0, step / max(1, warmup_steps)) * (1 + math.cos(math.pi * done)) / 2
        losses.append(_update(model, optimizer, batches(phase, processor, Random(f"{seed} {step}")), rate))
        if step % LOG_EVERY == 0 or step == len(phases):
            lines.append(
                {"step": step, "phase": phase, "loss": sum(losses) / len(losses), "learning_rate": rate}
            )
            losses = []
            out.with_name("metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    model.save_pretrained(out)


def _update(model: Any, optimizer: Any, parts: Sequence[Batch], rate: float) -> float:
    """One optimizer update on all parts together; returns the mean loss of their trained tokens."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    hidden, targets = [], []
    for part in parts:
        trained = part.pop("trained")[:, 1:]
        hidden.append(model.model(**part, use_cache=False).last_hidden_state[:, :-1][trained])
        targets.append(part["input_ids"][:, 1:][trained])
    loss = torch.nn.functional.cross_entropy(model.lm_head(torch.cat(hidden)), torch.cat(targets))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def batches(phase: str, processor: Any, rng: Random) -> list[Batch]:
    """One step's rows with pictures and those without, apart: they differ in length, and padding costs time.

    A batch holds input_ids, attention_mask and trained (R, T); with pictures also pixel_values (R, 3, SIDE, SIDE).
    """
    lessons = draw_lessons(phase, rng)
    shown = [one for one in lessons if one.chart]
    told = [one for one in lessons if not one.chart]
    pictures = np.stack([np.asarray(draw(one.chart, rng)) for one in shown if one.chart])
    return [
        {**tokens(shown, processor), "pixel_values": normalized(pictures, processor)},
        tokens(told, processor),
    ]


def normalized(pictures: np.ndarray, processor: Any) -> torch.Tensor:
    """Bytes (R, SIDE, SIDE, 3), normalised as by the processor: (R, 3, SIDE, SIDE)."""
    how = processor.image_processor
    mean, std = (np.asarray(value, np.float32) for value in (how.image_mean, how.image_std))
    scaled = (pictures * np.float32(how.rescale_factor) - mean) / std
    return torch.from_numpy(scaled.transpose(0, 3, 1, 2).copy())


def tokens(lessons: Sequence[Lesson], processor: Any) -> Batch:
    """The rows as input_ids, attention_mask and trained (R, T), padded on the right; all with pictures, or none."""
    tokenizer = processor.tokenizer
    before, after = frame(processor, bool(lessons[0].chart))
    rows: list[tuple[list[int], list[bool]]] = []
    for lesson in lessons:
        asked = [*before, *tokenizer(lesson.asked)["input_ids"], *after]
        ids, trained = list(asked), [False] * len(asked)
        for text, learnt in (*lesson.reply, (tokenizer.eos_token, True)):
            piece = tokenizer(text)["input_ids"]
            ids += piece
            trained += [learnt] * len(piece)
        rows.append((ids, trained))
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows]),
        "trained": torch.tensor([trained + [False] * (width - len(trained)) for _, trained in rows]),
    }


def frame(processor: Any, picture: bool) -> tuple[list[int], list[int]]:
    """The tokens before and after a question in a chat, as in every stage: the processor's chat template decides."""
    from PIL import Image

    images = [Image.new("RGB", (SIDE, SIDE))] if picture else []
    chat = processor.apply_chat_template(
        [messages({"images": images, "question": "?", "mode": "direct"})],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    ids = list(chat["input_ids"][0])
    place = ids.index(processor.tokenizer.convert_tokens_to_ids("?"))
    return ids[:place], ids[place + 1 :]
