import io
import json
import tracemalloc
import weakref

import numpy as np
import pytest
from PIL import Image

from core.model.pictures import as_rgb
from core.model.prompts import THINK_CONTRACT
from core.strict import ConfigError, parse
from corpus.records import (
    FIELDS,
    DataSource,
    RecordError,
    load_records,
    load_source,
    problem_of,
    write_records,
)

PIXELS = np.arange(8 * 6 * 3, dtype=np.uint8).reshape(8, 6, 3)


def record(number: int = 0, **changes):
    row = {
        **{
            "id": f"row-{number}",
            "images": [Image.fromarray(PIXELS)],
            "question": "What is A?",
            "answer": "4",
        },
        **{"mode": "think", "verifier": "exact", "chain": "A = 4 .", "source": "panels", "meta": {"A": 4}},
    }
    return {**row, **changes}


def stored(number: int = 0, **changes):
    """A row as a file of somebody else holds it: nothing checked it."""
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, "PNG")
    row = {
        **record(number),
        "images": [{"bytes": buffer.getvalue(), "path": None}],
        **{"meta": "{}", "response": None, "system": "Be brief.", "history": "[]"},
    }
    return {**row, **changes}


def raw(path, rows):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def test_a_record_comes_back_as_it_was_written(tmp_path):
    path = tmp_path / "set.parquet"
    own = {"system": "Be brief.", "history": [{"user": "What is B?", "assistant": "5"}]}
    assert write_records(path, [record(**own)]) == 1
    (row,) = load_records(path)
    assert tuple(row) == FIELDS
    assert np.array_equal(np.asarray(row["images"][0].rgb()), PIXELS)
    expected = {**record(**own), "response": None}
    others = [name for name in FIELDS if name not in ("images", "videos")]
    assert {name: row[name] for name in others} == {name: expected[name] for name in others}
    assert row["videos"] == []


def test_the_images_column_is_pictures_to_datasets(tmp_path):
    import datasets

    write_records(tmp_path / "set.parquet", [record()])
    row = datasets.load_dataset("parquet", data_files=str(tmp_path / "set.parquet"), split="train")[0]
    assert row["images"][0].size == (6, 8)


def test_fields_left_out_get_their_defaults(tmp_path):
    path = raw(
        tmp_path / "set.parquet",
        [{"id": "a", "question": "2+2?", "answer": "4", "mode": "direct", "verifier": "number"}],
    )
    (row,) = load_records(path)
    assert (row["images"], row["chain"], row["source"], row["meta"]) == ([], None, "", {})


