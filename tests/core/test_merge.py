"""An adapter merged file by file gives peft's merge_and_unload, bit for bit, and belongs to one core alone."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.checkpoint.adapters import AdapterError, read_adapter, write_base
from core.checkpoint.check import NonFinite
from core.checkpoint.merge import merge_adapter
from core.checkpoint.shards import weights_hash
from core.model.tiny import TinySize, build_tiny
from core.strict import ConfigError
from core.training.config import LearnerConfig, LoRAConfig
from core.training.model import load_model, peft_config

SMALL = {
    "vision_hidden": 32,
    "vision_layers": 1,
    "vision_mlp": 32,
    "text_hidden": 32,
    "text_layers": 2,
    "text_mlp": 32,
}
WHOLE = "model.multi_modal_projector.layer_norm"


def build(path, **size):
    return build_tiny(path, words=["read"], seed=0, size=TinySize(**SMALL | size))


@pytest.fixture(scope="module")
def cores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cores")
    moe = build(folder / "moe", experts=3, tie_embeddings=False)
    return {"dense": build(folder / "dense"), "moe": moe}


def train_none(core, out, *, targets="language_model", dtype=torch.float32, **options):
    """An adapter of `core` with random B, as if it had been trained; and peft's own merge of it."""
    from peft import get_peft_model

    config = peft_config(LearnerConfig(lora=LoRAConfig(r=3, alpha=5, targets=targets)))
    for name, value in options.items():
        setattr(config, name, value)
    model = get_peft_model(load_model(core, LearnerConfig(deepspeed=None)), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora_A" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.save_pretrained(out)
    return out


def pefts_merge(core, adapter, out, dtype):
    from peft import PeftModel

    from core import SailVL2ForConditionalGeneration

    base = SailVL2ForConditionalGeneration.from_pretrained(core, dtype=dtype)
    PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(out)
    return load_file(out / "model.safetensors")


def in_dtype(core, out, dtype):
    """A copy of the core with its weights in another type."""
    shutil.copytree(core, out)
    weights = {name: tensor.to(dtype) for name, tensor in load_file(core / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_gives_pefts_merge_bit_for_bit(cores, tmp_path, kind, dtype):
    core = in_dtype(cores[kind], tmp_path / "core", dtype)
    options = {
        **{"modules_to_save": [WHOLE], "rank_pattern": {"layers.0.self_attn.q_proj": 2}},
        **{"alpha_pattern": {"layers.1.self_attn.v_proj": 9}, "use_rslora": kind == "moe"},
    }
    adapter = train_none(core, tmp_path / "adapter", targets="all_linear", **options)
    merged = merge_adapter(adapter, tmp_path / "merged", core=core)
    ours, before = load_file(tmp_path / "merged/model.safetensors"), load_file(core / "model.safetensors")
    theirs = pefts_merge(core, adapter, tmp_path / "peft", dtype)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    moved = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert moved == {f"{module}.weight" for module in read_adapter(adapter).pairs} | {
        f"{WHOLE}.weight",
        f"{WHOLE}.bias",
    }
    assert (min(merged.modules.values()) > 0, merged.replaced, merged.checked_base) == (True, 2, False)


def test_the_result_is_a_checkpoint_with_all_that_the_core_had(cores, tmp_path):
    from core.training.model import load_processor

    adapter = train_none(cores["dense"], tmp_path / "adapter")
    write_base(adapter, cores["dense"], weights_hash(cores["dense"]))
    merged = merge_adapter(
        adapter, tmp_path / "merged", max_shard_bytes=30_000
    )  # the core: what the adapter names
    assert merged.checked_base
    files = {path.name for path in (tmp_path / "merged").iterdir() if path.suffix != ".safetensors"}
    assert files == {path.name for path in cores["dense"].iterdir() if path.suffix != ".safetensors"} | {
        *("manifest.json", "model.safetensors.index.json")
    }
    inputs = json.loads((tmp_path / "merged/manifest.json").read_text())["inputs"]
    assert inputs["core"] == weights_hash(cores["dense"])
    load_processor(tmp_path / "merged")
    theirs = pefts_merge(cores["dense"], adapter, tmp_path / "peft", torch.float32)
    model = load_model(tmp_path / "merged", LearnerConfig(deepspeed=None))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in theirs.items())


def test_an_adapter_of_another_core_is_refused_with_what_does_not_fit(cores, tmp_path):
    adapter = train_none(cores["dense"], tmp_path / "adapter")
    wide = build(tmp_path / "wide", text_mlp=64)
    with pytest.raises(
        AdapterError,
        match=r"mlp\.up_proj: made for a layer of shape \(32, 32\); the core's layer has \(64, 32\)",
    ):
        merge_adapter(adapter, tmp_path / "merged", core=wide)
    shallow = build(tmp_path / "shallow", text_layers=1)
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.up_proj: no such layer in the core"):
        merge_adapter(adapter, tmp_path / "merged", core=shallow)
    deep = build(tmp_path / "deep", text_layers=3)
    with pytest.raises(AdapterError, match=r"7 problems(.|\n)*layers\.2.*the adapter has no tensors for it"):
        merge_adapter(adapter, tmp_path / "merged", core=deep)
    assert not (tmp_path / "merged").exists()


def test_a_core_of_the_same_shape_with_other_weights_is_refused(cores, tmp_path):
    adapter = train_none(cores["dense"], tmp_path / "adapter")
    write_base(adapter, cores["dense"], weights_hash(cores["dense"]))
    other = build_tiny(tmp_path / "other", words=["read"], seed=1, size=TinySize(**SMALL))
    with pytest.raises(AdapterError, match=r"was trained on the weights .*/other holds"):
        merge_adapter(adapter, tmp_path / "merged", core=other)


def test_an_output_layer_for_a_core_that_ties_it_is_refused(cores, tmp_path):
    adapter = train_none(cores["dense"], tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.lm_head.weight"] = torch.zeros(50, 32)
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"lm_head\.weight: the core ties its output layer"):
        merge_adapter(adapter, tmp_path / "merged", core=cores["dense"])


def test_a_sum_that_is_not_finite_is_refused_and_leaves_no_checkpoint(cores, tmp_path):
    adapter = train_none(cores["dense"], tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, adapter / "adapter_model.safetensors")
    with pytest.raises(NonFinite, match=r"lora_A.weight: NaN, in adapter_model.safetensors"):
        merge_adapter(adapter, tmp_path / "merged", core=cores["dense"])
    huge = {name: torch.full_like(tensor, 3e38) for name, tensor in weights.items()}
    save_file(huge, adapter / "adapter_model.safetensors")
    with pytest.raises(NonFinite, match=r"_proj.weight holds (infinity|NaN): such weights are not written"):
        merge_adapter(adapter, tmp_path / "merged", core=cores["dense"])
    assert not (tmp_path / "merged").exists()


def test_an_existing_folder_and_a_missing_core_are_refused(cores, tmp_path):
    adapter = train_none(cores["dense"], tmp_path / "adapter")
    with pytest.raises(ConfigError, match="exists already"):
        merge_adapter(adapter, tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "some/model"})
    )
    with pytest.raises(
        AdapterError, match=r"names its core as 'some/model', but no such folder exists.*--core"
    ):
        merge_adapter(adapter, tmp_path / "merged")
