"""`posttrain data curate`: steps in order, resumption, report, manifest, refusals, models, Ray."""

import json
import random
from pathlib import Path

import pytest
import yaml
from PIL import Image

from benchmarks.curation_rows import near, row
from chain.cli.main import main
from core.manifest import Manifest
from corpus.curation import running
from corpus.records import load_records, write_records
from rewards.judge import client as judge_client

from ..core.films import film
from ..rewards.judge_server import asked, material, serving

STEPS = [{"op": "strip_instructions"}, {"op": "unify_format"}, {"op": "duplicates"}, {"op": "decontaminate"}]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch) -> Path:
    """Thirty good rows, ten near-duplicates, two leaks; five held-out rows."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(3)
    good = [row(rng, n) for n in range(30)]
    held = [{**row(rng, n), "id": f"held-{n}"} for n in range(5)]
    leaks = [{**near(rng, one, n), "id": f"leak-{n}"} for n, one in enumerate(held[:2])]
    rows = [*good, *(near(rng, good[n], n) for n in range(10)), *leaks]
    for start in range(0, len(rows), 10):
        write_records(f"rows/{start:02d}.parquet", rows[start : start + 10])
    write_records("held.parquet", held)
    return tmp_path


def curation(folder: Path, steps=STEPS, **rest) -> Path:
    given = {
        "sets": {"rows": "rows"},
        "held_out": {"held": "held.parquet"},
        "output": "out",
        "workers": 1,
    }
    (folder / "mine.yaml").write_text(yaml.safe_dump({**given, "steps": steps, "shard_rows": 10, **rest}))
    return folder / "mine.yaml"


def test_the_steps_run_and_every_dropped_row_is_named(folder, capsys):
    assert main(["data", "curate", str(curation(folder))]) == 0
    kept = load_records("out")
    assert [one["id"] for one in kept] == [f"row-{n}" for n in range(30)]
    assert kept[0]["images"][0].size == (96, 96)
    dropped = [json.loads(line) for line in Path("out/dropped.jsonl").read_text().splitlines()]
    assert {one["id"] for one in dropped} == {f"near-{n}" for n in range(10)} | {"leak-0", "leak-1"}
    assert next(one for one in dropped if one["id"] == "near-3")["detail"] == "of row-3"
    assert "duplicates: 42 -> 32 rows" in capsys.readouterr().out
    manifest = Manifest.read(Path("out"))
    assert set(manifest.inputs) == {"rows", "held"}
    page = Path("out/report.html").read_text()
    assert page.count("<img") >= 42
    assert "10 of 10 dropped rows" in page


def test_conversations_and_videos_pass_through(folder):
    history = [{"user": "And here?", "assistant": "no"}]
    first, *rest = load_records("rows/00.parquet")
    clip = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in (0, 99)]
    write_records(
        "rows/00.parquet", [{**first, "system": "Be brief.", "history": history, "videos": [clip]}, *rest]
    )
    assert main(["data", "curate", str(curation(folder, STEPS[1:]))]) == 0
    found = next(one for one in load_records("out") if one["id"] == first["id"])
    assert (found["system"], found["history"]) == ("Be brief.", history)
    assert [image.getpixel((0, 0))[0] for image in found["videos"][0].decode()] == [0, 99]


def test_a_finished_curation_is_up_to_date_and_a_changed_step_keeps_the_steps_before_it(folder, capsys):
    path = curation(folder)
    assert main(["data", "curate", str(path)]) == 0
    first = Path("out.work/steps/04_duplicates/step.json").stat().st_mtime_ns
    capsys.readouterr()
    assert main(["data", "curate", str(path)]) == 0
    assert "up to date" in capsys.readouterr().out
    assert main(["data", "curate", str(curation(folder, [*STEPS, {"op": "redundancy"}]))]) == 0
    assert Path("out.work/steps/04_duplicates/step.json").stat().st_mtime_ns == first


def test_an_interrupted_step_continues_with_its_next_shard(folder, monkeypatch):
    done, real = [], running.run_work

    def dies(work):
        if work.do == "rows" and ("rows", 2) in done:
            raise KeyboardInterrupt
        done.append((work.do, work.number))
        return real(work)

    monkeypatch.setattr(running, "run_work", dies)
    path = curation(folder)
    assert main(["data", "curate", str(path)]) == 130
    monkeypatch.setattr(running, "run_work", lambda work: done.append((work.do, work.number)) or real(work))
    assert main(["data", "curate", str(path)]) == 0
    assert done.count(("rows", 0)) == 2  # two row steps: only the third shard of the first was left
    assert done.count(("rows", 3)) == 2
    assert len(load_records("out")) == 30


def test_videos_system_messages_and_earlier_turns_are_kept_and_compared(folder):
    base = {**row(random.Random(9), 0), "images": [], "system": "Be brief."}
    told = [{"user": "What is this?", "assistant": "A film."}]
    rows = [
        {**base, "id": "first", "videos": [film(frames=4)], "history": told},
        {**base, "id": "again", "videos": [film(frames=4)], "history": told},
        {
            **base,
            "id": "other turns",
            "videos": [film(frames=4)],
            "history": [{**told[0], "user": "Who made it?"}],
        },
        {**base, "id": "still", "videos": [film(frames=4)[:200]]},
    ]
    write_table(rows, "films.parquet")
    assert main(["data", "curate", str(curation(folder, sets={"films": "films.parquet"}))]) == 0
    first, other = load_records("out")
    assert (first["id"], other["id"]) == ("first", "other turns")
    assert first["system"] is None  # strip_instructions
    assert first["history"] == told
    assert len(first["videos"][0].frames) == 4
    reasons = [json.loads(line)["reason"] for line in Path("out/dropped.jsonl").read_text().splitlines()]
    assert reasons == ["videos: must decode", "duplicate"]


def write_table(rows, path) -> None:
    """Write rows as they are, without the checks of write_records."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def stored(value):
        return [{"bytes": data, "path": None} for data in value]

    texts = [{**one, "history": json.dumps(one.get("history", []))} for one in rows]
    media = ("images", "videos")
    pq.write_table(
        pa.Table.from_pylist(
            [{**one, **{name: stored(one.get(name, [])) for name in media}} for one in texts]
        ),
        path,
    )


