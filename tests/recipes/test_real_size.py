"""SAIL-VL2-2B's real shape, random weights, no GPU: the whole way that a user's core takes, below 20 GiB of memory."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import psutil
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open

from core.checkpoint.shards import Tensors
from core.files import read_json, read_jsonl, write_json
from corpus.records import write_records

from ..core.serving import ONE_PROCESS, ask, picture, user, vllm_server
from .memory import MemoryWatch

LIMIT = 20 * 2**30
DISK = 30 * 10**9
"""Five checkpoints of 5 GB lie there at the worst moment."""
THREADS = "2"
MAX_TOKENS = 512
"""Of prompt and completion; a tile of 448 px is 256."""

REWARD = '''
class EveryOther:
    """1 for every other completion: a random policy's answers are all wrong, and equal rewards move nothing."""

    def batch(self, completions, examples):
        return [float(at % 2) for at in range(len(completions))]
'''
LEARNER = {
    "dtype": "bfloat16",
    "deepspeed": None,
    "gradient_checkpointing": True,
    "threads": int(THREADS),
    "lora": {"r": 4},
}
OPTIM = {"learning_rate": 1e-4, "schedule": "constant", "micro_batch_size": 1}
RECIPE = {
    "name": "real",
    "wandb": {"mode": "disabled"},
    "servers": {
        "dtype": "bfloat16",
        "max_model_tokens": MAX_TOKENS,
        "max_sequences": 2,
        "kv_cache_gib": 1,
        "max_images": 1,
        "threads": int(THREADS),
        "startup_timeout_s": 900,
        "weights_dir": "weights",  # on the disk: in shared memory they would take 4.5 GiB until the next update
    },
    "basic_sft": {
        "max_tokens": MAX_TOKENS,
        "learner": LEARNER,
        "phases": [
            {
                "name": "only",
                "data": [{"set": "rows"}],
                "optim": {**OPTIM, "max_steps": 1, "global_batch_size": 1},
            }
        ],
    },
    "rlvr": {
        "data": [{"set": "rows"}],
        "rewards": [{"name": "other", "use": "every_other.py:EveryOther", "weight": 1.0}],
        "algorithm": {"clip_low": 0.2, "clip_high": 0.28, "mask_truncated": False},
        "rollout": {"prompts_per_batch": 1, "group_size": 2, "max_completion_tokens": 4},
        "dynamic_sampling": {"max_rounds": 0},
        "batches": 1,
        "mini_batch": 2,
        "optim": OPTIM,
        "learner": LEARNER,
        "parity": {"bound": 0.2, "sequences": 1, "tokens": 4},
        "self_test_rows": 0,
    },
}


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied whatever happens: failed tests' folders are kept, and these are large."""
    free, total = shutil.disk_usage(tmp_path).free, psutil.virtual_memory().total
    if free < DISK or total < LIMIT:
        pytest.skip(
            f"takes {DISK / 1e9:.0f} GB at {tmp_path} and {LIMIT / 2**30:.0f} GiB of memory; "
            f"there are {free / 1e9:.0f} GB and {total / 2**30:.0f} GiB"
        )
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
def test_a_2b_is_imported_served_trained_merged_and_exported_below_20_gib(place: Path) -> None:
    memory = MemoryWatch()
    with memory.step("new"):
        posttrain(place, "core", "new", "--size", "2b", "--layout", "released", "release")
    # One tile: vLLM tries the costliest image before it serves, and eleven tiles take minutes on a CPU.
    for name in ("config.json", "preprocessor_config.json"):
        write_json(place / "release" / name, {**read_json(place / "release" / name), "max_dynamic_patch": 1})
    with memory.step("import"):
        posttrain(place, "core", "import", "release", "native")

    with memory.step("one image question"):
        reply = answer(place / "native", place / "server.log")
    assert len(reply.choices[0].token_ids) == 4
    assert 256 < reply.usage.prompt_tokens < 300

    run_dir = place / "runs" / "real"
    write_recipe(place)
    with memory.step("one LoRA step of SFT"):
        posttrain(place, "run", "recipe", "--until", "basic_sft")
    assert adapter_moved(run_dir / "basic_sft" / "checkpoint" / "adapter")
    with memory.step("one LoRA step of GRPO"):
        posttrain(place, "run", "recipe", "--from", "rlvr")
    trained = run_dir / "rlvr" / "checkpoint"
    assert adapter_moved(trained / "adapter")
    [metrics] = read_jsonl(run_dir / "rlvr" / "metrics.jsonl")
    assert metrics["grad_norm"] > 0
    assert len(read_jsonl(run_dir / "rlvr" / "completions.jsonl")) == 2
    shutil.rmtree(place / "native")

    with memory.step("merge"):
        posttrain(place, "core", "merge", str(trained / "adapter"), "merged")
    assert different(place / "merged", trained) == set()
    shutil.rmtree(run_dir)
    with memory.step("export"):
        posttrain(place, "core", "export", "merged", "exported")
    moved = different(place / "exported", place / "release")
    assert moved == {name for name in Tensors(place / "release").entries if "_proj." in name}

    assert max(memory.peaks.values()) < LIMIT, memory.peaks


def answer(model: Path, log: Path) -> Any:
    """What a stock vLLM server of a checkpoint says to a question about one image, in four tokens."""
    flags = [
        *("--dtype", "bfloat16", "--max-model-len", str(MAX_TOKENS), "--max-num-seqs", "2"),
        *("--block-size", "32", "--no-enable-chunked-prefill", "--distributed-executor-backend", "uni"),
        *("--limit-mm-per-prompt", '{"image": 1}'),
    ]
    environment = {**ONE_PROCESS, "OMP_NUM_THREADS": THREADS}
    with (
        vllm_server(model, log, *flags, environment=environment) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client,
    ):
        return ask(client, [user(picture(448, 448), "What is the digit?")], max_tokens=4)


def posttrain(folder: Path, *words: str) -> None:
    """Run the command line in a folder, as a user would; its output is seen if it fails."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "chain.cli.main", *words],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"posttrain {' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def write_recipe(folder: Path) -> None:
    (folder / "recipe").mkdir()
    (folder / "every_other.py").write_text(REWARD)
    noise = np.random.default_rng(0).integers(0, 256, (448, 448, 3), dtype=np.uint8)
    row = {
        **{"id": "a", "images": [Image.fromarray(noise)], "question": "What is the digit?", "answer": "7"},
        **{
            "chain": None,
            "response": None,
            "mode": "direct",
            "verifier": "number",
            "source": "t",
            "meta": {},
        },
    }
    write_records(folder / "rows.parquet", [row])
    # The tokenizer of a new core knows few words, and nothing is learned here.
    recipe = {"core": {"path": "native", "max_unknown": 1.0}, "data": {"sets": {"rows": "rows.parquet"}}}
    (folder / "recipe" / "pipeline.yaml").write_text(yaml.safe_dump(recipe | RECIPE))


def adapter_moved(adapter: Path) -> bool:
    """Whether every layer's second half, which starts at zero, is no longer there."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        halves = [file.get_tensor(name) for name in file.keys() if "lora_B" in name]  # noqa: SIM118
    return len(halves) == 28 * 7 and all(half.abs().max() > 0 for half in halves)


def different(one: Path, other: Path) -> set[str]:
    """Names of the tensors in which two checkpoints differ; both have the same names, shapes and data types."""
    ours, theirs = Tensors(one), Tensors(other)
    shapes = [
        {name: (entry.dtype, entry.shape) for name, entry in side.entries.items()} for side in (ours, theirs)
    ]
    assert shapes[0] == shapes[1]
    return {name for name in ours.entries if not _tensor(ours, name).equal(_tensor(theirs, name))}


def _tensor(checkpoint: Tensors, name: str) -> torch.Tensor:
    with safe_open(checkpoint.folder / checkpoint.entries[name].file, "pt") as file:
        return file.get_tensor(name)
