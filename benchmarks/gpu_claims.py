"""The checks of benchmarks.gpu_check: each function writes the lines of one check.

`tiny` selects a core and shapes that a CPU computes in seconds.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check import Lines
from benchmarks.learner import (
    QUICK,
    SAIL_2B,
    Shape,
    Size,
    build_core,
    mfu,
    repeated,
    rows_of,
    step,
    trainer_of,
)

FLOAT32, BFLOAT16 = 1e-5, 2e-2
"""Bounds of relative differences. bfloat16 rounds each operation at 4e-3."""
RATIO, MFU = 3.0, 0.4
"""Targets at group 8, four tiles and 512 completion tokens of the 2B."""
AGREES = 0.1
"""Relative difference of peak memory from plan and from benchmarks.realsize."""


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance of `one` from `other`."""
    return float((one.float() - other.float()).norm() / other.float().norm())


# 1 Kernels


def kernels(lines: Lines, tiny: bool) -> None:
    """Shared-prefix attention and its gradients against float32 attention with a dense mask."""
    from rl.shared_prefix import attention
    from rl.shared_prefix.layout import PrefixGroup, PrefixLayout

    heads, width = (2, 32) if tiny else (16, 128)
    layouts = {
        "long prompt": PrefixLayout((PrefixGroup(96 if tiny else 3172, (16 if tiny else 512,) * 4),)),
        "two groups": PrefixLayout(
            (PrefixGroup(24 if tiny else 356, (9, 1, 40)), PrefixGroup(16 if tiny else 1124, (30,)))
        ),
    }
    kinds: dict[str, Callable[..., torch.Tensor]] = {"concatenated": attention._concatenated}
    if device() == "cpu":
        kinds["merged"] = lambda *given: attention._Merged.apply(*given)
        lines.skip("flex attention", "its backward pass needs a GPU")
    else:
        kinds["flex"] = attention._flex
        lines.skip("merged attention", "a CPU's kernel")
    for shape, layout in layouts.items():
        torch.manual_seed(0)
        states = torch.randn(4, 1, heads, layout.tokens, width, device=device())
        exact = _attended(_dense(layout), states)
        for kind, attend in kinds.items():
            for dtype, bound in ((torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)):
                if device() == "cuda" and dtype == torch.float32:
                    bound = BFLOAT16 / 10  # TF32 where torch allows it
                found = _attended(
                    lambda *given, run=attend, at=layout: run(*given, at, width**-0.5), states.to(dtype)
                )
                worst = max(apart(one, other) for one, other in zip(found, exact, strict=True))
                lines.at_most(f"{kind}, {shape}, {str(dtype)[6:]}: output and gradients", worst, bound)
    if not has("flash_attn"):
        lines.skip("flash attention of packed SFT rows", "flash_attn is not installed; sdpa takes its place")


def _dense(layout: Any) -> Callable[..., torch.Tensor]:
    places = torch.arange(layout.tokens, device=device())
    mask = layout.sees(device())(None, None, places[:, None], places[None, :])

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        scores = (query @ key.mT) * query.shape[-1] ** -0.5
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(1, 2)

    return attend


def _attended(attend: Callable[..., torch.Tensor], states: torch.Tensor) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value; `states` are these three and the output's gradient."""
    inputs = [one.clone().requires_grad_() for one in states[:3]]
    out = attend(*inputs)
    out.backward(states[3].transpose(1, 2))
    return [out.detach(), *(one.grad for one in inputs if one.grad is not None)]


# 2 Learner


def learner(lines: Lines, tiny: bool) -> None:
    """A GRPO step of a random 2B: ours against stock TRL."""
    size: Size = QUICK if tiny else SAIL_2B
    headline = Shape("8x", 8, 4, 12 if tiny else 108, 8 if tiny else 512, groups=1)
    nothing_shared = Shape("no groups", 2, 1, 4, 8 if tiny else 2048, groups=1)
    model, processor = build_core(size)
    for shape, bound in ((headline, RATIO), (nothing_shared, 1.0)):
        rows = rows_of(shape, size, processor)
        with tempfile.TemporaryDirectory() as folder:
            sides = {side: trainer_of(side, model, processor, rows, folder) for side in ("stock", "shared")}
            losses = {side: step(*both) for side, both in sides.items()}
            lines.at_most(f"{shape.name}: losses differ", abs(losses["stock"] - losses["shared"]), 5e-2)
            peaks = {side: _step_peak(*both) for side, both in sides.items()}
            seconds = {side: _fastest(repeated(*both), 1 if tiny else 3) for side, both in sides.items()}
        tokens = shape.group_size * shape.completion * shape.groups
        ratio = seconds["stock"] / seconds["shared"]
        lines.at_least(f"{shape.name}: times stock TRL's speed", ratio, bound, on_gpu=True)
        lines.note(f"{shape.name}: seconds of a step, stock", seconds["stock"])
        lines.note(f"{shape.name}: seconds of a step, ours", seconds["shared"])
        lines.note(f"{shape.name}: completion tokens/s, ours", tokens / seconds["shared"])
        if peaks["stock"]:
            lines.at_most(
                f"{shape.name}: peak over stock's", peaks["shared"] / peaks["stock"], 1.0, on_gpu=True
            )
        else:
            lines.skip(f"{shape.name}: peak over stock's", "only CUDA's allocator counts it")
        share = mfu(size, shape, seconds["shared"])
        if share is None:
            lines.skip(f"{shape.name}: MFU", "the device's peak speed is unknown")
        elif shape is headline:
            lines.at_least(f"{shape.name}: MFU", share, MFU, on_gpu=True)
        else:
            lines.note(f"{shape.name}: MFU", share)
    del model, sides
    _peak_lines(lines, "2b", tiny, lora=False)


