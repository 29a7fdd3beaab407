"""Peak memory of training, measured beside the estimate of core/training/memory.py.

    python -P -m benchmarks.memory [--quick]

Each case trains two updates on a random core with a stage's own trainer, in a fresh process on the CPU. The measured
value is the process's peak resident memory minus its resident memory before the model was loaded.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.learner import Size, build_core, status_kib
from core.model.shape import CoreShape
from core.training.config import LearnerConfig
from core.training.memory import Memory, Work, estimate

AT_ONCE = 2
"""Cases that run concurrently. Their memory is independent, and their time is not measured."""
PHOTO_PX, PHOTOS = 1500, 1000
"""Side and number of the photos whose rows are measured."""
UPDATES = 2
"""Updates per case. The second one starts with the optimizer's states in memory."""
SEPARATE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
"""With this setting, glibc gives every tensor its own pages and frees them with the tensor. So resident memory equals
live memory."""

WIDE = Size(112, (256, 2, 4, 512), (768, 3, 8, 2048), 4, 96, 16_384)
"""33M parameters in few layers, a third of them embeddings."""
DEEP = Size(112, (128, 2, 4, 256), (256, 12, 4, 768), 2, 64, 2048)
"""11M parameters in many layers: activations take more memory than parameters."""
SEEING = Size(224, (512, 6, 8, 1408), (256, 2, 4, 768), 2, 64, 2048)
"""A core whose vision tower has most of the parameters."""
SPECK = Size(112, (64, 1, 2, 64), (64, 1, 2, 64), 2, 32, 512)
"""The smallest core."""


@dataclass(frozen=True)
class Case:
    """One learner and its work. Each row has `text` tokens and `images` tiles."""

    name: str
    size: Size
    kind: str
    """sft, or rl: `rows` completions of `completion` tokens for each of `groups` prompts."""
    rows: int
    text: int
    images: int = 0
    completion: int = 0
    groups: int = 1
    passes: int = 1
    """Passes per update, which split an update's rows (sft)."""
    learner: Mapping[str, Any] = field(default_factory=dict)

    @property
    def row_tokens(self) -> int:
        return self.text + self.images * self.size.tile_tokens

    @property
    def cfg(self) -> LearnerConfig:
        return LearnerConfig.model_validate({"deepspeed": None, **self.learner})

    @property
    def work(self) -> Work:
        """The largest pass."""
        if self.kind == "sft":
            rows = self.rows // self.passes
            return Work(tokens=rows * self.row_tokens, tiles=rows * self.images, accumulates=self.passes > 1)
        tokens = self.groups * (self.row_tokens + self.rows * (self.completion - 1))
        return Work(
            tokens=tokens,
            tiles=self.groups * self.images,
            scored=self.groups * self.rows * self.completion,
            repeats_heads=True,
            accumulates=False,
        )


RECOMPUTED = {"gradient_checkpointing": True}
BFLOAT16 = {"dtype": "bfloat16", "deepspeed": {"zero_stage": 2}}
CASES = (
    Case("weights", WIDE, "sft", rows=1, text=64),
    Case("weights, ZeRO-2", WIDE, "sft", rows=1, text=64, learner={"deepspeed": {"zero_stage": 2}}),
    Case("weights, two passes", WIDE, "sft", rows=2, text=256, passes=2),
    Case("weights, bfloat16", WIDE, "sft", rows=1, text=64, learner=BFLOAT16),
    Case("head", WIDE, "sft", rows=2, text=512),
    Case("layers", DEEP, "sft", rows=4, text=384),
    Case("layers, recomputed", DEEP, "sft", rows=8, text=512, learner=RECOMPUTED),
    Case("tower", SEEING, "sft", rows=4, text=32, images=2),
    Case("tower, recomputed", SEEING, "sft", rows=8, text=32, images=2, learner=RECOMPUTED),
    Case("tower frozen", SEEING, "sft", rows=8, text=32, images=2, learner={"freeze": ["tower"]}),
    Case("LoRA", DEEP, "sft", rows=4, text=384, learner={"lora": {"r": 8}}),
    Case("LoRA, recomputed", WIDE, "sft", rows=4, text=512, learner={"lora": {"r": 8}, **RECOMPUTED}),
    Case("group", DEEP, "rl", rows=8, text=256, completion=128),
    Case("groups, recomputed", DEEP, "rl", rows=8, text=256, completion=128, groups=3, learner=RECOMPUTED),
    Case("group with images", SEEING, "rl", rows=4, text=32, images=4, completion=64),
    Case("group, LoRA", DEEP, "rl", rows=8, text=256, completion=128, learner={"lora": {"r": 8}}),
)


def estimated(case: Case) -> Memory:
    """The estimate of core/training/memory.py for a case, in bytes."""
    config = build_config(case)
    return estimate(CoreShape.of(config.to_dict()), case.cfg, case.work, gpu=False)


