"""The shared-prefix learner against stock TRL on the same batch: log-probabilities, loss, statistics, gradients."""

from types import SimpleNamespace

import pytest

from core.model.videos import Caps, Clip
from core.training.model import load_processor
from rewards.mix import Graded
from rewards.verdict import Verdict
from rl.collect import Group, Sample
from rl.feed import RolloutFeed
from rl.rollout.messages import Completion
from rl.shared_prefix.tiles import TileStore

from ..core.films import film
from .conftest import WORDS, record
from .learners import Given, NoServers, Scripted, backward, learner, relative_difference, shared, stock

GROUPS = (Scripted(0, (1,), (5, 3, 7, 4)), Scripted(1, (2,), (6, 2, 5, 7)))
BATCHES = {
    "two groups": GROUPS,
    "unequal groups": (Scripted(0, (1,), (9,) * 5), Scripted(1, (2,), (3, 4)), Scripted(3, (2,), (8,))),
    "groups of one": tuple(Scripted(q, (s,), (4 + q,)) for q, s in ((0, 1), (1, 2), (2, 3), (3, 4))),
    "several images": (
        Scripted(0, (1, 2, 3), (4, 6)),
        Scripted(1, (4,), (5, 5)),
        Scripted(1, (5, 4), (6, 2)),
    ),
    "several tiles": (Scripted(0, (1, 2), (4, 6), wide=True), Scripted(1, (3,), (5, 5), wide=True)),
    "text among images": (Scripted(2, (), (5, 1)), Scripted(0, (1,), (2, 7)), Scripted(1, (), (3, 3))),
    "text only": (Scripted(2, (), (5, 1)), Scripted(0, (), (2, 7))),
    "same question, other image": (Scripted(0, (1,), (5, 6)), Scripted(0, (2,), (4, 3))),
    "truncated": (Scripted(0, (1,), (5, 3, 7, 4), cut=(1,)), Scripted(1, (2,), (6, 2), cut=(0, 1))),
    "nothing scored": (Scripted(0, (1,), (5, 3), cut=(0, 1)), Scripted(1, (2,), (6, 2), cut=(0, 1))),
}
ANY_RESOLUTION = {
    "one image": (Scripted(0, (1,), (5, 3, 7, 4), odd=True), Scripted(1, (2,), (6, 2, 5, 7), odd=True)),
    "several images": (
        Scripted(0, (1, 2, 3), (4, 6), odd=True),
        Scripted(1, (4,), (5, 5), odd=True),
        Scripted(1, (3, 4), (6, 2), odd=True),
    ),
    "text among images": (
        Scripted(2, (), (5, 1)),
        Scripted(0, (1, 4), (2, 7), odd=True),
        Scripted(1, (), (3, 3)),
    ),
    "truncated": (Scripted(0, (1,), (5, 3), odd=True, cut=(1,)), Scripted(1, (2,), (6, 2), cut=(0, 1))),
}
OBJECTIVES = {
    "dapo": {},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    "kl": {"beta": 0.1},
    "sequence correction": {"vllm_importance_sampling_mode": "sequence_mask"},
    "no correction": {"vllm_importance_sampling_correction": False},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "bnpo": {"loss_type": "bnpo"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 1.2, "beta": 0.05},
    "sapo": {"loss_type": "sapo"},
    "gdpo": {"multi_objective_aggregation": "normalize_then_sum"},
    "two-sided clip": {"delta": 1.4},
    "entropy bonus": {"entropy_coef": 0.01},
    "high entropy only": {"top_entropy_quantile": 0.3},
    "high entropy and bonus": {
        "loss_type": "bnpo",
        "top_entropy_quantile": 0.5,
        "entropy_coef": 0.01,
        "beta": 0.1,
    },
}


@pytest.fixture(scope="module")
def moe_core(tmp_path_factory):
    from core.model.tiny import TinySize, build_tiny

    folder = tmp_path_factory.mktemp("moe") / "tiny"
    return build_tiny(folder, words=WORDS, seed=0, size=TinySize(experts=4, text_layers=2))


@pytest.fixture(scope="module")
def any_core(tmp_path_factory):
    from core.model.tiny import TinySize, build_tiny

    folder = tmp_path_factory.mktemp("any") / "tiny"
    return build_tiny(folder, words=WORDS, seed=0, size=TinySize(any_resolution=True, text_layers=2))


