"""Packed SFT against stock TRL with padding, on a documented mixture: `python -P -m benchmarks.packing [--quick]`.

The mixture is ours. It resembles the image-text SFT data of SAIL-VL2's stages 1 to 4 together, with dynamic tiling at
256 tokens per tile:

- images: 25% of rows have no image. Of the other rows, half have one tile (an image of 448 px or less), 35% have one
  image cut into 2 to 12 tiles plus the thumbnail, and 15% have two to four images of one tile.
- prompts: log-normal, median 45 tokens.
- answers: 45% are short (median 12 tokens), 35% are descriptions (median 200), 20% are long chains (median 1,000).
  The chains' tail is the reason for contexts of 16,384 and 20,480 tokens; here it is cut at 12,000.

One CPU thread cannot train at that scale. So the timing divides the lengths by sixteen (16 tokens per tile of 112 px)
and trains SAIL-VL2-2B with widths divided by sixteen and layers by four. Tower, linear layers and attention keep their
shares of the work. Both paths train the same prepared rows in the same updates; they differ in the collator and
the attention. Stock pads to the longest row of a micro-batch of 8, TRL's default. Smaller micro-batches pad less but
use a GPU less well, which a CPU does not show. Imbalance is computed at full scale and not timed. On a GPU, the
benchmark is not scaled: SAIL-VL2-2B's shapes with random weights, bf16, gradient checkpointing, wall time.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import alternate, emit, show
from benchmarks.workload import WORDS, learner_settings, on_gpu, random_core
from chain.worker import keep_engine_out

TILE_TOKENS = 256
SCALE = 16
"""The timing divides real lengths by this factor."""
RANKS, GLOBAL_BATCH, PACK_TOKENS = 8, 1024, 32768
"""For the imbalance: the report's global batch (section 4) on eight ranks."""
HEADLINE = 8
"""Rows of stock's micro-batch for the headline ratio."""
PACK_ROWS = 2
"""Size of a pack in longest rows. On a CPU, small packs that stay in the cache are 10 to 15% faster than packs of eight
rows, and they take less memory than the padded micro-batches."""


def mixture(rows: int, seed: int) -> dict[str, np.ndarray]:
    """Prompt tokens, answer tokens and tiles of each row of the documented mixture, (rows,) each.

    The tiles of a row are the tiles of all its images.
    """
    draw = np.random.default_rng(seed)
    prompt = np.clip(draw.lognormal(np.log(45), 0.6, rows), 12, 1000)
    kind = draw.random(rows)
    answer = np.select(
        [kind < 0.45, kind < 0.80],
        [draw.lognormal(np.log(12), 0.6, rows), draw.lognormal(np.log(200), 0.5, rows)],
        draw.lognormal(np.log(1000), 0.9, rows),
    )
    look, cut = draw.random(rows), 1 + np.clip(1 + draw.geometric(0.25, rows), 2, 12)  # and the thumbnail
    tiles = np.select(
        [look < 0.25, look < 0.625, look < 0.8875],
        [np.zeros(rows), np.ones(rows), cut],
        draw.integers(2, 5, rows),
    )
    return {
        "prompt": prompt.astype(np.int64),
        "answer": np.clip(answer, 2, 12000).astype(np.int64),
        "tiles": tiles.astype(np.int64),
    }


def full_scale_sizes(rows: int, seed: int) -> np.ndarray:
    """Text and image tokens of the mixture's rows, (rows, 2)."""
    parts = mixture(rows, seed)
    return np.stack([parts["prompt"] + parts["answer"], parts["tiles"] * TILE_TOKENS], axis=1)


