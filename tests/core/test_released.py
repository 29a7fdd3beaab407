"""A released checkpoint imports, loads and exports again; every tensor and file comes back as it was."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import core
from core import SailVL2Processor, TinySize, build_tiny
from core.checkpoint import released, shards
from core.checkpoint.released import export_released, import_released
from core.checkpoint.released_files import hand_on
from core.checkpoint.shards import LayoutError, Tensors
from core.manifest import Manifest

from .released_reference import IDS, Sizes, compute, read_released, write_released

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
VARIANTS = {
    "tied, output layer stored": {},
    "tied, output layer left out": {"lm_head": False, "shards": 2},
    "untied": {"tied": False, "dtype": "bfloat16"},
    "mixture of experts": {"tied": False, "experts": 4, "dtype": "bfloat16", "shards": 3},
    "older snapshot that says Qwen2": {"qwen2_label": True, "select_layer": -4, "use_thumbnail": False},
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same_tensors(one: Path, other: Path) -> None:
    here, there = tensors(one), tensors(other)
    assert here.keys() == there.keys()
    for name in here:
        assert here[name].dtype == there[name].dtype, name
        assert torch.equal(here[name], there[name]), name


def texts(folder: Path) -> dict[str, bytes]:
    """Every file but weights and manifest."""
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.is_file() and path.suffix != ".safetensors" and path.name not in (*WEIGHTS, "manifest.json")
    }


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_import_then_export_gives_back_every_tensor_and_every_file(variant: dict, tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", **variant)
    import_released(there, tmp_path / "native", max_shard_bytes=200_000)
    export_released(tmp_path / "native", tmp_path / "back", max_shard_bytes=100_000)
    assert_same_tensors(there, tmp_path / "back")
    assert texts(there) == texts(tmp_path / "back")


@pytest.mark.parametrize(
    "size",
    [TinySize(), TinySize(experts=3, tie_embeddings=False), TinySize(any_resolution=True)],
    ids=["dense", "mixture of experts", "any resolution"],
)
def test_export_then_import_gives_back_every_tensor_and_the_configuration(
    size: TinySize, tmp_path: Path
) -> None:
    native = build_tiny(tmp_path / "native", words=["A", "B"], seed=1, size=size)
    # No release to take files from: the layout is written anew.
    done = export_released(native, tmp_path / "released")
    assert any("contain no code" in note for note in done.notes)
    import_released(tmp_path / "released", tmp_path / "again")
    assert_same_tensors(native, tmp_path / "again")
    for name in ("config.json", "processor_config.json", "chat_template.jinja"):
        assert (native / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    tokenizers = [
        SailVL2Processor.from_pretrained(folder).tokenizer for folder in (native, tmp_path / "again")
    ]
    assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


@pytest.mark.parametrize("experts", [0, 4])
def test_an_imported_core_loads_by_the_auto_classes_and_computes_what_the_release_does(
    experts: int, tmp_path: Path
) -> None:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    there = write_released(tmp_path / "released", experts=experts, tied=not experts, select_layer=1, shards=2)
    import_released(there, tmp_path / "native", max_shard_bytes=100_000)
    core.register()
    model, found = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "native", dtype=torch.float32, output_loading_info=True
    )
    assert not any(found.values())
    processor = AutoProcessor.from_pretrained(tmp_path / "native")
    assert isinstance(processor, SailVL2Processor)
    text = f"<img>{'<IMG_CONTEXT>' * 4}</img>the hint"
    ids = processor.tokenizer(text, return_tensors="pt").input_ids
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    config, state = read_released(there)
    with torch.no_grad():
        logits = model(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(logits, compute(config, state, ids, pixels).logits, atol=1e-4, rtol=1e-4)


def test_the_tokenizer_gives_the_released_ids_and_ends_with_every_end(tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    there = write_released(tmp_path / "released")
    import_released(there, tmp_path / "native")
    ours = SailVL2Processor.from_pretrained(tmp_path / "native").tokenizer
    theirs = Tokenizer.from_file(str(there / "tokenizer.json"))
    text = "<|im_start|>user\nthe <IMG_CONTEXT> thin</think> 你<|im_end|>"
    assert ours.encode(text) == theirs.encode(text).ids
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert config["image_token_id"] == IDS["<IMG_CONTEXT>"] != 151671
    generation = json.loads((tmp_path / "native" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [IDS["<|im_end|>"], IDS["<|endoftext|>"]]


def test_an_any_resolution_release_is_read_as_one_where_the_user_says_so(tmp_path: Path) -> None:
    from PIL import Image

    there = write_released(tmp_path / "SAIL-VL2-AnyRes-2B")
    told = import_released(there, tmp_path / "tiles").text()
    assert "the path contains AnyRes" in told
    with pytest.raises(LayoutError, match="from other files"):
        import_released(there, tmp_path / "tiles", any_resolution=True)
    told = import_released(there, tmp_path / "native", any_resolution=True).text()
    assert "images: of any size up to 1792 px, one token for 28 by 28 px" in told
    processor = SailVL2Processor.from_pretrained(tmp_path / "native")
    inputs = processor(images=Image.new("RGB", (280, 84)), text="<IMG_CONTEXT>", return_tensors="pt")
    assert (inputs["input_ids"] == IDS["<IMG_CONTEXT>"]).sum() == 10 * 3
    export_released(tmp_path / "native", tmp_path / "back")
    assert_same_tensors(there, tmp_path / "back")
    assert texts(there) == texts(tmp_path / "back")


def test_stacked_experts_export_like_single_ones(tmp_path: Path) -> None:
    native = build_tiny(tmp_path / "native", words=["A"], seed=0, size=TinySize(experts=3))
    stacked = shutil.copytree(native, tmp_path / "stacked")
    weights = tensors(native)
    for layer in range(3):
        at = f"model.language_model.layers.{layer}.mlp.experts."
        parts = {
            half: torch.stack([weights.pop(f"{at}{expert}.{half}_proj.weight") for expert in range(3)])
            for half in ("gate", "up", "down")
        }
        weights[f"{at}gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        weights[f"{at}down_proj"] = parts["down"]
    save_file(weights, stacked / "model.safetensors")
    for folder in (native, stacked):
        export_released(folder, tmp_path / f"{folder.name}-released")
    assert_same_tensors(tmp_path / "native-released", tmp_path / "stacked-released")


def test_files_of_weights_stay_below_the_size_asked_for_unless_one_tensor_is_larger(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", shards=2)
    import_released(there, tmp_path / "native", max_shard_bytes=60_000)
    sizes = {
        file.name: sum(value.nbytes for value in load_file(file).values())
        for file in (tmp_path / "native").glob("*.safetensors")
    }
    largest = {name for name, size in sizes.items() if size > 60_000}
    assert len(sizes) > 5
    # The embedding (320 x 64 in float32) and the patches' projection (32 x 3 x 14 x 14).
    assert sorted(sizes[name] for name in largest) == [75_264, 81_920]
    assert all(len(load_file(tmp_path / "native" / name)) == 1 for name in largest)
    index = json.loads((tmp_path / "native" / shards.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes.values())
    homes = {name: entry.file for name, entry in Tensors(tmp_path / "native").entries.items()}
    assert index["weight_map"] == homes


MEASURED = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from core.checkpoint.released import export_released, import_released

def peak(work):
    # In MiB, over what is resident now; mapped files count like memory of the process's own.
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS:")
    work()
    return resident("VmHWM:") - before

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

small, large, out = map(Path, sys.argv[1:])
# Once with a small one: what libraries take at their first use is no part of the measurement.
import_released(small, out / "small")
export_released(out / "small", out / "small-back")
print(peak(lambda: import_released(large, out / "large", max_shard_bytes=3_000_000)))
print(peak(lambda: export_released(out / "large", out / "large-back", max_shard_bytes=3_000_000)))
print(peak(lambda: [value + 0 for file in large.glob("*.safetensors") for value in load_file(file).values()]))
"""


