"""On-policy distillation: advantages per token from a teacher, exact in packed passes, and a student that gains."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from chain.job import Task
from chain.launch import run_job
from core.files import read_jsonl
from core.strict import ConfigError, parse
from corpus.records import write_records
from rl.config import RLConfig, Teacher
from rl.data import prompt_messages
from rl.distill import TeacherClient, image_tokens_only, token_advantages
from rl.job import ServedJob
from rl.rollout.access import TOKEN
from rl.rollout.client import RolloutClient
from rl.rollout.config import PoolConfig
from rl.rollout.http import RolloutError
from rl.rollout.messages import CoreFacts, Prompt, Sampling
from rl.rollout.server import rollout_pool

from .conftest import plain_logprobs, record
from .learners import Scripted, backward, learner, relative_difference, shared, stock
from .test_loss import config

GROUPS = (
    Scripted(question=0, images=(1,), lengths=(5, 9)),
    Scripted(question=1, images=(), lengths=(3, 12), cut=(1,)),
)
POOL = PoolConfig(engine="hf", max_model_tokens=256)


def with_teacher(rows):
    for row in rows:
        row["teacher_logprobs"] = [value + 0.1 * at for at, value in enumerate(row["logprobs"])]
    return rows


def taught(rows, **own):
    return shared(with_teacher(rows), **own)


@pytest.mark.parametrize("own", [{}, {"token_budget": 60}])
def test_packed_passes_give_trls_loss_and_gradients_of_advantages_per_token(tiny_core, tmp_path, own):
    ours, batch = learner(taught, tiny_core, GROUPS, tmp_path, own=own, loss_type="dapo")
    # The gap of token t is 0.1 t; the truncated completion is masked.
    assert batch["advantages"][0].tolist() == pytest.approx([0.1 * t for t in range(5)] + [0.0] * 7, abs=1e-6)
    assert not batch["advantages"][3].any()
    theirs, plain = learner(stock, tiny_core, GROUPS, tmp_path, loss_type="dapo")
    plain["advantages"] = batch["advantages"]
    (loss, gradients), (loss_, gradients_) = backward(ours, batch), backward(theirs, plain)
    assert float(loss) == pytest.approx(float(loss_), abs=1e-5)
    assert relative_difference(gradients, gradients_) < 1e-5


def test_advantages_are_the_gap_to_the_teacher_and_zero_outside_the_completion():
    rows = [
        {"teacher_logprobs": [-1.0, -2.0], "logprobs": [-3.0, -1.5]},
        {"teacher_logprobs": [0.0], "logprobs": [0.0]},
    ]
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert token_advantages(rows, mask).tolist() == [[2.0, -0.5, 0.0], [0.0, 0.0, 0.0]]


def test_placeholder_ranges_of_a_rendered_prompt_hold_image_tokens_only():
    ids = [1, 8, 5, 5, 9, 2, 8, 5, 9]  # 8 and 9 open and close an image
    ranges = [{"offset": 1, "length": 4}, {"offset": 6, "length": 3}]
    features = {"mm_hashes": {"image": ["a", "b"]}, "mm_placeholders": {"image": ranges}}
    found = image_tokens_only({"token_ids": ids, "features": features}, 5)
    narrowed = [{"offset": 2, "length": 2}, {"offset": 7, "length": 1}]
    assert found == {**features, "mm_placeholders": {"image": narrowed}}
    assert image_tokens_only({"token_ids": ids, "features": None}, 5) is None
    assert image_tokens_only({"token_ids": ids, "features": {"messages": []}}, 5) == {"messages": []}


TEACHER = {"urls": ["http://127.0.0.1:1"], "token_file": "t"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "distill"}, "distill needs a teacher"),
        (
            {"name": "dapo", "teacher": {"urls": ["http://127.0.0.1:1"], "token_file": "t"}},
            "no other algorithm has one",
        ),
        (
            {"name": "distill", "teacher": {"urls": ["http://127.0.0.1:1"], "token_file": "t"}},
            "the student must sample at 1",
        ),
    ],
)
def test_settings_that_contradict_distillation_are_refused(change, message):
    with pytest.raises((ConfigError, ValueError), match=message):
        config(**change)


def token_of(folder: Path) -> str:
    """A file with the token of the servers that run in this process."""
    file = folder / "token"
    file.touch(0o600)
    file.write_text(os.environ[TOKEN])
    return str(file)


def test_a_teacher_gives_the_log_probabilities_of_a_plain_pass(tiny_core, tmp_path):
    with rollout_pool(POOL, tiny_core, tmp_path) as urls:
        client = RolloutClient(urls, CoreFacts.of(tiny_core))
        check_scores(client, tiny_core, tmp_path)
        client.close()


@pytest.mark.slow
def test_a_teacher_on_vllm_gives_the_log_probabilities_of_a_plain_pass(client, tiny_core, tmp_path):
    check_scores(client, tiny_core, tmp_path)


def check_scores(client: RolloutClient, core: Path, folder: Path) -> None:
    """The servers' completions, scored by the same servers as a teacher, against a plain pass."""
    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor

    rows = [record(1), record(2, image=False)]
    rows[0]["images"] *= 2
    prompts = [Prompt(prompt_messages(row), seed=at) for at, row in enumerate(rows)]
    answers = client.generate(prompts, Sampling(max_tokens=6, n=2))
    (image_token,) = client.core.banned_ids
    teacher = TeacherClient(Teacher(urls=tuple(client.urls), token_file=token_of(folder)), image_token)
    completions = [[one.token_ids for one in answer.completions] for answer in answers]
    found = teacher.score(prompts, [answer.prompt_ids for answer in answers], completions)
    with pytest.raises(RolloutError, match="same tokenizer, chat template"):
        teacher.score(prompts[:1], [[1, 2]], completions[:1])
    teacher.close()
    model, processor = load_model(core, LearnerConfig()).eval(), load_processor(core)
    for row, answer, group in zip(rows, answers, found, strict=True):
        for completion, given in zip(answer.completions, group, strict=True):
            ids = completion.token_ids
            expected = plain_logprobs(model, processor, row, answer.prompt_ids, ids, temperature=1.0)
            assert given == pytest.approx(expected.tolist(), abs=1e-4)