def dealt_imbalance(sizes: np.ndarray) -> tuple[float, float]:
    """Excess of the busiest of RANKS ranks over the mean, over whole updates: (rows dealt in order, rows packed)."""
    from sft.balance import imbalance
    from sft.packing import ByRows, Plan

    updates = len(sizes) // GLOBAL_BATCH
    plan = Plan(sizes, ByRows(GLOBAL_BATCH), budget=PACK_TOKENS, ranks=RANKS, seed=0, max_updates=updates)
    packed, stock = [], []
    for update in range(updates):
        packs = plan[update * plan.packs : (update + 1) * plan.packs]
        loads = np.array([sizes[pack].sum(axis=0) for pack in packs])
        packed.append(imbalance(loads.reshape(-1, RANKS, 2).sum(axis=0)))
        order = plan.order(0)[update * GLOBAL_BATCH : (update + 1) * GLOBAL_BATCH]
        stock.append(imbalance(sizes[order].reshape(-1, RANKS, 2).sum(axis=0)))
    return max(stock), max(packed)


def build_core(folder: Path) -> Path:
    """SAIL-VL2-2B (Qwen3-1.7B, SAIL-ViT-Huge) with widths divided by 16 and layers by 4; at full size on a GPU."""
    from core.model.tiny import TinySize, build_tiny

    if on_gpu():
        return random_core(folder, "2b")

    size = TinySize(
        vision_hidden=96,
        vision_layers=6,
        vision_heads=4,  # of 12
        vision_mlp=256,
        image_px=112,
        text_hidden=128,
        text_layers=7,
        text_heads=4,  # of 16; the projections' widths are in proportion
        text_kv_heads=2,
        text_head_dim=32,
        text_mlp=384,
    )
    return build_tiny(folder, words=WORDS, seed=0, size=size)


