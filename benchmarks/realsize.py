"""FLOPs and memory of the trainers' passes at SAIL-VL2's real shapes, without a GPU and without weights.

    python -P -m benchmarks.realsize [--quick] [--size 2b|8b|a3b]

The real trainers run on tensors that have shapes only (benchmarks/fake.py). FLOPs are linear in the number of layers,
so they are counted on cores of one and two layers and extended to all layers, which is exact. Memory takes all
layers.

- learner: one GRPO step of one group: the pass for old log-probabilities, the loss, its gradients, with the recipe's
  gradient checkpointing. Stock TRL against ours.
- SFT: one update of rows of benchmarks.packing's mixture, padded in micro-batches of 8 against packed.
- rollouts: the prefill of a group's prompts, with and without a prefix cache. With one, the group's first completion
  computes the prompt, and each other one the last, incomplete block of at most 16 tokens.
- memory: the peak of one rank in the recipe's largest passes, by kind.
"""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.common import emit, show
from benchmarks.packing import HEADLINE, mixture
from chain.worker import keep_engine_out
from core.model.shape import SHAPES
from core.training.config import DeepSpeedConfig, LearnerConfig, LoRAConfig
from core.training.memory import GIB, LIVE, Work
from rl.config import RLConfig

GROUPS, TILES, COMPLETIONS = (8, 16), (1, 4, 12), (512, 2048, 4096)
TEXT = 100
"""Text tokens of a learner's prompt: a question with the thinking instruction."""
BLOCK = 16
"""Tokens of a block of vLLM's prefix cache."""
RECIPES = {"2b": "recipes/sailvl2_2b", "8b": "recipes/sailvl2_8b", "a3b": "recipes/sailvl2_a3b"}
TERA = 1e12
ROWS = 64
"""Rows of the mixture in the SFT comparison."""


@dataclass(frozen=True)
class Pass:
    """A pass of one rank whose memory is counted: `tokens` of one SFT row, or a GRPO batch."""

    name: str
    size: str
    stage: Any
    """The stage's configuration: sft.config.SFTConfig or rl.config.RLConfig."""
    batch: Any
    """benchmarks.realsize_passes.Batch, or (tokens, tiles) of a packed SFT row."""
    accumulates: bool = True

    @property
    def learner(self) -> LearnerConfig:
        return self.stage.learner

    @property
    def work(self) -> Work:
        """The pass as the plan's arithmetic sees it (core.training.memory)."""
        if isinstance(self.batch, tuple):
            tokens, tiles = self.batch
            return Work(tokens=tokens, tiles=tiles, accumulates=self.accumulates)
        one = self.batch
        own = one.completion - 1
        return Work(
            tokens=one.groups * (one.prompt + one.group_size * own),
            tiles=one.groups * one.tiles,
            scored=one.rows * one.completion,
            attended=one.groups * (one.prompt + one.group_size * (one.prompt + 2 * own)),
            repeats_heads=True,
            accumulates=self.accumulates,
        )

    def with_learner(self, name: str, **changes: Any) -> Pass:
        """The same pass with another learner."""
        learner = self.stage.learner.model_copy(update=changes)
        return replace(self, name=name, stage=self.stage.model_copy(update={"learner": learner}))


def by_layers(size: str, count: Callable[[tuple[int, int]], float]) -> float:
    """`count((tower layers, language model layers))` extended from one and two layers to all layers."""
    shape = SHAPES[size]
    base, tower, text = count((1, 1)), count((2, 1)), count((1, 2))
    return base + (shape.vision_layers - 1) * (tower - base) + (shape.layers - 1) * (text - base)