def _fastest(run: Callable[[int], None], times: int) -> float:
    best = float("inf")
    for turn in range(times):
        started = time.perf_counter()
        run(turn)
        best = min(best, time.perf_counter() - started)
    return best


def _step_peak(trainer: Any, inputs: dict[str, Any]) -> int:
    """Bytes of CUDA memory at the peak of a step; 0 on a CPU."""
    if device() == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    step(trainer, inputs)
    return torch.cuda.max_memory_allocated()


def _peak_lines(lines: Lines, size: str, tiny: bool, *, lora: bool) -> None:
    """One update with checkpointing and an optimizer: its peak against the plan and against benchmarks.realsize."""
    from benchmarks.realsize import peak, plan_of

    one = _pass(size, tiny, lora)
    seconds, measured = _update(one)
    lines.note("an update with the optimizer's step, seconds", seconds)
    said = peak(one)["peak"]
    if device() == "cpu":
        lines.note("peak by realsize, bytes", said)
        lines.skip("peak against plan and realsize", "only CUDA's allocator counts it")
        return
    lines.note("peak, GiB", measured / 2**30)
    lines.at_most("peak against realsize, relative difference", abs(measured / said - 1), AGREES)
    lines.at_most("peak against the plan, relative difference", abs(measured / plan_of(one) - 1), AGREES)


def _pass(size: str, tiny: bool, lora: bool) -> Any:
    """The pass of one rank: a group of 8 with 4 tiles and 512 completion tokens."""
    from benchmarks.realsize import RECIPES, Pass
    from benchmarks.realsize_passes import Batch
    from chain.recipe import load_recipe
    from core.training.config import DeepSpeedConfig, LoRAConfig

    root = Path(__file__).parents[1]
    stage = load_recipe(root / RECIPES[size]).rlvr
    assert stage
    changes: dict[str, Any] = {"processes": 1, "deepspeed": DeepSpeedConfig(zero_stage=2)}
    if tiny:
        changes["deepspeed"] = DeepSpeedConfig(zero_stage=2, bucket_elements=1000)
    if lora:
        changes = {"processes": 1, "deepspeed": None, "lora": LoRAConfig(r=64)}
    batch = Batch(1, 2, 20, 1, 6) if tiny else Batch(1, 8, 4 * 256 + 100, 4, 512)
    one = Pass("update", "tiny" if tiny else size, stage, batch, accumulates=False)
    return one.with_learner("update", **changes)


def _update(one: Any) -> tuple[float, int]:
    """Train one update for real; returns seconds and the peak bytes of CUDA memory."""
    from benchmarks.fake import Memory
    from benchmarks.realsize_passes import Rank, fake_core, rl_batch, rl_trainer, rl_update

    torch.manual_seed(0)
    with torch.device(device()):
        core, processor = fake_core(one.size)
        trainer = rl_trainer(one.stage, core, processor)
        rank = Rank(trainer.model, one.learner, one.accumulates, Memory())
        inputs = rl_batch(trainer, one.batch)
        if device() == "cuda":
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        rl_update(trainer, inputs)
        rank.step()
        if device() == "cpu":
            return time.perf_counter() - started, 0
        torch.cuda.synchronize()
        return time.perf_counter() - started, torch.cuda.max_memory_allocated()


# 3 Packing


def packing(lines: Lines, tiny: bool) -> None:
    """Packed SFT against padded SFT of the 2B, on the documented mixture."""
    from benchmarks.packing import HEADLINE, Bench

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), updates=1, rows=HEADLINE if tiny else 32)
        found = bench.compare(HEADLINE, 1)
    lines.at_most("losses of packed and padded updates differ", found["loss_diff"], BFLOAT16)
    lines.at_least("times padded SFT's speed", found["ratio"], 1.0, on_gpu=True)
    lines.note("tokens of signal per second, packed", found["packed"])
    if "packed_peak_gib" in found:
        lines.at_most("peak over padded's", found["packed_peak_gib"] / found["stock_peak_gib"], 1.0)


# 4 The chain, and 6 vLLM's engine


