"""A vLLM server on checkpoints of several files and of experts: at the start, and after each kind of update."""

from pathlib import Path

import pytest

import core
from core import TinySize
from rl.rollout.client import RolloutClient
from rl.rollout.messages import CoreFacts
from rl.rollout.server import rollout_pool
from rl.rollout.weights import FileSync

from .conftest import POOL, WORDS
from .test_vllm import move, parity

LAYOUTS = {
    "dense": TinySize(tie_embeddings=False),
    "mixture of experts": TinySize(experts=4, tie_embeddings=False, text_mlp=64),
}


def in_shards(model, processor, folder: Path) -> Path:
    """A checkpoint of several files with an index."""
    model.save_pretrained(folder, max_shard_size="600KB")
    processor.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_load_at_the_start_and_later_and_weights_arrive_from_memory(layout, tmp_path, records):
    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor
    from rl.trainer import ban_tokens

    whole = core.build_tiny(tmp_path / "whole", words=WORDS, seed=0, size=LAYOUTS[layout])
    processor = load_processor(whole)
    first = in_shards(load_model(whole, LearnerConfig()), processor, tmp_path / "first")
    facts = CoreFacts.of(first)

    def learner(folder):
        model = load_model(folder, LearnerConfig()).eval()
        ban_tokens(model, facts.banned_ids)
        return model, processor

    with rollout_pool(POOL, first, tmp_path / "log") as urls:
        client = RolloutClient(urls, facts)
        assert parity(client, learner(first), records) < 1e-5

        moved = load_model(first, LearnerConfig())
        move(moved, "")
        second = in_shards(moved, processor, tmp_path / "second")
        client.load_checkpoint(second)
        assert parity(client, learner(second), records) < 1e-5

        model, _ = learner(first)
        move(model, "model.language_model.layers")
        FileSync(client, tmp_path).push(model)
        assert parity(client, (model, processor), records) < 1e-5
        client.close()