def build_config(case: Case) -> Any:
    import torch

    with torch.device("meta"):
        return build_core(case.size)[0].config


def measured(case: Case) -> float:
    """Peak memory of a case in bytes, measured in a child process."""
    command = [sys.executable, "-P", "-m", "benchmarks.memory", "--case", case.name]
    environment = {**os.environ, **SEPARATE, "OMP_NUM_THREADS": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    if done.returncode:
        raise RuntimeError(f"{case.name}: measuring failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])["peak_bytes"]


def peak_bytes(case: Case) -> int:
    """Train the case in this process; return peak resident bytes minus resident bytes before the model was loaded."""
    from chain.worker import keep_engine_out
    from core.training.ranks import join_process_group

    keep_engine_out()
    join_process_group(case.cfg)
    make = sft_trainer if case.kind == "sft" else rl_trainer
    with tempfile.TemporaryDirectory() as folder:
        # This trainer loads everything that is independent of the case (late imports, threads, data loaders).
        small = replace(
            case, size=SPECK, rows=2, text=8, images=min(case.images, 1), completion=4, groups=1, passes=1
        )
        make(small, saved_core(small, Path(folder) / "small"), Path(folder)).train()
        core = saved_core(case, Path(folder) / "core")
        gc.collect()
        before = status_kib("VmRSS")
        trainer = make(case, core, Path(folder))
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # reset the high-water mark, because loading has its own peak
        trainer.train()
        return (status_kib("VmHWM") - before) * 2**10


def saved_core(case: Case, folder: Path) -> Path:
    """A random core on disk. A child process makes the core, so that its model leaves no memory in this process."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            model, processor = build_core(case.size)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"{case.name}: the core could not be saved")
    return folder


def sft_trainer(case: Case, core: Path, folder: Path) -> Any:
    """An SFT phase's trainer on random rows."""
    import numpy as np
    import torch

    from core.training.model import load_processor
    from sft.config import SFTConfig
    from sft.packing import ByRows, Plan
    from sft.train import phase_trainer

    tokens = case.rows // case.passes * case.row_tokens
    cfg = SFTConfig.model_validate(
        {
            "max_tokens": case.row_tokens,
            "learner": case.cfg.model_dump(),
            "packing": {"micro_batch_tokens": tokens},
            "phases": [
                {
                    "name": "measured",
                    "data": [{"set": "none"}],
                    "optim": {"learning_rate": 1e-5, "max_steps": UPDATES, "global_batch_size": case.rows},
                }
            ],
        }
    )
    image = [load_processor(core).image_token_id] * case.size.tile_tokens * case.images
    generator = torch.Generator().manual_seed(0)
    lessons: list[Any] = []
    for _ in range(case.rows):
        ids = torch.tensor([*image, *torch.randint(15, 30, (case.text,), generator=generator).tolist()])
        side = case.size.image_px
        pixels = torch.randn(case.images, 3, side, side, generator=generator) if case.images else None
        lessons.append({"input_ids": ids, "labels": ids.clone(), "pixel_values": pixels})
    sizes = np.array([[case.text, len(image)]] * case.rows)
    plan = Plan(sizes, ByRows(case.rows), budget=tokens, ranks=1, seed=0, epochs=None, max_updates=UPDATES)
    return phase_trainer(cfg, cfg.phases[0], lessons, plan, start=core, folder=folder, seed=0)


def rl_trainer(case: Case, core: Path, folder: Path) -> Any:
    """An RL stage's trainer on synthetic completions."""
    import torch
    from datasets import Dataset

    from core.training.model import load_model, load_processor, peft_config
    from rl.algorithm import trl_config
    from rl.config import RLConfig
    from rl.feed import trl_rows
    from rl.rollout.messages import CoreFacts
    from rl.shared_prefix.passes import SharedPasses
    from rl.trainer import RolloutTrainer, reward_function

    count = case.groups * case.rows
    cfg = RLConfig.model_validate(
        {
            "data": [{"set": "none"}],
            "rewards": [{"name": "answer", "use": "answer", "weight": 1.0}],
            "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
            "rollout": {
                "prompts_per_batch": case.groups,
                "group_size": case.rows,
                "max_completion_tokens": case.completion,
            },
            "batches": UPDATES,
            "mini_batch": count,
            "optim": {"learning_rate": 1e-5, "micro_batch_size": count},
            "parity": {"bound": 1.0},
            "learner": case.cfg.model_dump(),
        }
    )
    processor = load_processor(core)
    groups = synthetic_groups(case, processor)

    class Given:
        """A feed that returns these groups."""

        def rows(self, trainer: Any, count: int) -> list[dict[str, Any]]:
            prompt = [{"role": "user", "content": "A"}]
            return [
                {**row, "prompt": prompt, "images": group.row["images"]}
                for group in groups
                for row in trl_rows(group)
            ]

    arguments, policy = trl_config(cfg, folder, seed=0), load_model(core, cfg.learner)
    torch.manual_seed(0)
    return RolloutTrainer(
        feed=Given(),
        passes=partial(SharedPasses, budget_rows=count),
        banned_ids=CoreFacts.of(core).banned_ids,
        model=policy,
        processing_class=processor,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * count}),
        reward_funcs=[reward_function("answer")],
        args=arguments,
        peft_config=peft_config(cfg.learner),
    )