def chain(lines: Lines, tiny: bool) -> None:
    """The tiny chain from the core to RLVR with transformers' engine; the parity guard in bfloat16."""
    settings = {"servers.engine": "hf", "servers.dtype": "float32" if tiny else "bfloat16"}
    _run_chain(lines, "engine hf", settings, tiny)


def engine(lines: Lines, tiny: bool) -> None:
    """The same with vLLM: its CUDA graphs against the learner, sleep mode, weights by NCCL."""
    if not has("vllm"):
        lines.skip("vLLM's parity, sleep mode and NCCL weights", "vLLM is not installed")
        return
    if device() == "cpu":
        lines.skip("CUDA graphs, sleep mode and NCCL weights", "a GPU's")
        return
    shared = {"servers.share_gpus": "true", "servers.weights": "shm", "servers.gpu_memory_utilization": "0.3"}
    _run_chain(lines, "vLLM with CUDA graphs, asleep while training", shared, tiny)
    if torch.cuda.device_count() < 2:
        lines.skip("weights by NCCL", "two processes on one GPU cannot use NCCL; a second GPU is missing")
        return
    _run_chain(lines, "vLLM, weights by NCCL", {"servers.weights": "nccl", "servers.first_gpu": "1"}, tiny)


def _run_chain(lines: Lines, name: str, settings: Mapping[str, str], tiny: bool) -> None:
    """Run recipes/smoke up to RLVR with these settings, and read its parity and its loss."""
    bound = 0.01 if tiny else 0.5  # the bound of the recipes for bfloat16
    settings = {**settings, "servers.device": device() if device() == "cpu" else "gpu"}
    stages = ("basic_sft", "longcot_sft", "rlvr")
    if not tiny:
        settings |= {f"{stage}.learner.dtype": "bfloat16" for stage in stages} | {
            "rlvr.parity.bound": str(bound)
        }
    if not has("deepspeed"):
        lines.skip(f"{name}: under DeepSpeed", "DeepSpeed is not installed; plain PyTorch")
        settings |= {f"{stage}.learner.deepspeed": "null" for stage in stages}
    root = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        words = ["run", str(root / "recipes" / "smoke"), "--runs-dir", folder, "--until", "rlvr"]
        words += ["--set", *(f"{key}={value}" for key, value in settings.items())]
        done = subprocess.run(
            [sys.executable, "-P", "-m", "chain.cli.main", *words],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"{name}: {(done.stdout + done.stderr)[-3000:]}")
        text = (Path(folder) / "smoke" / "rlvr" / "metrics.jsonl").read_text(encoding="utf-8")
    metrics = [json.loads(line) for line in text.splitlines()]
    found = [
        line["parity/max_logprob_difference"] for line in metrics if "parity/max_logprob_difference" in line
    ]
    lines.at_most(f"{name}: largest difference of log-probabilities", max(found), bound)
    lines.at_least(f"{name}: updates", len(metrics), 1)


# 5 LoRA


def lora(lines: Lines, tiny: bool) -> None:
    """A LoRA step of the 8B."""
    _peak_lines(lines, "8b", tiny, lora=True)


# 7 Rounding


def rounding(lines: Lines, tiny: bool) -> None:
    """Gradients in bfloat16 against float32: ours are no further away than stock TRL's."""
    size = (
        QUICK
        if tiny
        else replace(SAIL_2B, vision=(1536, 2, 12, 4096), text=(2048, 4, 16, 6144), vocabulary=8192)
    )
    shape = Shape("rounding", 4, 2, 12, 16 if tiny else 128, groups=2)
    model, processor = build_core(size)
    model.float()
    rows = rows_of(shape, size, processor)
    exact, old = _gradients("stock", model, processor, rows)
    model.bfloat16()
    distance = {}
    for side in ("stock", "shared"):
        found, _ = _gradients(side, model, processor, rows, old)
        distance[side] = apart(found, exact)
        lines.note(f"distance of gradients from float32, {side}", distance[side])
    lines.at_most("our distance over stock's", distance["shared"] / distance["stock"], 1.0, on_gpu=True)


def _gradients(
    side: str, model: Any, processor: Any, rows: Any, old: Mapping[str, Any] | None = None
) -> tuple[torch.Tensor, dict[str, Any]]:
    """All gradients of one step as a vector on the CPU, and the old policy's values; `old` replaces them."""
    with tempfile.TemporaryDirectory() as folder, _own_type():
        trainer, inputs = trainer_of(side, model, processor, rows, folder)
        trainer.accelerator.native_amp = False
        given = {name: inputs[name] for name in ("old_per_token_logps", "importance_sampling_ratio")}
        step(trainer, {**inputs, **(old or {})})
    return torch.cat(
        [one.grad.flatten().float().cpu() for one in model.parameters() if one.grad is not None]
    ), given


@contextmanager
def _own_type() -> Iterator[None]:
    """Inside, products in float32 are exact: without TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