def taught_to_answer(core: Path, folder: Path) -> tuple[Path, Path]:
    """A student that answers "7" now and then, and a teacher that nearly always does: two states of one fine-tuning."""
    from core.checkpoint.stream import write_stream
    from core.model.layout import stored
    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor

    model, processor = load_model(core, LearnerConfig()), load_processor(core)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    answer = [*processor.tokenizer.encode("7", add_special_tokens=False), processor.tokenizer.eos_token_id]
    saved: list[Path] = []
    for bound, name in ((0.1, "student"), (0.95, "teacher")):
        likely = 0.0
        while likely < bound:
            row = record(torch.randint(1000, ()).item(), mode="direct")
            inputs = processor.apply_chat_template(
                [prompt_messages(row)],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
            ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
            logits = model(
                input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=inputs["pixel_values"]
            ).logits[0]
            logps = logits.log_softmax(-1)[-len(answer) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
            (-logps.mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
            likely = 0.7 * likely + 0.3 * float(logps.detach().sum().exp())
        shutil.copytree(core, folder / name, ignore=shutil.ignore_patterns("*.safetensors"))
        write_stream(stored(model.state_dict(), model.all_tied_weights_keys), folder / name)
        saved.append(folder / name)
    return saved[0], saved[1]


STAGE = {
    "data": [{"set": "rl"}],
    "rewards": [{"name": "answer", "use": "answer", "weight": 1.0}],
    "rollout": {"prompts_per_batch": 8, "group_size": 4, "max_completion_tokens": 6},
    "dynamic_sampling": {"max_rounds": 0},
    "batches": 30,
    "mini_batch": 32,
    "optim": {"learning_rate": 1e-3, "micro_batch_size": 8, "schedule": "constant"},
    "learner": {"deepspeed": None},
    "parity": {"bound": 1e-3, "sequences": 2, "tokens": 4},
    "self_test_rows": 0,
    "watch": {"max_repeats": 1.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_the_student_gains(tiny_core, tmp_path, engine):
    student, teacher = taught_to_answer(tiny_core, tmp_path)
    write_records(tmp_path / "rl.parquet", [record(number, mode="direct") for number in range(64)])
    with (
        rollout_pool(POOL, student, tmp_path / "logs") as urls,
        rollout_pool(POOL.model_copy(update={"engine": engine}), teacher, tmp_path) as whose,
    ):
        algorithm = {"name": "distill", "clip_low": 0.2, "clip_high": 0.28, "mask_truncated": False}
        algorithm["teacher"] = {"urls": whose, "token_file": token_of(tmp_path)}
        cfg = parse(RLConfig, {**STAGE, "algorithm": algorithm}, "test")
        (tmp_path / "weights").mkdir()
        job = ServedJob(
            **{
                "stage": "rlvr",
                "model": student,
                "out": tmp_path / "out",
                "sets": {"rl": tmp_path / "rl.parquet"},
            },
            **{"pool": POOL, "urls": tuple(urls), "weights": tmp_path / "weights"},
        )
        (tmp_path / "out").mkdir()
        run_job(Task.of("rl.train:train", cfg, job), tmp_path / "out")
    lines = read_jsonl(tmp_path / "out" / "metrics.jsonl")
    first, last = lines[:3], lines[-3:]

    def mean(of, name):
        return sum(line[name] for line in of) / len(of)

    assert mean(last, "rollout/correct") > mean(first, "rollout/correct") + 0.2
    assert mean(last, "rollout/correct") > 0.9
    assert mean(last, "distill/reverse_kl") < 0.2 * mean(first, "distill/reverse_kl")
