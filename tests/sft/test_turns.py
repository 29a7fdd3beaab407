"""Lessons of conversations: each assistant turn is trained where the chat template puts it, packed rows included."""

import pytest
import torch
from PIL import Image

from core.model.prompts import THINK_CONTRACT, messages, shown
from sft.data import IGNORED, Lessons, count_tokens, prepare
from sft.packed_rows import pack_rows

HISTORY = [
    {"user": "What is in cell A", "assistant": "<think>A = 4 .</think>\\boxed{4}"},
    {"user": "What is in <image>", "assistant": "seven"},
]


@pytest.fixture
def talk(make_record):
    """Three exchanges, two pictures, one of them in the last turn."""
    pictures = [Image.new("RGB", (56, 56), (50 * n, 0, 0)) for n in range(2)]
    changes = {"history": HISTORY, "system": "compute", "images": pictures, "mode": "direct"}
    return make_record(7, question="<image> What is B", answer="7", **changes)


def flat(value):
    return value[0] if isinstance(value[0], list) else value


@pytest.mark.parametrize("system", [None, "compute"])
@pytest.mark.parametrize("exchanges", [0, 1, 2])
def test_labels_are_the_template_generation_markers_token_by_token(talk, processor, exchanges, system):
    marks = 1 + (exchanges == 2)
    row = {**talk, "history": HISTORY[:exchanges], "images": talk["images"][:marks], "system": system}
    marked = processor.apply_chat_template(
        messages(row, with_target=True), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    lesson = prepare(row, processor)
    assert lesson["input_ids"].tolist() == flat(marked["input_ids"])
    trained = lesson["labels"] != IGNORED
    assert trained.int().tolist() == flat(marked["assistant_masks"])
    assert trained.int().diff().tolist().count(1) == exchanges + 1
    assert sum(count_tokens(row, processor)) == len(lesson["input_ids"])
    assert len(lesson["pixel_values"]) == marks


def test_a_lesson_begins_with_the_prompt_that_rl_and_evaluation_ask(talk, processor):
    prompt = processor.apply_chat_template(
        [messages(talk)], add_generation_prompt=True, tokenize=True, return_dict=True
    )["input_ids"][0]
    assert prepare(talk, processor)["input_ids"][: len(prompt)].tolist() == list(prompt)


def test_every_turn_is_trained_in_a_pack(talk, make_record, processor):
    lessons = Lessons([make_record(1), talk], processor)
    batch = pack_rows([lessons[0], lessons[1]], processor.tokenizer.pad_token_id)
    expected = [label for lesson in lessons for label in lesson["labels"].tolist() if label != IGNORED]
    assert batch["shift_labels"][0].tolist() == expected
    assert torch.equal(batch["input_ids"][0, batch["keep"] + 1], batch["shift_labels"][0])


def test_a_turn_has_the_contract_if_its_reply_thinks(talk):
    system, first, _, second, *_ = messages(talk)
    assert system == {"role": "system", "content": [{"type": "text", "text": "compute"}]}
    assert first["content"][-1]["text"].endswith(THINK_CONTRACT)
    assert THINK_CONTRACT not in second["content"][0]["text"]
    assert shown(talk) == talk["images"]


def test_a_template_that_rewrites_earlier_turns_is_refused(talk, processor, monkeypatch):
    cut = "{%- for m in messages -%}{{ m.role ~ (m.content[0].text if loop.last else '') }}{%- endfor -%}"
    monkeypatch.setattr(processor, "chat_template", cut)
    with pytest.raises(ValueError, match=r"row .row-7..*keeps earlier turns as they were"):
        prepare(talk, processor)
