"""For each public format a file of twenty rows, made after its public description, and what each row must become."""

import base64
import csv
import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from core.strict import ConfigError
from corpus.formats import files
from corpus.formats.files import rows_of
from corpus.formats.gold import kind_of
from corpus.formats.table import Options
from corpus.importing import import_set
from corpus.records import RecordError, load_records

from ..core.films import film

ROWS = range(20)
OPTIONS = ["red", "green", "blue", "none"]


def colour(number: int) -> tuple[int, int, int]:
    return (10 * number, 100, 200)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour(number)).save(buffer, "PNG")
    return buffer.getvalue()


def saved(folder: Path, number: int) -> str:
    file = folder / "pictures" / f"{number}.png"
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(png(number))
    return f"pictures/{number}.png"


def encoded(number: int) -> str:
    return base64.b64encode(png(number)).decode()


def cell(number: int) -> dict:
    return {"bytes": png(number), "path": None}


def jsonl(folder: Path, rows: list) -> Path:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "rows.jsonl"


def array(folder: Path, rows: list) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows, indent=2))
    return folder / "rows.json"


def parquet(folder: Path, rows: list) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    return folder / "rows.parquet"


def table(folder: Path, rows: list, name: str = "rows.csv") -> Path:
    with (folder / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if name.endswith("tsv") else ",")
        writer.writeheader()
        writer.writerows(rows)
    return folder / name


def shard(folder: Path, samples: list[dict[str, bytes]]) -> Path:
    with tarfile.open(folder / "rows.tar", "w") as tar:
        for number, sample in enumerate(samples):
            for ending, data in sample.items():
                member = tarfile.TarInfo(f"shard/{number:05d}.{ending}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder / "rows.tar"


def turns(*said: str) -> list[dict]:
    return [{"from": "human" if at % 2 == 0 else "gpt", "value": words} for at, words in enumerate(said)]


def messages(*said) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[at % 2], "content": words} for at, words in enumerate(said)]


def lettered(question: str) -> str:
    return "\n".join([question, *(f"{letter}. {word}" for letter, word in zip("ABCD", OPTIONS, strict=True))])


def expect(question: str, answer: str, verifier: str, **more) -> dict:
    return {
        "question": question,
        "answer": answer,
        "verifier": verifier,
        "mode": "direct",
        "response": None,
    } | more


def llava(folder):
    """LLaVA-Instruct: a JSON array; `<image>` before or after the question; the whole reply is trained."""
    rows = [
        {
            "id": f"{n:09d}",
            "image": saved(folder, n),
            "conversations": turns(
                f"<image>\nCount {n}." if n % 2 else f"Count {n}.\n<image>", f"It shows {n} dots.\nSo {n}."
            ),
        }
        for n in ROWS
    ]
    replies = [f"It shows {n} dots.\nSo {n}." for n in ROWS]
    return array(folder, rows), "llava", [
        expect(f"Count {n}." if n % 2 else f"Count {n}.\n<image>", "", "none", response=replies[n]) for n in ROWS
    ]  # fmt: skip


def math_v360k(folder):
    """MathV360K: LLaVA's shape, options in the question, replies that end in the answer."""
    rows = [
        {
            "id": f"m{n}",
            "image": saved(folder, n),
            "conversations": turns(
                f"<image>Hint: choose.\nQuestion: Which {n}?\nChoices:\n(A) red\n(B) green",
                "The answer is B.",
            ),
        }
        for n in ROWS
    ]
    words = "Hint: choose.\nQuestion: Which {}?\nChoices:\n(A) red\n(B) green"
    return array(folder, rows), "llava", [
        expect(words.format(n), "B", "choice", response="The answer is B.") for n in ROWS
    ]  # fmt: skip


def llava_cot(folder):
    """LLaVA-CoT: four sections; three of them are the thought."""
    reply = (
        "<SUMMARY>I look.</SUMMARY>\n\n<CAPTION>Dots.</CAPTION>\n\n"
        "<REASONING>{0} dots.</REASONING>\n\n<CONCLUSION>{0}</CONCLUSION>"
    )
    rows = [
        {"id": n, "image": saved(folder, n), "conversations": turns(f"<image>\nCount {n}.", reply.format(n))}
        for n in ROWS
    ]
    return jsonl(folder, rows), "llava", [
        expect(f"Count {n}.", str(n), "number", mode="think", chain=f"I look.\nDots.\n{n} dots.") for n in ROWS
    ]  # fmt: skip