def test_a_seed_draws_the_same_rows_again_and_another_seed_others(tmp_path):
    path = tmp_path / "set.parquet"
    write_records(path, [record(number) for number in range(40)])
    draws = [[row["id"] for row in load_records(path, rows=5, seed=seed)] for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert draws[0] == sorted(draws[0], key=lambda name: int(name.split("-")[1]))  # in the file's order


def test_without_a_seed_the_first_rows_are_taken(tmp_path):
    path = tmp_path / "set.parquet"
    write_records(path, [record(number) for number in range(4)])
    assert [row["id"] for row in load_records(path, rows=2)] == ["row-0", "row-1"]


def test_more_rows_than_there_are_is_an_error_not_a_smaller_mixture(tmp_path):
    path = tmp_path / "set.parquet"
    write_records(path, [record()])
    with pytest.raises(RecordError, match="rows=2 were requested, but it has 1 usable"):
        load_records(path, rows=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"bytes": b"\x89PNG broken", "path": None}]}, "images: must decode"),
        ({"images": [{"bytes": None, "path": "/etc/hostname"}]}, "images: must decode.*only a path"),
        ({"answer": ""}, "answer: gold answer is missing.*response"),
        ({"system": " "}, "system: must not be empty.*write null"),
        ({"history": "[1"}, "history: must be JSON"),
        ({"history": "{}"}, "history: must be a list"),
        ({"history": '[{"user": "A?"}]'}, "history: a turn has user and assistant"),
        ({"history": '[{"user": "A?", "assistant": " "}]'}, "history: a turn's texts must not be empty"),
        ({"history": '[{"user": "A?", "assistant": " 4"}]'}, "history: .*white space.*strip it"),
        (
            {"history": '[{"user": "A?", "assistant": "4<|im_end|>"}]'},
            "history: holds an image placeholder or chat token",
        ),
        ({"history": '[{"user": "<audio> A?", "assistant": "4"}]'}, "history: holds the placeholder"),
        (
            {"history": '[{"user": "<image>A?", "assistant": "4"}]', "question": "<image> B?"},
            "question: placeholders.*2 <image> for 1 images",
        ),
        ({"answer": None}, "answer: must be a string"),
        (
            {"question": "<image> What?", "images": []},
            "question: placeholders.*1 <image> for 0 images.*write one for each",
        ),
        (
            {"question": "What is in <audio>?"},
            "question: holds the placeholder of another.*'<audio>'.*data import",
        ),
        ({"question": "Is <Image-1> red?"}, "question: holds the placeholder of another data set.*<Image-1>"),
        ({"meta": '{"x": NaN}'}, "meta: must be a JSON object.*JSON has no NaN"),
        ({"meta": "[" * 100_000}, "meta: must be a JSON object"),
        ({"question": "  "}, "question: must not be empty"),
        ({"id": ""}, "id: must not be empty"),
        ({"mode": "thinking"}, "mode: must be one of think, direct.*'thinking'.*did you mean think"),
        ({"verifier": "maths"}, "verifier: must be one of.*did you mean math"),
        ({"question": "<IMG_CONTEXT> What?"}, "question: holds an image placeholder.*IMG_CONTEXT.*remove it"),
        ({"answer": "4<|im_end|>"}, "answer: holds an image placeholder or chat token"),
        ({"chain": "</img>"}, "chain: holds an image placeholder"),
        ({"response": "<|im_start|>user"}, "response: holds an image placeholder or chat token"),
        ({"chain": "<think>A = 4"}, "chain: holds a think tag.*response"),
        ({"question": f"What?\n{THINK_CONTRACT}"}, "question: holds the thinking contract.*adds it"),
        ({"meta": "[1, 2]"}, "meta: must be a JSON object"),
        ({"meta": "{"}, "meta: must be a JSON object"),
    ],
)
def test_a_bad_row_is_refused_with_file_row_field_rule_and_remedy(tmp_path, changes, message):
    path = raw(tmp_path / "bad.parquet", [stored(0), stored(1), stored(2, **changes)])
    with pytest.raises(RecordError, match=f"(?s)bad.parquet: row 2: {message}"):
        load_records(path)


def test_a_truncated_picture_is_found(tmp_path):
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    path = raw(tmp_path / "bad.parquet", [stored(images=[{"bytes": buffer.getvalue()[:-200], "path": None}])])
    with pytest.raises(RecordError, match=r"images: must decode.*truncated"):
        load_records(path)


def test_a_second_row_of_the_same_id_is_refused(tmp_path):
    path = raw(tmp_path / "bad.parquet", [stored(0), stored(0)])
    with pytest.raises(RecordError, match=r"row 1: id: must be unique.*'row-0'"):
        load_records(path)


def test_dropped_rows_are_counted_by_rule(tmp_path, caplog):
    rows = [stored(0), stored(1, answer=""), stored(2, answer=""), stored(3, mode="x"), stored(4)]
    records = load_records(raw(tmp_path / "bad.parquet", rows), on_bad="drop")
    assert [row["id"] for row in records] == ["row-0", "row-4"]
    assert records.dropped == {"answer: gold answer is missing": 2, "mode: must be one of think, direct": 1}
    assert "dropped 3 rows" in caplog.text


def test_a_draw_replaces_the_rows_it_drops(tmp_path):
    rows = [stored(number, answer="" if number % 2 else "4") for number in range(20)]
    assert len(load_records(raw(tmp_path / "bad.parquet", rows), rows=10, seed=0, on_bad="drop")) == 10


