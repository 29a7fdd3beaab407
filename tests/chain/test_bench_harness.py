"""lmms-eval's own code of the suites' benchmarks on ten local rows each, with a scripted policy and judge.

They need the second environment (`make bench-setup`).
"""

import base64
import io
import re
from pathlib import Path

import datasets
import pytest
from PIL import Image

from chain.bench import bench as benches
from chain.bench.bench import Options
from chain.bench.harness import DEFAULT, Harness
from chain.bench.relay import JudgeServer
from chain.bench.suite import load_suite
from chain.recipe import WandbConfig
from core.files import read_json
from core.model.pictures import Picture

from ..core.films import film
from .benching import FakeClient, judge_server
from .test_bench import FakePool

PYTHON = Path(__file__).parents[2] / DEFAULT
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="lmms-eval is missing: make bench-setup"),
]
WRONG = (3, 7)
"""Rows that the policy answers wrongly."""


def picture(number: int) -> Image.Image:
    return Image.new("RGB", (32, 24), (20 * number, 90, 160))


def save(folder: Path, split: str, rows: list[dict], images: tuple[str, ...]) -> str:
    table = datasets.Dataset.from_list(rows)
    for name in images:
        table = table.cast_column(name, datasets.Image())
    (folder / "data").mkdir(parents=True)
    table.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


def mathvista(folder: Path) -> str:
    """Rows 0 to 4 are free form with a number, 5 to 7 multiple choice, 8 and 9 free form with text (judge needed)."""
    rows = []
    for n in range(10):
        choice = n in (5, 6, 7)
        kind = {
            "question_type": "multi_choice" if choice else "free_form",
            "answer_type": "text" if n >= 5 else "integer",
        }
        metadata = dict.fromkeys(("language", "source", "category", "task", "context", "grade"), "x")
        gold = "red" if choice else f"word{n}" if n > 7 else str(n)
        rows.append(
            {
                "pid": str(n), "question": f"q{n}?", "query": f"Hint: answer.\nQuestion: q{n}?", "unit": "",
                "precision": 1.0, "choices": ["red", "blue"] if choice else [], "answer": gold,
                "decoded_image": picture(n), "metadata": {**metadata, "split": "testmini", "skills": ["s"]}, **kind,
            }
        )  # fmt: skip
    return save(folder, "testmini", rows, ("decoded_image",))


def mmmu(folder: Path) -> str:
    """Rows 0 to 6 are multiple choice with gold B, the rest open with gold n."""
    rows = []
    for n in range(10):
        choice = n < 7
        rows.append(
            {
                "id": f"validation_Math_{n}", "question": f"q{n}? <image 1>",
                "options": "['10', '20']" if choice else "[]", "answer": "B" if choice else str(n),
                "question_type": "multiple-choice" if choice else "open", "image_1": picture(n),
            }
        )  # fmt: skip
    return save(folder, "validation", rows, ("image_1",))


def mathverse(folder: Path) -> str:
    rows = [
        {
            "sample_index": str(n), "problem_index": str(n), "problem_version": "Vision Only", "question": f"q{n}?",
            "answer": str(n), "question_type": "free-form", "query_wo": "", "query_cot": "", "metadata": {"split": "x"},
            "question_for_eval": f"q{n}?", "image": picture(n),
        }
        for n in range(10)
    ]  # fmt: skip
    return save(folder, "vision_only", rows, ("image",))


def say(gold, wrong: str = "none") -> FakeClient:
    def answer(text: str) -> str:
        number = int(re.search(r"q(\d)\?", text)[1])
        said = wrong if number in WRONG else gold(number)
        return rf"<think>of question {number}</think> \boxed{{{said}}}"

    return FakeClient(answer)


def run(
    tmp_path, monkeypatch, name: str, suite: str, data: str, client: FakeClient, judge: str | None = None
) -> dict:
    model = tmp_path / "rlvr" / "checkpoint"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(benches, "check_checkpoint", lambda _: None)
    monkeypatch.setattr(benches, "own_tiles", lambda _: 2)
    monkeypatch.setattr(benches, "Pool", FakePool(client))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    wanted = load_suite(suite)
    wanted = wanted.model_copy(update={"benchmarks": {name: wanted.benchmarks[name]}})
    options = Options(
        modes=("thinking",),
        max_completion_tokens=64,
        data={name: data},
        judge=JudgeServer(judge, "fake") if judge else None,
    )
    recipe = type("Recipe", (), {"servers": None, "tracking": (), "wandb": WandbConfig()})
    (folder,) = benches.bench(recipe, [model], wanted, Harness.at(PYTHON), options)
    task = read_json(folder / "bench.json")["tasks"][name]
    assert "failed" not in task, task
    return task


def assert_scored(task: dict) -> None:
    """8 of 10 rows are right, and each sample has its own completion and picture."""
    assert (task["score"], task["n"]) == (pytest.approx(80.0), 10)
    assert [one["score"] for one in task["samples"]] == [float(n not in WRONG) for n in range(10)]
    for n, one in enumerate(task["samples"]):
        assert one["completion"].startswith(f"<think>of question {n}<")
        assert len(one["pictures"]) == 1


def test_mathvista_runs_with_rules_choices_and_a_judge(tmp_path, monkeypatch):
    def gold(n: int) -> str:
        return "red" if n in (5, 6, 7) else f"The word is word{n}." if n > 7 else str(n)

    def extract(text: str) -> str:
        words = text.rpartition("Extracted answer:")[0].rpartition("?")[2]
        found = re.search(r"word\d", words)
        return found[0] if found else "blue"

    with judge_server(extract) as (url, asked):
        task = run(
            tmp_path, monkeypatch, "mathvista", "reasoning", mathvista(tmp_path / "data"), say(gold), url
        )
    assert_scored(task)
    assert task["samples"][0]["prompt"] == "Hint: answer.\nQuestion: q0?"
    assert len(asked) == 4  # the two words and the two wrong answers


