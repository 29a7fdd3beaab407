"""Our GRPO learner step against stock TRL's, on the same model, batch and completions.

    python -P -m benchmarks.learner [--quick]

A step consists of the pass for old log-probabilities and of the loss with its backward pass. The optimizer is left out,
as it is equal on both sides. `ratio` counts both passes on both sides. With one update per rollout batch, our learner
skips the first pass, while TRL with an engine still runs it (`ratio_one_update`). All completions of a shape have the
same length, so that padding favours no side.

Loss and gradients of both sides are compared before timing. Both sides run in one process, in alternating order, on one
CPU thread or one GPU (bf16, SAIL-VL2-2B's shapes with random weights). Peak memory is measured in a separate process
per side. MFU, on known GPUs, is the step's work without repetition, divided by the GPU's peak over the step's time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from benchmarks.common import alternate, bars, emit, show
from chain.worker import keep_engine_out

REPEATS = 5
SIDES = ("stock", "shared")
ONE_UPDATE = "shared, one update"


@dataclass(frozen=True)
class Shape:
    """Groups of completions of the same length."""

    name: str
    group_size: int
    images: int
    """Tiles in the prompt. The core's size determines the tokens per tile."""
    text: int
    """Text tokens of the prompt."""
    completion: int
    groups: int = 2
    clip: bool = False
    """Whether the tiles are the frames of a video."""


@dataclass(frozen=True)
class Size:
    """The size of a core; `vision` and `text` are (hidden, layers, heads, mlp)."""

    image_px: int
    vision: tuple[int, int, int, int]
    text: tuple[int, int, int, int]
    kv_heads: int
    head_dim: int
    vocabulary: int

    @property
    def tile_tokens(self) -> int:
        return (self.image_px // 28) ** 2

    def step_flops(self, shape: Shape) -> float:
        """Floating-point operations of a step that computes every prompt and image once.

        Each weight costs two operations per token in each of four passes: old log-probabilities, forward, and backward,
        which counts twice. Attention costs two products over the keys that a token attends to. Norms and softmax are
        left out.
        """
        prompt = shape.images * (self.tile_tokens + 2) + max(0, shape.text - 2 * shape.images)
        scored = shape.group_size * shape.completion
        hidden, layers, heads, mlp = self.text
        per_token = hidden * self.head_dim * 2 * (heads + self.kv_heads) + 3 * hidden * mlp
        seen = prompt**2 / 2 + shape.group_size * (shape.completion * prompt + shape.completion**2 / 2)
        text = layers * ((prompt + scored) * per_token + 2 * seen * heads * self.head_dim)
        wide, blocks, _, narrow = self.vision
        patches = 4 * self.tile_tokens
        tower = blocks * (patches * (4 * wide**2 + 3 * wide * narrow) + 2 * patches**2 * wide)
        adapter = self.tile_tokens * (4 * wide * hidden + hidden**2)
        macs = text + scored * hidden * self.vocabulary + shape.images * (tower + adapter)
        return 4 * 2 * macs * shape.groups


SMALL = Size(112, (128, 4, 4, 256), (192, 4, 4, 576), 2, 48, 2048)
PROOF = Size(448, (128, 6, 4, 256), (192, 6, 4, 576), 2, 48, 2048)
QUICK = Size(112, (96, 2, 4, 192), (128, 3, 4, 256), 2, 32, 512)
# Equal to core.model.sizes, which tests/test_benchmarks.py checks.
SAIL_2B = Size(448, (1536, 24, 12, 4096), (2048, 28, 16, 6144), 8, 128, 151_936)

PROOF_SHAPE = Shape("proof", 8, images=2, text=43, completion=128, groups=1)
RATIOS = {  # prompt : completion, with 16 tokens per image
    "8:1": (12, 64, 32),
    "4:1": (12, 64, 64),
    "1:1": (6, 32, 128),
    "1:4": (2, 32, 256),
}
SHAPES = (
    *(
        Shape(f"{ratio} x{group}", group, images, text, completion, groups=2)
        for ratio, (images, text, completion) in RATIOS.items()
        for group in (4, 8, 16)
    ),
    Shape("a clip of 16 frames x8", 8, images=16, text=112, completion=128, groups=2, clip=True),
    Shape("no groups", 1, images=2, text=32, completion=256, groups=8),  # nothing to share
)
GPU_SHAPES = tuple(
    Shape(f"{ratio} x{group}", group, images, text, completion, groups=1)
    for ratio, (images, text, completion) in {
        "8:1": (8, 0, 256),
        "4:1": (8, 0, 512),
        "1:1": (4, 0, 1024),
        "1:4": (1, 0, 1024),
    }.items()
    for group in (4, 8, 16)
)


PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}
"""Part of a GPU's name -> dense bf16 operations per second. Source: NVIDIA's data sheets (SXM)."""


