"""Benches with a harness of a few lines: what reaches the servers, what is asked again, what is named."""

import base64
import io
import json
import os
import sys
from pathlib import Path

import pytest
import requests
from PIL import Image

from chain.bench import bench as benches
from chain.bench.bench import Options, checkpoints
from chain.bench.harness import Harness
from chain.bench.local import local_task
from chain.bench.relay import JudgeServer, Relay, last_box
from chain.bench.suite import FOLDER, Benchmark, Suite, load_suite
from chain.recipe import WandbConfig
from core.files import read_json
from core.model.prompts import THINK_CONTRACT
from core.strict import ConfigError
from corpus.records import load_records, write_records
from rl.rollout.access import TOKEN

from .benching import FakeClient, judge_server

HARNESS = '''
"""A harness of a few lines: asks each question of tasks/<task>.json, and asks the judge if the task says so."""
import json, os, sys, urllib.request
from pathlib import Path

def option(name):
    return sys.argv[sys.argv.index(name) + 1]

def post(url, body):
    headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"]}
    request = urllib.request.Request(url + "/chat/completions", json.dumps(body).encode(), headers)
    reply = json.loads(urllib.request.urlopen(request).read())
    return reply["choices"][0]["message"]["content"], reply["usage"]["prompt_tokens"]

if "SHOWN" in os.environ:
    Path(os.environ["SHOWN"]).write_text(str(dict(os.environ)))
model = dict(pair.split("=", 1) for pair in option("--model_args").split(","))
file = Path(os.environ["FAKE_TASKS"]) / (option("--tasks") + ".json")
if not file.exists():
    raise SystemExit("DatasetNotFoundError: no such data set")
task = json.loads(file.read_text())
out = Path(option("--output_path"))
out.mkdir(parents=True)
samples = []
for number, (question, gold) in enumerate(task["rows"]):
    message = {"role": "user", "content": [{"type": "text", "text": question}]}
    answer, count = post(model["base_url"], {"messages": [message], "max_tokens": 16, "temperature": 0})
    right = answer == gold
    if task.get("judge"):
        right = post(os.environ["OPENAI_API_URL"], {"messages": [{"role": "user", "content": answer}]})[0] == "1"
    sample = {"doc_id": number, "input": question, "target": gold, "filtered_resps": [answer]}
    samples.append({**sample, "acc": float(right), "token_counts": [{"input_tokens": count}]})
name = option("--tasks")
score = sum(sample["acc"] for sample in samples) / len(samples)
lines = "".join(json.dumps(sample) + chr(10) for sample in samples)
(out / f"x_samples_{name}.jsonl").write_text(lines)
(out / "x_results.json").write_text(json.dumps({"results": {name: {"acc,none": score}}, "versions": {name: 1}}))
'''
ROWS = [["1+1?", "2"], ["2+2?", "4"]]
WHOLE = Benchmark(task="x", metric="acc", score="acc", extract="whole", source="ours: a test")


def say(text: str) -> str:
    return r"<think>\boxed{9}</think> so \boxed{2}." if "FIRST" in text else "2"


@pytest.fixture
def harness(tmp_path, monkeypatch) -> Harness:
    script = tmp_path / "harness.py"
    script.write_text(HARNESS)
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 3\nexec {sys.executable} {script} "$@"\n')
    python.chmod(0o755)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sums.json").write_text(json.dumps({"rows": ROWS}))
    (tasks / "judged.json").write_text(json.dumps({"rows": ROWS, "judge": True}))
    monkeypatch.setenv("FAKE_TASKS", str(tasks))
    return Harness(python, "0.7.3", tasks)


def suite(**judged: bool) -> Suite:
    one = {"metric": "acc", "score": "acc", "source": "ours: a test"}
    return Suite(
        about="test",
        benchmarks={name: Benchmark(task=name, judge=asks, **one) for name, asks in judged.items()},
    )


class FakePool:
    def __init__(self, client):
        self.client = client

    def __call__(self, *_):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def serve(self, model):
        return self.client