def test_mmmu_runs_multiple_choice_and_open_questions(tmp_path, monkeypatch):
    client = say(lambda n: "B" if n < 7 else str(n))
    task = run(tmp_path, monkeypatch, "mmmu", "general", mmmu(tmp_path / "data"), client)
    assert (task["n"], [one["score"] for one in task["samples"]][7:]) == (10, [0.0, 1.0, 1.0])
    assert "A. 10\nB. 20" in task["samples"][0]["prompt"]
    right = [one["score"] for one in task["samples"]]
    # MMMU gives an unreadable multiple choice answer a random option, with a fixed seed.
    assert sum(right) * 10 == pytest.approx(task["score"])


def test_mathverse_runs_with_a_binary_judge(tmp_path, monkeypatch):
    with judge_server(lambda text: "0" if "none" in text else "1") as (url, asked):
        task = run(
            tmp_path, monkeypatch, "mathverse", "reasoning", mathverse(tmp_path / "data"), say(str), url
        )
    assert_scored(task)
    assert task["samples"][4]["prompt"] == "q4?"
    assert len(asked) == 10


def picture_text(n: int) -> str:
    buffer = io.BytesIO()
    picture(n).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
GENERAL: dict = {
    "ai2d": (
        "test",
        {"options": ["x", "red", "y"], "answer": "1"},
        lambda n: "B",
        "q0?\nA. x\nB. red\nC. y\n" + LETTER,
    ),
    "chartqa": ("test", {"answer": "10", "type": "human_test"}, lambda n: "10.4", f"q0?\n{WORD}"),
    "docvqa": ("validation", {"answers": ["the house", "house"]}, lambda n: "house", f"q0?\n{WORD}"),
    "infovqa": ("validation", {"answers": ["red car"]}, lambda n: "red car", f"q0?\n{WORD}"),
    "ocrbench": (
        "test",
        {"answer": ["shop"], "dataset": "IIIT5K", "question_type": "Regular Text Recognition"},
        lambda n: "SHOP",
        f"q0?\n{WORD}",
    ),
    "hrbench4k": (
        "hrbench_4k",
        {
            "A": "x",
            "B": "red",
            "C": "y",
            "D": "z",
            "answer": "B",
            "category": "single",
            "cycle_category": "0",
        },
        lambda n: "B",
        f"q0?\nA. x\nB. red\nC. y\nD. z\n{LETTER}",
    ),
}


@pytest.mark.parametrize("name", GENERAL)
def test_the_general_suite_runs_with_the_wrappers_prompts(tmp_path, monkeypatch, name):
    split, row, gold, prompt = GENERAL[name]
    rows = [
        {"question": f"q{n}?", "questionId": str(n), "index": n, **row}
        | {"image": picture_text(n) if name == "hrbench4k" else picture(n)}
        for n in range(10)
    ]
    data = save(tmp_path / "data", split, rows, () if name == "hrbench4k" else ("image",))
    client = say(gold)
    with judge_server(lambda text: "A") as (url, _):
        task = run(tmp_path, monkeypatch, name, "general", data, client, url)
    assert_scored(task)
    assert task["samples"][0]["prompt"] == prompt
    cap = load_suite("general").benchmarks[name].tiles
    assert {body["mm_processor_kwargs"]["max_patches"] for _, body in client.asked} == {cap}


VIDEOS: dict = {
    "videomme": (
        "videomme/data",
        {
            "videoID": "clip{}",
            "question_id": "{}",
            "options": ["A. red", "B. blue"],
            "answer": "B",
            "duration": "short",
        }
        | {"domain": "Knowledge", "sub_category": "Law", "task_type": "OCR Problems"},
    ),
    "longvideobench": (
        "datasets/longvideobench/videos",
        {"video_path": "clip{}.mp4", "id": "{}", "option0": "red", "option1": "blue", "correct_choice": 1}
        | {
            "option2": "N/A",
            "option3": "N/A",
            "option4": "N/A",
            "duration_group": 15,
            "question_category": "S2E",
        },
    ),
    "tempcompass_mcq": ("tempcompass/videos", {"video_id": "clip{}", "answer": "B. blue", "dim": "speed"}),
}


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_are_sixteen_labelled_frames(tmp_path, monkeypatch, name):
    folder, row = VIDEOS[name]
    rows = [
        {"question": f"q{n}?"}
        | {key: one.format(n) if isinstance(one, str) else one for key, one in row.items()}
        for n in range(10)
    ]
    data = save(tmp_path / "data", "test", rows, ())
    for n in range(10):
        (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
        film(20 + n, to=tmp_path / "data" / folder / f"clip{n}.mp4")
    client = say(lambda n: "B", wrong="A")  # an unreadable answer gets a random option
    with judge_server(lambda text: "Incorrect") as (url, _):
        task = run(tmp_path, monkeypatch, name, "video", data, client, url)
    assert [one["score"] for one in task["samples"]] == [float(n not in WRONG) for n in range(10)]
    assert task["score"] == pytest.approx(80.0)
    labels = "".join(f"Frame-{number}: \n" for number in range(1, 17))
    for one in task["samples"]:
        assert one["prompt"].startswith(labels)
        assert len(one["pictures"]) == 16
    sizes = {
        Picture(file.read_bytes()).size for file in (tmp_path / "rlvr" / "bench").rglob("pictures/*.png")
    }
    assert sizes == {(448, 448)}
