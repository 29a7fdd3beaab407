"""Every fault of a checkpoint is reported with its file; no code runs and no file outside it is read."""

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core import TinySize, build_tiny
from core.checkpoint.check import NonFinite, check_checkpoint
from core.checkpoint.released import export_released, import_released
from core.checkpoint.released_files import hand_on
from core.checkpoint.shards import INDEX, LayoutError, Tensors

from .released_reference import write_released

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def edit(file: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def header(content: bytes | dict) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(raw)) + raw


def refused(folder: Path, *expected: str) -> str:
    with pytest.raises(LayoutError) as error:
        import_released(folder, folder.parent / "native")
    for words in expected:
        assert words in str(error.value)
    assert not (folder.parent / "native").exists()
    return str(error.value)


def test_every_unknown_missing_and_misshapen_tensor_is_listed_with_its_file(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vision_model.trunk.blocks.0.attn.qkv.bias"] = torch.zeros(96)
        tensors["vision_model.lora_A"] = torch.zeros(2)
        del tensors["mlp1.3.bias"], tensors["language_model.model.layers.2.mlp.up_proj.weight"]
        tensors["mlp1.0.weight"] = torch.zeros(127)
        tensors["vision_model.preprocessor.pos_embed"] = torch.zeros(16, 32)

    rewrite(there / "model.safetensors", change)
    text = refused(
        there,
        "6 problems",
        "vision_model.trunk.blocks.0.attn.qkv.bias: unknown, in model.safetensors",
        "vision_model.lora_A: unknown, in model.safetensors",
        "mlp1.3.bias: missing, [64] is expected",
        "language_model.model.layers.2.mlp.up_proj.weight: missing, [88, 64] is expected",
        "mlp1.0.weight: [127] in model.safetensors, [128] is expected by config.json",
        "pos_embed: [16, 32] in model.safetensors, [1, 16, 32] is expected",
    )
    assert len(text.splitlines()) == 7


def test_an_export_lists_faulty_tensors_too(tmp_path: Path) -> None:
    native = build_tiny(tmp_path / "native", words=["A"], seed=0, size=TinySize(experts=2))

    def change(tensors: dict[str, torch.Tensor]) -> None:
        at = "model.language_model.layers.0.mlp.experts."
        tensors[f"{at}2.up_proj.weight"] = tensors.pop(f"{at}1.up_proj.weight")
        at = "model.vision_tower.encoder.layers.0.attention."
        tensors[f"{at}q_proj.weight"] = torch.zeros(96, 97)

    rewrite(native / "model.safetensors", change)
    with pytest.raises(LayoutError) as error:
        export_released(native, tmp_path / "back")
    assert [line.split(":")[0].split(".")[-3:] for line in str(error.value).splitlines()[1:]] == [
        ["2", "up_proj", "weight"],
        ["attention", "q_proj", "weight"],
        ["1", "up_proj", "weight"],
    ]
    rewrite(native / "model.safetensors", lambda tensors: tensors.pop("model.vision_tower.rms_norm.weight"))
    with pytest.raises(LayoutError, match=r"rms_norm\.weight: missing"):
        export_released(native, tmp_path / "back")


def test_parts_of_one_released_tensor_in_two_data_types_are_refused(tmp_path: Path) -> None:
    native = build_tiny(tmp_path / "native", words=["A"], seed=0)
    name = "model.vision_tower.encoder.layers.1.attention.k_proj.weight"
    rewrite(native / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].half()}))
    with pytest.raises(LayoutError, match=r"blocks\.1\.attn\.qkv\.weight: its parts differ in data type"):
        export_released(native, tmp_path / "back")


def test_tensors_of_other_types_than_floats_are_refused(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    quantised = {"mlp1.1.weight": torch.zeros(64, 128, dtype=torch.int8)}
    rewrite(there / "model.safetensors", lambda tensors: tensors.update(quantised))
    refused(there, "mlp1.1.weight: data type I8 in model.safetensors; weights are one of F64, F32, F16, BF16")


def test_pickles_are_refused_and_never_opened(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    (there / "model.safetensors").unlink()

    class Trap:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "executed",))

    (there / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(
        there,
        "pytorch_model.bin",
        "pickles and run code when read",
        "safetensors.torch.save_file(torch.load(file, weights_only=True)",
    )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "weights.bin"])