def openai(folder):
    """OpenAI's messages: parts of text and image_url, as data URLs and as local paths; a system message."""
    rows, chain = [], "<think>{0} dots</think>\\boxed{{{0}}}"
    for n in ROWS:
        url = f"data:image/png;base64,{encoded(n)}" if n % 2 else saved(folder, n)
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"Count {n}."}]
        said = [
            {"role": "system", "content": "Be brief."},
            *messages(parts, chain.format(n)),
        ]
        rows.append({"messages": said})
    return jsonl(folder, rows), "openai", [
        expect(f"Count {n}.", str(n), "number", mode="think", chain=f"{n} dots", response=chain.format(n))
        for n in ROWS
    ]  # fmt: skip


def swift(folder):
    """ms-swift: texts with `<image>`, pictures in a list; text-only rows among them."""
    rows = [
        {
            "messages": messages("<image>Count the dots." if n % 3 else "2+2?", "4"),
            **({"images": [saved(folder, n)]} if n % 3 else {}),
        }
        for n in ROWS
    ]
    return jsonl(folder, rows), "swift", [
        expect("Count the dots." if n % 3 else "2+2?", "4", "number", pictures=1 if n % 3 else 0) for n in ROWS
    ]  # fmt: skip


def geometry3k(folder):
    rows = [
        {"images": [cell(n)], "problem": f"<image>Find x in {n}.", "answer": rf"\sqrt{{{n}}}"} for n in ROWS
    ]
    return (
        parquet(folder, rows),
        "columns",
        [expect(f"Find x in {n}.", rf"\sqrt{{{n}}}", "math") for n in ROWS],
    )


def chartqa(folder):
    rows = [{"image": cell(n), "query": f"Value in {n}?", "label": [f"{n}.5"]} for n in ROWS]
    return parquet(folder, rows), "columns", [expect(f"Value in {n}?", f"{n}.5", "number") for n in ROWS]


def clevr(folder):
    rows = [
        {"image": cell(n), "problem": f"How many in {n}?", "solution": f"<answer> {n} </answer>"}
        for n in ROWS
    ]
    return parquet(folder, rows), "columns", [expect(f"How many in {n}?", str(n), "number") for n in ROWS]


def onevision(folder):
    rows = [
        {
            "id": f"o{n}",
            "image": cell(n),
            "conversations": turns(f"<image>\nColour {n}?", "Blue"),
            "data_source": "figureqa",
        }
        for n in ROWS
    ]
    return (
        parquet(folder, rows),
        "llava",
        [expect(f"Colour {n}?", "Blue", "exact", source="figureqa") for n in ROWS],
    )


def mmpr(folder):
    rows = [
        {
            "image": saved(folder, n),
            "question": f"<image>\nCount {n}.",
            "chosen": f"{n} dots.\nAnswer: {n}",
            "rejected": "None.",
        }
        for n in ROWS
    ]
    return jsonl(folder, rows), "columns", [
        expect(f"Count {n}.", str(n), "number", response=f"{n} dots.\nAnswer: {n}") for n in ROWS
    ]  # fmt: skip


def visual_web_instruct(folder):
    rows = [
        {
            "idx": n,
            "question": f"What is {n} + 1?",
            "answer": f"Add one.\nIt is {n + 1}.",
            "short_answer": str(n + 1),
            "images": [cell(n)],
        }
        for n in ROWS
    ]
    return parquet(folder, rows), "columns", [
        expect(f"What is {n} + 1?", str(n + 1), "number", response=f"Add one.\nIt is {n + 1}.") for n in ROWS
    ]  # fmt: skip


def science_qa(folder):
    rows = [
        {"image": cell(n), "question": f"Which {n}?", "choices": OPTIONS, "answer": n % 4, "hint": "Look."}
        for n in ROWS
    ]
    return parquet(folder, rows), "columns", [
        expect(lettered(f"Look.\nWhich {n}?"), "ABCD"[n % 4], "choice") for n in ROWS
    ]  # fmt: skip