def compare(core, groups, out, own=None, bound=1e-5, **config):
    """Both trainers on one batch. The old policy is put elsewhere, so that clipping takes part, unless one update
    follows.
    """
    import torch

    ours, mine = learner(shared, core, groups, out, own=own, **config)
    trl, theirs = learner(stock, core, groups, out, **config)
    mask = theirs["completion_mask"]
    for name in ("old_per_token_logps", "ref_per_token_logps", "importance_sampling_ratio", "advantages"):
        if name in theirs.keys() & mine.keys():
            assert torch.allclose(mine[name], theirs[name], atol=1e-5), name
    if ours.num_iterations > 1:
        shift = 0.3 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
        for inputs in (mine, theirs):
            for name in {"old_per_token_logps", "ref_per_token_logps"} & inputs.keys():
                inputs[name] = inputs[name] + shift
    (loss, gradients), (expected, their_gradients) = backward(ours, mine), backward(trl, theirs)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    if all(float(gradient.norm()) == 0 for gradient in their_gradients.values()):
        assert all(float(gradient.norm()) == 0 for gradient in gradients.values())
        assert gradients.keys() == their_gradients.keys()
    else:
        assert relative_difference(gradients, their_gradients) <= bound
    return ours, trl


@pytest.mark.parametrize("batch", BATCHES)
def test_a_batch_trains_as_in_stock_trl(tiny_core, tmp_path, batch):
    compare(tiny_core, BATCHES[batch], tmp_path)


def assert_same_statistics(ours, stock):
    assert ours._metrics["train"].keys() == stock._metrics["train"].keys()
    for name, values in stock._metrics["train"].items():
        assert ours._metrics["train"][name] == pytest.approx(values, abs=2e-5, nan_ok=True), name


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_is_stock_trls_with_its_statistics(tiny_core, tmp_path, objective):
    ours, trl = compare(tiny_core, GROUPS, tmp_path, **OBJECTIVES[objective])
    assert_same_statistics(ours, trl)
    assert ours._metrics["train"]["entropy"][0] > 1  # bans aside, a random core spreads over its 100 tokens


@pytest.mark.parametrize(
    ("batch", "mode"),
    [
        *(("two groups", mode) for mode in ("token_truncate", "token_mask", "sequence_truncate", "off")),
        ("truncated", "sequence_mask"),
        ("nothing scored", "token_truncate"),
    ],
)
def test_one_update_per_batch_needs_no_pass_for_the_old_policy(tiny_core, tmp_path, batch, mode):
    config = {
        "num_iterations": 1,
        "vllm_importance_sampling_correction": mode != "off",
        "vllm_importance_sampling_mode": "token_mask" if mode == "off" else mode,
        "vllm_importance_sampling_clip_min": 0.8,
        "vllm_importance_sampling_clip_max": 1.25,
    }
    ours, trl = compare(tiny_core, BATCHES[batch], tmp_path, **config)
    assert_same_statistics(ours, trl)


@pytest.fixture
def packs(monkeypatch):
    """The number of rows of every pack that a loss makes."""
    from rl.shared_prefix.passes import SharedPasses

    sizes, run = [], SharedPasses.over

    def noted(self, model, inputs, rows):
        sizes.append(len(rows))
        return run(self, model, inputs, rows)

    monkeypatch.setattr(SharedPasses, "over", noted)
    return sizes


@pytest.mark.parametrize("objective", ["dapo", "gspo"])
def test_one_update_in_packs_is_corrected_as_a_whole(tiny_core, tmp_path, packs, objective):
    config = OBJECTIVES[objective] | {"num_iterations": 1}
    ours, trl = compare(tiny_core, GROUPS, tmp_path, own={"token_budget": 60}, **config)
    assert len(packs) > 1
    assert_same_statistics(ours, trl)


def test_one_update_runs_the_core_once(tiny_core, tmp_path, monkeypatch):
    from transformers import Qwen3Model

    passes, forward = [], Qwen3Model.forward
    monkeypatch.setattr(Qwen3Model, "forward", lambda *args, **kw: passes.append(1) or forward(*args, **kw))
    for iterations, count in ((1, 1), (2, 2)):
        passes.clear()
        trainer, inputs = learner(shared, tiny_core, GROUPS, tmp_path, num_iterations=iterations)
        backward(trainer, inputs)
        assert len(passes) == count


@pytest.mark.parametrize("batch", ["two groups", "unequal groups", "text among images"])
def test_the_attention_of_other_devices_trains_as_in_stock_trl(tiny_core, tmp_path, monkeypatch, batch):
    from types import SimpleNamespace

    from rl.shared_prefix import attention as prefix

    calls = []
    other = SimpleNamespace(apply=lambda *inputs: calls.append(1) or prefix._concatenated(*inputs))
    monkeypatch.setattr(prefix, "_Merged", other)
    compare(tiny_core, BATCHES[batch], tmp_path, beta=0.1)
    assert calls


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tiny_core, tmp_path, reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    ours, _ = compare(tiny_core, GROUPS, tmp_path, **options)
    assert ours.model.is_gradient_checkpointing


