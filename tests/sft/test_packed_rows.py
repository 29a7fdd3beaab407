"""Packed rows through the model: the losses and gradients of padded ones. Training on them: test_train.py."""

import numpy as np
import pytest
import torch
from PIL import Image

from core.model.modeling import no_images
from core.model.tiny import TinySize, build_tiny
from core.training.config import LearnerConfig
from core.training.model import load_model, load_processor
from sft.data import IGNORED, Collator, Lessons, blank_lesson, count_tokens
from sft.packed_rows import PackedCollator, attend_within_samples, pack_rows
from sft.packing import ByRows, Plan


@pytest.fixture
def lessons(make_record, processor):
    """Rows without an image, with one and with three, of several lengths."""
    images = [Image.new("RGB", (56, 56), (40 * n, 10, 200)) for n in range(3)]
    changes = [{"images": []}, {}, {"images": images}, {"mode": "direct"}, {"images": [], "mode": "direct"}]
    return Lessons([make_record(number, **change) for number, change in enumerate(changes)], processor)


@pytest.fixture
def packed_model(core_path):
    return packed(core_path)


@pytest.fixture
def any_core(tmp_path):
    return build_tiny(tmp_path / "any", words=["compute"], seed=0, size=TinySize(any_resolution=True))


@pytest.fixture
def any_lessons(make_record, any_core):
    """Rows without an image, with one and with three, of sizes of their own."""
    images = [Image.new("RGB", (30 + 50 * n, 150 - 20 * n), (40 * n, 10, 200)) for n in range(4)]
    held = [[], images[:1], images[1:], images[3:]]
    records = [make_record(number, images=own) for number, own in enumerate(held)]
    return Lessons(records, load_processor(any_core))


def packed(core):
    model = load_model(core, LearnerConfig(deepspeed=None))
    attend_within_samples(model)
    return model


def inputs_of(batch, without=()):
    return {name: value for name, value in batch.items() if name not in ("labels", "shift_labels", *without)}


def logits_of(model, batch):
    """At every position, those without a label too."""
    return model(**inputs_of(batch, without=["keep"])).logits[0]


def loss_and_gradients(model, batch):
    """The sum of the label tokens' negative log-likelihoods, and the gradient of each weight."""
    model.zero_grad()
    logps, labels = model(**inputs_of(batch)).logits.log_softmax(-1), batch.get("shift_labels")
    if labels is None:
        logps, labels = logps[:, :-1], batch["labels"][:, 1:]
    loss = -logps.gather(2, labels.clamp(min=0)[..., None])[..., 0][labels != IGNORED].sum()
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def relative_difference(one, other):
    assert one.keys() == other.keys()
    gap = sum(float((one[name] - other[name]).square().sum()) for name in one)
    return (gap / sum(float(value.square().sum()) for value in one.values())) ** 0.5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_those_of_the_padded_batch(core_path, packed_model, lessons, checkpointing):
    padded_model = load_model(core_path, LearnerConfig(deepspeed=None))
    if checkpointing:
        packed_model.gradient_checkpointing_enable()
        packed_model.train()
    padded = Collator(lessons, pad_token_id=0)([{"row": row} for row in range(5)])
    loss, gradients = loss_and_gradients(padded_model, padded)
    packed_loss, packed_gradients = loss_and_gradients(packed_model, pack_rows(lessons[:], 0))
    assert packed_loss == pytest.approx(loss, rel=1e-5)
    assert relative_difference(gradients, packed_gradients) < 1e-5


def test_loss_and_gradients_of_images_of_any_resolution_are_those_of_the_rows_alone(any_core, any_lessons):
    model = load_model(any_core, LearnerConfig(deepspeed=None))
    alone = [
        loss_and_gradients(model, Collator(any_lessons, pad_token_id=0)([{"row": row}])) for row in range(4)
    ]
    expected = {
        name: sum(gradients[name] for _, gradients in alone if name in gradients) for name in alone[1][1]
    }
    padded = loss_and_gradients(model, Collator(any_lessons, pad_token_id=0)([{"row": r} for r in range(4)]))
    for loss, gradients in (padded, loss_and_gradients(packed(any_core), pack_rows(any_lessons[:], 0))):
        assert loss == pytest.approx(sum(loss for loss, _ in alone), rel=1e-5)
        assert relative_difference(expected, gradients) < 1e-5


