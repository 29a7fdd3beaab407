"""A whole RL step: rollout, rewards, weight update and learner, against stock TRL with its own generation.

    python -P -m benchmarks.step [--quick]

All sides train the same random core on the same prompts with the same reward, group size and completion length, each
in its own processes. Our side samples from a vLLM server; with `rollout.overlap` it samples while it trains. TRL's
GRPOTrainer samples with transformers' generate. A random core rarely ends a completion early, so all sides process the
same number of tokens (checked to 5%). On a GPU: SAIL-VL2-2B's shapes with random weights, bf16.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median
from typing import Any

from benchmarks.common import emit, show
from benchmarks.workload import (
    TEMPERATURE,
    Child,
    child,
    learner_settings,
    on_gpu,
    pool_of,
    random_core,
    records,
    rl_stage,
    train_rl,
    wait_for_the_word,
)
from core.files import read_jsonl

MODULE = "benchmarks.step"
GROUP = 8
SHAPES: Mapping[str, Mapping[str, int]] = {
    "tiny": {"prompts": 16, "tokens": 48, "side_px": 56, "rows_per_pass": 64, "steps": 6},
    "mid": {"prompts": 2, "tokens": 64, "side_px": 448, "rows_per_pass": 8, "steps": 3},
    "2b": {"prompts": 8, "tokens": 512, "side_px": 448, "rows_per_pass": 8, "steps": 5},
}
"""Core -> prompts in a batch, completion length in tokens, side of the pictures in pixels, completions in one backward
pass, and counted steps of a turn."""
SIDES = ("stock", "ours", "overlap")
QUICK = {"prompts": 8, "steps": 2}
PARTS = {
    "rollout": "rollout/generating_seconds",
    "rewards": "rollout/grading_seconds",
    "sync": "sync/seconds",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare on the tiny and the mid-size core; `--quick` uses only the tiny core and fewer steps."""
    parser = argparse.ArgumentParser(prog=MODULE, description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="use only the tiny core, with fewer prompts and steps and without overlap",
    )
    parser.add_argument("--ours", help=argparse.SUPPRESS)
    parser.add_argument("--stock", help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    if chosen.ours:
        train_rl(json.loads(chosen.ours))
    elif chosen.stock:
        _train_stock(json.loads(chosen.stock))
    else:
        compare(chosen.quick)


def compare(quick: bool) -> None:
    """Run all sizes and print the results."""
    sizes = ["2b"] if on_gpu() else ["tiny"] if quick else ["tiny", "mid"]
    found = {name: _compare(name, quick) for name in sizes}
    shares = next(iter(found.values()))["shares"]
    rows = [
        (name, side, seconds, one["stock_s"] / seconds, *(shown if side == "ours" else [""] * len(shown)))
        for name, one in found.items()
        for shown in [[f"{share:.0%}" for share in one["shares"].values()]]
        for side, seconds in ((side, one[f"{side}_s"]) for side in SIDES if f"{side}_s" in one)
    ]
    show("One RL step, median seconds", ("core", "side", "seconds", "times faster", *shares), rows)
    emit("step", ratio={name: one["ratio"] for name, one in found.items()}, sizes=found)


def _compare(name: str, quick: bool) -> dict[str, Any]:
    """Median seconds per step of each side, over alternating turns without the first two steps; shares of our step."""
    from corpus.records import write_records
    from rl.rollout.server import rollout_pool

    shape = {**SHAPES[name], **(QUICK if quick else {})}
    sides, turns = (SIDES[:2], 1) if quick else (SIDES, 2)
    order = [(turn, side) for turn in range(turns) for side in (reversed(sides) if turn % 2 else sides)]
    logs: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as place, ExitStack() as running:
        folder = Path(place)
        core, data = folder / "core", folder / "rl.parquet"
        pool = pool_of(max_model_tokens=1024 if on_gpu() else 512, max_sequences=128)
        job = {"model": str(core), "data": str(data), "pool": pool.model_dump_json()}
        children = []
        for turn, side in order:  # the children import while the core is made and the server starts
            own = {
                **job,
                "stage": _stage(shape, overlap=side == "overlap"),
                "out": str(folder / f"{side}-{turn}"),
            }
            command = child(MODULE, "--stock" if side == "stock" else "--ours", own)
            children.append(running.enter_context(Child(command, folder / f"{side}.log")))
        random_core(core, name)
        write_records(data, records(shape["prompts"] * (shape["steps"] + 2), side_px=shape["side_px"]))
        urls = running.enter_context(rollout_pool(pool, core, folder / "logs"))
        for one in children:
            one.wait_until_ready()
        for (turn, side), one in zip(order, children, strict=True):
            one.run(urls)
            logs[side].append(read_jsonl(folder / f"{side}-{turn}" / "metrics.jsonl"))
    tokens = {
        side: fmean(line["completions/mean_length"] for turn in own for line in turn)
        for side, own in logs.items()
    }
    if max(tokens.values()) / min(tokens.values()) > 1.05:
        raise AssertionError(
            f"the sides did not process the same number of tokens: {tokens} tokens per completion"
        )
    medians = {side: _step_seconds(own) for side, own in logs.items()}
    return {
        **{f"{side}_s": seconds for side, seconds in medians.items()},
        "ratio": medians["stock"] / medians["ours"],
        **({} if quick else {"ratio_overlap": medians["stock"] / medians["overlap"]}),
        "shares": _shares(logs["ours"], medians["ours"]),
        "tokens": tokens["ours"],
    }


def _stage(shape: Mapping[str, int], overlap: bool) -> dict[str, Any]:
    stage = rl_stage(
        batches=shape["steps"] + 2,
        prompts=shape["prompts"],
        group=GROUP,
        tokens=shape["tokens"],
        rows_per_pass=shape["rows_per_pass"],
    )
    stage["rollout"]["overlap"] = overlap
    return stage


def _step_seconds(turns: Sequence[Sequence[Mapping[str, Any]]]) -> float:
    """Median seconds per step over all turns, without the first two steps of each turn."""
    ends = ([line["elapsed"] for line in lines[1:]] for lines in turns)
    return median(after - before for own in ends for before, after in pairwise(own))


def _shares(turns: Sequence[Sequence[Mapping[str, Any]]], step_s: float) -> dict[str, float]:
    """Shares of our step: sampling, rewards, weight update, and the learner as the remainder."""
    counted = [line for lines in turns for line in lines[2:]]
    shares = {part: median(line[figure] for line in counted) / step_s for part, figure in PARTS.items()}
    return {**shares, "learner": 1 - sum(shares.values())}


def _train_stock(job: Mapping[str, Any]) -> None:
    """Train TRL's GRPOTrainer on the same prompts, as in TRL's documentation."""
    import time

    from chain.worker import keep_engine_out

    keep_engine_out()
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from core.files import append_jsonl
    from core.model.videos import Decoded
    from core.strict import parse
    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor
    from corpus.records import load_records
    from rewards.answer import AnswerReward
    from rl.config import RLConfig
    from rl.data import example_of, prompt_messages
    from rl.trainer import ban_tokens

    wait_for_the_word()
    cfg = parse(RLConfig, job["stage"], "benchmark")
    rows = {row["id"]: row for row in load_records(Path(job["data"]))}
    answer, out, started = AnswerReward(), Path(job["out"]), time.monotonic()
    out.mkdir(parents=True)

    def correct(completions: list[Any], id: list[str], **_: Any) -> list[float | None]:
        texts = [one[0]["content"] for one in completions]
        return [answer(text, example_of(rows[row])).score for text, row in zip(texts, id, strict=True)]

    class Log(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            if "train_runtime" not in logs:
                line = {"elapsed": time.monotonic() - started, **logs}
                append_jsonl(
                    out / "metrics.jsonl", {k: v for k, v in line.items() if isinstance(v, int | float)}
                )

    model = load_model(Path(job["model"]), LearnerConfig.model_validate(learner_settings()))
    ban_tokens(model, [model.config.image_token_id])
    trainer = GRPOTrainer(
        model=model,
        processing_class=load_processor(Path(job["model"])),
        reward_funcs=correct,
        train_dataset=Dataset.from_list(
            [
                {
                    "id": row["id"],
                    "prompt": [{"role": "user", "content": prompt_messages(row)[-1]["content"][-1]["text"]}],
                    "images": list(Decoded(row["images"])),
                }
                for row in rows.values()
            ]
        ),
        args=_stock_config(cfg, out / "trainer"),
        callbacks=[Log()],
    )
    trainer.train()


def _stock_config(cfg: Any, out: Path) -> Any:
    """TRL's GRPOConfig for the stage `cfg` (rl.config.RLConfig)."""
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=str(out),
        max_steps=cfg.batches,
        num_generations=GROUP,
        per_device_train_batch_size=cfg.optim.micro_batch_size,
        gradient_accumulation_steps=cfg.mini_batch // cfg.optim.micro_batch_size,
        max_completion_length=cfg.rollout.max_completion_tokens,
        temperature=TEMPERATURE,
        learning_rate=cfg.optim.learning_rate,
        loss_type="dapo",
        epsilon=cfg.algorithm.clip_low,
        epsilon_high=cfg.algorithm.clip_high,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not on_gpu(),
        bf16=on_gpu(),
        gradient_checkpointing=on_gpu(),
        disable_tqdm=True,
    )


if __name__ == "__main__":
    main()