def test_memory_is_that_of_one_file_and_one_tensor_not_of_the_model(tmp_path: Path) -> None:
    # Eight files, each with a part of every layer, so that each file written is gathered from all of them.
    sizes = Sizes(hidden=256, mlp=2048, layers=10)
    small = write_released(tmp_path / "small")
    large = write_released(tmp_path / "large", sizes=sizes, shards=8)
    weights = sum(file.stat().st_size for file in large.glob("*.safetensors")) / 2**20
    command = [sys.executable, "-P", "-c", MEASURED, str(small), str(large), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported, exported, whole = map(float, done.stdout.split())
    # A file of 3, a tensor of 2, and what the allocator keeps and the system maps around what is read.
    assert max(imported, exported) < 20 < 60 < weights < whole


def test_a_second_import_of_the_same_files_does_nothing_and_of_others_is_refused(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released")
    import_released(there, tmp_path / "native")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "native").rglob("*")}
    again = import_released(there, tmp_path / "native")
    assert again.skipped
    assert "nothing to do" in again.text()
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "native").rglob("*")}
    other = write_released(tmp_path / "other", seed=1)
    with pytest.raises(LayoutError, match="exists already, from other files"):
        import_released(other, tmp_path / "native")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(LayoutError, match="exists already and was not written by an import"):
        import_released(there, tmp_path / "mine")
    with pytest.raises(LayoutError, match=r"lies in .*; import to a folder outside it"):
        import_released(there, there / "native")


