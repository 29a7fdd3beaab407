"""Rows with videos: written, read with caps, refused; and the videos of public formats in their places."""

import io
import json
import tarfile

import pytest
from PIL import Image

from core.model.prompts import messages
from corpus.formats.table import Options
from corpus.importing import import_set
from corpus.records import DataSource, RecordError, load_records, load_source, problem_of, write_records
from rewards.judge.judges import VisionJudge
from rl.data import example_of

from ..core.films import film, shown_numbers, sound
from ..rewards.judge_server import material, serving

ROW = {"question": "What moves?", "answer": "4", "mode": "direct", "verifier": "number"}


def row(number, **changes):
    return {"id": f"v{number}", **ROW, **changes}


def folder_of_frames(path, count=20):
    path.mkdir()
    for number in range(count):
        Image.new("RGB", (8, 8), (5 * number,) * 3).save(path / f"frame_{number}.png")
    return path


def test_a_video_is_a_file_its_bytes_or_a_folder_or_list_of_frames(tmp_path):
    film(to=tmp_path / "a.mp4")
    frames = folder_of_frames(tmp_path / "frames")
    given = [tmp_path / "a.mp4", str(tmp_path / "a.mp4"), film(), frames, [Image.new("RGB", (8, 8))] * 3]
    write_records(tmp_path / "set.parquet", [row(n, videos=[one]) for n, one in enumerate(given)])
    read = load_records(tmp_path / "set.parquet")
    assert [len(one["videos"][0].frames) for one in read] == [16, 16, 16, 16, 3]
    assert read[0]["videos"][0].data == (tmp_path / "a.mp4").read_bytes()
    # frame_10 comes after frame_9
    assert shown_numbers(read[3]["videos"][0].decode()) == [
        *(0, 1, 3, 4, 5, 6, 8, 9, 10, 11, 13, 14, 15, 16, 18, 19),
    ]


def test_a_source_caps_the_frames_of_its_videos(tmp_path):
    write_records(tmp_path / "set.parquet", [row(0, videos=[film()])])
    sets = {"mine": tmp_path / "set.parquet"}
    for caps, count in (({}, 16), ({"frames": 4}, 4), ({"fps": 5.0}, 8)):
        (one,) = load_source(DataSource(set="mine", **caps), sets, None)
        assert len(one["videos"][0].frames) == count


@pytest.mark.parametrize(
    ("video", "words"),
    [(sound(), "no video stream"), (film()[:200], "does not decode"), (b"", "only a path|empty")],
)
def test_a_broken_or_audio_only_file_is_refused_with_its_row(tmp_path, video, words):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row(n, videos=[{"bytes": one, "path": None}]) for n, one in enumerate((film(), video))]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "set.parquet")
    with pytest.raises(RecordError, match=rf"set.parquet: row 1: videos: must decode.*({words})"):
        load_records(tmp_path / "set.parquet")
    records = load_records(tmp_path / "set.parquet", on_bad="drop")
    assert records.dropped == {"videos: must decode": 1}


def test_marks_and_videos_agree_in_number():
    problem = problem_of(row(0, videos=[film()], question="<video> or <video>?"))
    assert problem.rule == "placeholders (<video>) and videos differ in number"
    assert problem_of(row(0, videos=[film()], question="Is <video> new?")) is None


def imported(folder, lines, **options):
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = import_set(folder / "rows.jsonl", folder / "out.parquet", **options)
    assert not summary.rejected
    return summary.format, load_records(folder / "out.parquet")


def text_of(record):
    return "".join(part.get("text", "#") for m in messages(record) for part in m["content"])


def said(question):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "4"}]


def test_llavas_video_stands_at_its_mark(tmp_path):
    film(to=tmp_path / "a.mp4")
    lines = [
        {"video": "a.mp4", "conversations": said("<video>\nWhat moves?")},
        {"video": "a.mp4", "conversations": said("What moves in <video>?")},
    ]
    name, records = imported(tmp_path, lines)
    assert name == "llava"
    assert [one["question"] for one in records] == ["What moves?", "What moves in <video>?"]
    assert [len(one["videos"]) for one in records] == [1, 1]
    assert text_of(records[0]).endswith("Frame-16: #\nWhat moves?")