def test_many_bad_rows_are_reported_together(tmp_path):
    path = raw(tmp_path / "bad.parquet", [stored(number, answer="") for number in range(9)])
    with pytest.raises(
        RecordError, match=r"(?s)row 0.*row 4.*and 4 more bad rows.*'answer: gold answer is missing': 9"
    ):
        load_records(path)


def test_an_unknown_column_names_the_nearest_known(tmp_path):
    path = raw(tmp_path / "bad.parquet", [{**stored(), "anwser": "4"}])
    with pytest.raises(RecordError, match="unknown column 'anwser'; did you mean answer"):
        load_records(path)


def test_a_missing_column_is_named(tmp_path):
    path = raw(tmp_path / "bad.parquet", [{"id": "a", "question": "?", "answer": "4", "mode": "direct"}])
    with pytest.raises(RecordError, match="columns missing: verifier"):
        load_records(path)


def test_a_folder_holds_splits_and_a_bad_row_is_located_in_its_own_file(tmp_path):
    raw(tmp_path / "train-0.parquet", [stored(0), stored(1)])
    raw(tmp_path / "train-1.parquet", [stored(2), stored(3, answer="")])
    raw(tmp_path / "test.parquet", [stored(4)])
    assert [row["id"] for row in load_records(tmp_path, split="test")] == ["row-4"]
    with pytest.raises(RecordError, match=r"train-1.parquet: row 1: answer"):
        load_records(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file for split 'validation'.*test.parquet"):
        load_records(tmp_path, split="validation")


def test_a_file_that_is_no_parquet_says_so(tmp_path):
    (tmp_path / "set.parquet").write_text("id,question\n")
    with pytest.raises(RecordError, match=r"set.parquet: not readable as Parquet"):
        load_records(tmp_path / "set.parquet")


def test_a_missing_file_is_not_looked_up_on_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_records("data/none.parquet")


def test_a_hub_dataset_is_checked_like_a_file(monkeypatch, tmp_path):
    import datasets

    rows = [{name: value for name, value in stored(0, answer="").items() if name != "images"}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: datasets.Dataset.from_list(rows))
    with pytest.raises(RecordError, match=r"somebody/set\[test\]: row 0: answer: gold answer is missing"):
        load_records("hf://datasets/somebody/set", split="test")


def test_writing_refuses_what_loading_would_and_leaves_no_file(tmp_path):
    with pytest.raises(RecordError, match="row 1: mode"):
        write_records(tmp_path / "set.parquet", [record(0), record(1, mode="x")])
    with pytest.raises(RecordError, match=r"row 0: chian: unknown field.*did you mean chain"):
        write_records(tmp_path / "set.parquet", [record(chian="A = 4")])
    assert list(tmp_path.iterdir()) == []


def test_equal_records_make_equal_files(tmp_path):
    for name in ("one", "two"):
        write_records(tmp_path / name, [record(number) for number in range(3)])
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_an_ungraded_row_needs_a_response_instead_of_a_gold_answer():
    row = {**stored(), "answer": "", "verifier": "none"}
    assert problem_of(row).field == "answer"
    assert problem_of({**row, "response": "A panel with four digits."}) is None


def test_meta_may_be_a_mapping_or_its_json():
    assert problem_of(stored(meta={"A": 4})) is None
    assert problem_of(stored(meta=json.dumps({"A": 4}))) is None


def test_a_data_source_refuses_an_unknown_key():
    with pytest.raises(ConfigError, match="unknown key; did you mean rows"):
        parse(DataSource, {"set": "longcot", "row": 640})


def text_only(number, **changes):
    return {
        "id": f"text-{number}",
        "question": "2+2?",
        "answer": "4",
        "mode": "direct",
        "verifier": "number",
        **changes,
    }


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("nulls", [{}, {"images": None, "chain": None}, {"images": []}])
def test_a_folder_of_text_and_pictures_loads_in_any_order_of_its_files(tmp_path, nulls, text_first):
    raw(tmp_path / f"train-{0 if text_first else 2}.parquet", [text_only(0, **nulls)])
    write_records(tmp_path / "train-1.parquet", [record(1)])
    rows = sorted(load_records(tmp_path), key=lambda row: row["id"])
    assert [len(row["images"]) for row in rows] == [1, 0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": 4}, "column 'answer' holds int64: it must be a string"),
        ({"images": "a.png"}, "column 'images' holds"),
    ],
)
def test_a_column_of_another_type_is_refused_with_its_file(tmp_path, changes, message):
    raw(tmp_path / "train-0.parquet", [stored(0)])
    raw(tmp_path / "train-1.parquet", [text_only(1, **changes)])
    with pytest.raises(RecordError, match=f"train-1.parquet: {message}"):
        load_records(tmp_path)


