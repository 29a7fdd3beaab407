"""One rank that trains two updates on scripted groups and saves its policy; run by test_shared_prefix_ranks.py.

    python -P rank_worker.py CORE OUT JSON [ordered]

JSON is the stage's `learner`. With `ordered`, groups keep their order: nothing is shuffled.

Four groups of four: those of the first half have images, the second of them a video as well, the others none, so that
of two ranks one has no image.
Images of an any-resolution core differ in size.
"""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from core.checkpoint.save import save_checkpoint
from core.model.pictures import Picture
from core.model.videos import Clip
from core.strict import parse
from core.training.model import apply_freeze, load_model, load_processor, peft_config
from core.training.ranks import join_process_group
from rewards.mix import Graded
from rewards.verdict import Verdict
from rl.algorithm import trl_config
from rl.collect import Group, Sample
from rl.config import RLConfig
from rl.data import prompt_messages
from rl.feed import RolloutFeed
from rl.rollout.messages import Completion, CoreFacts
from rl.shared_prefix.passes import SharedPasses
from rl.trainer import RolloutTrainer, reward_function

sys.path.append(str(Path(__file__).parent))
from learners import Given, NoServers

LENGTHS = (5, 12, 7, 3)


def record(number, images, odd):
    noise = np.random.default_rng(number)
    shapes = [(56 + 30 * at * odd, 56 + 84 * number * odd, 3) for at in range(images)]
    return {
        "id": f"row-{number}",
        "images": [Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)) for shape in shapes],
        "videos": [Clip.of_frames([Picture.of(Image.new("RGB", (30, 60), (k, 0, 0))) for k in (0, 99)])]
        if number == 1
        else [],
        "question": "compute A plus B",
        "answer": "7",
        "mode": "think" if number % 2 else "direct",
    }


def scripted(processor, rows):
    generator = torch.Generator().manual_seed(0)
    groups = []
    for row in rows:
        prompt = processor.apply_chat_template(
            [prompt_messages(row)], add_generation_prompt=True, tokenize=True, return_dict=True
        )["input_ids"][0]
        samples = []
        for index, length in enumerate(LENGTHS):
            ids = [
                *torch.randint(15, 40, (length - 1,), generator=generator).tolist(),
                processor.tokenizer.eos_token_id,
            ]
            logps = (0.2 * torch.randn(length, generator=generator) - 4).tolist()
            verdict = Verdict(index / 3, "correct")
            graded = Graded(total=index / 3, verdicts={"answer": verdict})
            samples.append(Sample(Completion(ids, logps, "", True), graded, 0.0, verdict))
        groups.append(Group(row, list(prompt), samples))
    return groups


def main(core, out, learner):
    stage = {
        "data": [{"set": "rl"}],
        "rewards": [{"name": "answer", "use": "answer", "weight": 1.0}],
        "algorithm": {"clip_low": 0.2, "clip_high": 0.28},
        "rollout": {"prompts_per_batch": 4, "group_size": 4, "max_completion_tokens": 16, "temperature": 0.7},
        "batches": 2,
        "mini_batch": 16,
        # This epsilon makes AdamW's step proportional to the gradient: signs of rounding noise move nothing.
        "optim": {"learning_rate": 0.1, "epsilon": 1.0, "micro_batch_size": 8, "schedule": "constant"},
        "parity": {"bound": 1e-3},
        "learner": learner,
    }
    cfg = parse(RLConfig, stage, "test")
    join_process_group(cfg.learner)
    processor = load_processor(core)
    rows = [record(number, images, processor.any_resolution) for number, images in enumerate((1, 2, 0, 0))]
    groups = scripted(processor, rows)
    arguments = trl_config(cfg, out, seed=0)  # before the model, as rl.train does
    policy = load_model(core, cfg.learner)
    apply_freeze(policy, cfg.learner.freeze)

    trainer = RolloutTrainer(
        feed=RolloutFeed(Given(groups), NoServers(), NoServers(), rows, []),
        passes=partial(
            SharedPasses, token_budget=cfg.learner.token_budget, budget_rows=cfg.optim.micro_batch_size
        )
        if cfg.learner.shares_prefix
        else None,
        banned_ids=CoreFacts.of(core).banned_ids,
        model=policy,
        processing_class=processor,
        train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * 16}),
        reward_funcs=[reward_function("answer")],
        args=arguments,
        peft_config=peft_config(cfg.learner),
    )
    trainer.train()
    save_checkpoint(trainer, processor, out / "checkpoint")
    if arguments.process_index == 0:
        lines = [line for line in trainer.state.log_history if "loss" in line]
        (out / "losses.json").write_text(json.dumps([line["loss"] for line in lines]))
        (out / "balance.json").write_text(json.dumps([line.get("aux_loss") for line in lines]))


if __name__ == "__main__":
    if sys.argv[4:] == ["ordered"]:
        torch.randperm = lambda count, **_: torch.arange(count)
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