class Learners:
    """Trainers of shallow cores of one size, made once for all shapes."""

    def __init__(self, size: str) -> None:
        from chain.recipe import load_recipe

        self.size, self.recipe = size, load_recipe(RECIPES[size])
        self._made: dict[Any, Any] = {}

    def trainer(self, side: str, layers: tuple[int, int]) -> Any:
        """TRL's trainer ("stock", "padded") or ours ("shared", "packed") of a core with these layers."""
        from benchmarks.realsize_passes import fake_core, rl_trainer, sft_trainer

        if (side, layers) not in self._made:
            core, processor = fake_core(self.size, layers)
            if side in ("stock", "shared"):
                assert self.recipe.rlvr
                made = rl_trainer(self.recipe.rlvr, core, processor, stock=side == "stock")
            else:
                stage = self.recipe.longcot_sft
                assert stage
                packed = side == "packed"
                stage = stage if packed else stage.model_copy(update={"packing": None})
                made = sft_trainer(stage, stage.phases[0], core, processor, packed=packed)
            self._made[side, layers] = made
        return self._made[side, layers]

    def step(self, side: str, batch: Any) -> float:
        """FLOPs of a GRPO step of a batch."""
        from benchmarks.fake import flop_counter
        from benchmarks.realsize_passes import rl_batch, rl_old, rl_update

        def count(layers: tuple[int, int]) -> float:
            trainer = self.trainer(side, layers)
            inputs = rl_batch(trainer, batch)
            with flop_counter() as counter:
                rl_old(trainer, inputs, batch, rows=4)
                rl_update(trainer, inputs)
            trainer.model.zero_grad()
            return counter.get_total_flops()

        return by_layers(self.size, count)

    def sft(self, side: str, rows: int) -> float:
        """FLOPs of an SFT update of `rows` rows of the mixture, padded or packed."""
        from benchmarks.fake import flop_counter
        from benchmarks.realsize_passes import lesson, sft_update
        from sft.data import Collator
        from sft.packed_rows import pack_rows

        drawn = mixture(rows, seed=0)
        budget = 32768

        def batches(trainer: Any) -> Iterator[dict[str, Any]]:
            processor, per_tile = trainer.processing_class, trainer.model.config.image_seq_length
            lessons = [
                lesson(processor, int(tiles), int(prompt + answer + tiles * per_tile), int(answer))
                for prompt, answer, tiles in zip(*(drawn[name] for name in drawn), strict=True)
            ]
            if side == "padded":
                collate = Collator(lessons, 0, None)
                for start in range(0, rows, HEADLINE):
                    yield collate([{"row": row} for row in range(start, min(rows, start + HEADLINE))])
                return
            pack: list[Any] = []
            for one in lessons:
                if pack and sum(len(each["input_ids"]) for each in [*pack, one]) > budget:
                    yield pack_rows(pack, 0)
                    pack = []
                pack.append(one)
            yield pack_rows(pack, 0)

        def count(layers: tuple[int, int]) -> float:
            trainer = self.trainer(side, layers)
            with flop_counter() as counter:
                for inputs in batches(trainer):
                    sft_update(trainer, inputs)
                    trainer.model.zero_grad()
            return counter.get_total_flops()

        return by_layers(self.size, count)

    def prefill(self, tokens: int, tiles: int) -> float:
        """FLOPs of the forward pass of a prompt, which gives one distribution."""
        import torch

        from benchmarks.fake import flop_counter
        from benchmarks.realsize_passes import TEXT_ID

        def count(layers: tuple[int, int]) -> float:
            trainer = self.trainer("shared", layers)
            core, processor = trainer.model, trainer.processing_class
            image = [processor.image_token_id] * core.config.image_seq_length * tiles
            ids = torch.tensor([image + [TEXT_ID] * (tokens - len(image))])
            side = core.config.vision_config.image_size
            pixels = {"pixel_values": torch.zeros(tiles, 3, side, side, dtype=core.dtype)} if tiles else {}
            with flop_counter() as counter, torch.no_grad():
                core(input_ids=ids, logits_to_keep=1, use_cache=False, **pixels)
            return counter.get_total_flops()

        return by_layers(self.size, count)


