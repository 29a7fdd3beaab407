"""After an update, a real vLLM server serves exactly the learner's weights. Each trap has its test.

The traps (sailvl2-core notes, measured on this stack): a tied output head that the CPU engine keeps; image features
that outlive the tower they came from; packed weights that `load_weights` alone leaves as they were; a token banned in
sampling only.
"""

import os
import socket

import pytest

from rl.config import Parity
from rl.rollout.access import TOKEN
from rl.rollout.client import RolloutClient
from rl.rollout.messages import CoreFacts, Prompt, Sampling
from rl.rollout.parity import ParityError, ParityGuard
from rl.rollout.weights import FileSync, weights_folder

from .conftest import POOL, TEMPERATURE, WORDS, plain_logprobs, prompt_inputs


@pytest.fixture(scope="module")
def learner(tiny_core):
    """The core in transformers, the banned token without probability."""
    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor
    from rl.trainer import ban_tokens

    model = load_model(tiny_core, LearnerConfig()).eval()
    ban_tokens(model, CoreFacts.of(tiny_core).banned_ids)
    return model, load_processor(tiny_core)


@pytest.fixture
def fresh_learner(learner):
    """The learner, its weights put back after the test."""
    model, processor = learner
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield model, processor
    model.load_state_dict(before)


def logprobs(learner, row, answer):
    """The learner's side of one answer."""
    return plain_logprobs(*learner, row, answer.prompt_ids, answer.completions[0].token_ids).tolist()


def parity(client, learner, records):
    """Largest difference over four probes with an image each, by the guard."""
    from rl.data import prompt_messages

    rows = [row for row in records if row["images"]][:4]
    prompts = [Prompt(prompt_messages(row), seed=at) for at, row in enumerate(rows)]
    guard = ParityGuard(Parity(bound=1e-4), prompts, TEMPERATURE)
    return guard.check(
        guard.sample(client), lambda at, answer: logprobs(learner, rows[at], answer), servers=1
    )


def push(client, model):
    """An update as the trainer sends it."""
    with weights_folder(None) as folder:
        FileSync(client, folder).push(model)