def same_rows(one: Path, two: Path) -> None:
    """Both outputs hold the same files and drops."""
    names = sorted(file.name for file in one.glob("*.parquet"))
    assert names == sorted(file.name for file in two.glob("*.parquet"))
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert (one / "dropped.jsonl").read_text() == (two / "dropped.jsonl").read_text()


def test_two_processes_give_the_same_rows(folder):
    assert main(["data", "curate", str(curation(folder))]) == 0
    assert main(["data", "curate", str(curation(folder, output="two", workers=2))]) == 0
    same_rows(Path("out"), Path("two"))


def test_paths_are_searched_in_the_folder_of_the_file_first(folder, capsys, monkeypatch):
    path = curation(folder)
    (folder / "else").mkdir()
    monkeypatch.chdir(folder / "else")
    write_records("held.parquet", [row(random.Random(99), 0)])  # the other one, beside the file, counts
    assert main(["data", "curate", str(path)]) == 0
    said = capsys.readouterr().out
    assert f"set rows: {folder / 'rows'}\n" in said
    assert f"set held: {folder / 'held.parquet'}\n" in said
    assert len(load_records(folder / "else" / "out")) == 30


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"steps": [{"op": "duplicate"}]},
            "steps[0]: op = 'duplicate' is unknown; did you mean duplicates?",
        ),
        ({"steps": [{"op": "redundancy", "max_overlp": 0.5}]}, "did you mean max_overlap?"),
        ({"steps": [{"op": "describe", "model": "judge"}]}, "model 'judge'"),
        ({"held_out": {}}, "decontaminate needs held_out"),
        (
            {"sets": {"rows": "missing.parquet"}},
            "'missing.parquet': there is no such file or folder; looked in",
        ),
        ({"sets": {"rows": "org/set"}}, "a data set on the hub is written hf://datasets/org/set"),
        (
            {"sets": {"rows": "hf://datasets/org/set"}},
            "write rows: {path: hf://datasets/org/set, format: records}",
        ),
    ],
)
def test_a_wrong_curation_is_refused_in_one_line(folder, capsys, change, said):
    assert main(["data", "curate", str(curation(folder, **change))]) == 2
    assert said in capsys.readouterr().err


def test_a_broken_picture_and_a_wrong_column_are_named(folder, capsys):
    good = [row(random.Random(n), n) for n in range(4)]
    good[2]["images"] = [good[2]["images"][0][:300]]
    write_table(good, "rows.parquet")
    given = {"sets": {"rows": "rows.parquet"}}
    assert main(["data", "curate", str(curation(folder, **given))]) == 0
    (dropped,) = [json.loads(line) for line in Path("out/dropped.jsonl").read_text().splitlines()]
    assert (dropped["id"], dropped["step"], dropped["reason"]) == ("row-2", "read", "images: must decode")
    write_table([{**one, "gold": "1"} for one in good], "rows.parquet")
    assert main(["data", "curate", str(curation(folder, **given))]) == 1
    assert "rows.parquet: unknown column 'gold'" in capsys.readouterr().err


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(judge_client, "_PAUSE_S", 0.01)
    with serving() as server:
        yield server


def models(server) -> dict:
    return {"models": {"judge": {"base_url": server.url, "model": "m", "max_concurrency": 4}}}


def test_a_server_that_is_down_loses_no_row_and_the_next_run_continues(folder, server, capsys):
    replies = iter(["a phrase"] * 15)
    server.reply = lambda request: next(replies, (500, b""))
    path = curation(folder, [{"op": "describe", "model": "judge"}], **models(server))
    assert main(["data", "curate", str(path)]) == 1
    assert "run the command again to continue" in capsys.readouterr().err
    assert not Path("out").exists()
    judge_client._servers.drop()  # as a new process
    server.reply, answered = lambda request: "a phrase", len(server.requests)
    assert main(["data", "curate", str(path)]) == 0
    assert len(load_records("out")) == 42
    assert len(server.requests) - answered <= 42 - 15  # replies are cached
    assert load_records("out")[0]["meta"]["phrase"] == "a phrase"