def cases(quick: bool, gpu: bool) -> list[tuple[Size, Shape]]:
    """The shapes to measure. The first is the headline."""
    if gpu:
        return [(SAIL_2B, shape) for shape in (PROOF_SHAPE, *(GPU_SHAPES[1:2] if quick else GPU_SHAPES))]
    if quick:
        few = [shape for shape in SHAPES if shape.name in ("8:1 x8", "1:1 x4", "1:4 x4")]
        return [(QUICK, shape) for shape in few]
    return [(PROOF, PROOF_SHAPE), *((SMALL, shape) for shape in SHAPES)]


def build_core(size: Size) -> tuple[Any, Any]:
    """A core with random weights in memory, and its processor."""
    import torch

    from core import SailVL2ForConditionalGeneration, TinySize, register
    from core.model.sizes import blueprint
    from core.model.tiny import tiny_config, tiny_processor
    from core.model.tokenizer import build_word_tokenizer

    register()
    gpu = torch.cuda.is_available()
    if size == SAIL_2B:
        drawn = blueprint("2b", words=["A"])
        torch.manual_seed(0)
        with torch.device("cuda" if gpu else "cpu"):
            return SailVL2ForConditionalGeneration(drawn.config).bfloat16(), drawn.processor
    (vision_hidden, vision_layers, vision_heads, vision_mlp) = size.vision
    (text_hidden, text_layers, text_heads, text_mlp) = size.text
    tiny = TinySize(
        vision_hidden=vision_hidden,
        vision_layers=vision_layers,
        vision_heads=vision_heads,
        vision_mlp=vision_mlp,
        image_px=size.image_px,
        text_hidden=text_hidden,
        text_layers=text_layers,
        text_heads=text_heads,
        text_kv_heads=size.kv_heads,
        text_head_dim=size.head_dim,
        text_mlp=text_mlp,
        max_tokens=8192,
        initializer_range=0.02,
    )
    tokenizer = build_word_tokenizer(["A"])
    config = tiny_config(tokenizer, tiny)
    config.text_config.vocab_size = size.vocabulary
    torch.manual_seed(0)
    with torch.device("cuda" if gpu else "cpu"):
        model = SailVL2ForConditionalGeneration(config)
    return (model.bfloat16() if gpu else model.float()), tiny_processor(tokenizer, tiny)


def rows_of(shape: Shape, size: Size, processor: Any) -> list[dict[str, Any]]:
    """Rows for TRL: pictures of noise, random tokens, arbitrary rewards and sampling log-probabilities."""
    import numpy as np
    import torch
    from PIL import Image

    from core.model.pictures import Picture
    from core.model.tokenizer import IMAGE_END, IMAGE_START, token_id
    from core.model.videos import Caps, Clip, tiles

    tokenizer = processor.tokenizer
    image = [processor.image_token_id] * size.tile_tokens
    start, end = token_id(tokenizer, IMAGE_START), token_id(tokenizer, IMAGE_END)
    letter = token_id(tokenizer, "A")
    typical = -math.log(size.vocabulary)
    noise, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
    rows = []
    for _ in range(shape.groups):
        side = size.image_px
        images = [
            Image.fromarray(noise.integers(0, 255, (side, side, 3), dtype=np.uint8))
            for _ in range(shape.images)
        ]
        if shape.clip:
            clip = Clip.of_frames([Picture.of(image) for image in images], Caps(frames=shape.images))
            images = tiles(clip.frames, side)
        text = [letter] * max(0, shape.text - 2 * shape.images)
        prompt = [token for _ in images for token in (start, *image, end)] + text
        for _ in range(shape.group_size):
            completion = torch.randint(letter, letter + 8, (shape.completion,), generator=generator).tolist()
            completion[-1] = tokenizer.eos_token_id
            rows.append(
                {
                    "prompt": [{"role": "user", "content": "A"}],
                    "images": images,
                    "prompt_ids": prompt,
                    "completion_ids": completion,
                    "logprobs": (torch.randn(shape.completion, generator=generator) / 4 + typical).tolist(),
                    "score": float(torch.rand((), generator=generator)),
                }
            )
    return rows


