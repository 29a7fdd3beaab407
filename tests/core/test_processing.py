"""From chats and images to token ids and tiles: the template, the placeholders, the assistant's mask."""

from pathlib import Path

import pytest
from PIL import Image

import core
from core import SailVL2Processor, build_tiny

QUESTION = [{"type": "image"}, {"type": "text", "text": "compute A + B"}]
THOUGHT = r"<think>A=9;B=0;9+0=9</think>\boxed{9}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny(tmp_path_factory.mktemp("tiny") / "core", words=["A", "B", "compute"], seed=0)


@pytest.fixture
def processor(folder: Path) -> SailVL2Processor:
    return SailVL2Processor.from_pretrained(folder)


def image(width: int = 56, height: int = 56) -> Image.Image:
    return Image.new("RGB", (width, height), (200, 30, 60))


def chat(answer: str | None = THOUGHT, picture: Image.Image | None = None) -> list[dict]:
    parts = [{"type": "image", "image": picture or image()}, QUESTION[1]]
    turns = [{"role": "user", "content": parts}]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def test_chat_is_chatml_without_newlines_between_turns_and_without_system_prompt(
    processor: SailVL2Processor,
) -> None:
    user = "<|im_start|>user\n<IMG_CONTEXT>compute A + B<|im_end|>"
    assert processor.apply_chat_template(chat()) == f"{user}<|im_start|>assistant\n{THOUGHT}<|im_end|>"


def test_generation_prompt_opens_the_assistants_turn(processor: SailVL2Processor) -> None:
    prompt = processor.apply_chat_template(chat(answer=None), add_generation_prompt=True)
    assert prompt == "<|im_start|>user\n<IMG_CONTEXT>compute A + B<|im_end|><|im_start|>assistant\n"
    assert processor.apply_chat_template(chat()).startswith(prompt)


def test_content_may_be_text_or_parts_and_a_system_turn_is_kept(processor: SailVL2Processor) -> None:
    as_text = [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]
    as_parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in as_text]
    rendered = "<|im_start|>system\nA<|im_end|><|im_start|>user\nB<|im_end|>"
    assert processor.apply_chat_template(as_text) == rendered
    assert processor.apply_chat_template(as_parts) == rendered


def test_a_part_that_is_neither_image_nor_text_is_refused(processor: SailVL2Processor) -> None:
    with pytest.raises(Exception, match="content part of type video: a part is an image or a text"):
        processor.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_the_mask_marks_what_the_assistant_wrote_and_its_end_of_turn(
    processor: SailVL2Processor, padding_side: str
) -> None:
    chats = [
        chat("9"),
        [*chat(), {"role": "user", "content": "compute A"}, {"role": "assistant", "content": "7"}],
    ]
    inputs = processor.apply_chat_template(
        chats,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": padding_side},
    )
    masks = [mask.bool() for mask in inputs["assistant_masks"]]
    marked = [processor.decode(ids[mask]) for ids, mask in zip(inputs["input_ids"], masks, strict=True)]
    assert marked == ["9<|im_end|>", THOUGHT + "<|im_end|>7<|im_end|>"]


def test_a_placeholder_becomes_one_token_per_tile_and_position(processor: SailVL2Processor) -> None:
    inputs = processor(images=[[image()]], text=["<IMG_CONTEXT>compute"], return_tensors="pt")
    tokens = processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0])
    assert tokens == ["<img>", *["<IMG_CONTEXT>"] * 4, "</img>", "compute"]
    assert sorted(inputs) == ["attention_mask", "input_ids", "pixel_values"]
    assert inputs["pixel_values"].shape == (1, 3, 56, 56)


def test_tiles_of_all_rows_follow_in_reading_order(processor: SailVL2Processor) -> None:
    red, blue = Image.new("RGB", (56, 56), "red"), Image.new("RGB", (56, 56), "blue")
    nested = processor(
        images=[[red], [], [blue, red]],
        text=["<IMG_CONTEXT>", "compute", "<IMG_CONTEXT><IMG_CONTEXT>"],
        padding=True,
        return_tensors="pt",
    )
    # Red, blue, red: the first channel is high, low, high.
    assert (nested["pixel_values"][:, 0].mean((1, 2)) > 0).tolist() == [True, False, True]
    none = processor(images=[[], None], text=["A", "B"])
    assert "pixel_values" not in none