def test_swifts_images_and_videos_stand_at_their_marks(tmp_path):
    film(to=tmp_path / "a.mp4")
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    folder_of_frames(tmp_path / "frames", 2)
    talk = [
        {"role": "user", "content": "<image>Is it in <video>?"},
        {"role": "assistant", "content": "no"},
        {"role": "user", "content": "<video>Or here?"},
        {"role": "assistant", "content": "4"},
    ]
    name, (one,) = imported(
        tmp_path, [{"messages": talk, "images": ["a.png"], "videos": ["a.mp4", "frames"]}]
    )
    assert (name, one["question"]) == ("swift", "<video>Or here?")
    assert one["history"] == [{"user": "<image>Is it in <video>?", "assistant": "no"}]
    assert [len(clip.frames) for clip in one["videos"]] == [16, 2]


def test_qwens_parts_give_a_file_or_a_list_of_frames(tmp_path):
    film(to=tmp_path / "a.mp4")
    frames = folder_of_frames(tmp_path / "frames", 2)
    names = [f"frames/{file.name}" for file in sorted(frames.iterdir())]
    parts = [
        {"type": "video", "video": "a.mp4"},
        {"type": "video", "video": names},
        {"type": "text", "text": "Which?"},
    ]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "4"}]
    name, (one,) = imported(tmp_path, [{"messages": talk}])
    assert (name, one["question"]) == ("openai", "Which?")
    assert [len(clip.frames) for clip in one["videos"]] == [16, 2]


def test_a_column_and_a_shard_may_hold_videos(tmp_path):
    film(to=tmp_path / "a.mp4")
    _, (one,) = imported(tmp_path, [{"video": "a.mp4", "question": "How many?", "answer": "4"}])
    assert len(one["videos"]) == 1
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        for ending, data in (("mp4", film()), ("json", json.dumps({"question": "Q?", "answer": 4}).encode())):
            member = tarfile.TarInfo(f"0.{ending}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    import_set(tmp_path / "rows.tar", tmp_path / "shard.parquet")
    assert load_records(tmp_path / "shard.parquet")[0]["videos"][0].data == film()


def test_videos_stay_below_the_image_folder(tmp_path):
    film(to=tmp_path / "a.mp4")
    (tmp_path / "data").mkdir()
    lines = [{"video": "../a.mp4", "conversations": said("What?")}]
    (tmp_path / "data" / "rows.jsonl").write_text(json.dumps(lines[0]))
    with pytest.raises(RecordError, match="a file lies outside the image folder"):
        import_set(tmp_path / "data" / "rows.jsonl", tmp_path / "out.parquet")
    options = Options(root=tmp_path)
    lines[0]["video"] = "a.mp4"
    (tmp_path / "data" / "rows.jsonl").write_text(json.dumps(lines[0]))
    assert (
        import_set(tmp_path / "data" / "rows.jsonl", tmp_path / "out.parquet", options=options).written == 1
    )


def test_a_judge_sees_the_frames_and_reads_the_turns_before_the_question(tmp_path):
    history = [{"user": "Who plays?", "assistant": "Two boys."}]
    one = row(0, videos=[film()], history=history, system="Be brief.", verifier="judge")
    write_records(tmp_path / "set.parquet", [one])
    (record,) = load_source(DataSource(set="mine", frames=3), {"mine": tmp_path / "set.parquet"}, None)
    with serving() as server:
        judge = VisionJudge(server.url, "m", canaries=False, max_retries=0)
        assert judge("Four.", example_of(record)).score == 1
        (request,) = server.requests
    parts = request["messages"][-1]["content"]
    assert [part["type"] for part in parts].count("image_url") == 3
    for said in ("System: Be brief.", "User: Who plays?", "Assistant: Two boys.", "User: What moves?"):
        assert said in material(request)
