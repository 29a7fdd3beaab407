"""What a GPU would refuse or wait for, found on the meta device: the passes of both trainers on a tiny core.

On `meta` a tensor on the CPU cannot meet one of the device, and values cannot be read. The test answers reads by 1 and
notes who asked. The passes of a micro-batch are the inner loop: a read there makes the host wait for the GPU.
"""

import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.fake import _lower_right
from rl.shared_prefix import attention

from .rl.learners import Scripted, learner, shared

ROOT = Path(__file__).parents[1]
OURS = tuple(str(ROOT / name) for name in ("core", "rl", "sft"))
TOKENS = 24


class Waits(TorchDispatchMode):
    """Notes reads by the host, tensors made on the CPU, and float64, with the innermost frame of ours or of TRL's."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.made: Counter[str] = Counter()
        self.wide: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            self.reads[asker()] += 1
            return 1.0 if args[0].is_floating_point() else True if args[0].dtype == torch.bool else 1
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                if tensor.device.type == "cpu" and tensor.numel() > 1:
                    self.made[asker()] += 1
                if tensor.dtype == torch.float64:
                    self.wide[asker()] += 1
        return made


def asker() -> str:
    """The innermost frame outside torch: file and function."""
    for frame in reversed(traceback.extract_stack()[:-2]):
        if "/torch/" in frame.filename or "import_utils" in frame.filename:
            continue
        path = Path(frame.filename)
        return f"{path.relative_to(ROOT) if frame.filename.startswith(OURS) else path.name}:{frame.name}"
    raise AssertionError("no frame outside torch")


def meta(value):
    """Tensors on the meta device; everything else unchanged."""
    if isinstance(value, dict):
        return {name: meta(one) for name, one in value.items()}
    return value.to("meta") if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    from core.model.tiny import TinySize, build_tiny

    words = ("compute", "plus", "largest", "smallest", "minus", "digit", "in", "cell", "yes", *"ABCD")
    return build_tiny(tmp_path_factory.mktemp("core"), words=words, seed=0, size=TinySize())


def rl_waits(core, tmp_path) -> Waits:
    """A micro-batch of two groups in one pack: forward, TRL's loss, backward."""
    groups = [Scripted(0, (1, 2), (5, 7, 3)), Scripted(1, (3,), (4, 6, 2))]
    trainer, batch = learner(shared, core, groups, tmp_path)
    passes = trainer.passes
    rows = passes.rows(batch)
    passes.tiles._pixels = [tile.to("meta") for tile in passes.tiles._pixels]
    passes.rows = lambda inputs: rows  # token ids are read once per update, before the passes
    trainer.model.to("meta")
    waits = Waits()
    with waits:
        loss = trainer._compute_loss(trainer.model, meta(batch))
        loss.backward()
    assert all(one.grad is not None for one in trainer.model.parameters() if one.requires_grad)
    return waits


def sft_waits(core, layers=None) -> Waits:
    """A pack of two rows: forward, the output layer, backward."""
    from trl.trainer.utils import add_fused_lm_head

    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor
    from sft.packed_rows import attend_within_samples, pack_rows

    model, processor = load_model(core, LearnerConfig()), load_processor(core)
    add_fused_lm_head(model, outputs=("log_probs", "entropy"))
    attend_within_samples(model)
    if layers:
        del model.model.language_model.layers[layers:]
    per_tile, side = model.config.image_seq_length, model.config.vision_config.image_size
    rows = []
    for tiles in (1, 2):
        ids = torch.tensor([20] + [processor.image_token_id] * per_tile * tiles + [21] * TOKENS)
        rows.append(
            {"input_ids": ids, "labels": ids.clone(), "pixel_values": torch.zeros(tiles, 3, side, side)}
        )
    batch = pack_rows(rows, 0)
    model.to("meta").train()
    waits = Waits()
    with waits:
        model(**meta(batch), fused_lm_head=True, use_cache=False).loss.backward()
    return waits


@pytest.fixture(autouse=True)
def what_meta_lacks(monkeypatch):
    """Autocast, and torch's causal bias under a dispatch mode; benchmarks.fake computes what the bias stands for."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(attention, "causal_lower_right", lambda queries, keys: "causal")
    monkeypatch.setattr(attention, "scaled_dot_product_attention", _lower_right)


def ours(found: Counter[str]) -> set[str]:
    return {place for place in found if place.split("/")[0] in ("core", "rl", "sft")}


def test_an_rl_pass_reads_nothing_and_makes_nothing_on_the_cpu(core, tmp_path):
    waits = rl_waits(core, tmp_path)
    # TRL's statistics and transformers' count of image tokens, once per micro-batch; nothing of ours.
    assert set(waits.reads) == {
        *("grpo_trainer.py:global_masked_mean", "grpo_trainer.py:_compute_loss", "utils.py:nanmin"),
        *("utils.py:nanmax", "modeling_internvl.py:get_placeholder_mask"),
    }
    assert ours(waits.made) == set()
    assert waits.wide == {}


def test_an_sft_pass_reads_nothing_in_its_layers(core):
    waits, shallow = sft_waits(core), sft_waits(core, layers=1)
    assert waits.reads == shallow.reads == {"modeling_internvl.py:get_placeholder_mask": 1}
    assert ours(waits.made) == set()
    assert waits.wide == {}