@pytest.fixture
def run(tmp_path, harness, monkeypatch):
    """Runs a suite for a checkpoint of one file; returns bench.json and the policy's requests."""
    model = tmp_path / "rlvr" / "checkpoint"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.setattr(benches, "check_checkpoint", lambda _: None)
    monkeypatch.setattr(benches, "own_tiles", lambda _: 2)

    def go(suite: Suite, tracking=(), **options):
        client = FakeClient(say)
        monkeypatch.setattr(benches, "Pool", FakePool(client))
        recipe = type("Recipe", (), {"servers": None, "tracking": tracking, "wandb": WandbConfig()})
        options = Options(**{"modes": ("thinking",), "max_completion_tokens": 64, **options})
        (folder,) = benches.bench(recipe, [model], suite, harness, options)
        return read_json(folder / "bench.json"), client.asked

    return go


def test_a_bench_keeps_every_sample_and_scores_the_box_after_the_thought(run):
    found, asked = run(suite(sums=False))
    task = found["tasks"]["sums"]
    assert (task["score"], task["n"], task["mode"]) == (50.0, 2, "thinking")
    assert [(one["prompt"], one["extracted"], one["score"]) for one in task["samples"]] == [
        ("1+1?", "2", 1.0),
        ("2+2?", "2", 0.0),
    ]
    assert task["samples"][0]["completion"] == say("FIRST")
    assert task["samples"][0]["tokens"] == 3
    body = asked[0][1]
    assert body["messages"][0]["content"][0]["text"] == f"1+1?\n{THINK_CONTRACT}"
    assert (body["max_tokens"], body["temperature"], body["logit_bias"]) == (64, 0.0, {"7": -100.0})
    assert {url for url, _ in asked} == {"http://one", "http://two"}


def test_both_modes_and_the_blind_pass_have_entries_of_their_own(run):
    found, asked = run(suite(sums=False), modes=("thinking", "direct"), blind=True)
    assert list(found["tasks"]) == ["sums", "sums.blind", "sums.direct", "sums.direct.blind"]
    assert len(asked) == 8
    assert found["tasks"]["sums.direct"]["samples"][0]["completion"] == "2"


def test_a_second_mode_keeps_the_first_ones_scores(run):
    first, _ = run(suite(sums=False))
    both, asked = run(suite(sums=False), modes=("direct",))
    assert both["tasks"]["sums"] == first["tasks"]["sums"]
    assert (both["tasks"]["sums.direct"]["mode"], len(asked)) == ("direct", 2)


def test_everything_that_makes_a_score_is_kept_beside_it(run):
    with judge_server(lambda text: "1") as (url, _):
        found, _ = run(suite(judged=True, sums=False), judge=JudgeServer(url, "tiny"), seed=3, limit=2)
    assert (found["seed"], found["harness"]) == (3, {"name": "lmms-eval", "version": "0.7.3"})
    task = found["tasks"]["judged"]
    assert (task["judge"], task["task_version"], task["limit"], task["metric"]) == ("tiny", 1, 2, "acc")
    assert found["tasks"]["sums"]["judge"] is None
    assert len(task["prompts_sha256"]) == 64
    again, _ = run(suite(sums=False), seed=4, limit=2)
    assert again["tasks"]["sums"]["fingerprint"] != found["tasks"]["sums"]["fingerprint"]


def test_scores_and_samples_reach_the_tracker_in_the_group_of_the_run(run, tmp_path, monkeypatch):
    seen = {}
    (tmp_path / "chain.json").write_text('{"id": "demo-1234"}')

    class Run:
        def summary(self, values):
            seen["summary"] = values

        def table(self, name, table, step):
            seen[name] = [dict(zip(table.columns, row, strict=True)) for row in table.rows]

        def finish(self, exit_code):
            seen["exit"] = exit_code

    def opened(cfg, group, stage, config, run_dir):
        seen["opened"] = (group, stage, run_dir, config["seed"])
        return Run()

    monkeypatch.setattr("chain.tracking.open_wandb", opened)
    run(suite(sums=False), tracking=("wandb",))
    assert seen["opened"] == ("demo-1234", "bench_rlvr", tmp_path, 0)
    assert (seen["summary"], seen["exit"]) == ({"bench/sums": 50.0}, 0)
    assert [(row["score/bench"], row["why/bench"]) for row in seen["bench_samples/sums"]] == [
        (1.0, "extracted: 2"), (0.0, "extracted: 2")
    ]  # fmt: skip
    seen.clear()
    run(suite(sums=False), tracking=("wandb",))
    assert seen == {}  # nothing new, no run