def test_a_budget_stops_the_step(folder, server, capsys):
    server.reply = lambda request: "a phrase"
    limited = models(server)
    limited["models"]["judge"]["run_calls"] = 5
    assert (
        main(["data", "curate", str(curation(folder, [{"op": "describe", "model": "judge"}], **limited))])
        == 1
    )
    assert "run_calls=5 used up" in capsys.readouterr().err


def test_a_judge_that_credits_injected_rows_is_refused(folder, server, capsys):
    server.reply = lambda request: "7"
    step = {"op": "score", "model": "judge", "preset": "image"}
    assert main(["data", "curate", str(curation(folder, [step], **models(server)))]) == 1
    assert "credits wrong rows" in capsys.readouterr().err


def test_scores_drop_rows_and_stay_in_meta(folder, server):
    def reply(request):
        if "elephants" in material(request):
            return "0"
        return "2" if "difficult" in asked(request) and "harbour" in material(request).casefold() else "6"

    server.reply = reply
    step = {"op": "score", "model": "judge", "preset": "image"}
    assert main(["data", "curate", str(curation(folder, [step], **models(server)))]) == 0
    kept = load_records("out")
    assert 0 < len(kept) < 42
    assert all("harbour" not in one["question"].casefold() for one in kept)
    assert kept[0]["meta"]["scores"] == {"quality": 6, "difficulty": 6}
    assert server.requests[-1]["structured_outputs"]["choice"][0] == "-1"


def test_pass_at_k_drops_what_is_always_and_never_solved(folder, server):
    golds = {one["question"]: one["answer"] for one in load_records("rows")}
    solved = {question: number % 3 for number, question in enumerate(golds)}  # never, half, always

    def reply(request):
        text = request["messages"][-1]["content"][-1]["text"]
        question = next(one for one in golds if text.startswith(one))
        right = solved[question] == 2 or (solved[question] == 1 and request["seed"] % 2)
        return f"<think>I count.</think>\\boxed{{{golds[question] if right else 'none'}}}"

    server.reply = reply
    step = {"op": "pass_at_k", "model": "judge", "samples": 2, "max_completion_tokens": 50}
    assert main(["data", "curate", str(curation(folder, [step], **models(server)))]) == 0
    rates = {one["meta"]["pass_rate"] for one in load_records("out")}
    assert rates == {0.5}
    reasons = {json.loads(line)["reason"] for line in Path("out/dropped.jsonl").read_text().splitlines()}
    assert reasons == {"always solved", "never solved"}
    assert [part["type"] for part in server.requests[0]["messages"][0]["content"]] == ["image_url", "text"]


def test_an_embedding_server_makes_the_classes(folder, server):
    def reply(request):
        if "input" not in request:
            return "birds" if "harbour" in material(request) else "boats"
        data = [
            {"index": at, "embedding": [3.0, 0.0] if text == "birds" else [0.0, 1.0]}
            for at, text in enumerate(request["input"])
        ]
        return 200, json.dumps({"data": data[::-1]}).encode()

    server.reply = reply
    steps = [
        {"op": "describe", "model": "judge"},
        {"op": "latent_classes", "classes": 2, "keep_share": 0.2, "embedder": "judge"},
    ]
    assert main(["data", "curate", str(curation(folder, steps, **models(server)))]) == 0
    phrases = [one["meta"]["phrase"] for one in load_records("out")]
    assert (phrases.count("birds"), phrases.count("boats")) == (4, 4)


def test_a_broken_embedding_server_stops_the_step(folder, server, capsys):
    server.reply = lambda request: (200, b"{}")
    steps = [{"op": "latent_classes", "keep_share": 0.5, "embedder": "judge"}]
    assert main(["data", "curate", str(curation(folder, steps, **models(server)))]) == 1
    assert "models.judge: no embeddings (KeyError" in capsys.readouterr().err


def test_pass_at_k_refuses_what_it_cannot_ask(folder, server, capsys):
    write_records("told.parquet", [{**row(random.Random(1), 1), "system": "Be brief."}])
    step = {"op": "pass_at_k", "model": "judge", "samples": 1, "max_completion_tokens": 5}
    path = curation(folder, [step], sets={"told": "told.parquet"}, **models(server))
    assert main(["data", "curate", str(path)]) == 1
    assert "prepare.pass_at_k of an RL stage" in capsys.readouterr().err
    assert server.requests == []


@pytest.mark.filterwarnings("ignore")  # Ray Data sets its own deprecated options
def test_ray_keeps_the_same_rows(folder):
    pytest.importorskip("ray")
    assert main(["data", "curate", str(curation(folder))]) == 0
    assert main(["data", "curate", str(curation(folder, output="by-ray", engine="ray", workers=2))]) == 0
    same_rows(Path("out"), Path("by-ray"))
