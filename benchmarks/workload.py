"""Shared work of the rollout and step benchmarks: random cores, prompts with pictures of noise, an RL stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

from core.checkpoint.new import new_core, plan_core
from core.model.sizes import SMALL
from core.model.tiny import TinySize, build_tiny
from core.processes import how_it_ended, last_lines
from rl.rollout.config import PoolConfig

WORDS = (
    *("compute", "A", "B", "plus", "minus", "digit", "cell", "question"),
    *("".join(letters) for letters in islice(product("ABCDEFGHIJKLMN", repeat=3), 2328)),
)
"""Makes a vocabulary of 2,374 tokens, with the chat tokens. With it, a random core rarely ends a turn. The size is in
proportion (151,936 / 64) to cores with SAIL-VL2-2B's widths divided by 16 and layers by 4."""
TINY_WORDS = 560
"""Vocabulary of the tiny core. Its output layer then has a fifth of the language model's parameters, as in the 2B."""
TEMPERATURE = 0.7
READY = "ready"
SIZES: Mapping[str, TinySize] = {"tiny": TinySize(text_layers=2), "mid": SMALL["mid"]}
"""`tiny` is the demo's architecture without one layer; `mid` has tiles of real size: 448 px, 256 tokens each."""


def on_gpu() -> bool:
    """Whether the benchmarks use SAIL-VL2-2B's shapes in bf16 on a GPU."""
    import torch

    return torch.cuda.is_available()


def random_core(path: Path, size: str = "tiny") -> Path:
    """A core with random weights, which rarely ends its turn early; core.model.sizes has the real sizes."""
    if size in SIZES:
        words = WORDS[:TINY_WORDS] if size == "tiny" else WORDS
        return build_tiny(path, words=words, seed=0, size=SIZES[size])
    return new_core(plan_core(size, path, words=WORDS), path)


def pool_of(**fields: Any) -> PoolConfig:
    """Rollout servers beside the learner, on the same GPU or on the CPU."""
    if on_gpu():
        fields = {"device": "gpu", "dtype": "bfloat16", "gpu_memory_utilization": 0.3, **fields}
    return PoolConfig(**fields)


def learner_settings() -> dict[str, Any]:
    """A stage's `learner` on this machine."""
    return {"dtype": "bfloat16", "gradient_checkpointing": True} if on_gpu() else {}


def records(count: int, first: int = 0, side_px: int = 56, images: int = 1) -> list[dict[str, Any]]:
    """Prompts with distinct pictures of noise, so that caches cannot replace the engine's work."""
    import numpy as np
    from PIL import Image

    rows: list[dict[str, Any]] = []
    for number in range(first, first + count):
        noise = np.random.default_rng(number)
        pictures = [noise.integers(0, 255, (side_px, side_px, 3), dtype=np.uint8) for _ in range(images)]
        rows.append(
            {
                "id": f"row-{number}",
                "images": [Image.fromarray(pixels) for pixels in pictures],
                "question": f"question {number}",
                "answer": "7",
                "chain": None,
                "response": None,
                "mode": "think",
                "verifier": "number",
                "source": "benchmark",
                "meta": {},
            }
        )
    return rows


def rl_stage(
    *, batches: int, prompts: int, group: int, tokens: int, rows_per_pass: int = 64
) -> dict[str, Any]:
    """An RL stage on the set `rl` that trains on every sampled group, so that each step has the same work."""
    return {
        "data": [{"set": "rl"}],
        "rewards": [{"name": "answer", "use": "answer", "weight": 1.0}],
        "algorithm": {"clip_low": 0.2, "clip_high": 0.28, "mask_truncated": False},
        "rollout": {
            "prompts_per_batch": prompts,
            "group_size": group,
            "max_completion_tokens": tokens,
            "temperature": TEMPERATURE,
        },
        "dynamic_sampling": {"max_rounds": 0},
        "batches": batches,
        "mini_batch": prompts * group,
        "optim": {"learning_rate": 1e-5, "micro_batch_size": rows_per_pass},
        "learner": learner_settings(),
        "parity": {"bound": 0.5 if on_gpu() else 0.01},
        "watch": {"stop_on": []},
    }


def train_rl(job: Mapping[str, Any]) -> None:
    """Run an RL stage in this process, a `Child` that receives the servers' URLs. Keys of `job`: stage, model, out,
    data, pool (JSON)."""
    from chain.worker import keep_engine_out
    from core.strict import parse
    from rl.config import RLConfig
    from rl.job import ServedJob

    keep_engine_out()
    import deepspeed  # noqa: F401

    import rl.trainer  # noqa: F401
    from rl.rollout.weights import weights_folder
    from rl.train import train

    urls = wait_for_the_word()
    with weights_folder(None) as weights:
        train(
            parse(RLConfig, job["stage"], "benchmark"),
            ServedJob(
                stage="benchmark",
                model=Path(job["model"]),
                out=Path(job["out"]),
                sets={"rl": Path(job["data"])},
                pool=PoolConfig.model_validate_json(job["pool"]),
                urls=urls,
                weights=weights,
            ),
        )


def child(module: str, option: str, job: Mapping[str, Any]) -> list[str]:
    """The command line of a benchmark's child process."""
    return [sys.executable, "-P", "-m", module, option, json.dumps(job)]


def environment(threads: int = 1) -> dict[str, str]:
    """Environment of rollout servers and learners, equal on all sides."""
    from chain.ranks import environment as learner_environment
    from rl.rollout.command import environment as server_environment

    return learner_environment(threads) | server_environment(pool_of(max_model_tokens=256, threads=threads))


class Child:
    """A process that imports its modules first and works on request, so that its start is not timed.

    Args:
        command: command line of a program that calls `wait_for_the_word` before it works.
        log: file for the output of the process.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.command, self.log = command, log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env=environment(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
            )

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()

    def wait_until_ready(self) -> None:
        """Wait until the process has imported its modules."""
        assert self._process.stdout is not None
        for line in self._process.stdout:  # imports print warnings
            if line.strip() == READY:
                return
        self._fail()

    def run(self, told: Any = None) -> None:
        """Send the task and wait for the process to end. Raises RuntimeError with the end of its log if it fails."""
        self._process.communicate(f"{json.dumps(told)}\n")
        if self._process.returncode:
            self._fail()

    def _fail(self) -> None:
        self._process.kill()
        code = self._process.wait()
        raise RuntimeError(f"{' '.join(self.command[:5])} {how_it_ended(code)}:\n{last_lines(self.log)}")


def wait_for_the_word() -> Any:
    """In a `Child`: report that the imports are done, and wait for the task. Prints go to the log."""
    answer = os.dup(1)
    os.dup2(2, 1)
    os.write(answer, f"{READY}\n".encode())
    os.close(answer)
    word = sys.stdin.readline()
    if not word:
        raise SystemExit("the benchmark has ended")
    return json.loads(word)