def test_a_finished_bench_asks_nothing_and_an_interrupted_one_asks_the_rest(run, tmp_path):
    found, asked = run(suite(sums=False))
    again, none = run(suite(sums=False))
    assert (len(asked), none, again["tasks"]) == (2, [], found["tasks"])
    # as if it had been killed after the first reply
    (file,) = (tmp_path / "rlvr" / "bench").rglob("replies.jsonl")
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    (tmp_path / "rlvr" / "bench" / "bench.json").unlink()
    rest, missing = run(suite(sums=False))
    assert len(missing) == 1
    assert rest["tasks"]["sums"]["samples"] == found["tasks"]["sums"]["samples"]


def test_a_missing_data_set_and_a_missing_judge_are_named_and_the_rest_runs(run):
    found, _ = run(suite(gone=False, judged=True, sums=False))
    assert "DatasetNotFoundError: no such data set" in found["tasks"]["gone"]["failed"]
    assert found["tasks"]["judged"]["failed"] == "its scoring asks a judge; name one with --judge URL"
    assert found["tasks"]["sums"]["score"] == 50.0


def test_the_judge_decides_and_is_asked_once(run):
    with judge_server(lambda text: "1") as (url, requests_):
        found, _ = run(suite(judged=True), judge=JudgeServer(url, "tiny", "secret"))
    assert found["tasks"]["judged"]["score"] == 100.0
    assert found["judge"] == {"url": url, "model": "tiny"}
    assert [body["model"] for body in requests_] == ["tiny"]  # both answers are equal


def test_the_harness_gets_neither_the_servers_token_nor_the_judges_key(run, monkeypatch, tmp_path):
    monkeypatch.setenv(TOKEN, "of the servers")
    monkeypatch.setenv("MY_KEY", "of the judge")
    monkeypatch.setenv("SHOWN", str(tmp_path / "environment.txt"))
    with judge_server(lambda text: "1") as (url, _):
        run(suite(judged=True), judge=JudgeServer(url, "tiny", "of the judge"))
    shown = (tmp_path / "environment.txt").read_text()
    assert "OPENAI_API_KEY" in shown
    assert not any(one in shown for one in ("of the servers", "of the judge", "PYTHONPATH"))


def test_a_judge_that_fails_leaves_no_score(run):
    with judge_server(lambda text: " ") as (url, _):
        found, _ = run(suite(judged=True), judge=JudgeServer(url, "tiny"))
    assert "score" not in found["tasks"]["judged"]
    assert "502" in found["tasks"]["judged"]["failed"]  # this harness ends at its first error


def test_a_judge_that_answers_the_second_time_leaves_no_failure(tmp_path):
    replies = iter([" ", "1"])
    body = {"messages": [{"role": "user", "content": "4"}]}
    with judge_server(lambda text: next(replies)) as (url, asked):
        relay = Relay(None, tmp_path, "direct", WHOLE, 8, judge=JudgeServer(url, "tiny"))
        with pytest.raises(ValueError, match="the judge's reply is empty"):
            relay.answer("judge", body)
        assert len(relay.failures["judge"]) == 1
        assert relay.answer("judge", body)["choices"][0]["message"]["content"] == "1"
    assert (relay.failures["judge"], len(asked)) == ({}, 2)