def move(model, *prefixes):
    """Change the weights under `prefixes` as a large update would."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(prefixes):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def test_server_and_transformers_agree(client, fresh_learner, records):
    assert parity(client, fresh_learner, records) < 1e-5


def test_the_server_fetches_no_image_from_a_url(client, server_url):
    import requests

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        picture = {"url": f"http://127.0.0.1:{listener.getsockname()[1]}/picture.png"}
        parts = [{"type": "image_url", "image_url": picture}, {"type": "text", "text": "compute A"}]
        body = {"model": "policy", "messages": [{"role": "user", "content": parts}]}
        own = {"Authorization": f"Bearer {os.environ[TOKEN]}"}
        reply = requests.post(f"{server_url}/v1/chat/completions", json=body, headers=own, timeout=60)
        assert "must be from one of the allowed domains" in reply.text
        with pytest.raises(BlockingIOError):  # nobody has called
            listener.accept()


def test_an_update_of_every_weight_reaches_the_server(client, fresh_learner, records):
    move(fresh_learner[0], "")
    with pytest.raises(ParityError):  # the guard sees that the servers have not been told yet
        parity(client, fresh_learner, records)
    push(client, fresh_learner[0])
    assert parity(client, fresh_learner, records) < 1e-5


@pytest.mark.slow
def test_updates_reach_a_server_of_an_any_resolution_core(tmp_path, records):
    """Through the server of a run, images of several sizes, before and after the tower has moved."""
    from core.model.tiny import TinySize, build_tiny
    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor
    from rl.rollout.server import rollout_pool
    from rl.trainer import ban_tokens

    folder = build_tiny(tmp_path / "any", words=WORDS, seed=0, size=TinySize(any_resolution=True))
    model = load_model(folder, LearnerConfig()).eval()
    ban_tokens(model, CoreFacts.of(folder).banned_ids)
    rows = [
        {**row, "images": [image.resize((30 + 41 * at, 180 - 13 * at)) for image in row["images"] * 2]}
        for at, row in enumerate(records[:8])
    ]
    with rollout_pool(POOL, folder, tmp_path) as urls:
        client = RolloutClient(urls, CoreFacts.of(folder))
        learner = (model, load_processor(folder))
        assert parity(client, learner, rows) < 1e-5
        move(model, "model.vision_tower")
        with pytest.raises(ParityError):
            parity(client, learner, rows)
        FileSync(client, tmp_path).push(model)
        assert parity(client, learner, rows) < 1e-5
        client.close()


def test_without_its_twin_the_tied_output_head_stays_old_and_the_guard_says_so(
    client, fresh_learner, records, server_url, tiny_core
):
    core = CoreFacts.of(tiny_core)
    assert core.tied, "the tiny core ties its embeddings"
    forgetful = RolloutClient([server_url], CoreFacts(core.banned_ids, tied={}))
    move(fresh_learner[0], "model.language_model.embed_tokens")
    push(forgetful, fresh_learner[0])
    with pytest.raises(ParityError, match="tied lm_head not sent"):
        parity(client, fresh_learner, records)
    push(client, fresh_learner[0])
    assert parity(client, fresh_learner, records) < 1e-5
    forgetful.close()


def test_without_the_cache_resets_rollouts_see_the_old_tower_and_the_guard_says_so(
    client, fresh_learner, records, monkeypatch
):
    parity(client, fresh_learner, records)  # fills the caches
    move(fresh_learner[0], "model.vision_tower", "model.multi_modal_projector")
    with monkeypatch.context() as patch:
        patch.setattr(RolloutClient, "reset_caches", lambda self: None)
        push(client, fresh_learner[0])
    with pytest.raises(ParityError, match="a cache that was not reset"):
        parity(client, fresh_learner, records)
    client.reset_caches()
    assert parity(client, fresh_learner, records) < 1e-5


def test_loading_without_the_layerwise_reload_is_seen_by_the_guard(
    client, fresh_learner, records, monkeypatch
):
    move(fresh_learner[0], "model.language_model.layers")
    real = RolloutClient.on_every_server

    def without_reload(self, path, body=None):
        return {} if path in ("start_weight_update", "finish_weight_update") else real(self, path, body)

    with monkeypatch.context() as patch:
        patch.setattr(RolloutClient, "on_every_server", without_reload)
        # vLLM refuses, or takes the tensors and keeps its packed copies: either way nothing passes unseen.
        with pytest.raises((ParityError, RuntimeError)):  # noqa: PT012
            push(client, fresh_learner[0])
            parity(client, fresh_learner, records)


def test_a_policy_in_love_with_the_image_token_samples_none_and_its_ratios_are_right(
    client, fresh_learner, records, tiny_core
):
    import torch

    from rl.data import prompt_messages

    model, _ = fresh_learner
    banned = CoreFacts.of(tiny_core).banned_ids[0]
    head = model.get_output_embeddings().weight
    with torch.no_grad():  # the image token becomes the likeliest wherever hidden states point this way
        head[banned] = head.mean(0) * 40
    push(client, model)
    rows = records[:8]
    answers = client.generate(
        [Prompt(prompt_messages(row), seed=at) for at, row in enumerate(rows)],
        Sampling(max_tokens=12, temperature=TEMPERATURE),
    )
    worst = {"banned on both sides": 0.0, "banned in sampling only": 0.0}
    for row, answer in zip(rows, answers, strict=True):
        completion = answer.completions[0]
        assert banned not in completion.token_ids
        for name in worst:
            bias = model.get_output_embeddings().bias
            kept = bias.clone()
            if name == "banned in sampling only":
                bias.zero_()
            ours = logprobs(fresh_learner, row, answer)
            bias.copy_(kept)
            worst[name] = max(
                worst[name], *(abs(a - b) for a, b in zip(ours, completion.logprobs, strict=True))
            )
    assert worst["banned on both sides"] < 1e-4
    assert worst["banned in sampling only"] > 0.01  # what every importance ratio would be off by


def test_greedy_text_is_transformers_greedy_text(client, fresh_learner, records):
    from rl.data import prompt_messages

    model, processor = fresh_learner
    row = records[1]
    answer = client.generate([Prompt(prompt_messages(row))], Sampling(max_tokens=16, temperature=0.0))[0]
    inputs = prompt_inputs(processor, row)
    out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert out[0, inputs["input_ids"].shape[1] :].tolist() == answer.completions[0].token_ids


def test_lora_weights_reach_the_server_merged_and_stay_apart_here(client, fresh_learner, records, tiny_core):
    import torch
    from peft import get_peft_model

    from core.training.config import LearnerConfig, LoRAConfig
    from core.training.model import load_model, peft_config
    from rl.trainer import ban_tokens

    _, processor = fresh_learner
    base = load_model(tiny_core, LearnerConfig()).eval()
    ban_tokens(base, CoreFacts.of(tiny_core).banned_ids)
    model = get_peft_model(base, peft_config(LearnerConfig(lora=LoRAConfig(r=4))))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # adapters start as zero maps: make them change the output
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    frozen = model.get_base_model().model.language_model.layers[0].self_attn.q_proj.base_layer.weight.clone()
    push(client, model)
    assert parity(client, (model, processor), records) < 1e-5
    kept = model.get_base_model().model.language_model.layers[0].self_attn.q_proj.base_layer.weight
    assert kept.equal(frozen)


@pytest.mark.slow
def test_the_engine_ends_with_a_server_whose_guard_was_killed_too(tiny_core, tmp_path):
    import psutil

    from rl.rollout.server import rollout_pool

    with rollout_pool(POOL, tiny_core, tmp_path):
        servers = [one for one in psutil.Process().children(recursive=True) if str(tmp_path) in _log_of(one)]
        guard = next(one for one in servers if "processes.py" in " ".join(one.cmdline()))
        assert any("EngineCore" in " ".join(one.cmdline()) for one in servers)
        guard.kill()
        gone, alive = psutil.wait_procs(servers, timeout=30)
        assert guard in gone
        assert [one for one in alive if one.status() != psutil.STATUS_ZOMBIE] == []


def _log_of(process):
    """Where the process writes."""
    try:
        return os.readlink(f"/proc/{process.pid}/fd/1")
    except OSError:
        return ""
