"""The objective, against plain torch: advantages, DAPO's and GSPO's losses and gradients, masks, KL, correction.

No engine here: groups are scripted, and the policy's own log-probabilities play the sampler's.
"""

import pytest

from core.strict import parse
from rewards.mix import Graded
from rewards.verdict import Verdict
from rl.collect import Group, Sample
from rl.config import RLConfig
from rl.rollout.messages import Completion

from .conftest import TEMPERATURE, plain_logprobs, prompt_inputs, record
from .learners import Given, NoServers

REWARDS = [[1.0, 0.0, 0.5, None], [0.0, 0.25, 1.0, 1.0]]
LENGTHS = [[5, 3, 7, 4], [6, 2, 5, 7]]
CUT = (1, 2)
"""Group and sample of a completion without an end: truncated."""


def config(passes=1, rollout=None, **algorithm) -> RLConfig:
    stage = {
        "data": [{"set": "rl"}],
        "rewards": [{"name": "answer", "use": "answer", "weight": 1.0}],
        "algorithm": {"clip_low": 0.2, "clip_high": 0.28, **algorithm},
        "rollout": {
            "prompts_per_batch": 2,
            "group_size": 4,
            "max_completion_tokens": 8,
            "temperature": TEMPERATURE,
            **(rollout or {}),
        },
        "batches": 1,
        "mini_batch": 8,
        "passes": passes,
        "optim": {"learning_rate": 1e-4, "micro_batch_size": 8, "schedule": "constant"},
        "learner": {"deepspeed": None},
        "parity": {"bound": 1e-3},
    }
    return parse(RLConfig, stage, "test")