def test_an_index_cannot_name_files_outside_the_folder(name: str, tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", shards=2)
    save_file({"a": torch.zeros(1)}, tmp_path / "secret.safetensors")
    edit(there / INDEX, lambda index: index["weight_map"].update({"mlp1.0.bias": name}))
    refused(there, f"{INDEX} names {name!r}, which is not a safetensors file of this folder")


def test_index_and_files_must_agree(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", shards=2)

    def change(index: dict) -> None:
        homes = index["weight_map"]
        homes["mlp1.0.bias"] = SECOND if homes["mlp1.0.bias"] == FIRST else FIRST
        del homes["mlp1.1.bias"]
        homes["made.up"] = FIRST

    homes = dict(json.loads((there / INDEX).read_text())["weight_map"])
    edit(there / INDEX, change)
    twice = next(name for name, file in homes.items() if file == FIRST)
    rewrite(there / SECOND, lambda tensors: tensors.update({twice: torch.zeros(1)}))
    refused(
        there,
        "mlp1.0.bias: model.safetensors.index.json says",
        f"mlp1.1.bias: in {homes['mlp1.1.bias']}, not in {INDEX}",
        f"made.up: {INDEX} says {FIRST}, which does not hold it",
        f"{twice}: in {FIRST} and in {SECOND}",
    )
    (there / SECOND).unlink()
    refused(there, f"{SECOND}: the file is missing; download the checkpoint again")
    (there / INDEX).unlink()
    refused(there, "config.json and weights disagree", "missing")
    (there / INDEX).write_text('{"weight_map": [1]}')
    refused(there, "no weight_map from tensor names to file names")


def test_a_file_beside_the_index_is_not_skipped(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", shards=2)
    save_file({"a": torch.zeros(1)}, there / "adapter.safetensors")
    refused(there, f"adapter.safetensors: not in {INDEX}; move it out of the folder")


def test_links_that_lead_out_of_the_folder_are_refused_and_those_of_the_hub_cache_followed(
    tmp_path: Path,
) -> None:
    there = write_released(tmp_path / "released")
    (tmp_path / "id_rsa").write_text("a private key")
    (there / "NOTICE").symlink_to(tmp_path / "id_rsa")
    refused(there, f"a link to {tmp_path / 'id_rsa'}, outside the checkpoint")
    (there / "NOTICE").unlink()
    (there / "model.safetensors").rename(tmp_path / "weights")
    (there / "model.safetensors").symlink_to(tmp_path / "weights")
    refused(there, "outside the checkpoint; replace the link by the file if you trust it")
    (there / "model.safetensors").unlink()
    (tmp_path / "weights").rename(there / "model.safetensors")

    repository = tmp_path / "models--sail"
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for file in list(there.iterdir()):
        file.rename(repository / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(repository / "blobs" / f"blob-{file.name}")
    import_released(snapshot, tmp_path / "native")
    assert not any(path.is_symlink() for path in (tmp_path / "native").rglob("*"))


HEADERS = {
    "larger than the file": struct.pack("<Q", 1 << 60) + b"{}",
    "larger than a header may be": struct.pack("<Q", 200 << 20) + b"{}",
    "empty": b"",
    "no JSON": header(b"nope"),
    "shape beyond the data": header({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}),
    "another tensor's bytes": header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}),
}


@pytest.mark.parametrize("raw", HEADERS.values(), ids=HEADERS)
def test_a_header_that_lies_is_refused_with_its_file(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(LayoutError, match=r"model\.safetensors: not a whole safetensors file .*download"):
        Tensors(tmp_path)


def test_a_git_lfs_pointer_is_called_one(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
    (tmp_path / "model.safetensors").write_text(pointer)
    with pytest.raises(LayoutError, match="a Git LFS pointer, not the weights"):
        Tensors(tmp_path)


def test_names_cannot_drive_the_terminal(tmp_path: Path) -> None:
    save_file({"\x1b[2Jmine": torch.zeros(1, dtype=torch.int8)}, tmp_path / "model.safetensors")
    with pytest.raises(LayoutError) as error:
        Tensors(tmp_path)
    assert "\x1b" not in str(error.value)


WRONG_CONFIGS = {
    "ps_version=v1": ({"ps_version": "v1"}, "ps_version = 'v1'"),
    "padded to a square": ({"pad2square": True}, "pad2square"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config"),
    "another tile size": ({"force_image_size": 112}, "force_image_size=112, vision_config.image_size=56"),
    "a layer beyond the tower": ({"select_layer": -6}, "select_layer=-6 of 5 blocks"),
    "the last block without its norm": ({"select_layer": 4}, "select_layer=4 of 5 blocks"),
    "a word for a number": ({"downsample_ratio": "half"}, "downsample_ratio"),
    "patches that do not fold": ({"downsample_ratio": 0.3}, "cannot be downsampled by 0.3"),
    "no tower": ({"vision_config": None}, "vision_config"),
    "not this layout": ({"model_type": "llava", "llm_config": 3}, "llm_config"),
    "more tiles than the most": ({"min_dynamic_patch": 11}, "min_dynamic_patch=11 is above"),
}


@pytest.mark.parametrize(("changes", "words"), WRONG_CONFIGS.values(), ids=WRONG_CONFIGS)
def test_a_configuration_without_a_native_counterpart_is_refused(
    changes: dict, words: str, tmp_path: Path
) -> None:
    refused(write_released(tmp_path / "released", config_changes=changes), words)


WRONG_PARTS = {
    "more layers than the weights": ("llm_config", {"num_hidden_layers": 10**9}, "the weights have 3"),
    "fewer blocks than the weights": ("vision_config", {"num_hidden_layers": 4}, "the weights have 5"),
    "experts of a dense model": ("llm_config", {"num_experts": 128}, "llm_config.num_experts=128"),
    "wider than memory": ("llm_config", {"hidden_size": 2**62}, "does not describe a SAIL-VL2 model"),
    "no number of heads": (
        "llm_config",
        {"num_attention_heads": "four"},
        "does not describe a SAIL-VL2 model",
    ),
    "biases in half of the attention": ("vision_config", {"qkv_bias": True}, "qkv_bias=True, use_bias=False"),
    "other heads": ("llm_config", {"head_dim": 16}, "[128, 64] in model.safetensors, [64, 64] is expected"),
    "fewer rows than the tokenizer": ("llm_config", {"vocab_size": 200}, "the embedding 200 rows"),
}


@pytest.mark.parametrize(("part", "changes", "words"), WRONG_PARTS.values(), ids=WRONG_PARTS)
def test_a_configuration_that_contradicts_the_weights_is_refused(
    part: str, changes: dict, words: str, tmp_path: Path
) -> None:
    there = write_released(tmp_path / "released")
    edit(there / "config.json", lambda config: config[part].update(changes))
    refused(there, words)


def test_a_real_qwen2_is_refused(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", qwen2_label=True)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if re.search(r"\.self_attn\.[qk]_norm\.", name)]:
            del tensors[name]
            tensors[name.replace("_norm.weight", "_proj.bias")] = torch.zeros(64)

    rewrite(there / "model.safetensors", change)
    refused(
        there,
        "Qwen2ForCausalLM by config.json",
        "no q_norm, so it is not a Qwen3",
        "older SAIL-VL is built on Qwen2.5",
    )


def test_a_tied_output_layer_that_differs_from_the_embedding_is_refused(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    rewrite(
        there / "model.safetensors", lambda tensors: tensors["language_model.lm_head.weight"][3].mul_(1.01)
    )
    refused(
        there, "config.json ties the output layer to the embedding", "in model.safetensors differs from it"
    )
    native = build_tiny(tmp_path / "tiny", words=["A"], seed=0)
    rewrite(
        native / "model.safetensors", lambda tensors: tensors.update({"lm_head.weight": torch.zeros(39, 128)})
    )
    with pytest.raises(LayoutError, match=r"ties the output layer to the embedding|is expected by config"):
        export_released(native, tmp_path / "back")


def test_an_untied_configuration_without_output_layer_is_incomplete(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", lm_head=False)
    edit(there / "config.json", lambda config: config["llm_config"].update(tie_word_embeddings=False))
    refused(there, "language_model.lm_head.weight: missing, [320, 64] is expected")


WRONG_FILES = {
    "config.json": ("config.json", None, "no config.json"),
    "no JSON": ("config.json", "{", "config.json: not JSON"),
    "a list": ("config.json", "[]", "a JSON object is expected, this is a list"),
    "nested without end": ("config.json", "[" * 100_000, "config.json: not JSON"),
    "native already": ("config.json", '{"model_type": "sailvl2"}', "a native core already"),
    "no tokenizer": ("tokenizer.json", None, "no tokenizer.json and no vocab.json"),
    "a broken tokenizer": ("tokenizer.json", '{"model": 1}', "tokenizer.json: not a tokenizer"),
    "ends that are words": (
        "generation_config.json",
        '{"eos_token_id": ["</s>"]}',
        "token ids are whole numbers",
    ),
    "ends beyond the vocabulary": (
        "generation_config.json",
        '{"eos_token_id": 151645}',
        "outside the vocabulary of 320 ids",
    ),
    "a mean of two": ("preprocessor_config.json", '{"image_mean": [0.5, 0.5]}', "image_mean"),
    "a deviation of 0": ("preprocessor_config.json", '{"image_std": [0.0, 0.5, 0.5]}', "image_std[0] = 0.0"),
}


@pytest.mark.parametrize(("name", "content", "words"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_file_that_is_missing_or_wrong_is_named(
    name: str, content: str | None, words: str, tmp_path: Path
) -> None:
    there = write_released(tmp_path / "released")
    if content is None:
        (there / name).unlink()
    else:
        (there / name).write_text(content)
    refused(there, words)


def test_a_tokenizer_without_the_image_token_is_refused(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    text = (there / "tokenizer.json").read_text().replace("<IMG_CONTEXT>", "<IMAGE_PATCH>")
    (there / "tokenizer.json").write_text(text)
    described = (there / "tokenizer_config.json").read_text().replace("<IMG_CONTEXT>", "<IMAGE_PATCH>")
    (there / "tokenizer_config.json").write_text(described)
    refused(there, "the tokenizer has no token <IMG_CONTEXT>")


def test_a_release_is_not_exported_and_a_core_not_imported(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    with pytest.raises(
        LayoutError, match=r"model_type='sailvl'; a native core has 'sailvl2', this is a release"
    ):
        export_released(there, tmp_path / "back")
    with pytest.raises(LayoutError, match="no such folder"):
        import_released(tmp_path / "nowhere", tmp_path / "native")


def test_an_import_lists_every_tensor_that_is_not_finite(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mlp1.3.bias"][0] = float("nan")
        tensors["language_model.model.norm.weight"][1] = float("-inf")

    rewrite(there / "model.safetensors", change)
    refused(
        there,
        "2 problems",
        "mlp1.3.bias: NaN, in model.safetensors",
        "language_model.model.norm.weight: infinity, in model.safetensors",
        "--allow-nonfinite",
    )
    taken = import_released(there, tmp_path / "native", allow_nonfinite=True)
    assert "not finite: mlp1.3.bias: NaN" in taken.text()
    with pytest.raises(NonFinite):
        check_checkpoint(tmp_path / "native")


def test_names_from_files_reach_the_terminal_escaped(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    red = "\x1b]0;owned\x07\u202e"
    edit(there / "config.json", lambda config: config["llm_config"].update({red: 1}))
    (there / f"notes{red}.bin").write_bytes(b"")
    text = import_released(there, tmp_path / "native").text()
    assert "llm_config keys without a meaning" in text
    assert "files that are not copied: notes\\x1b]0;owned\\x07\\u202e.bin" in text
    rewrite(there / "model.safetensors", lambda tensors: tensors.update({f"bad\n{red}": torch.zeros(1)}))
    shutil.rmtree(tmp_path / "native")
    refusal = refused(there, "bad\\n\\x1b]0;owned\\x07\\u202e: unknown")
    assert all(mark.isprintable() or mark == "\n" for mark in text + refusal)


@pytest.mark.parametrize("name", ["LICENSE", "released/notes.txt", "chat_template.jinja"])
def test_a_link_out_of_a_native_core_is_neither_exported_nor_handed_on(tmp_path: Path, name: str) -> None:
    native = build_tiny(tmp_path / "native", words=["A"], seed=0, size=TinySize())
    if name.startswith("released"):
        shutil.rmtree(native)
        import_released(write_released(tmp_path / "release"), native)
    (tmp_path / "secret").write_text("a private key")
    (native / name).unlink(missing_ok=True)
    (native / name).symlink_to(tmp_path / "secret")
    copies = [lambda: export_released(native, tmp_path / "out")]
    copies += [lambda: hand_on(native, tmp_path / "out")] if name != "chat_template.jinja" else []
    for copy in copies:
        with pytest.raises(LayoutError, match=r"a link to .*secret, outside the checkpoint"):
            copy()
    assert not [path for path in tmp_path.glob("out/**/*") if path.name == Path(name).name]


def test_a_linked_folder_of_release_files_is_not_handed_on(tmp_path: Path) -> None:
    native = build_tiny(tmp_path / "native", words=["A"], seed=0, size=TinySize())
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "import.json").write_text("{}")
    (native / "released").symlink_to(tmp_path / "private")
    for copy in (
        lambda: hand_on(native, tmp_path / "out"),
        lambda: export_released(native, tmp_path / "out"),
    ):
        with pytest.raises(LayoutError, match=r"a link to .*private"):
            copy()
