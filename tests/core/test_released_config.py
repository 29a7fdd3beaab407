"""What a release's configuration, tokenizer and template mean natively; every guess is noted."""

import json
from pathlib import Path

import pytest

from core import SailVL2Processor
from core.checkpoint.released import export_released, import_released
from core.checkpoint.released_config import _feature_layer, _select_layer
from core.checkpoint.released_text import load_tokenizer, native_generation_config, native_template
from core.model.tokenizer import chat_template

from .released_reference import CHAT_TEMPLATE, IDS, write_released

TURN = "{{ '<|im_start|>' + m['role'] + '\\n' }}{% for p in m['content'] %}{% if p['type'] == 'image' %}IMAGE{% else %}"
SIMPLE = (
    f"{{% for m in messages %}}{TURN}{{{{ p['text'] }}}}{{% endif %}}{{% endfor %}}<|im_end|>{{% endfor %}}"
)
CHAT = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is <image> a tag?"}]}]


def edit(file: Path, **changes: object) -> None:
    value = json.loads(file.read_text()) if file.exists() else {}
    value = {key: item for key, item in {**value, **changes}.items() if item is not None}
    file.write_text(json.dumps(value))


def native(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(("select_layer", "native_index"), [(-1, -1), (-4, -4), (-24, -24), (0, 1), (22, 23)])
def test_a_layer_of_the_tower_keeps_its_meaning(select_layer: int, native_index: int) -> None:
    # 24 blocks. Released: outputs of the blocks 0..23. Native: inputs of the blocks 0..23, then the last output.
    assert _feature_layer(select_layer, 24) == native_index
    assert _select_layer(native_index, 24) == select_layer


def test_the_configuration_of_the_language_model_is_read_whole(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", experts=4, tied=False)
    import_released(there, tmp_path / "native")
    was, now = (
        json.loads((there / "config.json").read_text())["llm_config"],
        native(tmp_path / "native", "config.json"),
    )
    text = now["text_config"]
    assert text["model_type"] == "qwen3_moe"
    assert text["rope_parameters"] == {"rope_theta": 1000000, "rope_type": "default"}
    assert text["num_local_experts"] == was["num_experts"]
    for key in ("head_dim", "moe_intermediate_size", "num_experts_per_tok", "norm_topk_prob", "rms_norm_eps"):
        assert text[key] == was[key]
    assert now["vision_config"]["rms_norm_eps"] == 1e-5
    assert now["dtype"] == text["dtype"] == "float32"


TIES = {
    # lm_head stored, in llm_config, at the top: tied?, said
    "in llm_config": (True, True, None, True, None),
    "at the top only": (True, None, True, True, None),
    "nowhere, without output layer": (False, None, None, True, "no lm_head is stored, so they are"),
    "nowhere, with output layer": (True, None, None, False, None),
    "in both, contradicting": (
        True,
        False,
        True,
        False,
        "False from llm_config is used; the top level of config.json has True",
    ),
}


@pytest.mark.parametrize(("stored", "llm", "top", "tied", "said"), TIES.values(), ids=TIES)
def test_embeddings_are_tied_where_the_configuration_says_so_and_the_weights_allow(
    stored: bool, llm: bool | None, top: bool | None, tied: bool, said: str | None, tmp_path: Path
) -> None:
    there = write_released(tmp_path / "released", lm_head=stored)
    config = json.loads((there / "config.json").read_text())
    edit(
        there / "config.json",
        llm_config={**config["llm_config"], "tie_word_embeddings": llm},
        tie_word_embeddings=top,
    )
    done = import_released(there, tmp_path / "native")
    now = native(tmp_path / "native", "config.json")
    assert now["tie_word_embeddings"] is now["text_config"]["tie_word_embeddings"] is tied
    told = [note for note in done.notes if "tie" in note]
    assert (said in told[0]) if said else not told


def test_images_follow_the_preprocessor_then_the_configuration_then_a_noted_guess(
    tmp_path: Path,
) -> None:
    there = write_released(
        tmp_path / "released", max_dynamic_patch=12, processor_max_dynamic_patch=6, use_thumbnail=False
    )
    edit(there / "preprocessor_config.json", image_mean=[0.5, 0.25, 0.125], image_std=None, image_size=448)
    edit(there / "config.json", dynamic_image_size=None)
    done = import_released(there, tmp_path / "native")
    images = SailVL2Processor.from_pretrained(tmp_path / "native").image_processor
    assert (images.min_patches, images.max_patches, images.use_thumbnail, images.crop_to_patches) == (
        1,
        6,
        False,
        True,
    )
    assert tuple(images.image_mean) == (0.5, 0.25, 0.125)
    assert tuple(images.image_std) == (0.229, 0.224, 0.225)
    assert images.size["height"] == 56
    text = done.text()
    assert "1 to 6 tiles of 56 px, 4 tokens each, without a thumbnail" in text
    assert "max_dynamic_patch: 6 from preprocessor_config.json is used; config.json has 12" in text
    assert "dynamic_image_size=True, image_std=[0.229, 0.224, 0.225] is assumed" in text
    assert "preprocessor_config.json has image_size=448; tiles are 56 px" in text
    assert "keys that are not used: pad_input" in text


def test_a_release_that_tiles_at_two_scales_keeps_that_both_ways(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    edit(there / "preprocessor_config.json", use_msac=True)
    done = import_released(there, tmp_path / "native")
    images = SailVL2Processor.from_pretrained(tmp_path / "native").image_processor
    assert images.use_msac
    assert "at two scales" in done.text()
    export_released(tmp_path / "native", tmp_path / "back")
    assert import_released(tmp_path / "back", tmp_path / "again").text().count("at two scales") == 1


def test_a_release_that_does_not_tile_sees_one_tile(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", config_changes={"dynamic_image_size": False})
    done = import_released(there, tmp_path / "native")
    images = SailVL2Processor.from_pretrained(tmp_path / "native").image_processor
    assert images.get_number_of_image_patches(5000, 100) == 1
    assert "images: one tile of 56 px, 4 tokens" in done.text()


@pytest.mark.parametrize("home", ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"])
def test_the_shipped_template_is_found_where_releases_put_it(home: str, tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    (there / "chat_template.jinja").unlink()
    shipped = SIMPLE.replace("IMAGE", "<IMG_CONTEXT>")
    if home.endswith("jinja"):
        (there / home).write_text(shipped)
    else:
        named = [{"name": "tools", "template": "x"}, {"name": "default", "template": shipped}]
        edit(there / home, chat_template=shipped if home == "chat_template.json" else named)
    notes: list[str] = []
    assert native_template(there, load_tokenizer(there), notes) == shipped
    assert notes == [
        "chat template: a chat with its answer does not begin with its prompt, which SFT needs; compare "
        "chat_template.jinja with ours in core/"
    ]  # this one has no add_generation_prompt


@pytest.mark.parametrize("placeholder", ["<image>", "<img><IMG_CONTEXT></img>", "<image>\\n"])
def test_a_template_with_another_placeholder_writes_ours_and_leaves_the_users_words_alone(
    placeholder: str, tmp_path: Path
) -> None:
    shipped = CHAT_TEMPLATE.replace("<image>\\n", placeholder)
    there = write_released(tmp_path / "released", chat_template=shipped)
    tokenizer, notes = load_tokenizer(there), list[str]()
    template = native_template(there, tokenizer, notes)
    rendered = tokenizer.apply_chat_template(CHAT, chat_template=template, tokenize=False)
    break_ = "\n" if "\\n" in placeholder else ""
    assert rendered.endswith(f"user\n<IMG_CONTEXT>{break_}Is <image> a tag?<|im_end|>")
    assert any("became <IMG_CONTEXT>" in note for note in notes)
    assert any("default system prompt" in note for note in notes)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template is shipped"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "writes no image"),
        ("{{ 1 / 0 }}", "writes no image"),
        ("{% syntax", "writes no image"),
        ("{{ messages.__class__.__mro__ }}", "writes no image"),
    ],
)
def test_our_template_replaces_one_that_is_missing_or_cannot_show_images(
    template: str | None, said: str, tmp_path: Path
) -> None:
    there = write_released(tmp_path / "released", chat_template=template or "")
    if template is None:
        (there / "chat_template.jinja").unlink()
    notes: list[str] = []
    assert native_template(there, load_tokenizer(there), notes) == chat_template()
    assert said in notes[0]


def test_every_end_that_is_named_anywhere_ends_a_text_and_no_sampling_parameter_stays(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    edit(there / "generation_config.json", eos_token_id=[7, IDS["<|endoftext|>"]], temperature=0.6, top_k=20)
    tokenizer, notes = load_tokenizer(there), list[str]()
    found = native_generation_config(there, {"eos_token_id": 9, "vocab_size": 320}, tokenizer, notes)
    assert found.eos_token_id == [7, IDS["<|endoftext|>"], 9, IDS["<|im_end|>"]]
    assert found.pad_token_id == IDS["<|endoftext|>"]
    assert (found.temperature, found.top_k) == (None, None)
    assert notes == [
        "generation_config.json: temperature=0.6, top_k=20 left out: servers would make them the defaults of "
        "every request"
    ]


def test_files_beside_the_weights_travel_along_and_others_are_named(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    (there / "LICENSE").unlink()
    (there / "assets").mkdir()
    (there / "model.onnx").write_bytes(b"")
    (there / ".gitattributes").write_text("")
    done = import_released(there, tmp_path / "native")
    assert "files that are not copied: assets/, model.onnx" in done.notes
    assert any("the release has no licence file" in note for note in done.notes)
    carried = {path.name for path in (tmp_path / "native" / "released").iterdir()}
    assert carried >= {"modeling_sailvl.py", "README.md", "tokenizer.json"}
    assert not {"model.onnx", ".gitattributes", "assets"} & carried
    # Code stays data: nothing at the top of the core points to it.
    assert "auto_map" not in native(tmp_path / "native", "config.json")
    assert not list((tmp_path / "native").glob("*.py"))
