"""How far a mixture of experts is from its rollout server, with and without routing replay (R3, arXiv:2510.11370).

    python -P -m benchmarks.routing [--quick]

A server over transformers (rl.rollout.hf) samples with a tiny random core in float32 or bfloat16. The learner scores
the completions in float32 by the shared prefix: once with its own choice of experts, once with the server's. The gap is
|log learner - log server| per completion token, in nats.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import emit, show
from chain.worker import keep_engine_out
from rl.rollout.messages import Answer, CoreFacts, Prompt, Sampling, completion_request, read_answer

SIZES = {"4 of 16 experts, 6 layers": (16, 4, 6), "2 of 4 experts, 3 layers": (4, 2, 3)}
"""Name -> experts per layer, experts per token, layers."""
WORDS = ("compute", "plus", "largest", "smallest", "minus", "digit", "in", "cell", *"ABCD")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the gap for each core and data type of the server."""
    from core.model.tiny import TinySize, build_tiny

    parser = argparse.ArgumentParser(prog="benchmarks.routing", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer completions")
    options = parser.parse_args(arguments)
    keep_engine_out()
    prompts, group, tokens = (4, 4, 16) if options.quick else (16, 8, 64)
    lines: list[dict[str, Any]] = []
    for name, (experts, per_token, layers) in SIZES.items():
        size = TinySize(experts=experts, experts_per_token=per_token, text_layers=layers)
        with tempfile.TemporaryDirectory() as folder:
            core = build_tiny(Path(folder) / "core", words=WORDS, seed=0, size=size)
            for dtype in ("float32", "bfloat16"):
                answers = sampled(core, dtype, prompts, Sampling(max_tokens=tokens, n=group))
                lines.append({"core": name, "server": dtype, **gaps(core, answers)})
    columns = list(lines[0])
    show("gap between learner and server, nats", columns, [list(line.values()) for line in lines])
    emit("routing", lines=lines)


def sampled(core: Path, dtype: str, prompts: int, sampling: Sampling) -> list[Answer]:
    """Completions of a server in `dtype`, with the experts that it chose."""
    from rl.rollout.hf import Engine

    engine, facts = Engine(core, dtype, routing_replay=True), CoreFacts.of(core, routing_replay=True)
    answers = []
    for seed in range(prompts):
        words = [WORDS[(seed * 5 + at * 3) % len(WORDS)] for at in range(8)]
        prompt = Prompt([{"role": "user", "content": " ".join(words)}], seed=seed)
        reply = engine.ask("generate", completion_request(prompt, sampling, facts))
        answers.append(read_answer(reply, facts))
    return answers


def gaps(folder: Path, answers: Sequence[Answer]) -> dict[str, float]:
    """Mean and largest gap with the learner's own experts and with replayed ones.

    `other experts, share` counts the tokens for which the two sides choose different experts in some layer.
    """
    from core.training.config import LearnerConfig
    from core.training.model import load_model
    from rl.rollout.routing import Recorder
    from rl.shared_prefix.core import take_packed_rows
    from rl.trainer import ban_tokens

    core = load_model(folder, LearnerConfig()).eval()
    ban_tokens(core, CoreFacts.of(folder).banned_ids)
    take_packed_rows(core)
    recorder = Recorder(core, 1)
    with recorder.running():
        own = _gap(core, answers, replay=False)
    replayed = _gap(core, answers, replay=True)
    theirs = np.concatenate([_packed(answer, True).experts[0].numpy() for answer in answers])
    same = np.sort(recorder.experts()[0], -1) == np.sort(theirs, -1)
    return {
        "tokens": float(len(own)),
        "other experts, share": float(1 - same.all((-1, -2)).mean()),
        "mean, own": float(own.mean()),
        "mean, replayed": float(replayed.mean()),
        "max, own": float(own.max()),
        "max, replayed": float(replayed.max()),
    }


def _packed(answer: Answer, replay: bool) -> Any:
    import torch

    from rl.shared_prefix.rows import Row, pack

    prompt = answer.experts
    rows = []
    for one in answer.completions:
        known = replay and prompt is not None and one.experts is not None
        chosen: Any = (prompt, one.experts) if known else None
        rows.append(Row(tuple(answer.prompt_ids), (), tuple(one.token_ids), chosen))
    return pack(rows, torch.device("cpu"))


def _gap(core: Any, answers: Sequence[Answer], replay: bool) -> np.ndarray:
    """|log learner - log server| of all completion tokens, one after another."""
    import torch

    found = []
    for answer in answers:
        packed = _packed(answer, replay)
        with torch.no_grad():
            hidden = core.model(
                input_ids=packed.input_ids, position_ids=packed.position_ids, packed=packed
            ).last_hidden_state
            scores = core.lm_head(hidden).log_softmax(-1).gather(-1, packed.labels[..., None])[0, :, 0]
        server = [value for one in answer.completions for value in one.logprobs]
        found.append((scores - torch.tensor(server)).abs().numpy())
    return np.concatenate(found)


if __name__ == "__main__":
    main()