def test_pictures_may_be_a_list_of_binary(tmp_path):
    path = raw(tmp_path / "set.parquet", [stored(0, images=[stored(0)["images"][0]["bytes"]])])
    assert np.array_equal(np.asarray(load_records(path)[0]["images"][0].rgb()), PIXELS)


@pytest.mark.parametrize("as_dictionary", [True, False])
def test_a_file_that_repeats_one_value_out_of_all_measure_is_refused(tmp_path, as_dictionary):
    import pyarrow as pa
    import pyarrow.parquet as pq

    value = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int32()), pa.array(["x" * 1_000_000]))
    columns = {name: [f"{name} {n}" for n in range(2_000)] for name in ("id", "answer", "mode", "verifier")}
    table = pa.table({**columns, "question": value})
    if not as_dictionary:  # Parquet's own encoding, which a reader does not see
        table = table.replace_schema_metadata({})
        pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", store_schema=False)
    else:
        pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    with pytest.raises(
        RecordError, match=r"bomb.parquet: \d+ bytes that would take more than 256 MiB in memory"
    ):
        load_records(tmp_path / "bomb.parquet")


def test_a_prompt_that_all_rows_share_is_no_bomb(tmp_path):
    rows = [text_only(number, meta=json.dumps({"system": "x" * 2_000})) for number in range(1_000)]
    assert len(load_records(raw(tmp_path / "set.parquet", rows))) == 1_000


def jpeg(mode="RGB", **options):
    buffer = io.BytesIO()
    Image.new(mode, (16, 8), 0 if mode == "L" else (90,) * len(mode)).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_a_stored_file_passes_through_unchanged(tmp_path, mode):
    write_records(tmp_path / "one.parquet", [record(images=[jpeg(mode)])])
    write_records(tmp_path / "two.parquet", load_records(tmp_path / "one.parquet"))
    assert load_records(tmp_path / "two.parquet")[0]["images"][0].data == jpeg(mode)


@pytest.mark.parametrize(("rule", "system"), [("keep", "Be brief."), ("strip", None)])
def test_a_set_keeps_or_strips_system_messages(tmp_path, rule, system):
    write_records(tmp_path / "set.parquet", [record(system="Be brief."), record(1)])
    rows = load_source(DataSource(set="mine", system=rule), {"mine": tmp_path / "set.parquet"}, None)
    assert [row["system"] for row in rows] == [system, None]
    assert rows.only([0])[0]["system"] == system


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_pictures_and_the_file_may_be_given_as_paths(tmp_path, kind):
    (tmp_path / "a.jpg").write_bytes(jpeg())
    write_records(kind(tmp_path / "set.parquet"), [record(images=[kind(tmp_path / "a.jpg")])])
    assert load_records(tmp_path / "set.parquet")[0]["images"][0].data == jpeg()