def build_lessons(rows: int, processor: Any, seed: int) -> list[dict[str, Any]]:
    """Rows of the scaled mixture: random tokens and noise for pixels."""
    import torch

    from sft.data import IGNORED

    draw = torch.Generator().manual_seed(seed)
    parts, scale = mixture(rows, seed), 1 if on_gpu() else SCALE
    per_tile, side = processor.image_seq_length, processor.image_processor.size["height"]
    ordinary = [
        token for token in range(len(processor.tokenizer)) if token not in processor.tokenizer.all_special_ids
    ]
    ordinary = [token for token in ordinary if token not in processor.image_token_ids]
    lessons = []
    for prompt, answer, tiles in zip(*(parts[name].tolist() for name in parts), strict=True):
        prompt, answer = max(2, prompt // scale), max(1, answer // scale)
        chosen = torch.randint(len(ordinary), (prompt + answer,), generator=draw)
        text = torch.tensor(ordinary)[chosen]
        images = torch.full((tiles * per_tile,), processor.image_token_id)
        ids = torch.cat([text[:1], images, text[1:]])
        labels = torch.full_like(ids, IGNORED)
        labels[-answer:] = ids[-answer:]
        pixels = torch.randn(tiles, 3, side, side, generator=draw) if tiles else None
        lessons.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    return lessons


def clock() -> float:
    """A clock in seconds: on a CPU the thread's CPU time, which other processes do not affect; on a GPU wall time."""
    import torch

    if not on_gpu():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Bench:
    """Trains the same rows with padding and with packing, and times the updates."""

    def __init__(self, folder: Path, updates: int, rows: int) -> None:
        from core.training.model import load_processor

        self.folder, self.updates, self.rows = folder, updates, rows
        self.core = build_core(folder / "core")
        self.lessons = build_lessons(updates * rows, load_processor(self.core), seed=0)
        image = load_processor(self.core).image_token_id
        images = [int((lesson["input_ids"] == image).sum()) for lesson in self.lessons]
        self.sizes = np.array(
            [
                (len(lesson["input_ids"]) - count, count)
                for lesson, count in zip(self.lessons, images, strict=True)
            ]
        )
        labels = (int((lesson["labels"] != -100).sum()) for lesson in self.lessons)
        self.signal = sum(labels)

    def train(self, micro_batch: int, packed: bool) -> tuple[float, list[float]]:
        """Seconds of all updates, and the loss of each."""
        from transformers import TrainerCallback

        from sft.config import SFTConfig
        from sft.packing import ByRows, Plan
        from sft.train import phase_trainer

        longest = int(self.sizes.sum(axis=1).max())
        cfg = SFTConfig.model_validate(
            {
                "max_tokens": longest,
                "log_every": 1,
                "learner": {"deepspeed": None, **learner_settings()},
                "packing": {"micro_batch_tokens": PACK_ROWS * longest} if packed else "off",
                "phases": [
                    {
                        "name": "bench",
                        "data": [{"set": "bench"}],
                        "optim": {
                            "learning_rate": 1e-4,
                            "max_steps": self.updates,
                            "global_batch_size": self.rows,
                            "micro_batch_size": micro_batch,
                        },
                    }
                ],
            }
        )
        plan = packed and Plan(
            self.sizes,
            ByRows(self.rows),
            budget=cfg.micro_batch_tokens(cfg.phases[0]),
            ranks=1,
            seed=0,
            max_updates=self.updates,
        )
        trainer = phase_trainer(
            cfg, cfg.phases[0], self.lessons, plan or None, start=self.core, folder=self.folder, seed=0
        )
        ends: list[float] = []

        class Clock(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                ends.append(clock())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                ends.append(clock())

        trainer.add_callback(Clock())
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        return ends[-1] - ends[0], losses

    def compare(self, micro_batch: int, repetitions: int) -> dict[str, float]:
        """Medians of both paths, which run in alternating order."""
        import torch

        peaks: dict[str, float] = {}
        first: dict[str, list[float]] = {}  # compares the losses, and warms up
        for side in ("stock", "packed"):
            if on_gpu():
                torch.cuda.reset_peak_memory_stats()
            first[side] = self.train(micro_batch, side == "packed")[1]
            if on_gpu():
                peaks[f"{side}_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        differences = [abs(a - b) / abs(a) for a, b in zip(first["stock"], first["packed"], strict=True)]
        assert max(differences) <= (2e-2 if on_gpu() else 1e-5), f"losses differ: {first}"
        seconds = alternate(
            {
                "stock": lambda _: self.train(micro_batch, False)[0],
                "packed": lambda _: self.train(micro_batch, True)[0],
            },
            repetitions,
            warm_up=0,
        )
        return {
            "micro_batch": micro_batch,
            "stock": self.signal / seconds["stock"],
            "packed": self.signal / seconds["packed"],
            "ratio": seconds["stock"] / seconds["packed"],
            "padding": self.padding(micro_batch),
            "loss_diff": max(differences),
            **peaks,
        }

    def padding(self, micro_batch: int) -> float:
        """Share of padding among the positions of stock's batches."""
        import torch

        tokens = self.sizes.sum(axis=1)
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0)).numpy()
        batches = tokens[order].reshape(-1, micro_batch)
        return float(1 - tokens.sum() / (batches.max(axis=1).sum() * micro_batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="measure one micro-batch size, within a minute")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    keep_engine_out()
    import torch

    torch.set_num_threads(1)
    stock_imbalance, packed_imbalance = dealt_imbalance(
        full_scale_sizes((2 if quick else 16) * GLOBAL_BATCH, seed=0)
    )
    with tempfile.TemporaryDirectory() as folder:
        # A mixture with a long tail needs many rows: with 512 rows, the padding is 64%, and 65% over all rows.
        bench = Bench(Path(folder), updates=2 if quick else 8, rows=32 if quick else 64)
        lines = [
            bench.compare(micro_batch, 5) for micro_batch in ((HEADLINE,) if quick else (1, 4, HEADLINE, 16))
        ]
    columns = list(lines[0])
    show(
        "Tokens of signal per second by the rows of stock's micro-batch",
        [column.replace("_", " ") for column in columns],
        [[line[column] for column in columns] for line in lines],
    )
    print(
        f"Busiest of {RANKS} ranks above the mean: stock {stock_imbalance:.1%}, packed {packed_imbalance:.1%}"
    )
    (headline,) = (line for line in lines if line["micro_batch"] == HEADLINE)
    emit(
        "packing",
        ratio=round(headline["ratio"], 3),
        loss_diff=max(line["loss_diff"] for line in lines),
        imbalance=round(packed_imbalance, 4),
        stock_imbalance=round(stock_imbalance, 4),
        ratios={str(line["micro_batch"]): round(line["ratio"], 3) for line in lines},
        quick=quick,
    )


if __name__ == "__main__":
    main()