def picture() -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (6, 4), (250, 0, 0)).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("blind", [False, True])
def test_the_relay_keeps_pictures_and_blanks_them_for_the_blind_pass(tmp_path, blind):
    client = FakeClient(say)
    parts = [{"type": "image_url", "image_url": {"url": picture()}}, {"type": "text", "text": "?"}]
    with Relay(client, tmp_path, "direct", WHOLE, 8, blind) as relay:
        headers = {"Authorization": f"Bearer {relay.token}"}
        body = {"messages": [{"role": "user", "content": parts}], "temperature": 0}
        url = f"{relay.url('policy')}/chat/completions"
        reply = requests.post(url, json=body, headers=headers, timeout=10).json()
        refused = requests.post(url, json=body, headers={"Authorization": "Bearer no"}, timeout=10)
    assert reply["choices"][0]["message"]["content"] == "2"
    assert refused.status_code == 401
    sent = client.asked[0][1]["messages"][0]["content"][0]["image_url"]["url"]
    seen = Image.open(io.BytesIO(base64.b64decode(sent.partition(",")[2])))
    assert (seen.size, seen.getpixel((0, 0))) == ((6, 4), (128, 128, 128) if blind else (250, 0, 0))
    assert len(list((tmp_path / "pictures").iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\boxed{1}</think> it is \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"<think>\boxed{1}</think> it is two", "1"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{never closed", r"\boxed{never closed"),
        ("plain", "plain"),
    ],
)
def test_the_box_after_the_thought_counts_else_the_last(text, answer):
    assert last_box(text) == answer


@pytest.mark.parametrize("name", [file.stem for file in FOLDER.glob("*.yaml")])
def test_every_suite_loads_and_says_where_its_prompts_come_from(name):
    found = load_suite(name)
    assert all(one.source.startswith(("report:", "ours:", "differs:")) for one in found.benchmarks.values())
    assert all(set(scores) <= set(found.benchmarks) for scores in found.published.values())


def test_an_unknown_suite_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="did you mean reasoning"):
        load_suite("reasonin")
    (tmp_path / "mine.yaml").write_text("about: x\nbenchmarks: {a: {metric: m, score: s, source: 'ours: x'}}")
    with pytest.raises(ConfigError, match=r"benchmarks\.a: give exactly one of yaml and task"):
        load_suite(str(tmp_path / "mine.yaml"))


def test_a_missing_harness_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match="make bench-setup"):
        Harness.at(tmp_path / "python")
    with pytest.raises(ConfigError, match="no lmms-eval in this environment"):
        Harness.at(Path(sys.executable))


def test_paths_stand_for_checkpoints_stages_and_runs(tmp_path):
    for stage in ("longcot_sft", "rlvr"):
        (tmp_path / stage / "checkpoint").mkdir(parents=True)
        (tmp_path / stage / "checkpoint" / "config.json").write_text("{}")
    first, last = tmp_path / "longcot_sft" / "checkpoint", tmp_path / "rlvr" / "checkpoint"
    assert checkpoints([tmp_path]) == [first, last]
    assert checkpoints([tmp_path / "rlvr", first]) == [last, first]
    with pytest.raises(ConfigError, match="no checkpoint"):
        checkpoints([tmp_path / "rlvr" / "eval"])


def test_vlmevals_tsv_becomes_a_task(tmp_path):
    data = picture().partition(",")[2]
    lines = ["index\tquestion\timage\tA\tB\tanswer", f"7\tWhich?\t{data}\tred\tblue\tA"]
    (tmp_path / "mcq.tsv").write_text("\n".join(lines) + "\n")
    task = local_task("mcq", tmp_path / "mcq.tsv", tmp_path / "out")
    assert (task.task, task.extract) == ("mcq", "contract")
    assert "!function functions.results" in (tmp_path / "out" / "mcq.yaml").read_text()
    rows = load_records(tmp_path / "out" / "records.parquet")
    assert (rows[0]["answer"], len(rows[0]["images"])) == ("A", 1)
    assert "A. red" in rows[0]["question"]
    with pytest.raises(ConfigError, match="there is no such file"):
        local_task("x", tmp_path / "none.tsv", tmp_path / "out")


def test_records_become_a_task_of_plain_rows(tmp_path):
    import pyarrow.parquet as pq

    row = {"id": "a", "question": "?", "answer": "4", "mode": "think", "verifier": "number", "images": []}
    write_records(tmp_path / "rows.parquet", [row])
    local_task("mine", tmp_path / "rows.parquet", tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "test.parquet").to_pylist() == [
        {"id": "a", "question": "?", "answer": "4", "pictures": []}
    ]
    space: dict = {}
    exec((tmp_path / "out" / "functions.py").read_text(), space)
    assert space["results"]({"answer": "4"}, ["4.0"]) == {"accuracy": 1.0}
    assert space["results"]({"answer": "B"}, ["(b)"]) == {"accuracy": 1.0}
    assert space["results"]({"answer": "4"}, [""]) == {"accuracy": 0.0}
    assert os.path.isabs(__import__("yaml").safe_load(
        (tmp_path / "out" / "mine.yaml").read_text().partition("doc_to_visual")[0]
    )["dataset_kwargs"]["data_files"]["test"])  # fmt: skip