def mmmu(folder):
    rows = [
        {
            "id": f"v{n}",
            "question": f"Is <image 1> or <image 2> {n}?",
            "options": str(OPTIONS),
            "answer": "C",
            "image_1": cell(n),
            "image_2": cell(0),
        }
        for n in ROWS
    ]
    return parquet(folder, rows), "columns", [
        expect(lettered(f"Is <image> or <image> {n}?"), "C", "choice", pictures=2) for n in ROWS
    ]  # fmt: skip


def csv_paths(folder):
    rows = [
        {"image_path": saved(folder, n), "question": f"Count {n}, please.", "answer": f"{n} dots, red"}
        for n in ROWS
    ]
    return table(folder, rows), "columns", [
        expect(f"Count {n}, please.", f"{n} dots, red", "exact") for n in ROWS
    ]  # fmt: skip


def vlmevalkit(folder):
    """MMBench's TSV: base64, or the index of an earlier row that holds the picture."""
    rows = [
        {
            "index": n,
            "image": encoded(n) if n < 10 else n - 10,
            "question": f"Which {n}?",
            **dict(zip("ABCD", OPTIONS, strict=True)),
            "answer": "D",
        }
        for n in ROWS
    ]
    return table(folder, rows, "rows.tsv"), "vlmeval", [
        expect(lettered(f"Which {n}?"), "D", "choice", shown=n % 10) for n in ROWS
    ]  # fmt: skip


def webdataset(folder):
    samples = [
        {"png": png(n), "json": json.dumps({"question": f"Count {n}.", "answer": n}).encode()} for n in ROWS
    ]
    return shard(folder, samples), "columns", [expect(f"Count {n}.", str(n), "number") for n in ROWS]


def sharegpt(folder):
    """ShareGPT4V and its like: a system message and two exchanges about one picture."""
    rows = [
        {
            "system": "Be brief.",
            "image": saved(folder, n),
            "conversations": turns("<image>\nWhat is it?", "Dots.", f"Count {n}.", str(n)),
        }
        for n in ROWS
    ]
    earlier = [{"user": "What is it?", "assistant": "Dots."}]
    return jsonl(folder, rows), "llava", [
        expect(f"Count {n}.", str(n), "number", history=earlier, system="Be brief.") for n in ROWS
    ]  # fmt: skip


def llava_video(folder):
    """LLaVA-Video: LLaVA's shape with a video's file name."""
    film(4, to=folder / "a.mp4")
    rows = [
        {
            "id": f"v{n}",
            "data_source": "nextqa",
            "video": "a.mp4",
            "conversations": turns(f"<video>\nWhat {n}?", f"{n} dots"),
        }
        for n in ROWS
    ]
    return array(folder, rows), "llava", [
        expect(f"What {n}?", f"{n} dots", "exact", source="nextqa", pictures=0, videos=1) for n in ROWS
    ]  # fmt: skip


PUBLIC = (
    *(
        llava,
        math_v360k,
        llava_cot,
        openai,
        swift,
        geometry3k,
        chartqa,
        clevr,
        onevision,
        mmpr,
        visual_web_instruct,
    ),
    *(science_qa, mmmu, csv_paths, vlmevalkit, webdataset, sharegpt, llava_video),
)


@pytest.mark.parametrize("make", PUBLIC, ids=lambda make: make.__name__)
def test_every_row_of_a_public_format_becomes_the_right_record(make, tmp_path):
    source, name, expected = make(tmp_path)
    summary = import_set(source, tmp_path / "out" / "mine.parquet")
    assert (summary.format, summary.read, summary.written, summary.rejected) == (name, 20, 20, {})
    assert (tmp_path / "out" / "mine.rejected.jsonl").read_text() == ""
    for number, (row, wanted) in enumerate(
        zip(load_records(tmp_path / "out" / "mine.parquet"), expected, strict=True)
    ):
        pictures, shown = wanted.pop("pictures", 1), wanted.pop("shown", number)
        videos = wanted.pop("videos", 0)
        assert row["id"] == f"mine-{number}"
        assert {key: row[key] for key in wanted} == wanted
        assert (len(row["images"]), len(row["videos"])) == (pictures, videos)
        if pictures:
            assert row["images"][0].rgb().getpixel((0, 0)) == colour(shown)


