"""vLLM serves adapters of the language model as peft computes them; an adapter that it would apply in part is refused.

The engine runs in a child process: vLLM patches transformers, so a process with an engine must not compare.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

MAX_TOKENS = 6
PROMPT = "<|im_start|>user\n<IMG_CONTEXT>compute A + B<|im_end|><|im_start|>assistant\n"
SIDE_PX = 56
CPU_ENVIRONMENT = {
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
    **{"TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "CUDA_VISIBLE_DEVICES": ""},
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


@pytest.fixture(scope="module")
def cores(tmp_path_factory):
    from core.model.tiny import TinySize, build_tiny

    folder, words = tmp_path_factory.mktemp("cores"), ["A", "B", "compute"]
    moe = TinySize(experts=2, tie_embeddings=False)
    return {
        "dense": build_tiny(folder / "dense", words=words, seed=0),
        "moe": build_tiny(folder / "moe", words=words, seed=0, size=moe),
    }


@pytest.fixture(scope="module")
def adapters(cores, tmp_path_factory):
    """Adapters that change the output, by core and targets."""
    import torch
    from peft import get_peft_model

    from core.training.config import LearnerConfig, LoRAConfig
    from core.training.model import load_model, peft_config

    def build(kind, targets, **options):
        config = peft_config(LearnerConfig(lora=LoRAConfig(r=3, alpha=6, targets=targets)))
        for name, value in options.items():
            setattr(config, name, value)
        model = get_peft_model(load_model(cores[kind], LearnerConfig(deepspeed=None)), config)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        out = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(out)
        return out

    return {
        "language": build("dense", "language_model"),
        "everything": build("dense", "all_linear"),
        "whole": build("dense", "language_model", modules_to_save=["model.language_model.norm"]),
        "dora": build("dense", "language_model", use_dora=True),
        "large": build("dense", "language_model", r=600),
        "experts": build("moe", "language_model"),
    }


def test_an_adapter_of_the_language_model_is_served_under_a_name_of_its_own(adapters, cores):
    from core.checkpoint.adapters import check_servable, vllm_arguments

    adapter = check_servable(adapters["language"], cores["dense"])
    assert adapter.rank == 3
    assert {adapter.scaling(module) for module in adapter.pairs} == {2.0}  # 6 / 3
    assert vllm_arguments(adapter, "mine") == [
        *("--enable-lora", "--max-lora-rank", "8"),
        *("--lora-modules", f"mine={adapters['language'].resolve()}"),
    ]


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        (
            "everything",
            ["14 LoRA pairs on the vision tower", "2 LoRA pairs on the adapter between", "without an error"],
        ),
        ("whole", [r"whole weights \(model\.language_model\.norm\.weight\)"]),
        ("large", ["rank 600: vLLM takes ranks up to 512"]),
    ],
)
def test_what_vllm_cannot_serve_is_refused_with_the_reason_and_the_remedy(adapters, cores, name, reasons):
    from core.checkpoint.adapters import AdapterError, check_servable

    for reason in [*reasons, f"posttrain core merge {adapters[name]} DST"]:
        with pytest.raises(AdapterError, match=reason):
            check_servable(adapters[name], cores["dense"])


def test_lora_on_a_mixture_of_experts_is_refused_on_a_cpu_alone(adapters, cores):
    from core.checkpoint.adapters import AdapterError, check_servable

    with pytest.raises(AdapterError, match="which its CPU build lacks"):
        check_servable(adapters["experts"], cores["moe"], "cpu")
    check_servable(adapters["experts"], cores["moe"], "gpu")


def test_an_adapter_of_another_core_is_not_served(adapters, cores):
    from core.checkpoint.adapters import AdapterError, check_servable

    with pytest.raises(AdapterError, match=r"does not fit(.|\n)*mlp\.down_proj: no such layer"):
        check_servable(adapters["language"], cores["moe"], "gpu")


def test_variants_of_lora_are_refused(adapters):
    from core.checkpoint.adapters import AdapterError, read_adapter

    with pytest.raises(AdapterError, match="use_dora=True: this variant of LoRA is not supported"):
        read_adapter(adapters["dora"])


def test_a_checkpoint_folder_is_refused_and_the_adapter_inside_is_suggested(cores, adapters, tmp_path):
    from core.checkpoint.adapters import AdapterError, read_adapter

    (tmp_path / "adapter").symlink_to(adapters["language"])
    with pytest.raises(AdapterError, match=r"adapter_config\.json is missing; did you mean .*/adapter\?"):
        read_adapter(tmp_path)
    with pytest.raises(AdapterError, match="is missing"):
        read_adapter(cores["dense"])


def test_a_pickled_adapter_is_not_read(adapters, tmp_path):
    from core.checkpoint.adapters import AdapterError, read_adapter

    (tmp_path / "adapter_config.json").write_text((adapters["language"] / "adapter_config.json").read_text())
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(AdapterError, match="safetensors only"):
        read_adapter(tmp_path)


@pytest.mark.parametrize(
    ("pool", "reason"),
    [
        ({"engine": "hf"}, r"servers\.engine=hf"),
        ({"urls": ["http://127.0.0.1:1"]}, r"servers\.urls names running servers"),
    ],
)
def test_a_rollout_server_that_takes_no_adapter_says_so(adapters, cores, pool, reason):
    from chain.serve import with_adapter
    from core.strict import ConfigError
    from rl.rollout.config import PoolConfig

    with pytest.raises(ConfigError, match=reason):
        with_adapter(PoolConfig(max_model_tokens=64, **pool), cores["dense"], adapters["language"])


def test_a_rollout_server_with_an_adapter_gets_vllms_flags(adapters, cores):
    from chain.serve import with_adapter
    from rl.rollout.command import command
    from rl.rollout.config import PoolConfig

    cfg = with_adapter(PoolConfig(max_model_tokens=64), cores["dense"], adapters["language"])
    words = command(cfg, cores["dense"], 1)
    assert words[words.index("--lora-modules") + 1] == f"adapter={adapters['language'].resolve()}"


@pytest.mark.slow
def test_vllm_with_an_adapter_and_peft_agree_and_the_core_beside_it_stays_itself(adapters, cores, tmp_path):
    out = tmp_path / "answers.json"
    job = {"model": str(cores["dense"]), "adapter": str(adapters["language"]), "out": str(out)}
    child = subprocess.run(
        [sys.executable, "-P", __file__, json.dumps(job)],
        env={**os.environ, **CPU_ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    answers = json.loads(out.read_text())
    for answer, adapter in zip(answers, (None, adapters["language"]), strict=True):
        assert answer["logprobs"] == pytest.approx(
            transformers_logprobs(cores["dense"], adapter, answer["ids"]), abs=1e-4
        )
    assert answers[0]["logprobs"] != pytest.approx(answers[1]["logprobs"], abs=0.1)


def picture():
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8))


def transformers_logprobs(core_dir, adapter, ids):
    """Log-probability of each token but the first of `ids`, by transformers and peft."""
    import torch
    from peft import PeftModel

    from core import SailVL2ForConditionalGeneration, SailVL2Processor

    model = SailVL2ForConditionalGeneration.from_pretrained(core_dir)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    processor = SailVL2Processor.from_pretrained(core_dir)
    pixels = processor(images=[[picture()]], text=[PROMPT], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids]), pixel_values=pixels).logits[0, :-1]
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0].tolist()


def _serve(job):
    """The child: an engine as a stock server builds it, asked without and with the adapter."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model=job["model"],
        **{"model_impl": "transformers", "dtype": "float32", "max_model_len": 128, "max_num_seqs": 2},
        **{"block_size": 32, "enforce_eager": True, "distributed_executor_backend": "uni"},
        limit_mm_per_prompt={"image": {"count": 1, "width": SIDE_PX, "height": SIDE_PX}},
        **{"enable_lora": True, "max_lora_rank": 8},
    )
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, logprobs=0, prompt_logprobs=0)
    answers = []
    for adapter in (None, LoRARequest("adapter", 1, job["adapter"])):
        prompt = {"prompt": PROMPT, "multi_modal_data": {"image": [picture()]}}
        output = llm.generate(prompt, greedy, use_tqdm=False, lora_request=adapter)[0]
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        choices = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        logprobs = [choice[i].logprob for choice, i in zip(choices, ids[1:], strict=True)]
        answers.append({"ids": ids, "logprobs": logprobs})
    Path(job["out"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"target_modules": 5}, r"target_modules=5: a text or a list of texts is needed"),
        ({"target_modules": ["q_proj", 5]}, r"target_modules=\['q_proj', 5\]"),
        ({"modules_to_save": {"a": 1}}, r"modules_to_save="),
        ({"lora_alpha": 10**400}, r"lora_alpha=1000.*: a number of at most 1,000,000 is needed"),
        ({"lora_alpha": float("nan")}, r"lora_alpha=nan"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, r"alpha_pattern.q_proj=inf"),
        ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern=\['q_proj'\]: a mapping"),
        ({"target_modules": "(a+)+("}, r"list the layers by name in adapter_config.json"),
        (
            {"target_modules": r"(.*)*(.*)*(.*)*x"},
            r"not done after 0.3 s, so it was stopped; list the layers",
        ),
        ({"alpha_pattern": {r"(.*)*(.*)*(.*)*x": 3}}, r"not done after 0.3 s"),
        ({"r": "many", "layers_to_transform": "x"}, r"layers_pattern|peft cannot read it"),
    ],
)
def test_an_adapters_configuration_is_untrusted(adapters, cores, tmp_path, monkeypatch, values, words):
    from core import deadline
    from core.checkpoint.adapters import AdapterError
    from core.checkpoint.merge import merge_adapter

    monkeypatch.setattr(deadline, "LIMIT_S", 0.3)
    adapter = shutil.copytree(adapters["language"], tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | values))
    with pytest.raises(AdapterError, match=words):
        merge_adapter(adapter, tmp_path / "merged", core=cores["dense"])
    assert not (tmp_path / "merged").exists()