def test_text_only_batches_of_an_any_resolution_core_give_the_tower_gradients_of_zero(any_core, any_lessons):
    model, processor = load_model(any_core, LearnerConfig(deepspeed=None)), any_lessons.processor
    text, expected = loss_and_gradients(model, Collator(any_lessons, 0)([{"row": 0}]))
    nothing = pack_rows([any_lessons[0]], 0, no_images(model.config))
    blank = Collator(any_lessons, 0, blank_lesson(processor))([{"row": 0}])
    for loss, gradients in (
        loss_and_gradients(packed(any_core), nothing),
        loss_and_gradients(model, blank),
    ):
        assert loss == pytest.approx(text, rel=1e-5)
        assert len(gradients) == len(list(model.parameters()))
        assert not any(value.any() for name, value in gradients.items() if "vision_tower" in name)
        torch.testing.assert_close(
            gradients["model.language_model.norm.weight"], expected["model.language_model.norm.weight"]
        )


def test_tokens_of_images_of_any_resolution_are_counted_without_pixels(any_lessons):
    counted = [count_tokens(record, any_lessons.processor) for record in any_lessons.records]
    assert [sum(counts) for counts in counted] == [len(lesson["input_ids"]) for lesson in any_lessons[:]]
    assert [images for _, images in counted] == [0, 5, 15 + 20 + 18, 18]


def test_a_sample_sees_nothing_of_its_neighbours(packed_model, lessons):
    alone = logits_of(packed_model, pack_rows([lessons[2]], 0))
    batch = pack_rows(lessons[:], 0)
    start, end = batch["cu_seq_lens_q"][2:4].tolist()
    together = logits_of(packed_model, batch)[start:end]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][0, 0] += 1  # the first sample's first token
    logits = logits_of(packed_model, changed)
    assert torch.equal(logits[start:end], together)
    assert not torch.allclose(logits[:start], logits_of(packed_model, batch)[:start])


def test_positions_restart_and_no_sample_predicts_the_next_ones_first_token(lessons):
    batch = pack_rows(lessons[:], 0)
    lengths = [len(lesson["input_ids"]) for lesson in lessons]
    assert batch["position_ids"].tolist() == [[place for length in lengths for place in range(length)]]
    assert batch["cu_seq_lens_q"].tolist() == [0, *np.cumsum(lengths)]
    assert batch["max_length_q"] == max(lengths)
    starts = batch["cu_seq_lens_q"][:-1].long()
    assert (batch["labels"][0, starts] == IGNORED).all()
    assert batch["input_ids"].shape == batch["labels"].shape == (1, sum(lengths))


def test_only_positions_that_predict_a_label_reach_the_output_layer(packed_model, lessons):
    batch = pack_rows(lessons[:], 0)
    assert batch["input_ids"][0, batch["keep"] + 1].tolist() == batch["shift_labels"][0].tolist()
    assert len(batch["keep"]) == int((batch["labels"] != IGNORED).sum())
    kept = packed_model(**inputs_of(batch)).logits[0]
    torch.testing.assert_close(kept, logits_of(packed_model, batch)[batch["keep"]])


def test_pixels_are_those_of_all_samples_in_order(lessons):
    pixels = pack_rows([lessons[2], lessons[0], lessons[1]], 0)["pixel_values"]
    assert torch.equal(pixels, torch.cat([lessons[2]["pixel_values"], lessons[1]["pixel_values"]]))


def test_a_pack_without_images_still_gives_every_weight_a_gradient(packed_model, lessons):
    nothing = no_images(packed_model.config)
    loss, gradients = loss_and_gradients(packed_model, pack_rows([lessons[0], lessons[4]], 0, nothing))
    assert loss > 0
    assert not any(value.any() for name, value in gradients.items() if "vision_tower" in name)
    assert "pixel_values" not in pack_rows([lessons[0]], 0)  # where tower and adapter are frozen


def test_a_pack_without_rows_gives_gradients_of_zero(packed_model):
    loss, gradients = loss_and_gradients(packed_model, pack_rows([], 0, no_images(packed_model.config)))
    assert loss == 0.0
    assert not any(value.any() for value in gradients.values())


def test_rows_that_changed_since_they_were_counted_are_refused(lessons):
    sizes = np.array([[len(lesson["input_ids"]), 0] for lesson in lessons])
    sizes[3] += 1
    plan = Plan(sizes, ByRows(5), budget=1000, ranks=1, seed=0, epochs=1)
    with pytest.raises(ValueError, match=r"row 3 has \d+ tokens, but \d+ were counted"):
        PackedCollator(lessons, plan, 0)([{"pack": 0}])


def test_packed_attention_refuses_what_is_not_packed(packed_model, lessons):
    with pytest.raises(ValueError, match="one packed row with sample_lengths"):
        packed_model(input_ids=lessons[0]["input_ids"][None])


def test_flash_attention_is_left_to_read_the_lengths_itself(packed_model):
    packed_model.config.text_config._attn_implementation = "flash_attention_2"
    attend_within_samples(packed_model)
    assert packed_model.config.text_config._attn_implementation == "flash_attention_2"