def importing(folder: Path, rows: list, make=jsonl, **options):
    return import_set(make(folder, rows), folder / "out.parquet", **options)


def rejected(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "out.rejected.jsonl").read_text().splitlines()]


GOOD = {"question": "2+2?", "answer": "4"}


@pytest.mark.parametrize(
    ("bad", "field", "rule", "remedy"),
    [
        ({"question": "2?"}, "answer", "no column holds it", "--columns answer=COLUMN"),
        (GOOD | {"image": "gone.png"}, "image", "the picture does not exist", "--images"),
        (GOOD | {"image": "../secret.png"}, "image", "a file lies outside the image folder", "--images"),
        (GOOD | {"image": "/etc/hostname"}, "image", "a file lies outside the image folder", "--images"),
        (
            GOOD | {"image": "https://x.org/a.png"},
            "image",
            "files are not fetched from the network",
            "download",
        ),
        (GOOD | {"image": "data:image/png;base64,@@"}, "image", "must be base64", "encode"),
        (GOOD | {"image": "data:image/png;base64,R0lG"}, "images", "must decode", "file"),
        (
            GOOD | {"question": "<image> What?"},
            "question",
            "placeholders and images differ in number",
            "placeholder",
        ),
        (
            GOOD | {"question": "<video> What?"},
            "question",
            "placeholders and videos differ in number",
            "placeholder",
        ),
        (GOOD | {"question": "<audio> What?"}, "question", "sounds are not read", "leave"),
        (GOOD | {"video": "gone.mp4"}, "video", "the video does not exist", "--images"),
        (GOOD | {"video": b"x".hex()}, "video", "the video does not exist", "--images"),
        (
            GOOD | {"question": "What?<|im_end|>"},
            "question",
            "holds an image placeholder or chat token",
            "remove",
        ),
        (GOOD | {"options": ["1", "2"], "answer": "Q"}, "answer", "is none of the options", "letter"),
        (GOOD | {"question": ["2+2?"]}, "question", "must be a text", "map another column"),
        (GOOD | {"answer": float("nan")}, "answer", "must be a finite number or a text", "leave"),
        (GOOD | {"answer": "4 <image>"}, "answer", "a reply holds a placeholder", "remove"),
        (GOOD | {"image": "data:image/png,raw"}, "image", "a data URL must be in base64", "base64"),
        (GOOD | {"video": [[]]}, "video", "a video has no frames", "at least one frame"),
        (GOOD | {"video": "."}, "videos", "must decode", "file"),
        (GOOD | {"options": ["a", "A"], "answer": "a"}, "answer", "is several of the options", "letter"),
        ([1], "row", "must be an object", "object"),
    ],
)
def test_a_row_that_does_not_fit_is_listed_with_its_reason(tmp_path, bad, field, rule, remedy):
    summary = importing(tmp_path, [GOOD, bad, GOOD], format_="columns")
    (line,) = rejected(tmp_path)
    assert (line["row"], line["field"], line["rule"]) == (1, field, rule)
    assert line["file"].endswith("rows.jsonl")
    assert remedy in line["remedy"]
    assert (summary.written, summary.rejected) == (2, {f"{field}: {rule}": 1})


def test_an_empty_folder_of_frames_is_rejected(tmp_path):
    (tmp_path / "clip").mkdir()
    importing(tmp_path, [GOOD, GOOD | {"video": "clip"}])
    assert rejected(tmp_path)[0]["rule"] == "a video has no frames"


@pytest.mark.parametrize("make", [jsonl, array], ids=["jsonl", "json"])
def test_a_repeated_key_is_rejected(tmp_path, make):
    file = make(tmp_path, [GOOD, GOOD | {"b": 1}])
    file.write_text(file.read_text().replace('"b"', '"answer"'))
    assert import_set(file, tmp_path / "out.parquet").written == 1
    (line,) = rejected(tmp_path)
    assert (line["row"], line["rule"], line["found"]) == (1, "a key is repeated", "'answer'")