@pytest.fixture
def setup(tiny_core, tmp_path):
    """`setup(cfg, sampler_shift)` gives a trainer at its first batch, its inputs, and the batch's groups."""
    from datasets import Dataset

    from core.training.config import LearnerConfig
    from core.training.model import load_model, load_processor
    from rl.algorithm import trl_config
    from rl.feed import RolloutFeed
    from rl.rollout.messages import CoreFacts
    from rl.shared_prefix.passes import SharedPasses
    from rl.trainer import RolloutTrainer, ban_tokens, reward_function

    def build(cfg, sampler_shift=0.0):
        model, processor = load_model(tiny_core, LearnerConfig()), load_processor(tiny_core)
        ban_tokens(model, CoreFacts.of(tiny_core).banned_ids)
        rows = [record(1), record(2, image=False)]
        groups = scripted(model, processor, rows, sampler_shift)

        trainer = RolloutTrainer(
            feed=RolloutFeed(Given(groups), NoServers(), NoServers(), rows, []),
            passes=SharedPasses,
            banned_ids=CoreFacts.of(tiny_core).banned_ids,
            model=model,
            processing_class=processor,
            train_dataset=Dataset.from_dict({"prompt": [[{"role": "user", "content": ""}]] * 8}),
            reward_funcs=[reward_function("answer")],
            args=trl_config(cfg, tmp_path, seed=0),
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = trainer._generate_and_score_completions([{}] * 8)
        return trainer, inputs, groups

    return build


def scripted(model, processor, rows, shift):
    """Groups of random tokens with the policy's log-probabilities as the sampler's, `shift` added."""
    import torch

    generator = torch.Generator().manual_seed(0)
    end = processor.tokenizer.eos_token_id
    groups = []
    for g, row in enumerate(rows):
        prompt = prompt_inputs(processor, row)["input_ids"][0].tolist()
        samples = []
        for s, length in enumerate(LENGTHS[g]):
            ids = torch.randint(15, 40, (length,), generator=generator).tolist()
            finished = (g, s) != CUT
            ids[-1] = end if finished else ids[-1]
            logps = [value + shift for value in plain_logprobs(model, processor, row, prompt, ids).tolist()]
            reward = REWARDS[g][s]
            verdict = Verdict.unscored("down") if reward is None else Verdict(reward, "correct")
            graded = Graded(total=reward, verdicts={"answer": verdict})
            samples.append(Sample(Completion(ids, logps, "", finished), graded, 0.0, verdict))
        groups.append(Group(row, prompt, samples))
    return groups


def advantages(scale=True):
    """By hand: mean and standard deviation over the group's scored rewards; 0 where there is no reward."""
    import torch

    out = []
    for group in REWARDS:
        scored = torch.tensor([r for r in group if r is not None])
        spread = scored.std() + 1e-4 if scale else 1.0
        out += [0.0 if r is None else float((r - scored.mean()) / spread) for r in group]
    return out


def reference_loss(trainer, groups, cfg, old_shift=0.0, sampler_shift=0.0):
    """The loss written out, sample by sample. `old_shift` is added to the old log-probabilities."""
    import torch

    algorithm, model = cfg.algorithm, trainer.model
    per_sample, tokens = [], 0
    flat = [(g, s, sample) for g, group in enumerate(groups) for s, sample in enumerate(group.samples)]
    for (g, s, sample), advantage in zip(flat, advantages(algorithm.divides_by_std), strict=True):
        group, ids = groups[g], sample.completion.token_ids
        logps = plain_logprobs(model, trainer.processing_class, group.row, group.prompt_ids, ids, grad=True)
        if algorithm.mask_truncated and (g, s) == CUT:
            per_sample.append(logps.sum() * 0)
            continue
        tokens += len(ids)
        log_ratio = logps - (logps.detach() + old_shift)
        if algorithm.name == "gspo":  # arXiv:2507.18071, Eq. 5: length-normalized sequence ratio
            log_ratio = log_ratio.mean().expand(len(ids))
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
        weight = torch.exp(torch.tensor(-sampler_shift)).clamp(max=algorithm.importance_sampling.cap)
        per_sample.append((loss * weight).sum() if algorithm.name == "dapo" else (loss * weight).mean())
    if algorithm.name == "dapo":  # arXiv:2503.14476, Eq. 8: mean over the batch's tokens
        return torch.stack(per_sample).sum() / tokens
    return torch.stack(per_sample).mean()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare(trainer, inputs, groups, cfg, **shifts):
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    ours = gradients(trainer.model)
    trainer.model.zero_grad()
    expected = reference_loss(trainer, groups, cfg, **shifts)
    expected.backward()
    theirs = gradients(trainer.model)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert ours.keys() == theirs.keys()
    for name in ours:
        scale = theirs[name].norm() + 1e-6
        assert (ours[name] - theirs[name]).norm() / scale < 1e-3, name


def test_advantages_are_group_relative_and_zero_without_a_reward(setup):
    _, inputs, _ = setup(config())
    assert inputs["advantages"].tolist() == pytest.approx(advantages(), abs=1e-5)


def test_advantages_without_scaling(setup):
    _, inputs, _ = setup(config(scale_by_std=False))
    assert inputs["advantages"].tolist() == pytest.approx(advantages(scale=False), abs=1e-6)


def test_truncated_completions_are_masked(setup):
    _, inputs, groups = setup(config())
    lengths = [[len(s.completion.token_ids) for s in group.samples] for group in groups]
    lengths[CUT[0]][CUT[1]] = 0
    assert inputs["completion_mask"].sum(1).tolist() == [*lengths[0], *lengths[1]]


@pytest.mark.parametrize("name", ["dapo", "gspo"])
@pytest.mark.parametrize("shift", [0.0, 0.15, -0.4])
def test_loss_and_gradients_equal_the_formula(setup, name, shift):
    """shift moves the old policy: 0 is on-policy, 0.15 inside the clip range, -0.4 clips the positive side."""
    cfg = config(passes=2, name=name)
    trainer, inputs, groups = setup(cfg)
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + shift
    compare(trainer, inputs, groups, cfg, old_shift=shift)


def test_the_importance_correction_weighs_by_learner_over_sampler_up_to_the_cap(setup):
    # the sampler gave every token exp(1) less: the weight would be e = 2.718 and is cut at 2
    cfg = config()
    trainer, inputs, groups = setup(cfg, sampler_shift=-1.0)
    compare(trainer, inputs, groups, cfg, sampler_shift=-1.0)


def test_the_kl_term_is_zero_at_the_reference_and_grows_away_from_it(setup):
    import torch

    cfg = config(kl_beta=0.1)
    trainer, inputs, groups = setup(cfg)
    at_start = trainer._compute_loss(trainer.model, inputs).item()
    assert at_start == pytest.approx(reference_loss(trainer, groups, cfg).item(), abs=1e-5)
    inputs["ref_per_token_logps"] = inputs["ref_per_token_logps"] - 0.3
    moved = trainer._compute_loss(trainer.model, inputs).item()
    # Schulman's k3 per token: exp(-0.3) + 0.3 - 1 = 0.0408, times beta 0.1, mean over tokens
    expected = 0.1 * (torch.exp(torch.tensor(-0.3)).item() + 0.3 - 1)
    assert moved - at_start == pytest.approx(expected, rel=1e-3)