def learner_lines(learners: Learners, grid: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
    """FLOPs of a learner step of a group, and of its prefill, for (group size, tiles, completion tokens)."""
    from benchmarks.realsize_passes import Batch

    shape, lines = SHAPES[learners.size], []
    for group, tiles, completion in grid:
        prompt = tiles * shape.tile_tokens + TEXT
        batch = Batch(1, group, prompt, tiles, completion)
        stock, ours = learners.step("stock", batch), learners.step("shared", batch)
        once = learners.prefill(prompt, tiles)
        rest = learners.prefill((prompt - 1) % BLOCK + 1, 0)
        print(f"{learners.size}, {group} x {completion}, {tiles} tiles: {stock / ours:.2f}", flush=True)
        lines.append(
            {
                **{"size": learners.size, "group": group, "tiles": tiles, "completion": completion},
                **{"prompt": prompt, "stock_tflop": stock / TERA, "ours_tflop": ours / TERA},
                **{"ratio": stock / ours, "prefill_tflop": group * once / TERA},
                "cached_tflop": (once + (group - 1) * rest) / TERA,
            }
        )
    return lines


def passes_of(size: str) -> list[Pass]:
    """The largest passes of the recipe of a size, and the same with other learners."""
    from chain.recipe import load_recipe

    recipe = load_recipe(RECIPES[size])
    sft, rl = recipe.longcot_sft, recipe.rlvr
    assert sft
    assert rl
    first = [sft_pass("SFT", size, sft, recipe), rl_pass("RL", size, rl, recipe)]
    found = list(first)
    for one in first:
        found.append(one.with_learner(f"{one.name}, no checkpointing", gradient_checkpointing=False))
        found.append(
            one.with_learner(f"{one.name}, LoRA", lora=LoRAConfig(r=64), deepspeed=None, processes=1)
        )
        for stage in (2, 3):
            zero = DeepSpeedConfig(zero_stage=stage)  # type: ignore[arg-type]  # a literal
            found.append(one.with_learner(f"{one.name}, ZeRO-{stage} on 8", deepspeed=zero, processes=8))
    return found


def sft_pass(name: str, size: str, stage: Any, recipe: Any) -> Pass:
    """The largest pass of an SFT stage: one packed row, of which the recipe's share is image tokens."""
    tokens = max(stage.micro_batch_tokens(phase) for phase in stage.phases)
    return Pass(name, size, stage, (tokens, _tiles(tokens, size, recipe)))


def rl_pass(name: str, size: str, stage: RLConfig, recipe: Any) -> Pass:
    """The largest pass of an RL stage: one longest prompt with as many longest completions as the budget takes."""
    from benchmarks.realsize_passes import Batch

    completion = stage.rollout.max_completion_tokens
    prompt = recipe.servers.max_model_tokens - completion
    budget = max(
        stage.learner.token_budget or stage.optim.micro_batch_size * (prompt + completion),
        prompt + completion,
    )
    rows = max(1, (budget - prompt) // completion)
    return Pass(name, size, stage, Batch(1, rows, prompt, _tiles(prompt, size, recipe), completion))


def _tiles(tokens: int, size: str, recipe: Any) -> int:
    return int(tokens * recipe.hardware.image_share) // SHAPES[size].tile_tokens


def peak(one: Pass) -> dict[str, float]:
    """Bytes of one rank by kind at the peak of a pass or of the optimizer step, and `peak` in all."""
    from benchmarks.fake import Memory, as_on_a_gpu
    from benchmarks.realsize_passes import (
        Rank,
        fake_core,
        lesson,
        rl_batch,
        rl_trainer,
        rl_update,
        sft_trainer,
        sft_update,
    )

    memory = Memory()
    with as_on_a_gpu(memory):
        core, processor = fake_core(one.size)
        if isinstance(one.stage, RLConfig):
            trainer = rl_trainer(one.stage, core, processor)
            rank = Rank(trainer.model, one.learner, one.accumulates, memory)
            rl_update(trainer, rl_batch(trainer, one.batch))
        else:
            trainer = sft_trainer(one.stage, one.stage.phases[0], core, processor)
            rank = Rank(trainer.model, one.learner, one.accumulates, memory)
            tokens, tiles = one.batch
            sft_update(trainer, _packed_row(trainer, lesson(processor, tiles, tokens)))
        in_pass = memory.peak
        found = max((in_pass, rank.step()), key=lambda each: each.total())
    kinds = {kind: float(size) for kind, size in found.items() if size}
    if one.learner.deepspeed and one.learner.deepspeed.zero_stage == 3:
        whole = kinds["weights"]  # each rank keeps its part, and the weights that are gathered at a time
        kinds["weights"] = whole / one.learner.processes + min(whole, LIVE * core.dtype.itemsize)
    return {**kinds, "peak": sum(kinds.values())}


def _packed_row(trainer: Any, row: dict[str, Any]) -> dict[str, Any]:
    from sft.packed_rows import pack_rows

    return pack_rows([row], 0)


def plan_of(one: Pass) -> float:
    """Peak bytes of a pass by the plan's arithmetic."""
    from core.training.memory import estimate

    return estimate(SHAPES[one.size], one.learner, one.work).peak


def quiet() -> None:
    """Silence the libraries, and keep vLLM from being imported."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    keep_engine_out()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the 2B: one shape, one pass, within a minute")
    parser.add_argument(
        "--size", choices=list(RECIPES), action="append", help="sizes; default: all (quick: 2b)"
    )
    options = parser.parse_args()
    quiet()
    sizes = options.size or (["2b"] if options.quick else list(RECIPES))
    grid = [(group, tiles, tokens) for group in GROUPS for tiles in TILES for tokens in COMPLETIONS]
    if options.quick:
        grid = [(8, 4, 512)]
    lines: list[dict[str, Any]] = []
    sft: dict[str, dict[str, float]] = {}
    memory: list[dict[str, Any]] = []
    from benchmarks.fake import as_on_a_gpu

    for size in sizes:
        learners = Learners(size)
        with as_on_a_gpu():
            lines += learner_lines(learners, grid)
            rows = 8 if options.quick else ROWS
            sft[size] = {side: learners.sft(side, rows) / TERA for side in ("padded", "packed")}
        chosen = passes_of(size)
        for one in chosen[1:2] if options.quick else chosen:
            found = peak(one)
            memory.append({"size": size, "pass": one.name, **found, "plan": plan_of(one)})
            print(f"{size}, {one.name}: {found['peak'] / GIB:.1f} GiB", flush=True)
    report(lines, sft, memory, options.quick)


def report(
    lines: list[dict[str, Any]],
    sft: dict[str, dict[str, float]],
    memory: list[dict[str, Any]],
    quick: bool,
) -> None:
    """Print the tables and the JSON line."""
    columns: tuple[str, ...] = (
        "size",
        "group",
        "tiles",
        "completion",
        "prompt",
        "stock_tflop",
        "ours_tflop",
        "ratio",
    )
    columns += ("prefill_tflop", "cached_tflop")
    show(
        "A learner step of one group, TFLOP: stock TRL and ours; prefill without and with a prefix cache",
        [column.replace("_", " ") for column in columns],
        [[line[column] for column in columns] for line in lines],
    )
    show(
        "An SFT update of the documented mixture, TFLOP",
        ("size", "padded", "packed", "ratio"),
        [(size, one["padded"], one["packed"], one["padded"] / one["packed"]) for size, one in sft.items()],
    )
    kinds = ("weights", "optimizer", "gradients", "activations", "logits", "buffers", "step", "peak", "plan")
    show(
        "Peak memory of a rank, GiB",
        ("size", "pass", *kinds),
        [(one["size"], one["pass"], *(one.get(kind, 0) / GIB for kind in kinds)) for one in memory],
    )
    emit("realsize", ratio=lines[0]["ratio"], quick=quick, learner=lines, sft=sft, memory=memory)


if __name__ == "__main__":
    main()