def synthetic_groups(case: Case, processor: Any) -> list[Any]:
    """The case's groups (rl.collect.Group) of random completions with rewards spread evenly over [0, 1]."""
    from benchmarks.learner import Shape, rows_of
    from rewards.mix import Graded
    from rewards.verdict import Status, Verdict
    from rl.collect import Group, Sample
    from rl.rollout.messages import Completion

    shape = Shape("", case.rows, case.images, case.text, case.completion, case.groups)
    rows = rows_of(shape, case.size, processor)
    groups = []
    for number in range(case.groups):
        own = rows[number * case.rows : (number + 1) * case.rows]
        record: Any = {"id": str(number), "images": own[0]["images"], "question": "A", "mode": "direct"}
        samples = []
        for place, row in enumerate(own):
            verdict = Verdict(place / (case.rows - 1), Status.CORRECT)
            graded = Graded(total=verdict.score, verdicts={"answer": verdict})
            completion = Completion(row["completion_ids"], row["logprobs"], "", True)
            samples.append(Sample(completion, graded, 0.0, verdict))
        groups.append(Group(record, own[0]["prompt_ids"], samples))
    return groups


def table(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Print estimate and measurement of each case as soon as it is done."""
    lines = []
    print("case                  estimated  measured  ratio")
    with ThreadPoolExecutor(AT_ONCE) as children:
        for case, found in zip(cases, children.map(measured, cases), strict=True):
            said = estimated(case).peak
            lines.append({"case": case.name, "estimated": said, "measured": found, "ratio": said / found})
            print(
                f"{case.name:<20} {said / 2**20:>7.0f} MiB {found / 2**20:>5.0f} MiB {said / found:>6.2f}",
                flush=True,
            )
    return lines


def photos_line() -> dict[str, Any]:
    """Host memory of an RL stage's rows with photos, after each row was loaded and used once."""
    command = [sys.executable, "-P", "-m", "benchmarks.memory", "--photos"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(
        f"{PHOTOS:,} photos of {PHOTO_PX} px, {found['file'] / 2**20:.0f} MiB as files: rows loaded and used once "
        f"take {found['held'] / 2**20:.0f} MiB of the process's own memory"
    )
    return found


def held_by_photos() -> dict[str, int]:
    """Bytes of the file, and bytes that its rows add to this process's memory, without memory-mapped files."""
    import numpy as np
    from PIL import Image

    from corpus.records import DataSource, write_records
    from rl.data import load_rows, prompt_messages
    from rl.rollout.messages import openai_messages

    noise = np.random.default_rng(0)

    def photo() -> bytes:
        small = Image.fromarray(noise.integers(0, 256, (PHOTO_PX // 50, PHOTO_PX // 50, 3), dtype=np.uint8))
        buffer = io.BytesIO()
        small.resize((PHOTO_PX, PHOTO_PX), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=85)
        return buffer.getvalue()

    def written(count: int) -> Path:
        row = {"question": "How many?", "answer": "3", "mode": "direct", "verifier": "number"}
        path, photos = Path(folder) / f"{count}.parquet", [photo() for _ in range(20)]
        rows = ({**row, "id": str(number), "images": [photos[number % 20]]} for number in range(count))
        write_records(path, rows)
        return path

    def asked(path: Path) -> Any:
        rows = load_rows([DataSource(set="photos")], {"photos": path}, seed=0)
        for row in rows:
            openai_messages(prompt_messages(row), 448)
        gc.collect()
        return rows

    with tempfile.TemporaryDirectory() as folder:
        warm, path = written(20), written(PHOTOS)
        asked(warm)  # loads modules, threads and buffers
        before = status_kib("RssAnon")
        rows = asked(path)
        held = (status_kib("RssAnon") - before) * 2**10
        return {"photos": len(rows), "file": path.stat().st_size, "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="three cases")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--photos", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.photos:
        print(json.dumps(held_by_photos()))
        return
    if options.case:
        case = next(case for case in CASES if case.name == options.case)
        print(json.dumps({"peak_bytes": peak_bytes(case)}))
        return
    lines = table(CASES[:3] if options.quick else CASES)
    photos = photos_line()
    worst = max(abs(line["ratio"] - 1) for line in lines)
    print(json.dumps({"bench": "memory", "worst": worst, "cases": lines, "photos": photos}))


if __name__ == "__main__":
    main()
