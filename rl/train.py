"""Trains one RL stage. Read it from top to bottom.

Differs from stock TRL:

- Completions come from a pool of rollout servers behind one client, not from TRL's vLLM client. They are graded, and
  groups without spread are replaced, before TRL sees them (rl.collect, rl.feed).
- After every weight update, servers and learner must give probe completions the same probabilities (rl.rollout.parity).
- Prompts and images are computed once per group; loss and gradients are TRL's to 1e-5 (rl.shared_prefix).
- If one update follows each batch, the importance-sampling correction needs no extra pass (rl.correction).
- Updates whose loss or gradients are not finite are skipped, and end the stage (core.training.finite).

Differs from the report (arXiv:2509.14033, sections 4.2 and 4.4), which leaves open how its clip value moves within
0.20 to 0.28: by default those are DAPO's fixed lower and upper clip; `algorithm.clip_schedule` moves the upper one.
The report does not describe importance-sampling correction, rollout engine, dynamic sampling or overlong punishment.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from core.checkpoint.save import save_checkpoint
from core.checkpoint.shards import weights_hash
from core.training.finite import watch_finite
from core.training.model import apply_freeze, load_model, load_processor, peft_config
from core.training.ranks import join_process_group
from core.training.resume import FOLDER, Unfinished, forget, identity, marker
from corpus.records import DataSource, Records
from rewards.answer import AnswerReward
from rewards.isolation import load_limited
from rewards.selftest import thought_problem
from rewards.style.length import SoftOverlong
from rl import limits
from rl.algorithm import move_clip, reward_columns, trl_config
from rl.check import check_rewards
from rl.collect import Collector, Pipeline
from rl.config import RLConfig
from rl.data import Record, load_rows, prompt_messages
from rl.distill import TeacherClient
from rl.evaluate import accuracy
from rl.feed import Follower, Lead, RolloutFeed
from rl.job import ServedJob
from rl.record import RunLog
from rl.reward import mixture_of
from rl.rollout.client import RolloutClient
from rl.rollout.messages import CoreFacts, Prompt
from rl.rollout.parity import ParityGuard
from rl.rollout.weights import FileSync, NcclSync, WeightSync
from rl.watch import Watcher

log = logging.getLogger(__name__)


def train(cfg: RLConfig, job: ServedJob) -> Path:
    """Run one RL stage; return the checkpoint folder that the next stage starts from.

    `job.out` takes checkpoint/, metrics.jsonl, completions.jsonl, record.jsonl and alarms.jsonl. With `save_every`, an
    interrupted call continues there if the configuration, the policy's weights, the seed and the rows' ids are the
    same. `job.seed` is the seed of prompts, completions and updates.
    """
    from transformers import set_seed

    join_process_group(cfg.learner)
    records = load_rows(cfg.data, job.sets, job.seed, _askable(cfg, job))
    unfinished = _unfinished(cfg, job, records)
    # Before the model: ZeRO-3 splits weights as they load.
    arguments = trl_config(cfg, unfinished.folder, job.seed)
    set_seed(job.seed)
    policy, processor = load_model(job.start, cfg.learner), load_processor(job.start)
    apply_freeze(policy, cfg.learner.freeze)
    record = RunLog(cfg, job.out)
    leads = os.environ.get("RANK", "0") == "0"
    rank = _lead(cfg, job, records, unfinished, record) if leads else Follower()
    try:
        trainer = _trainer(cfg, job, rank, record, records, arguments, policy, processor)
        unfinished.train(trainer)
        path = save_checkpoint(trainer, processor, job.out / "checkpoint")
        if leads:
            forget(job.out)
        return path
    finally:
        rank.close()


def _askable(cfg: RLConfig, job: ServedJob) -> Callable[[DataSource, Records], Records]:
    """A filter that drops rows beyond the servers' limits."""

    def askable(source: DataSource, rows: Records) -> Records:
        return limits.askable(rows, source, job.pool, job.start, cfg.rollout.max_completion_tokens)

    return askable


def _unfinished(cfg: RLConfig, job: ServedJob, records: Sequence[Record]) -> Unfinished:
    """The checkpoints of this very stage."""
    if not cfg.save_every:
        return Unfinished(job.out / "trainer", "batches")
    same = identity(
        config=cfg.model_dump(mode="json"),
        weights=weights_hash(job.start),
        seed=job.seed,
        rows=[record["id"] for record in records],
    )
    return Unfinished(job.out / FOLDER / same, "batches")


