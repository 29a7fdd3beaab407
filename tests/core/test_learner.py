import shutil
from types import SimpleNamespace

import pytest

from core.checkpoint.save import save_checkpoint
from core.checkpoint.shards import weights_hash
from core.model.names import MODULES, module_of
from core.strict import ConfigError, parse
from core.training.config import DeepSpeedConfig, LearnerConfig, LoRAConfig, Optim
from core.training.model import apply_freeze, load_model, peft_config
from core.training.ranks import join_process_group


@pytest.fixture(scope="module")
def core_path(tmp_path_factory):
    from core.model.tiny import TinySize, build_tiny

    size = TinySize(
        vision_hidden=32, vision_layers=1, vision_mlp=32, text_hidden=32, text_layers=1, text_mlp=32
    )
    return build_tiny(tmp_path_factory.mktemp("core"), words=["read"], seed=0, size=size)


@pytest.fixture
def model(core_path):
    return load_model(core_path, LearnerConfig(deepspeed=None))


def test_ranks_times_micro_times_accumulation_is_the_global_batch():
    optim = Optim(learning_rate=1e-6, global_batch_size=1024, micro_batch_size=4)
    assert optim.gradient_accumulation(ranks=8) == 32  # 8 x 4 x 32 = 1024


def test_a_global_batch_that_no_accumulation_makes_is_refused_with_the_nearest():
    optim = Optim(learning_rate=1e-6, global_batch_size=30, micro_batch_size=4)
    with pytest.raises(
        ValueError, match=r"global_batch_size=30.*processes=2.*= 8; nearest multiples: 24 and 32"
    ):
        optim.gradient_accumulation(ranks=2)


def test_a_length_is_epochs_or_steps():
    with pytest.raises(ConfigError, match=r"epochs=1.0 and max_steps=5: give one"):
        parse(Optim, {"learning_rate": 1e-6, "epochs": 1, "max_steps": 5})


def test_the_deepspeed_json_leaves_batch_sizes_to_the_trainer():
    values = DeepSpeedConfig().to_dict()
    assert values["zero_optimization"]["stage"] == 2
    assert values["zero_force_ds_cpu_optimizer"] is False
    assert {
        values[key] for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping")
    } == {"auto"}


def test_zero_3_with_offload_moves_weights_and_optimizer():
    zero = DeepSpeedConfig(zero_stage=3, offload="cpu").to_dict()["zero_optimization"]
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "cpu"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"freeze": ["tower", "adapter", "language_model"]}, "nothing would train"),
        ({"freeze": ["tower", "tower"]}, "each module once"),
        ({"freeze": ["vision"]}, "tower"),
        ({"freeze": ["tower"], "lora": {}}, "LoRA freezes"),
        ({"deepspeed": {"zero_stage": 0, "offload": "cpu"}}, "from stage 1 on"),
        ({"dtypes": "float32"}, "did you mean dtype"),
    ],
)
def test_a_learner_that_cannot_train_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        parse(LearnerConfig, values)


def test_every_parameter_belongs_to_one_module(model):
    assert {module_of(name) for name, _ in model.named_parameters()} == set(MODULES)


def test_freezing_reports_what_still_trains(model):
    counts = apply_freeze(model, ["tower"])
    assert counts["tower"] == 0
    assert counts["language_model"] == sum(
        p.numel() for name, p in model.named_parameters() if module_of(name) == "language_model"
    )
    assert apply_freeze(model, [])["tower"] > 0  # and thaws again


def test_freezing_everything_or_something_unknown_is_refused(model):
    with pytest.raises(ValueError, match="no parameter would train"):
        apply_freeze(model, list(MODULES))
    with pytest.raises(ValueError, match="unknown module 'towr'; did you mean tower"):
        apply_freeze(model, ["towr"])


@pytest.mark.parametrize(
    ("targets", "modules"), [("language_model", {"language_model"}), ("all_linear", set(MODULES))]
)
def test_lora_puts_adapters_on_its_targets_alone(model, targets, modules):
    from peft import get_peft_model

    adapted = get_peft_model(model, peft_config(LearnerConfig(lora=LoRAConfig(r=2, targets=targets))))
    trained = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert {module_of(name.removeprefix("base_model.model.")) for name in trained} == modules
    assert all("lora_" in name for name in trained)


def test_without_lora_there_is_no_adapter():
    assert peft_config(LearnerConfig()) is None


def test_the_weights_hash_sees_one_changed_number(core_path, tmp_path):
    from safetensors.torch import load_file, save_file

    weights = load_file(core_path / "model.safetensors")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    same = weights_hash(tmp_path)
    weights["model.language_model.norm.weight"][0] += 1
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert same == weights_hash(core_path) != weights_hash(tmp_path)


def test_another_number_of_ranks_than_configured_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="processes=1, but 2 ranks were started"):
        join_process_group(LearnerConfig())


def test_a_checkpoint_keeps_the_release_its_start_was_imported_from(core_path, tmp_path):
    from core import SailVL2ForConditionalGeneration, SailVL2Processor

    start = shutil.copytree(core_path, tmp_path / "start")
    (start / "released").mkdir()
    (start / "released" / "modeling_sailvl.py").write_text("raise RuntimeError")
    (start / "LICENSE").write_text("Apache")
    model = SailVL2ForConditionalGeneration.from_pretrained(start)
    accelerator = SimpleNamespace(
        unwrap_model=lambda wrapped: wrapped,
        state=SimpleNamespace(deepspeed_plugin=None),
        is_main_process=True,
        wait_for_everyone=lambda: None,
    )
    trainer = SimpleNamespace(accelerator=accelerator, model_wrapped=model)
    out = save_checkpoint(trainer, SailVL2Processor.from_pretrained(start), tmp_path / "out")
    for name in ("released/modeling_sailvl.py", "LICENSE"):
        assert (out / name).read_text() == (start / name).read_text()


@pytest.mark.parametrize(
    ("learner", "dtype"),
    [
        ({"deepspeed": None}, "torch.float32"),  # updates of 1e-6 vanish in bfloat16 weights
        ({}, "torch.bfloat16"),  # DeepSpeed keeps float32 masters
        ({"deepspeed": None, "lora": {"r": 2}}, "torch.bfloat16"),  # these do not move
    ],
)
def test_bfloat16_weights_are_those_that_no_small_update_must_reach(core_path, learner, dtype):
    loaded = load_model(core_path, LearnerConfig(dtype="bfloat16", **learner))
    assert {str(parameter.dtype) for parameter in loaded.parameters()} == {dtype}
