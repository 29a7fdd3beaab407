"""A weight update sends every weight once, with adapters added, in files of a bounded size."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from core.training.config import LearnerConfig, LoRAConfig
from core.training.model import load_model, peft_config
from rl.rollout.served import Served
from rl.rollout.weights import FileSync, NoRoomForWeights, policy_tensors

LEARNER = LearnerConfig(dtype="bfloat16", deepspeed=None, lora=LoRAConfig(r=4))


@pytest.fixture
def adapted(tiny_core):
    """A bfloat16 core with adapters that are no longer zero, and the same core without any."""
    from peft import get_peft_model

    torch.manual_seed(0)
    plain = load_model(tiny_core, LEARNER)
    model = get_peft_model(load_model(tiny_core, LEARNER), peft_config(LEARNER))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model, plain


def test_the_weights_below_lora_are_in_bfloat16_and_the_adapters_in_float32(adapted):
    model, _ = adapted
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if "lora_" in name else torch.bfloat16), name
        assert parameter.requires_grad == ("lora_" in name), name


def test_adapters_are_added_in_float32_and_the_weights_below_keep_every_bit(adapted):
    model, plain = adapted
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        sent = {name: tensor.clone() for name, tensor in policy_tensors(model)}
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]), name
    assert set(sent) == {name for name, _ in plain.named_parameters()}
    moved = 0
    for name, tensor in plain.named_parameters():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        expected = tensor
        if f"{stem}.base_layer.weight" in before:
            a, b = (before[f"{stem}.lora_{half}.default.weight"] for half in "AB")
            expected = (tensor.float() + b @ a * (32 / 4)).bfloat16()
            moved += 1
        assert sent[name].dtype == torch.bfloat16
        assert sent[name].equal(expected), name
    assert moved == 7 * model.config.text_config.num_hidden_layers


def test_files_hold_every_weight_and_go_when_the_next_ones_come(tiny_core, tmp_path):
    model = load_model(tiny_core, LearnerConfig())
    found, sizes, there = {}, [], []

    class Client:
        served = Served()

        def load_checkpoint(self, folder, what):
            there.append(len(list(folder.parent.iterdir())))
            for path in folder.glob("*.safetensors"):
                sizes.append(path.stat().st_size)
                with safe_open(path, "pt") as file:
                    found.update({name: file.get_tensor(name).clone() for name in file.keys()})  # noqa: SIM118

    sync = FileSync(Client(), tmp_path, file_bytes=500_000)
    for _ in range(2):
        found.clear()
        sync.push(model)
        assert set(found) == {name for name, _ in model.named_parameters()}
        assert all(found[name].equal(parameter) for name, parameter in model.named_parameters())
        with torch.no_grad():
            next(model.parameters()).add_(1)
    assert max(sizes) < 600_000
    assert len(sizes) > 4
    assert there == [1, 1]
    assert len(list(tmp_path.iterdir())) == 1  # a server that comes back needs them


def test_weights_that_do_not_fit_are_refused_before_a_byte_is_written(tiny_core, tmp_path, monkeypatch):
    model = load_model(tiny_core, LearnerConfig())
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NoRoomForWeights, match=r"GB of weights have to pass.*weights_dir"):
        FileSync(SimpleNamespace(served=None), tmp_path).push(model)
    assert not list(tmp_path.iterdir())