def test_an_import_that_breaks_off_leaves_no_core_behind_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = write_released(tmp_path / "released")

    def full(*args: object, **options: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(released, "_check_loads", full)
        with pytest.raises(OSError, match="no space left"):
            import_released(there, tmp_path / "native")
    assert not (tmp_path / "native").exists()
    import_released(there, tmp_path / "native")
    manifest = Manifest.read(tmp_path / "native")
    assert manifest is not None
    assert manifest.inputs.keys() >= {"model.safetensors", "config.json", "LICENSE", "modeling_sailvl.py"}


def test_too_little_disk_is_noticed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = write_released(tmp_path / "released")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(LayoutError, match=r"0\.0 GB free"):
        import_released(there, tmp_path / "native")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["released"]


def test_a_checkpoint_trained_from_an_import_exports_with_the_releases_files(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", dtype="bfloat16")
    import_released(there, tmp_path / "native")
    trained = tmp_path / "trained"
    trained.mkdir()
    for path in (tmp_path / "native").iterdir():
        if path.is_file() and path.name not in ("manifest.json", "LICENSE"):
            shutil.copy(path, trained)
    # Trained in float32, with other values, and more tiles.
    weights = {name: value.float() * 1.5 for name, value in tensors(trained).items()}
    save_file(weights, trained / "model.safetensors")
    config = json.loads((trained / "config.json").read_text().replace('"bfloat16"', '"float32"'))
    (trained / "config.json").write_text(json.dumps(config))
    processor = json.loads((trained / "processor_config.json").read_text())
    processor["image_processor"]["max_patches"] = 24
    (trained / "processor_config.json").write_text(json.dumps(processor))
    hand_on(tmp_path / "native", trained)

    done = export_released(trained, tmp_path / "back")
    here, back = texts(there), texts(tmp_path / "back")
    changed = {name for name in here if here[name] != back.get(name)}
    assert changed == {"config.json", "preprocessor_config.json"}
    assert here.keys() == back.keys()
    was, now = (json.loads(found["config.json"]) for found in (here, back))
    assert now["torch_dtype"] == now["llm_config"]["torch_dtype"] == "float32"
    assert now["max_dynamic_patch"] == json.loads(back["preprocessor_config.json"])["max_dynamic_patch"] == 24
    for part in (was, was["llm_config"], was["vision_config"]):
        part["torch_dtype"] = "float32"
    assert now == {**was, "max_dynamic_patch": 24}
    assert "max_dynamic_patch=24, the release has 10" in done.text()
    assert torch.equal(
        tensors(tmp_path / "back")["mlp1.1.weight"], tensors(there)["mlp1.1.weight"].float() * 1.5
    )
    # The same from a checkpoint that has lost them, with the release at hand.
    shutil.rmtree(trained / "released")
    export_released(trained, tmp_path / "like", like=there)
    assert texts(tmp_path / "like") == back


def test_the_release_of_another_model_or_tokenizer_is_refused(tmp_path: Path) -> None:
    there = write_released(tmp_path / "released", experts=2)
    import_released(there, tmp_path / "native")
    other = write_released(tmp_path / "other", experts=2, select_layer=-2)
    with pytest.raises(LayoutError, match=r"of another model, config\.json differs in vision_feature_layer"):
        export_released(tmp_path / "native", tmp_path / "back", like=other)
    tokenizer = json.loads((there / "tokenizer.json").read_text())
    tokenizer["added_tokens"][-1]["content"] = "</boxes>"
    (there / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(LayoutError, match="would read tokens that the model was not trained on"):
        export_released(tmp_path / "native", tmp_path / "back", like=there)
    with pytest.raises(LayoutError, match="neither a release"):
        export_released(tmp_path / "native", tmp_path / "back", like=tmp_path)