def trainer_of(
    side: str, model: Any, processor: Any, rows: Sequence[dict[str, Any]], folder: str
) -> tuple[Any, Any]:
    """TRL's or our trainer of this model, and the batch that it prepares from the rows.

    The batch serves two updates, so the step needs old log-probabilities. On side `ONE_UPDATE`, it serves one update.
    """
    import torch
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from rl.shared_prefix.passes import SharedPasses
    from rl.trainer import RolloutTrainer

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    gpu = torch.cuda.is_available()

    def hand_over(prompts, trainer):
        return {name: [row[name] for row in rows] for name in ("prompt_ids", "completion_ids", "logprobs")}

    class Given:
        """A feed that returns these rows."""

        def rows(self, trainer: Any, count: int) -> list[dict[str, Any]]:
            return list(rows)

    def score(score, **_):
        return score

    trainer: Any = (
        partial(GRPOTrainer, rollout_func=hand_over)
        if side == "stock"
        else partial(RolloutTrainer, feed=Given(), passes=SharedPasses)
    )(
        model=model,
        processing_class=processor,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * len(rows)}),
        reward_funcs=[score],
        args=GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=len(rows),
            num_generations=2,
            num_iterations=1 if side == ONE_UPDATE else 2,
            max_completion_length=len(rows[0]["completion_ids"]),
            use_cpu=not gpu,
            bf16=gpu,
            dataloader_pin_memory=False,
            gradient_checkpointing=False,
            vllm_importance_sampling_mode="token_truncate",  # TRL's default drops whole rows as made up as these
            report_to="none",
            disable_tqdm=True,
        ),
    )
    trainer.use_vllm, trainer._last_loaded_step = True, 0  # completions that were sampled elsewhere
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer, trainer._generate_and_score_completions(list(rows))


def step(trainer: Any, inputs: dict[str, Any]) -> float:
    """One step: old log-probabilities if the batch needs them, loss and gradients. Returns the loss."""
    import torch

    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    images = {name: inputs[name] for name in ("pixel_values", "num_images", "num_tiles") if name in inputs}
    trainer.model.zero_grad()
    if "old_per_token_logps" in inputs:
        with torch.no_grad():
            trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, mask, inputs["completion_ids"].shape[1], batch_size=len(ids), **images
            )
    with trainer.accelerator.autocast():
        loss = trainer._compute_loss(trainer.model, inputs)
    trainer.accelerator.backward(loss)
    return float(loss.detach())


