"""Checkpoints with code, NaN or infinity are never loaded, saved, exported or served."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import core
from core.checkpoint.check import (
    ForeignCode,
    NonFinite,
    check_checkpoint,
    check_code,
    check_finite,
    nonfinite,
    nonfinite_tensor,
)
from core.checkpoint.released import export_released
from core.checkpoint.shards import LayoutError
from core.checkpoint.stream import write_stream
from core.model.tiny import TinySize, build_tiny
from core.training.config import LearnerConfig
from core.training.model import load_model, load_processor

NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    size = TinySize(
        vision_hidden=32, vision_layers=1, vision_mlp=32, text_hidden=32, text_layers=1, text_mlp=32
    )
    return build_tiny(tmp_path_factory.mktemp("core"), words=["read"], seed=0, size=size)


@pytest.fixture
def folder(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "core")


def edit(path: Path, **values) -> None:
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **values}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [NAN, -NAN, INF, -INF])
def test_one_bad_number_is_found_wherever_it_stands(dtype, value):
    for size in (1, 7, 64, 1025):
        sound = torch.cat(
            [torch.randn(size - 1).to(dtype), torch.tensor([-torch.finfo(dtype).max], dtype=dtype)]
        )
        assert nonfinite_tensor(sound) == ""
        for place in {0, size // 2, size - 1}:
            bad = sound.clone()
            bad[place] = value
            assert nonfinite_tensor(bad) == ("NaN" if value != value else "infinity")
    both = torch.tensor([INF, NAN, -INF], dtype=dtype)
    assert nonfinite_tensor(both) == "NaN"


def test_every_bit_pattern_of_bfloat16_is_judged_as_torch_judges_it():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    finite = bits.view(torch.bfloat16).isfinite()
    found = [nonfinite("BF16", np.array([pattern], "u2")) == "" for pattern in range(1 << 16)]
    assert found == finite.tolist()


def test_empty_and_integer_tensors_are_finite():
    assert nonfinite_tensor(torch.zeros(0)) == nonfinite_tensor(torch.tensor([1 << 40])) == ""


@pytest.fixture
def broken(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.language_model.norm.weight"][3] = NAN
    weights["model.vision_tower.rms_norm.weight"][0] = -INF
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_checkpoint_that_is_not_finite_is_refused_everywhere_with_its_tensors(broken, tmp_path):
    uses = (
        check_checkpoint,
        lambda path: load_model(path, LearnerConfig(deepspeed=None)),
        lambda path: export_released(path, tmp_path / "out"),
    )
    for use in uses:
        with pytest.raises(NonFinite) as error:
            use(broken)
        assert "norm.weight" in str(error.value)
    with pytest.raises(NonFinite) as error:
        check_finite(broken)
    assert "2 problems" in str(error.value)
    assert "model.language_model.norm.weight: NaN, in model.safetensors" in str(error.value)
    assert "model.vision_tower.rms_norm.weight: infinity, in model.safetensors" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_is_checked_again_after_its_files_changed(folder):
    check_finite(folder)
    weights = load_file(folder / "model.safetensors")
    weights["lm.extra"] = torch.tensor([NAN])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFinite, match=r"lm.extra: NaN"):
        check_finite(folder)


def test_nothing_that_is_not_finite_is_written_unless_asked_for(tmp_path):
    tensors = {"good": torch.ones(3), "bad": torch.tensor([1.0, NAN])}
    with pytest.raises(NonFinite, match=r"bad holds NaN"):
        write_stream(tensors.items(), tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    write_stream(tensors.items(), tmp_path, allow_nonfinite=True)
    assert load_file(tmp_path / "model.safetensors")["bad"][1].isnan()


# Where transformers looks for code, by the file it reads the key from.
AUTO_CLASSES = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"),
    "processor_config.json": ("AutoProcessor",),
    "preprocessor_config.json": ("AutoImageProcessor", "AutoProcessor"),
    "video_preprocessor_config.json": ("AutoVideoProcessor",),
    "tokenizer_config.json": ("AutoTokenizer", "AutoProcessor"),
}
PLANTED = [(file, name) for file, names in AUTO_CLASSES.items() for name in names]


@pytest.fixture
def mark(folder, monkeypatch):
    """A module in the core that leaves a file behind when it runs, and a `y` on standard input."""
    mark = folder.parent / "ran"
    (folder / "planted.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass Planted: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    yield mark
    assert not mark.exists()


def refused_by_every_load(folder, words, tmp_path):
    loads = (
        load_processor,
        lambda path: load_model(path, LearnerConfig(deepspeed=None)),
        lambda path: export_released(path, tmp_path / "exported"),
        check_checkpoint,
    )
    for load in loads:
        with pytest.raises(ForeignCode, match=words):
            load(folder)


@pytest.mark.parametrize(("file", "auto"), PLANTED)
def test_code_in_a_core_is_refused_with_file_and_key_and_never_runs(folder, mark, tmp_path, file, auto):
    reference = ["planted.Planted", None] if auto == "AutoTokenizer" else "planted.Planted"
    edit(folder / file, auto_map={auto: reference})
    refused_by_every_load(folder, rf"{file}: auto_map=.*{auto}", tmp_path)


def test_code_in_a_part_of_a_configuration_is_refused(folder, mark, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["auto_map"] = {"AutoConfig": "planted.Planted"}
    (folder / "config.json").write_text(json.dumps(config))
    refused_by_every_load(folder, r"config.json: text_config.auto_map", tmp_path)


def test_a_generation_loop_in_a_core_is_refused(folder, mark, tmp_path):
    (folder / "custom_generate").mkdir()
    shutil.copy(folder / "planted.py", folder / "custom_generate" / "generate.py")
    refused_by_every_load(folder, r"custom_generate/", tmp_path)
    shutil.rmtree(folder / "custom_generate")
    edit(folder / "generation_config.json", custom_generate=str(folder))
    refused_by_every_load(folder, r"generation_config.json: custom_generate", tmp_path)


@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_an_attention_kernel_by_its_name_on_the_hub_is_refused(folder, tmp_path, key):
    edit(folder / "config.json", **{key: "someone/kernel@main:attend"})
    refused_by_every_load(folder, rf"config.json: {key}='someone/kernel@main:attend'", tmp_path)
    edit(folder / "config.json", **{key: {"text_config": "someone/kernel"}})
    refused_by_every_load(folder, rf"config.json: {key}=", tmp_path)
    edit(folder / "config.json", **{key: "sdpa"})
    check_code(folder)


def test_an_adapter_in_a_cores_folder_which_would_load_another_core_is_refused(folder, tmp_path):
    edit(folder / "adapter_config.json", peft_type="LORA", base_model_name_or_path="someone/else")
    refused_by_every_load(folder, r"adapter_config.json: with this file transformers loads another", tmp_path)


def test_the_same_core_without_code_passes(folder):
    check_checkpoint(folder)
    load_processor(folder)
    core.register()


def test_an_error_shows_no_control_character_of_a_file(folder):
    edit(folder / "config.json", **{"auto_map": {"\x1b[31mred": "x\u202ey"}})
    with pytest.raises(LayoutError) as error:
        check_code(folder)
    assert "\x1b" not in str(error.value)
    assert "\u202e" not in str(error.value)
    assert "\\x1b[31mred" in str(error.value)


@pytest.mark.parametrize("bring", ["code", pytest.param("NaN", marks=pytest.mark.slow)])
def test_vllm_refuses_such_a_core_before_it_reads_it(folder, bring):
    """In a process of its own: vLLM patches transformers."""
    if bring == "code":
        edit(folder / "processor_config.json", auto_map={"AutoProcessor": "planted.Planted"})
    else:
        weights = load_file(folder / "model.safetensors")
        weights["model.language_model.norm.weight"][0] = NAN
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    program = (
        "from vllm.plugins import load_general_plugins\n"
        "load_general_plugins()\n"
        "from vllm.config import ModelConfig\n"
        f"ModelConfig(model={str(folder)!r}, model_impl='transformers', dtype='float32')\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    words = "processor_config.json: auto_map" if bring == "code" else "language_model.norm.weight: NaN"
    assert done.returncode != 0
    assert words in done.stderr