# 56x56 is one tile; 112x56 two and a thumbnail; 168x112 six and a thumbnail; a strip all that are allowed.
@pytest.mark.parametrize(
    ("width", "height", "tiles"), [(56, 56, 1), (112, 56, 3), (168, 112, 7), (2000, 10, 7), (1, 1, 1)]
)
def test_token_count_from_the_size_alone_equals_the_real_one(
    processor: SailVL2Processor, width: int, height: int, tiles: int
) -> None:
    processor.image_processor.max_patches = 6
    counted = processor._get_num_multimodal_tokens([(height, width)])
    inputs = processor(images=[[image(width, height)]], text=["<IMG_CONTEXT>"])
    assert counted.num_image_patches == [tiles]
    assert counted.num_image_tokens == [len(inputs["input_ids"][0])] == [2 + 4 * tiles]
    assert len(inputs["pixel_values"]) == tiles


def test_every_colour_mode_is_read_as_rgb(processor: SailVL2Processor) -> None:
    for mode in ("L", "RGBA", "P", "1"):
        pixels = processor(images=[[image().convert(mode)]], text=["<IMG_CONTEXT>"], return_tensors="pt")
        assert pixels["pixel_values"].shape == (1, 3, 56, 56)


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        ([[], [1]], ["<IMG_CONTEXT>", "A"], "row 0: 0 images for 1 <IMG_CONTEXT>"),
        ([[1, 2]], ["<IMG_CONTEXT>"], "row 0: 2 images for 1 <IMG_CONTEXT>"),
        ([[1]], ["<IMG_CONTEXT>", "A"], "1 lists of images for 2 rows"),
        ([1, 2], ["<IMG_CONTEXT>", "A"], "2 images for 1 <IMG_CONTEXT> placeholders in 2 rows"),
        (None, ["<IMG_CONTEXT>"], "0 images for 1 <IMG_CONTEXT>"),
        ([[1]], None, "text is missing"),
    ],
)
def test_images_and_placeholders_that_disagree_are_refused(
    processor: SailVL2Processor, images: object, text: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images=images, text=text)


def test_offsets_count_in_the_text_that_was_given(processor: SailVL2Processor) -> None:
    text = "<IMG_CONTEXT>compute A"
    inputs = processor(images=[[image()]], text=[text], return_offsets_mapping=True)
    assert [text[start:end] for start, end in inputs["offset_mapping"][0]] == [
        *["<IMG_CONTEXT>"] * 6, "compute", "A"
    ]  # fmt: skip


def test_saved_and_reloaded_by_the_auto_class_the_files_are_the_same(
    processor: SailVL2Processor, folder: Path, tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    core.register()
    again = AutoProcessor.from_pretrained(folder)
    again.save_pretrained(tmp_path)
    assert type(again) is SailVL2Processor
    assert type(again.image_processor).__name__ == "SailVL2ImageProcessor"
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
    text = processor.apply_chat_template(chat())
    one, two = (p(images=[[image()]], text=[text], return_tensors="pt") for p in (processor, again))
    assert all((one[key] == two[key]).all() for key in one)


def test_a_tokenizer_of_another_model_is_refused(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    image_processor = SailVL2Processor.from_pretrained(folder).image_processor
    stranger = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    with pytest.raises(ValueError, match="no token <IMG_CONTEXT>: it is not the tokenizer of a SAIL-VL2"):
        SailVL2Processor(image_processor, stranger)


def test_the_costliest_image_has_as_many_tokens_as_any_and_no_more_pixels_than_they_need(
    processor: SailVL2Processor,
) -> None:
    sizes = [(height, width) for height in range(20, 700, 31) for width in range(20, 700, 31)]
    for most, expected in [(1, (56, 56)), (6, (112, 168)), (10, (112, 280)), (12, (168, 224))]:
        processor.image_processor.max_patches = most
        assert processor.costliest_image() == expected
        tokens = processor._get_num_multimodal_tokens([expected, *sizes]).num_image_tokens
        assert tokens[0] == max(tokens)


def test_the_costliest_image_of_a_core_of_any_resolution_is_its_largest_square(tmp_path: Path) -> None:
    size = core.TinySize(any_resolution=True)
    processor = SailVL2Processor.from_pretrained(build_tiny(tmp_path / "any", words=["A"], seed=0, size=size))
    longest = processor.image_processor.size["longest_edge"]
    assert processor.costliest_image() == (longest, longest)