def test_lora(tiny_core, tmp_path):
    from core.training.config import LearnerConfig, LoRAConfig
    from core.training.model import peft_config

    ours, _ = compare(
        tiny_core, GROUPS, tmp_path, lora=peft_config(LearnerConfig(lora=LoRAConfig(r=4))), beta=0.1
    )
    assert ours.ref_model is None  # the reference is the model without its adapters


def test_a_mixture_of_experts(moe_core, tmp_path):
    compare(moe_core, GROUPS, tmp_path, loss_type="grpo", importance_sampling_level="sequence")


@pytest.mark.parametrize("batch", ["two groups", "truncated"])
def test_the_load_balancing_loss_counts_prompts_as_often_as_trl(moe_core, tmp_path, batch):
    ours, trl = compare(moe_core, BATCHES[batch], tmp_path, router_aux_loss_coef=0.1)
    assert ours._metrics["train"]["aux_loss"] == pytest.approx(trl._metrics["train"]["aux_loss"], rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_packs_by_tokens_sum_up_to_the_whole_and_its_statistics(tiny_core, tmp_path, packs, objective):
    groups = (*GROUPS, Scripted(2, (), (5, 1)), Scripted(3, (3,), (4, 4)))
    own = {"token_budget": 60}
    ours, trl = compare(tiny_core, groups, tmp_path, own=own, **OBJECTIVES[objective])
    assert len(packs) > 1
    assert_same_statistics(ours, trl)


def test_a_frozen_tower_sees_each_image_once_for_all_passes(tiny_core, tmp_path, monkeypatch):
    from transformers.models.aimv2.modeling_aimv2 import Aimv2VisionModel

    seen = []
    forward = Aimv2VisionModel.forward
    monkeypatch.setattr(
        Aimv2VisionModel,
        "forward",
        lambda self, pixel_values, **kw: seen.append(len(pixel_values)) or forward(self, pixel_values, **kw),
    )
    groups = (*GROUPS, Scripted(3, (2, 1), (4, 4)))
    trainer, inputs = learner(shared, tiny_core, groups, tmp_path, beta=0.1, freeze=["model.vision_tower."])
    backward(trainer, inputs)
    # old, reference and policy; four pictures, as scripted groups do not hold the same objects
    assert seen == [4]


@pytest.mark.parametrize("batch", ["two groups", "text among images"])
def test_a_frozen_tower_trains_as_in_stock_trl(tiny_core, tmp_path, batch):
    compare(tiny_core, BATCHES[batch], tmp_path, beta=0.1, freeze=["model.vision_tower."])


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("batch", ANY_RESOLUTION)
def test_images_of_any_resolution_train_as_in_stock_trl(any_core, tmp_path, batch, frozen):
    compare(
        any_core, ANY_RESOLUTION[batch], tmp_path, beta=0.1, freeze=["model.vision_tower."] if frozen else []
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_packs_of_images_of_any_resolution_sum_up_to_the_whole(any_core, tmp_path, packs, frozen):
    groups = (*ANY_RESOLUTION["text among images"], *ANY_RESOLUTION["several images"])
    freeze = ["model.vision_tower."] if frozen else []
    compare(any_core, groups, tmp_path, own={"token_budget": 60}, freeze=freeze)
    assert len(packs) > 1


def test_a_probe_of_images_of_any_resolution_scores_as_in_stock_trl(any_core, tmp_path):
    """Pixels with gradients of their own: a batch that the trainer did not collect."""
    import torch

    from .learners import scripted_rows

    groups = ANY_RESOLUTION["several images"][:1]
    trainer, _ = learner(shared, any_core, groups, tmp_path)
    (row, *_) = scripted_rows(trainer.processing_class, groups)
    inputs = trainer.processing_class(images=[row["images"]], text=["<IMG_CONTEXT>" * 3], return_tensors="pt")
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    images = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")} | {"num_images": [3]}
    scores = []
    with torch.no_grad():
        for passes in (trainer.passes, None):
            trainer.passes = passes
            scores.append(
                trainer._get_per_token_logps_and_entropies(
                    trainer.model, ids, torch.ones_like(ids), len(row["completion_ids"]), **images
                )[0]
            )
    torch.testing.assert_close(*scores, atol=1e-5, rtol=1e-5)


def test_images_are_processed_once_per_group(tiny_core, tmp_path):
    trainer, inputs = learner(shared, tiny_core, BATCHES["several images"], tmp_path)
    assert len(trainer.passes.tiles._pixels) == 3 + 1 + 2
    # groups of two rows with 3, 1 and 2 images
    assert inputs["pixel_values"].flatten().tolist() == [0, 1, 2, 0, 1, 2, 3, 3, 4, 5, 4, 5]


def test_bfloat16_is_no_further_from_float32_than_stock_is(tiny_core, tmp_path):

    _, exact = backward(*learner(stock, tiny_core, GROUPS, tmp_path))
    _, ours = backward(*learner(shared, tiny_core, GROUPS, tmp_path, bf16=True))
    _, theirs = backward(*learner(stock, tiny_core, GROUPS, tmp_path, bf16=True))
    # 10%: both are rounding noise, which falls as it may
    assert relative_difference(ours, exact) <= 1.1 * relative_difference(theirs, exact)


def test_mini_batches_hold_whole_groups(tiny_core, tmp_path):
    groups = [Scripted(q, (q,), (4, 5)) for q in range(4)]
    trainer, batch = learner(
        shared,
        tiny_core,
        groups,
        tmp_path,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        steps_per_generation=2,
    )
    trainer._generate_and_score_completions = lambda rows: batch
    halves = []
    for step in range(2):
        trainer._step = step
        halves.append(trainer.passes.rows(trainer._prepare_inputs([])))
    assert [len({row.group for row in half}) for half in halves] == [2, 2]
    assert len({row.group for half in halves for row in half}) == 4


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_attention_functions_agree_with_a_mask(monkeypatch):
    import torch

    from rl.shared_prefix.attention import _concatenated, _Merged, shared_prefix_attention
    from rl.shared_prefix.layout import PrefixGroup, PrefixLayout

    layout = PrefixLayout((PrefixGroup(7, (5, 1, 0, 9)), PrefixGroup(3, (4,)), PrefixGroup(6, ())))
    allowed = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    for start, end in layout.segments():
        allowed[start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
    for start, middle, end in layout.shared():
        allowed[middle:end, start:middle] = True

    def masked(query, key, value):
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, scale=0.3
        )
        return out.transpose(1, 2)

    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, 2, layout.tokens, 16, generator=generator) for _ in range(3)]
    weights = torch.randn(1, layout.tokens, 2, 16, generator=generator)

    def results(function):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        (out * weights).sum().backward()
        return [out.detach(), *(leaf.grad for leaf in leaves)]

    expected = results(masked)
    for function in (
        lambda q, k, v: _Merged.apply(q, k, v, layout, 0.3),
        lambda q, k, v: _concatenated(q, k, v, layout, 0.3),
    ):
        for ours, theirs in zip(results(function), expected, strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)

    places = torch.arange(layout.tokens)
    seen = layout.sees("cpu")(0, 0, places[:, None], places[None])
    assert torch.equal(seen, allowed)
    monkeypatch.setattr(
        "rl.shared_prefix.attention._compiled", lambda function: function
    )  # a minute of compiling
    with torch.no_grad():  # it has no backward pass on a CPU
        flexed, _ = shared_prefix_attention(
            torch.nn.Module(), *inputs, None, scaling=0.3, prefix=layout, flex=True
        )
    assert torch.allclose(flexed, expected[0], atol=1e-5)


def test_a_clip_of_a_group_is_decoded_and_processed_once(tiny_core, monkeypatch):
    clip, decoded = Clip(film(60), Caps(frames=16)), []
    stock_decode = Clip.decode
    monkeypatch.setattr(Clip, "decode", lambda self: decoded.append(self) or stock_decode(self))
    row, verdict = {**record(1, image=False), "videos": [clip]}, Verdict(1.0, "correct")
    sample = Sample(Completion([5], [-1.0], "", True), Graded(1.0, {"answer": verdict}), 0.0, verdict)
    sync, processor = NoServers(), load_processor(tiny_core)
    sync.push(None, 0)
    feed = RolloutFeed(Given([Group(row, [7], [sample] * 8)]), sync, None, [row], [])
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(num_processes=1, process_index=0),
        state=SimpleNamespace(global_step=0),
        processing_class=processor,
    )
    images = [one["images"] for one in feed.rows(trainer, 8)]
    processor.image_processor = store = TileStore(processor.image_processor)
    processor(images=images, text=["<IMG_CONTEXT>" * 16] * 8, return_tensors="pt", padding=True)
    assert len(decoded) == 1
    assert len(store._pixels) == 16
