"""A stock vLLM engine loads the native core and agrees with transformers. The engine runs in a child process:
vLLM patches transformers, so a process that built an engine must not be the one that compares.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORDS = ["A", "B", "compute", "digit"]
MAX_TOKENS = 12
ENGINE = {
    **{"model_impl": "transformers", "dtype": "float32", "max_model_len": 512, "max_num_seqs": 4},
    **{"block_size": 32, "enforce_eager": True, "seed": 0},
    # vLLM warms up on an image of 10,000 x 10,000 pixels unless told what images to expect.
    "limit_mm_per_prompt": {"image": {"count": 3, "width": 112, "height": 112}},
}
CPU_ENVIRONMENT = {
    **{"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
    # Otherwise the sampler's log-probabilities are compiled at the first request: longer than this test.
    **{"TORCH_COMPILE_DISABLE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "CUDA_VISIBLE_DEVICES": ""},
}
# One tile; two tiles and their thumbnail; one tile twice; no image.
IMAGE_SIZES = [[(56, 56)], [(112, 56)], [(40, 40), (70, 60)], []]


ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def test_vllm_and_transformers_agree_on_greedy_completions_and_logprobs(tmp_path: Path) -> None:
    _check_agreement(tmp_path, size={}, environment=ONE_PROCESS)


@pytest.mark.slow
def test_they_agree_on_a_mixture_of_experts_in_an_engine_of_three_processes(tmp_path: Path) -> None:
    _check_agreement(tmp_path, size={"experts": 4, "tie_embeddings": False}, environment={})


@pytest.mark.slow
def test_they_agree_on_images_of_any_resolution(tmp_path: Path) -> None:
    sizes = [[(56, 56)], [(131, 57), (30, 200)], [(9, 300), (64, 64), (100, 61)], []]
    _check_agreement(tmp_path, size={"any_resolution": True}, environment=ONE_PROCESS, images=sizes)


def _check_agreement(
    tmp_path: Path, size: dict, environment: dict[str, str], images: list | None = None
) -> None:
    core_dir = _build_core(tmp_path, size)
    requests = _write_requests(tmp_path, core_dir, images or IMAGE_SIZES)
    answers = _ask_vllm(core_dir, requests, tmp_path / "answers.json", environment)
    for request, answer in zip(requests, answers, strict=True):
        ids, completion, logprobs = _ask_transformers(core_dir, request)
        assert answer["prompt_ids"] == ids  # so both count the same image tokens
        assert answer["completion_ids"] == completion
        assert answer["logprobs"] == pytest.approx(logprobs, abs=1e-5)


def _build_core(tmp_path: Path, size: dict) -> Path:
    import core
    from core import TinySize, build_tiny

    core.register()
    path = build_tiny(tmp_path / "core", words=WORDS, seed=0, size=TinySize(**size))
    processor = core.SailVL2Processor.from_pretrained(path)
    if not processor.any_resolution:
        processor.image_processor.max_patches = (
            4  # tiny cores take one tile per image; real ones take several
        )
        processor.save_pretrained(path)
    return path


def _write_requests(tmp_path: Path, core_dir: Path, images: list) -> list[dict]:
    import numpy as np
    from PIL import Image

    from core import SailVL2Processor

    processor = SailVL2Processor.from_pretrained(core_dir)
    random = np.random.default_rng(0)
    requests = []
    for row, sizes in enumerate(images):
        paths = []
        for column, (width, height) in enumerate(sizes):
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            paths.append(str(tmp_path / f"{row}-{column}.png"))
            Image.fromarray(pixels).save(paths[-1])
        parts = [{"type": "image"}] * len(sizes) + [{"type": "text", "text": "compute A + B"}]
        chat = [{"role": "user", "content": parts}]
        prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
        requests.append({"prompt": prompt, "images": paths, "image_token_id": processor.image_token_id})
    return requests


def _ask_vllm(core_dir: Path, requests: list[dict], out: Path, environment: dict[str, str]) -> list[dict]:
    job = json.dumps({"model": str(core_dir), "requests": requests, "out": str(out)})
    child = subprocess.run(
        [sys.executable, "-P", __file__, job],
        env={**os.environ, **CPU_ENVIRONMENT, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    return json.loads(out.read_text())


def _ask_transformers(core_dir: Path, request: dict) -> tuple[list[int], list[int], list[float]]:
    import torch
    from PIL import Image

    from core import SailVL2ForConditionalGeneration, SailVL2Processor

    processor = SailVL2Processor.from_pretrained(core_dir)
    model = SailVL2ForConditionalGeneration.from_pretrained(core_dir)
    images = [[Image.open(path) for path in request["images"]]]
    inputs = processor(images=images, text=[request["prompt"]], return_tensors="pt")
    banned = [request["image_token_id"]]
    prompt_length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS, suppress_tokens=banned)
        pixels = {key: inputs[key] for key in ("pixel_values", "image_grid_thw") if key in inputs}
        logits = model(input_ids=ids, **pixels).logits
    logprobs = logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])[:, 0]
    return inputs["input_ids"][0].tolist(), ids[0, prompt_length:].tolist(), logprobs.tolist()


def _serve(job: dict) -> None:
    """The child: one engine as a stock server builds it; the plug-in reaches it by its entry point alone."""
    from PIL import Image
    from vllm import LLM, SamplingParams

    in_process = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0"
    llm = LLM(model=job["model"], distributed_executor_backend="uni" if in_process else None, **ENGINE)
    answers = []
    for request in job["requests"]:
        images = [Image.open(path) for path in request["images"]]
        prompt = {"prompt": request["prompt"], **({"multi_modal_data": {"image": images}} if images else {})}
        ban = {request["image_token_id"]: -100.0}
        greedy = SamplingParams(
            temperature=0, max_tokens=MAX_TOKENS, logprobs=0, prompt_logprobs=0, logit_bias=ban
        )
        output = llm.generate(prompt, greedy, use_tqdm=False)[0]
        ids = [*output.prompt_token_ids, *output.outputs[0].token_ids]
        choices = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
        answers.append(
            {
                "prompt_ids": output.prompt_token_ids,
                "completion_ids": list(output.outputs[0].token_ids),
                "logprobs": [choice[i].logprob for choice, i in zip(choices, ids[1:], strict=True)],
            }
        )
    Path(job["out"]).write_text(json.dumps(answers))


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
