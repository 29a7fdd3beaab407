import pytest
import torch
from PIL import Image

import sft.data
from core.model.prompts import messages
from core.strict import ConfigError
from corpus.records import DataSource, write_records
from sft.data import (
    IGNORED,
    Collator,
    Lessons,
    OverlongError,
    blank_lesson,
    count_tokens,
    fit,
    load_mixture,
    prepare,
)


def trained_tokens(lesson, processor):
    return processor.tokenizer.convert_ids_to_tokens(lesson["labels"][lesson["labels"] != IGNORED].tolist())


def test_on_direct_rows_the_answer_and_the_end_of_turn_are_trained(make_record, processor):
    lesson = prepare(make_record(mode="direct", answer="42"), processor)
    assert trained_tokens(lesson, processor) == ["4", "2", "<|im_end|>"]


def test_on_thinking_rows_thought_and_answer_are_trained(make_record, processor):
    lesson = prepare(make_record(chain="A = 4 .", answer="4"), processor)
    expected = ["<think>", "A", "=", "4", ".", "</think>", r"\boxed{", "4", "}", "<|im_end|>"]
    assert trained_tokens(lesson, processor) == expected


def test_a_label_is_its_own_token_or_ignored_and_the_trained_ones_close_the_row(make_record, processor):
    lesson = prepare(make_record(), processor)
    scored = lesson["labels"] != IGNORED
    assert torch.equal(lesson["labels"][scored], lesson["input_ids"][scored])
    assert scored.int().diff().tolist().count(1) == 1  # one switch from prompt to target ...
    assert scored[-1]  # ... and none back


@pytest.mark.parametrize("mode", ["think", "direct"])
@pytest.mark.parametrize("images", [0, 1, 2])
def test_labels_are_what_the_templates_generation_markers_frame(make_record, processor, mode, images):
    record = make_record(mode=mode, images=[Image.new("RGB", (56, 56))] * images)
    marked = processor.apply_chat_template(
        messages(record, with_target=True), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    lesson = prepare(record, processor)
    flat = lambda value: value[0] if isinstance(value[0], list) else value  # noqa: E731
    assert lesson["input_ids"].tolist() == flat(marked["input_ids"])
    assert (lesson["labels"] != IGNORED).int().tolist() == flat(marked["assistant_masks"])


def test_a_lesson_begins_with_the_ids_of_the_rollout_prompt(make_record, processor):
    record = make_record()
    prompt = processor.apply_chat_template(
        [messages(record)], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    lesson = prepare(record, processor)
    length = prompt["input_ids"].shape[1]
    assert torch.equal(lesson["input_ids"][:length], prompt["input_ids"][0])
    assert torch.equal(lesson["pixel_values"], prompt["pixel_values"])


def test_a_template_that_rewrites_the_prompt_is_refused(make_record, processor, monkeypatch):
    renders = iter(["prompt", "another prompt and an answer"])
    monkeypatch.setattr(processor, "apply_chat_template", lambda *_, **__: next(renders))
    with pytest.raises(ValueError, match=r"row 'row-0'.*differently once an answer follows"):
        prepare(make_record(), processor)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_tokens_are_counted_without_pixels(make_record, processor, images):
    record = make_record(images=[Image.new("RGB", (56, 56))] * images)
    lesson = prepare(record, processor)
    text, image = count_tokens(record, processor)
    assert text + image == len(lesson["input_ids"])
    assert image == int((lesson["input_ids"] == processor.image_token_id).sum())


def test_a_row_longer_than_the_context_is_refused_by_id(mixed_set, processor):
    mixture = load_mixture([DataSource(set="mixed")], {"mixed": mixed_set}, seed=0)
    with pytest.raises(
        OverlongError, match=r"row 'row-\d+' has \d+ tokens, max_tokens is 12; .*overlong: drop"
    ):
        fit(mixture, processor, max_tokens=12)


def test_longer_rows_are_dropped_and_counted_when_asked(mixed_set, processor, caplog):
    mixture = load_mixture([DataSource(set="mixed")], {"mixed": mixed_set}, seed=0)
    lengths = [sum(count_tokens(record, processor)) for record in mixture]
    limit = sorted(lengths)[11]
    fitting = fit(mixture, processor, max_tokens=limit, overlong="drop")
    assert [record["id"] for record in fitting] == [
        record["id"] for record, length in zip(mixture, lengths, strict=True) if length <= limit
    ]
    assert fitting.dropped == {"tokens: longer than max_tokens": 24 - len(fitting)}
    assert f"dropped {24 - len(fitting)} of 24 rows" in caplog.text


def test_a_context_that_no_row_fits_is_an_error(mixed_set, processor):
    mixture = load_mixture([DataSource(set="mixed")], {"mixed": mixed_set}, seed=0)
    with pytest.raises(ValueError, match="none of the 24 rows"):
        fit(mixture, processor, max_tokens=8, overlong="drop")


def test_a_mixture_takes_each_sets_share(make_record, mixed_set, tmp_path):
    write_records(tmp_path / "more.parquet", [make_record(number) for number in range(100, 110)])
    sources = [DataSource(set="mixed", rows=5), DataSource(set="more", rows=3)]
    sets = {"mixed": mixed_set, "more": tmp_path / "more.parquet"}
    ids = [record["id"] for record in load_mixture(sources, sets, seed=3)]
    assert [int(name.split("-")[1]) >= 100 for name in ids] == [False] * 5 + [True] * 3
    assert ids == [record["id"] for record in load_mixture(sources, sets, seed=3)]


def test_an_unknown_set_names_the_nearest(mixed_set):
    with pytest.raises(ConfigError, match="set 'mixd' is unknown; did you mean mixed"):
        load_mixture([DataSource(set="mixd")], {"mixed": mixed_set}, seed=0)


def test_a_batch_mixes_rows_with_and_without_images(make_record, processor):
    rows = [make_record(0), make_record(1, images=[], mode="direct"), make_record(2)]
    lessons = Lessons(rows, processor)
    batch = Collator(lessons, pad_token_id=0)([{"row": 0}, {"row": 1}, {"row": 2}])
    assert torch.equal(
        batch["pixel_values"], torch.cat([lessons[0]["pixel_values"], lessons[2]["pixel_values"]])
    )
    for row, (ids, labels, mask) in enumerate(
        zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True)
    ):
        length = len(lessons[row]["input_ids"])
        assert torch.equal(ids[:length], lessons[row]["input_ids"])
        assert torch.equal(labels[:length], lessons[row]["labels"])
        assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
        assert (labels[length:] == IGNORED).all()


def test_only_a_batch_without_images_gets_the_blank_and_it_teaches_nothing(make_record, processor):
    lessons = Lessons([make_record(0), make_record(1, images=[])], processor)
    collate = Collator(lessons, pad_token_id=0, blank=blank_lesson(processor))
    assert len(collate([{"row": 0}, {"row": 1}])["input_ids"]) == 2
    batch = collate([{"row": 1}])
    assert batch["pixel_values"].shape[0] == 1
    assert (batch["labels"][1] == IGNORED).all()


def test_prepared_rows_are_kept_within_the_budget(make_record, processor, monkeypatch):
    lessons = Lessons([make_record(0), make_record(1)], processor)
    size = sum(value.nbytes for value in prepare(make_record(0), processor).values())
    monkeypatch.setattr(sft.data, "CACHE_BYTES", size)
    assert lessons[0] is lessons[0]
    assert lessons[1] is not lessons[1]
