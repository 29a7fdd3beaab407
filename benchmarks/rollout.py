"""The rollout side: our client against vLLM in one process, weight updates, overlap, and waste of dynamic sampling.

    python -P -m benchmarks.rollout [--quick]

Client path: RolloutClient samples from a server of our pool; `vllm.LLM.generate` in one process is the reference. Both
get the same prompts, each with an image and several completions, and must return the same tokens. On a GPU they must
return the same number of tokens, because bf16 sums depend on the batch. Overlap: the same RL stage with
`rollout.overlap` off and on. Dynamic sampling: the collector on simulated prompts with known pass rates, plain DAPO
against the ledger.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.common import alternate, emit, show
from benchmarks.workload import (
    TEMPERATURE,
    Child,
    child,
    environment,
    learner_settings,
    on_gpu,
    pool_of,
    random_core,
    records,
    rl_stage,
    train_rl,
)

PROMPTS, GROUP, TOKENS, MODEL_TOKENS = 32, 8, 32, 512
MODULE = "benchmarks.rollout"
SIMULATED_PROMPTS = 500
"""Number of prompts of the simulated stage. Their pass rates follow Beta(0.6, 0.6): many near 0, many near 1."""

SIMULATED_BATCHES = (40, 160)
"""Numbers of batches of 16 groups: about 1.5 epochs, and 6 epochs. A ledger helps from the second epoch on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all parts; `--quick` runs fewer repetitions."""
    options = argparse.ArgumentParser(prog="benchmarks.rollout", description=__doc__.splitlines()[0])
    options.add_argument(
        "--quick", action="store_true", help="run fewer repetitions, without the overlap part"
    )
    options.add_argument("--raw", help=argparse.SUPPRESS)
    options.add_argument("--train", help=argparse.SUPPRESS)
    chosen = options.parse_args(arguments)
    if chosen.raw:
        _raw_engine(json.loads(chosen.raw))
    elif chosen.train:
        train_rl(json.loads(chosen.train))
    else:
        compare(chosen.quick)


def compare(quick: bool) -> None:
    """Run all parts and print the results."""
    from rl.rollout.messages import CoreFacts
    from rl.rollout.server import starting_pool

    repetitions = 3 if quick else 7
    horizons = SIMULATED_BATCHES[: 1 if quick else 2]
    sampling = {str(batches): simulate_dynamic_sampling(batches) for batches in horizons}
    with tempfile.TemporaryDirectory() as folder:
        core = random_core(Path(folder) / "core", "2b" if on_gpu() else "tiny")
        cfg = pool_of(max_model_tokens=MODEL_TOKENS, max_sequences=PROMPTS * GROUP)
        with starting_pool(cfg, core, Path(folder) / "logs") as wait:
            with _RawEngine(
                core, CoreFacts.of(core).banned_ids
            ) as raw:  # server and engine start concurrently
                urls = wait()
                client = compare_client(core, urls, raw, repetitions)
            sync_s = time_weight_sync(core, urls, repetitions)
            overlap = None if quick else compare_overlap(core, urls, cfg.model_dump_json(), Path(folder))
    rows: list[Sequence[Any]] = [
        ("client path, s", client["client"], "vLLM in one process", client["raw"], client["ratio"]),
        ("weight update, s", sync_s, "", "", ""),
        *(
            (
                f"useful groups per 1,000 completions, {batches} batches",
                one["ledger"],
                "plain DAPO",
                one["plain"],
                one["ledger"] / one["plain"],
            )
            for batches, one in sampling.items()
        ),
    ]
    if overlap:
        rows.append(
            (
                "RL step with overlap, s",
                overlap["on"],
                "without",
                overlap["off"],
                overlap["on"] / overlap["off"],
            )
        )
    show(
        f"Rollout side: {PROMPTS} prompts x {GROUP} completions x {TOKENS} tokens, {'2B' if on_gpu() else 'tiny'} core",
        ("", "ours", "against", "", "ratio"),
        rows,
    )
    emit("rollout", ratio=client["ratio"], weight_sync_s=sync_s, overlap=overlap, dynamic_sampling=sampling)


def simulate_dynamic_sampling(batches: int) -> dict[str, float]:
    """Useful groups per 1,000 completions over `batches` batches, plain DAPO and with the ledger's defaults.

    The policy improves: every batch moves the pass rates a little towards 1. Both sides have the same prompts, and the
    same random draws per prompt and visit.
    """
    return {
        "plain": _simulate(batches, {"oversample": 1.0, "carry": False, "rest_epochs": 0}),
        "ledger": _simulate(batches, {}),
    }


def _simulate(batches: int, sampling: dict[str, Any]) -> float:
    from core.strict import parse
    from rewards.mix import Mixture, Term
    from rewards.verdict import Verdict
    from rl.collect import Collector
    from rl.config import RLConfig

    rng = random.Random(0)
    rows = records(SIMULATED_PROMPTS, images=0)
    rates = {row["question"]: rng.betavariate(0.6, 0.6) for row in rows}
    policy = _SimulatedPolicy(rates)
    stage = rl_stage(batches=batches, group=GROUP, prompts=16, tokens=TOKENS)
    stage["dynamic_sampling"] = {"max_rounds": 4, **sampling}

    def grade(completion: str, example: object) -> Verdict:
        return Verdict.correct() if completion == "right" else Verdict.wrong()

    cfg = parse(RLConfig, stage, "simulation")
    collector = Collector(cfg, policy, rows, Mixture([Term("answer", grade, 1.0)]), grade, None, seed=0)  # type: ignore[arg-type]
    useful = completions = 0
    for _ in range(batches):
        batch = collector.collect()
        useful += sum(group.kind == "spread" for group in batch.groups)
        completions += sum(len(group.samples) for group in batch.sampled)
        policy.improve()
    return 1000 * useful / completions


class _SimulatedPolicy:
    """Gives right answers at each prompt's pass rate. The n-th visit of a prompt has the same draws on both sides."""

    def __init__(self, rates: dict[str, float]) -> None:
        self.rates, self.visits = dict(rates), dict.fromkeys(rates, 0)

    def improve(self) -> None:
        self.rates = {prompt: rate + 0.01 * (1 - rate) for prompt, rate in self.rates.items()}

    def generate(self, prompts: Sequence[Any], sampling: Any) -> list[Any]:
        from rl.rollout.messages import Answer, Completion

        answers = []
        for prompt in prompts:
            question = prompt.messages[-1]["content"][-1]["text"].splitlines()[0]
            self.visits[question] += 1
            luck = random.Random(f"{question} {self.visits[question]}")
            found = ["right" if luck.random() < self.rates[question] else "wrong" for _ in range(sampling.n)]
            answers.append(Answer([1], [Completion([1], [0.0], word, True) for word in found]))
        return answers