@pytest.mark.parametrize(
    "mode", ["CMYK", "YCbCr", "LAB", "HSV", "PA", "La", "RGBa", "RGBX", "I", "F", "I;16", "1"]
)
def test_an_image_of_any_mode_is_written_as_the_model_sees_it(tmp_path, mode):
    image = Image.new(mode, (4, 4), 1)
    write_records(tmp_path / "set.parquet", [record(images=[image])])
    stored = load_records(tmp_path / "set.parquet")[0]["images"][0]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored.data))), np.asarray(as_rgb(image)))


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ["gone.jpg"]}, r"images: must decode.*images\[0\]: str: .*No such file.*give a path"),
        ({"images": [None]}, r"images: must decode.*NoneType.*give a path"),
        ({"images": Image.new("RGB", (4, 4))}, "images: must be a list.*write a list"),
        ({"images": [np.zeros((4, 4, 3), np.uint8)]}, r"images: must decode.*ndarray.*Image.fromarray"),
        ({"images": [b""]}, "images: must decode.*the file is empty"),
        ({"images": [b"GIF"]}, "images: must decode.*the file is broken, or its format is not one of"),
        ({"images": [EPS]}, "images: must decode.*its format is not one of PNG, JPEG"),
        ({"images": [{"bytes": None, "path": "/etc/hostname"}]}, "images: must decode.*only a path"),
        ({"question": "a\ud800"}, "question: must be valid Unicode.*remove"),
        ({"meta": {"x": float("nan")}}, "meta: must be a JSON object.*Out of range.*write"),
        ({"meta": {"x": np.float32(1)}}, "meta: must be a JSON object.*float32.*write"),
        ({"meta": {"x": "\ud800"}}, "meta: must be a JSON object"),
        ({"chian": "A"}, "chian: unknown field.*did you mean chain"),
    ],
)
def test_a_bad_value_is_refused_with_row_field_rule_and_remedy(tmp_path, changes, message):
    with pytest.raises(RecordError, match=f"(?s)set.parquet: row 1: {message}"):
        write_records(tmp_path / "set.parquet", [record(0), record(1, **changes)])
    assert list(tmp_path.iterdir()) == []


def test_a_row_that_is_no_mapping_is_refused(tmp_path):
    with pytest.raises(RecordError, match="row 0: row: must be a mapping"):
        write_records(tmp_path / "set.parquet", ["id"])


def test_rows_with_an_animation_are_counted(tmp_path, caplog):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    write_records(tmp_path / "set.parquet", [record(0, images=[buffer.getvalue()]), record(1)])
    records = load_records(tmp_path / "set.parquet")
    assert records.animated == 1
    assert "1 rows have an animation; the model sees its first frame" in caplog.text
    assert records[0]["images"][0].rgb().getpixel((0, 0)) == (255, 0, 0)


def test_rows_are_written_as_they_come(tmp_path):
    """Of 2,000 rows no more than a few hundred are alive at once."""
    alive, most = weakref.WeakSet(), 0

    class Row(dict):
        """A row that can be counted."""

        __hash__ = object.__hash__

    def rows():
        nonlocal most
        for number in range(2_000):
            row = Row(text_only(number))
            alive.add(row)
            most = max(most, len(alive))
            yield row

    assert write_records(tmp_path / "set.parquet", rows()) == 2_000
    assert most < 600


def test_loaded_pictures_are_read_when_they_are_used(tmp_path):
    """Neither rows nor the examples and prompts made of them hold a file's bytes or pixels."""
    from rl.data import example_of, load_rows, prompt_messages

    noise = np.random.default_rng(0)
    pictures = [Image.fromarray(noise.integers(0, 256, (300, 300, 3), dtype=np.uint8)) for _ in range(20)]
    write_records(tmp_path / "set.parquet", [record(n, images=[image]) for n, image in enumerate(pictures)])
    tracemalloc.start()
    rows = load_rows([DataSource(set="s")], {"s": tmp_path / "set.parquet"}, seed=0)
    for row in rows:
        example_of(row).images[0].load()
        prompt_messages(row)[0]["content"][0]["image"].rgb()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert held < 20 * 300 * 300  # the files alone are 20 x 270 kB