def test_a_row_that_is_too_long_is_rejected_and_the_next_one_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_CELL", 100)
    importing(tmp_path, [GOOD, GOOD | {"note": "x" * 250}, GOOD | {"answer": "5"}])
    assert [(line["row"], line["rule"]) for line in rejected(tmp_path)] == [(1, "is too long")]
    assert [row["answer"] for row in load_records(tmp_path / "out.parquet")] == ["4", "5"]


def test_the_first_row_need_not_have_every_field(tmp_path):
    assert importing(tmp_path, [{"question": "2?"}, GOOD]).mapping == {
        "question": "question",
        "answer": "answer",
    }


def test_rejected_rows_are_listed_in_order_and_also_when_no_row_fits(tmp_path):
    rows = [
        GOOD | {"image": "data:image/png;base64,R0lG"},
        GOOD | {"image": "gone.png"},
        GOOD | {"answer": [[1]]},
    ]
    with pytest.raises(
        RecordError, match=r"no row fits the format columns: 1 x images.*; each row: .*rejected.jsonl"
    ):
        importing(tmp_path, rows)
    assert [line["row"] for line in rejected(tmp_path)] == [0, 1, 2]
    assert not (tmp_path / "out.parquet").exists()


def test_large_and_whole_numbers_are_texts(tmp_path):
    importing(tmp_path, [GOOD | {"answer": answer} for answer in (3.0, 2.5, 10**400, 1e300)])
    answers = [row["answer"] for row in load_records(tmp_path / "out.parquet")]
    assert answers == ["3", "2.5", str(10**400), "1e+300"]


