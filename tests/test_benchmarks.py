"""The arithmetic of the benchmarks, which assert their own measurements."""

import json

import numpy as np
import pytest

from benchmarks.common import alternate, bars
from benchmarks.learner import QUICK, SAIL_2B, Shape
from benchmarks.packing import mixture
from benchmarks.scaling import slope


def test_the_sides_take_turns_and_the_order_turns_round():
    calls = []
    seconds = alternate(
        {
            "one": lambda turn: calls.append(("one", turn)),
            "other": lambda turn: calls.append(("other", turn)) or 2.0,
        },
        repetitions=2,
    )
    assert calls == [("one", -1), ("other", -1), ("other", 0), ("one", 0), ("one", 1), ("other", 1)]
    assert seconds["other"] == 2.0  # what a side returns counts, else its wall time
    assert 0 <= seconds["one"] < 1


def test_a_power_law_gives_back_its_exponent():
    values = [1, 2, 4, 8]
    assert slope(values, [5 * value**0.3 for value in values]) == pytest.approx(0.3)


def test_the_2b_that_is_timed_on_a_gpu_has_the_released_shapes():
    from core.model.sizes import core_config

    config = core_config("2b")
    vision, text = config.vision_config, config.text_config
    shape = (
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
        vision.intermediate_size,
    )
    assert SAIL_2B.vision == shape
    shape = (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.intermediate_size)
    assert SAIL_2B.text == shape
    assert (SAIL_2B.kv_heads, SAIL_2B.head_dim) == (text.num_key_value_heads, text.head_dim)
    assert (SAIL_2B.vocabulary, SAIL_2B.tile_tokens) == (text.vocab_size, config.image_seq_length)


def test_the_operations_of_a_step_are_those_that_torch_counts():
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks.learner import build_core, rows_of

    shape = Shape("one", group_size=1, images=1, text=6, completion=5, groups=1)
    model, processor = build_core(QUICK)
    row = rows_of(shape, QUICK, processor)[0]
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    pixels = processor.image_processor(row["images"], return_tensors="pt")["pixel_values"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, pixel_values=pixels, logits_to_keep=shape.completion)
    # Four passes; torch counts the patch convolution too, and attention without its causal half.
    assert QUICK.step_flops(shape) / 4 == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_mixture_is_the_documented_one():
    parts = mixture(100_000, seed=0)
    assert np.median(parts["prompt"]) == pytest.approx(45, abs=1)
    assert (parts["tiles"] == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert (parts["tiles"] == 1).mean() == pytest.approx(0.375, abs=0.01)
    assert parts["tiles"].max() == 13
    assert parts["answer"].max() <= 12_000


def test_bars_are_a_mermaid_chart():
    chart = bars("times faster", "ratio", {"8:1 x8": 6.234, "1:4 x4": 1.0})
    assert chart.splitlines()[0] == "```mermaid"
    assert 'x-axis ["8:1 x8", "1:4 x4"]' in chart
    assert "bar [6.23, 1.00]" in chart
    assert json.loads(chart.split("x-axis ")[1].splitlines()[0]) == ["8:1 x8", "1:4 x4"]
