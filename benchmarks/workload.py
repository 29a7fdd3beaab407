"""The work that the rollout and step benchmarks share: random cores, prompts with pictures of noise, an RL stage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = ("compute", "A", "B", "plus", "minus", "digit", "cell", "question")
TEMPERATURE = 0.7
SIZES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"text_layers": 2},
    "mid": {
        **{"image_px": 448, "vision_hidden": 256, "vision_layers": 6, "vision_mlp": 512},
        **{"text_hidden": 384, "text_layers": 8, "text_heads": 6, "text_head_dim": 64, "text_mlp": 1024},
    },
}
"""`tiny` is the demo's architecture; `mid` has about 18M parameters and real tiles: 448 px, 256 tokens each."""


def random_core(path: Path, size: str = "tiny") -> Path:
    """A core with random weights, which never ends its turn early but by chance."""
    from core.tiny import TinySize, build_tiny

    return build_tiny(path, words=WORDS, seed=0, size=TinySize.model_validate(SIZES[size]))


def records(count: int, first: int = 0, side_px: int = 56, images: int = 1) -> list[dict[str, Any]]:
    """Prompts whose pictures are noise that no other prompt has, so that no cache answers in an engine's place."""
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
    """An RL stage on the set `rl` in which every sampled group is trained on: the work is the same every step."""
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
        "parity": {"bound": 0.01},
        "watch": {"stop_on": []},
    }


def train_rl(job: Mapping[str, Any]) -> None:
    """Run an RL stage in this process; job: stage, model, out, data, urls, pool (JSON)."""
    from core.strict import parse
    from recipes.worker import keep_engine_out
    from rl.config import PoolConfig, RLConfig

    keep_engine_out()
    from rl.rollout.weights import weights_folder
    from rl.train import train

    with weights_folder(None) as weights:
        train(
            parse(RLConfig, job["stage"], "benchmark"),
            model=Path(job["model"]),
            out=Path(job["out"]),
            seed=0,
            sets={"rl": Path(job["data"])},
            pool=PoolConfig.model_validate_json(job["pool"]),
            urls=job["urls"],
            weights=weights,
        )


def child(module: str, option: str, job: Mapping[str, Any]) -> list[str]:
    """Command line of this benchmark's own child process."""
    return [sys.executable, "-P", "-m", module, option, json.dumps(job)]


def environment(threads: int = 1) -> dict[str, str]:
    """What a rollout server gets, and a learner: so that two sides differ in nothing else."""
    from recipes.launch import environment as learner_environment
    from rl.config import PoolConfig
    from rl.rollout.server import environment as server_environment

    return learner_environment(threads) | server_environment(
        PoolConfig(max_model_tokens=256, threads=threads)
    )


def run_child(command: Sequence[str], log: Path) -> None:
    """Run to its end, or raise with the end of its log."""
    with log.open("ab") as output:
        done = subprocess.run(command, env=environment(), stdout=output, stderr=output, check=False)
    if done.returncode:
        end = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
        raise RuntimeError(f"{' '.join(command[:5])} ended with code {done.returncode}:\n{end}")