def test_strict_stops_at_the_first_and_writes_nothing(tmp_path):
    with pytest.raises(RecordError, match=r"rows.jsonl: row 1: answer: no column holds it"):
        importing(tmp_path, [GOOD, {"question": "2?"}, GOOD], strict=True)
    assert [file.name for file in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_link_does_not_lead_out_of_the_image_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(png(1))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    importing(folder, [GOOD, GOOD | {"image": "link.png"}])
    assert rejected(folder)[0]["rule"] == "a file lies outside the image folder"


def test_pictures_may_lie_in_another_folder_that_the_user_names(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    name = saved(tmp_path / "elsewhere", 3)
    summary = importing(tmp_path, [GOOD | {"image": name}], options=Options(root=tmp_path / "elsewhere"))
    assert summary.written == 1


def test_columns_may_be_named(tmp_path):
    rows = [{"q": "2+2?", "a": "4", "note": "x"}]
    with pytest.raises(ConfigError, match=r"question: no column holds it.*--columns question=COLUMN"):
        importing(tmp_path, rows)
    options = Options(root=tmp_path, columns={"question": "q", "answer": "a"})
    assert importing(tmp_path, rows, options=options).mapping == {"question": "q", "answer": "a"}
    assert load_records(tmp_path / "out.parquet")[0]["question"] == "2+2?"


SEVERAL = {"conversations": turns("<image>\nFirst?", "1", "Second?", "2")}


@pytest.mark.parametrize(
    ("choice", "found"),
    [
        ("refuse", []),
        ("first", [([], "First?", "1")]),
        ("split", [([], "First?", "1"), ([("First?", "1")], "Second?", "2")]),
        ("keep", [([("First?", "1")], "Second?", "2")]),
    ],
)
def test_several_turns_are_kept_cut_split_or_refused_and_keep_their_picture(tmp_path, choice, found):
    rows = [SEVERAL | {"image": saved(tmp_path, 5)}, {"conversations": turns("One?", "1")}]
    importing(tmp_path, rows, options=Options(root=tmp_path, turns=choice))
    *made, _ = load_records(tmp_path / "out.parquet")
    said = [[(turn["user"], turn["assistant"]) for turn in row["history"]] for row in made]
    assert [(h, row["question"], row["answer"]) for h, row in zip(said, made, strict=True)] == found
    assert all(len(row["images"]) == 1 for row in made)
    assert [line["rule"] for line in rejected(tmp_path)] == ([] if found else ["has several turns"])


def test_a_picture_of_a_later_turn_is_marked_in_its_turn(tmp_path):
    said = turns("<image>\nFirst?", "1", "And <image>?", "2")
    pictures = [saved(tmp_path, 5), saved(tmp_path, 6)]
    importing(tmp_path, [{"conversations": said, "images": pictures}])
    (row,) = load_records(tmp_path / "out.parquet")
    assert row["history"] == [{"user": "<image>\nFirst?", "assistant": "1"}]
    assert row["question"] == "And <image>?"
    assert [image.rgb().getpixel((0, 0)) for image in row["images"]] == [colour(5), colour(6)]


@pytest.mark.parametrize(
    ("choice", "system"), [("strip", [None, None]), ("keep", ["Be brief."] * 2), ("refuse", [])]
)
def test_a_system_message_is_kept_stripped_or_refused_by_rule(tmp_path, choice, system):
    said = messages("2+2?", "4")
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."}, *said]},
        {"messages": said, "system": "Be brief."},
        {"messages": said},
    ]
    importing(tmp_path, rows, options=Options(root=tmp_path, system=choice))
    *found, plain = load_records(tmp_path / "out.parquet")
    assert [row["system"] for row in found] == system
    assert (plain["system"], plain["question"]) == (None, "2+2?")


def test_older_swift_rows_have_their_turns_in_a_column_of_pairs(tmp_path):
    rows = [{"query": "And 3?", "response": "6", "history": [["2+2?", "4"]], "system": "Add."}]
    assert importing(tmp_path, rows).format == "columns"
    (row,) = load_records(tmp_path / "out.parquet")
    assert row["history"] == [{"user": "2+2?", "assistant": "4"}]
    assert (row["system"], row["question"], row["answer"]) == ("Add.", "And 3?", "6")


def test_the_kinds_of_the_golds_are_counted(tmp_path):
    answers = [
        "4",
        "-1,234.5",
        r"\frac{1}{2}",
        "x^2",
        "a red bus",
        "because the two of them are on the same line",
    ]
    summary = importing(tmp_path, [GOOD | {"answer": answer} for answer in answers])
    assert summary.kinds == {"number": 2, "expression": 2, "text": 2}
    verifiers = [row["verifier"] for row in load_records(tmp_path / "out.parquet")]
    assert verifiers == ["number", "number", "math", "math", "exact", "judge"]
    assert kind_of("B", options=True) == ("choice", "choice")
    assert kind_of("B", options=False) == ("text", "exact")


def test_a_long_array_is_read_row_by_row(tmp_path):
    rows = [{"question": f"{n}?", "answer": "x" * 3_000} for n in range(1_000)]
    read = rows_of(array(tmp_path, rows))
    assert next(read) == (0, rows[0])
    assert [row for _, row in read] == rows[1:]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", b'{"a": 1}', "is an array of rows"),
        ("rows.json", b'[{"a": 1}, {"b"', "row 1 is not a complete JSON value"),
        (
            "rows.json",
            b'[{"a": 1}, ' + b"[" * 100_000,
            "row 1 is (nested too deeply|not a complete JSON value)",
        ),
        ("rows.jsonl", b'{"a": "\xff"}\n', "not UTF-8"),
        ("rows.parquet", b"PAR1", "not readable as Parquet"),
        ("rows.tar", b"no tar", "rows.tar"),
        ("rows.txt", b"", "a data file ends in .jsonl"),
        ("rows.jsonl", b"", "has no rows"),
        ("rows.jsonl", b"{\n", "none of its first 1 rows can be read; row 0: row: must be JSON"),
        ("rows.jsonl.gz", b"", "unpack it first"),
    ],
)
def test_a_broken_file_is_refused_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        import_set(tmp_path / name, tmp_path / "out.parquet")


def test_a_folder_of_shards_is_one_set(tmp_path):
    for part in range(2):
        (tmp_path / f"part-{part}.jsonl").write_text(json.dumps(GOOD) + "\n")
    assert import_set(tmp_path, tmp_path / "out.parquet").written == 2


def test_an_unknown_format_names_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match="format 'lava' is unknown; did you mean llava"):
        importing(tmp_path, [GOOD], format_="lava")