def compare_client(core: Path, urls: Sequence[str], raw: _RawEngine, repetitions: int) -> dict[str, float]:
    """Median seconds for the same prompts through our client and in one process. Both must return the same tokens."""
    from rl.data import prompt_messages
    from rl.rollout.client import RolloutClient
    from rl.rollout.messages import CoreFacts, Prompt, Sampling

    client = RolloutClient(urls, CoreFacts.of(core))
    sampling = Sampling(max_tokens=TOKENS, n=GROUP, temperature=TEMPERATURE)
    answers: dict[str, list[Any]] = {}

    def ask_client(repetition: int) -> None:
        rows = _rows(repetition)
        prompts = [Prompt(prompt_messages(row), seed=GROUP * at) for at, row in enumerate(rows)]
        found = client.generate(prompts, sampling)
        answers["client"] = [[c.token_ids for c in answer.completions] for answer in found]

    def ask_raw(repetition: int) -> None:
        answers["raw"] = raw.ask(repetition)

    for side in (ask_client, ask_raw):
        side(99)
    compared = _lengths if on_gpu() else list
    assert compared(answers["client"]) == compared(answers["raw"]), (
        "client and engine sample different tokens"
    )
    seconds = alternate({"client": ask_client, "raw": ask_raw}, repetitions)
    client.close()
    return {**seconds, "ratio": seconds["client"] / seconds["raw"]}


def _lengths(answers: list[list[list[int]]]) -> list[list[int]]:
    return [[len(completion) for completion in answer] for answer in answers]


def time_weight_sync(core: Path, urls: Sequence[str], repetitions: int) -> float:
    """Median seconds until the servers serve the learner's new weights, including the reset of all caches."""
    from core.training.config import LearnerConfig
    from core.training.model import load_model
    from rl.rollout.client import RolloutClient
    from rl.rollout.messages import CoreFacts
    from rl.rollout.weights import FileSync, weights_folder

    learner = LearnerConfig.model_validate(learner_settings())
    client, model = RolloutClient(urls, CoreFacts.of(core)), load_model(core, learner)
    with weights_folder(None) as folder:
        sync = FileSync(client, folder)
        seconds = alternate({"push": lambda repetition: sync.push(model)}, repetitions)
    client.close()
    return seconds["push"]


