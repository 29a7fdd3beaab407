"""One rank of an SFT stage that breaks off after so many updates, if told so; run by test_resume.py."""

import os
import sys
from pathlib import Path

from transformers import TrainerCallback

from core.files import read_json, write_json
from core.training.job import Job
from sft import train as module
from sft.config import SFTConfig

job = read_json(Path(sys.argv[1]))
out, original, began = Path(job["out"]), module.phase_trainer, []


class Stop(TrainerCallback):
    left = job["stop"]

    def on_train_begin(self, args, state, control, **_):
        began.append(state.global_step)
        if os.environ["RANK"] == "0":
            write_json(out / "started.json", began)

    def on_step_end(self, *_, **__):
        Stop.left -= 1
        if Stop.left == 0:
            raise RuntimeError("Interrupted")


def watched(*args, **kwargs):
    trainer = original(*args, **kwargs)
    trainer.add_callback(Stop())
    return trainer


module.phase_trainer = watched
module.train(
    SFTConfig.model_validate(job["config"]),
    Job(stage="sft", model=Path(job["model"]), out=out, sets={"mixed": Path(job["set"])}),
)