def repeated(trainer: Any, inputs: dict[str, Any]) -> Callable[[int], None]:
    """A side for `alternate`: one step, until the device has finished."""
    import torch

    def run(_: int) -> None:
        step(trainer, inputs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def checked_equal(name: str, model: Any, sides: Mapping[str, tuple[Any, dict[str, Any]]]) -> float:
    """The largest relative difference of gradients of `model` between a side and stock.

    Raises AssertionError if a side's gradients or loss differ by more than rounding.
    """
    import torch

    results = {}
    for side, (trainer, inputs) in sides.items():
        loss = step(trainer, inputs)
        results[side] = loss, [p.grad.float().cpu() for p in model.parameters() if p.grad is not None]
    stock_loss, stock = results.pop("stock")
    length = sum(float(gradient.square().sum()) for gradient in stock) ** 0.5
    bound = 5e-2 if torch.cuda.is_available() else 1e-5  # bf16 rounds at 4e-3 in every operation
    largest = 0.0
    for side, (loss, gradients) in results.items():
        apart = sum(float((a - b).square().sum()) for a, b in zip(gradients, stock, strict=True)) ** 0.5
        largest = max(largest, apart / length)
        if not apart / length <= bound or abs(loss - stock_loss) > bound:
            raise AssertionError(
                f"{name}, {side}: gradients differ by {apart / length:.1e}, losses {loss} {stock_loss}"
            )
    return largest


def mfu(size: Size, shape: Shape, seconds: float) -> float | None:
    """Share of the GPU's peak that a step of `seconds` reaches; None on a CPU or an unlisted GPU."""
    import torch

    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
    return peak and size.step_flops(shape) / seconds / peak


def compare(size: Size, shape: Shape, folder: str) -> dict[str, Any]:
    """Check that both sides agree, then time them in alternating order."""
    model, processor = build_core(size)
    rows = rows_of(shape, size, processor)
    sides = {}
    for side in (*SIDES, ONE_UPDATE):
        # The sides share one model: a later trainer's fused head wraps the earlier head, and all sides call it.
        sides[side] = trainer_of(side, model, processor, rows, folder)
    difference = checked_equal(shape.name, model, sides)
    seconds = alternate({name: repeated(*side) for name, side in sides.items()}, REPEATS)
    tokens = sum(len(row["completion_ids"]) for row in rows)
    return {
        **asdict(shape),
        "prompt": len(rows[0]["prompt_ids"]),
        **{f"{name}_s": round(seconds[name], 4) for name in SIDES},
        "ratio": round(seconds["stock"] / seconds["shared"], 2),
        "ratio_one_update": round(seconds["stock"] / seconds[ONE_UPDATE], 2),
        "grad_rel_diff": difference,
        **{f"{name}_tokens_per_s": round(tokens / seconds[name]) for name in SIDES},
        **{f"{name}_mfu": mfu(size, shape, seconds[name]) for name in SIDES},
    }


def peak_mib(side: str, size: Size, shape: Shape) -> float:
    """Peak memory of one step above the memory before the step, in MiB. Call this in a fresh process."""
    import torch

    model, processor = build_core(size)
    with tempfile.TemporaryDirectory() as folder:
        trainer, inputs = trainer_of(side, model, processor, rows_of(shape, size, processor), folder)
        if torch.cuda.is_available():
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(trainer, inputs)
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the high-water mark to the current resident memory
        before_kib = status_kib("VmRSS")
        step(trainer, inputs)
        return (status_kib("VmHWM") - before_kib) / 2**10


def status_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def measured_memory(index: int, quick: bool, at_once: int) -> dict[str, int]:
    """`peak_mib` of both sides on case number `index`, each in a child process; `at_once` children run concurrently."""
    with ThreadPoolExecutor(at_once) as children:
        return dict(
            zip(SIDES, children.map(lambda side: _peak_of_child(side, index, quick), SIDES), strict=True)
        )


def _peak_of_child(side: str, index: int, quick: bool) -> int:
    command = [sys.executable, "-P", "-m", "benchmarks.learner", "--memory", side, "--case", str(index)]
    done = subprocess.run(
        command + (["--quick"] if quick else []), capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise RuntimeError(f"measuring {side}'s memory failed:\n{done.stderr[-2000:]}")
    return round(json.loads(done.stdout.splitlines()[-1])["peak_mib"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small core, three shapes, within a minute")
    parser.add_argument("--memory", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    keep_engine_out()

    import torch

    torch.set_num_threads(1)
    gpu = torch.cuda.is_available()
    chosen = cases(options.quick, gpu)
    if options.memory:
        print(json.dumps({"peak_mib": peak_mib(options.memory, *chosen[options.case])}))
        return
    lines = []
    for size, shape in chosen:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(compare(size, shape, folder))
        print(f"{shape.name}: {lines[-1]['ratio']:.2f}", flush=True)
    columns: tuple[str, ...] = (
        "group_size",
        "prompt",
        "completion",
        "stock_s",
        "shared_s",
        "ratio",
        "ratio_one_update",
    )
    columns += ("grad_rel_diff", "stock_tokens_per_s", "shared_tokens_per_s")
    columns += ("stock_mfu", "shared_mfu") if gpu else ()
    show(
        "A learner step: stock TRL and ours (shared); tokens are completion tokens",
        ("shape", *(column.replace("_", " ") for column in columns)),
        [(line["name"], *(line[column] for column in columns)) for line in lines],
    )
    print(
        bars(
            "Learner step, times faster than stock TRL", "ratio", {one["name"]: one["ratio"] for one in lines}
        )
    )
    # the headline, and the shape with the smallest gain
    lowest = min(range(len(lines)), key=lambda index: lines[index]["ratio"])
    for index in [0] if options.quick else sorted({0, lowest}):
        peaks = lines[index]["peak_mib"] = measured_memory(index, options.quick, at_once=1 if gpu else 2)
        print(f"{lines[index]['name']}: peak of a step, MiB: stock {peaks['stock']}, ours {peaks['shared']}")
    emit(
        "learner",
        ratio=lines[0]["ratio"],
        ratio_one_update=lines[0]["ratio_one_update"],
        lowest=lines[lowest]["ratio"],
        grad_rel_diff=max(line["grad_rel_diff"] for line in lines),
        device=torch.cuda.get_device_name() if gpu else "cpu",
        quick=options.quick,
        shapes=lines,
    )


if __name__ == "__main__":
    main()