def compare_overlap(core: Path, urls: Sequence[str], pool: str, folder: Path) -> dict[str, float]:
    """Median seconds per batch of the same RL stage with overlap off and on."""
    from corpus.records import write_records

    seconds: dict[str, list[float]] = {"off": [], "on": []}
    data = folder / "rl.parquet"
    write_records(data, records(64))
    for turn in range(2):
        for name in ("off", "on") if turn % 2 else ("on", "off"):
            stage = rl_stage(batches=8, group=GROUP, prompts=16, tokens=TOKENS)
            stage["rollout"]["overlap"] = name == "on"
            out = folder / f"{name}-{turn}"
            job = {
                "stage": stage,
                "model": str(core),
                "out": str(out),
                "data": str(data),
                "pool": pool,
            }
            with Child(child(MODULE, "--train", job), folder / "train.log") as process:
                process.wait_until_ready()
                process.run(list(urls))
            elapsed = [
                json.loads(line)["elapsed"] for line in (out / "metrics.jsonl").read_text().splitlines()
            ]
            # The first two batches include the start-up: imports, first requests, and with overlap the extra batch.
            seconds[name] += [after - before for before, after in pairwise(elapsed[1:])]
    return {name: median(found) for name, found in seconds.items()}


class _RawEngine:
    """`vllm.LLM` in a child process, which reads the number of each repetition."""

    def __init__(self, core: Path, banned: Sequence[int]) -> None:
        self.process = subprocess.Popen(
            child(MODULE, "--raw", {"core": str(core), "banned": list(banned)}),
            env=environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._ready = False

    def __enter__(self) -> _RawEngine:
        return self

    def __exit__(self, *error: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def ask(self, repetition: int) -> list[list[list[int]]]:
        """Token ids of every prompt's completions."""
        assert self.process.stdin is not None
        if not self._ready:
            self._ready = bool(self._read())
        self.process.stdin.write(f"{repetition}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the engine's process ended with code {self.process.wait()}")
        return json.loads(line)


def _raw_engine(job: dict[str, Any]) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM also prints to standard output
    from vllm import LLM, SamplingParams

    from core.training.model import load_processor
    from rl.data import prompt_messages

    options: dict[str, Any] = {"dtype": "bfloat16", "gpu_memory_utilization": 0.3}
    if not on_gpu():
        options = {"dtype": "float32", "block_size": 32, "max_num_batched_tokens": 4096}
        options |= {"enforce_eager": True, "enable_chunked_prefill": False}
    llm = LLM(
        model=job["core"],
        model_impl="transformers",
        max_model_len=MODEL_TOKENS,
        max_num_seqs=PROMPTS * GROUP,
        generation_config="vllm",
        logprobs_mode="processed_logprobs",
        distributed_executor_backend="uni",
        limit_mm_per_prompt={"image": {"count": 1, "width": 112, "height": 112}},
        **options,
    )
    from core.model.videos import Decoded

    processor = load_processor(Path(job["core"]))
    print(json.dumps("ready"), file=answers, flush=True)
    for line in sys.stdin:
        requests: list[Any] = []
        params = []
        for at, row in enumerate(_rows(int(line))):
            text = processor.apply_chat_template(
                prompt_messages(row), add_generation_prompt=True, tokenize=False
            )
            requests.append({"prompt": text, "multi_modal_data": {"image": list(Decoded(row["images"]))}})
            params.append(
                SamplingParams(
                    n=GROUP,
                    temperature=TEMPERATURE,
                    max_tokens=TOKENS,
                    seed=GROUP * at,
                    logprobs=0,
                    logit_bias=dict.fromkeys(job["banned"], -100.0),
                )
            )
        outputs = llm.generate(requests, params, use_tqdm=False)
        found = [
            [list(one.token_ids) for one in sorted(output.outputs, key=lambda o: o.index)]
            for output in outputs
        ]
        print(json.dumps(found), file=answers, flush=True)


def _rows(repetition: int) -> list[dict[str, Any]]:
    return records(PROMPTS, first=PROMPTS * (repetition + 1), side_px=448 if on_gpu() else 56)


if __name__ == "__main__":
    main()