def _trainer(
    cfg: RLConfig,
    job: ServedJob,
    rank: Lead | Follower,
    record: RunLog,
    records: Sequence[Record],
    arguments: Any,
    policy: Any,
    processor: Any,
) -> Any:
    """The trainer of this rank."""
    from datasets import Dataset

    from rl.shared_prefix.passes import SharedPasses
    from rl.trainer import RolloutTrainer, reward_function

    # Probes with images come first, because they test more parts of the model.
    probes = sorted(records, key=lambda row: not (row["images"] or row.get("videos")))[: cfg.parity.sequences]
    prompts = [Prompt(prompt_messages(row), seed=number) for number, row in enumerate(probes)]
    learner = cfg.learner
    trainer = RolloutTrainer(
        feed=RolloutFeed(
            rank,
            _sync(job, rank, policy),
            ParityGuard(cfg.parity, prompts, cfg.rollout.temperature),
            records,
            probes,
            share_gpus=job.pool.share_gpus,
        ),
        passes=partial(
            SharedPasses,
            token_budget=learner.token_budget,
            budget_rows=cfg.optim.micro_batch_size,
            flex=learner.prefix == "shared_flex",
        )
        if learner.shares_prefix
        else None,
        banned_ids=CoreFacts.of(job.start).banned_ids,
        model=policy,
        processing_class=processor,
        # TRL draws rows from this data set; the feed replaces them by collected ones.
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": ""}]] * cfg.completions_per_batch}
        ),
        reward_funcs=[reward_function(name) for name in reward_columns(cfg)],
        args=arguments,
        peft_config=peft_config(learner),
        callbacks=[record.callback(), marker(lambda: {"batches": record.batches}, rank.write)],
    )
    move_clip(trainer, cfg.algorithm)
    watch_finite(trainer)
    return trainer


def _lead(
    cfg: RLConfig, job: ServedJob, records: Sequence[Record], unfinished: Unfinished, record: RunLog
) -> Lead:
    """Rank 0's part, restored from the last checkpoint if there is one."""
    if cfg.save_every:
        record.drop_after(**unfinished.done)
    mixture = mixture_of(cfg.rewards, job.folders)
    check_rewards(mixture, records, cfg.self_test_rows, job.seed, CoreFacts.of(job.start).thought_open)
    overlong = None
    if cfg.overlong:
        overlong = SoftOverlong(cfg.rollout.max_completion_tokens, cfg.overlong.cache_tokens)
    client = RolloutClient.of_pool(job.pool, job.urls, job.start, record.alarm_of_servers, job.addresses)
    answer = AnswerReward(thought_open=client.core.thought_open)
    teacher = None
    if cfg.algorithm.teacher:
        (image_token,) = client.core.banned_ids
        teacher = TeacherClient(cfg.algorithm.teacher, image_token)
    collector = Collector(cfg, client, records, mixture, answer, overlong, job.seed, teacher)
    left = cfg.batches - unfinished.done["batches"]
    lead = Lead(
        client,
        Pipeline(collector, left, cfg.rollout.overlap),
        _watcher(cfg, job, client),
        record,
        records,
        share_gpus=job.pool.share_gpus,
        look=_look(job, client),
    )
    if unfinished.checkpoint:
        lead.state.read(unfinished.checkpoint)
    return lead


def _look(job: ServedJob, client: RolloutClient) -> Callable[[int], Mapping[str, float]]:
    """A function from the number of a batch to the metrics of `job.look` at it, {} between two looks."""
    look = job.look
    if look is None:
        return lambda batch: {}
    module, _, name = look.call.partition(":")
    function = getattr(importlib.import_module(module), name)
    return lambda batch: (
        {} if batch % look.batches else function(client, job.out / "looks" / str(batch), look.params)
    )


def _watcher(cfg: RLConfig, job: ServedJob, client: RolloutClient) -> Watcher:
    watch = cfg.watch
    second = (
        load_limited(watch.second_verifier, watch.second_params, job.folders)
        if watch.second_verifier
        else None
    )
    if second and (problem := thought_problem(second, client.core.thought_open)):
        raise ValueError(f"watch.second_verifier: {problem}")
    rows = load_rows([watch.held_out], job.sets, job.seed, _askable(cfg, job)) if watch.held_out else []
    longest = cfg.rollout.max_completion_tokens
    return Watcher(watch, job.out, second, rows, lambda records: accuracy(records, client, longest))


def _sync(job: ServedJob, rank: Lead | Follower, policy: Any) -> WeightSync:
    if job.pool.sends_files:
        return FileSync(rank.client, job.weights)
    return NcclSync(rank.client, len(job.urls), policy.device)
