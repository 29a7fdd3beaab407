"""One RL stage, from a policy to a better one. Reads top to bottom."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from core.checkpoint.save import save_checkpoint
from core.checkpoint.shards import weights_hash
from core.files import append_jsonl
from core.training.model import apply_freeze, load_model, load_processor, peft_config
from core.training.ranks import join_process_group, training_arguments
from core.training.resume import FOLDER, Unfinished, drop_lines_after, identity, marker
from corpus.records import DataSource, Records
from rewards.adapters import check_columns
from rewards.answer import AnswerReward
from rewards.isolation import load_limited
from rewards.judge.judges import Judge, statistics
from rewards.mix import Mixture
from rewards.selftest import self_test
from rewards.style.length import SoftOverlong
from rl import limits
from rl.collect import Collector, Group, Pipeline, Sample
from rl.config import RLConfig
from rl.data import Record, example_of, load_rows, prompt_messages
from rl.evaluate import accuracy
from rl.job import ServedJob
from rl.resume import StageState
from rl.reward import mixture_of
from rl.rollout.client import RolloutClient
from rl.rollout.config import PoolConfig
from rl.rollout.messages import CoreFacts, Prompt
from rl.rollout.parity import ParityGuard
from rl.rollout.weights import FileSync, NcclSync, WeightSync
from rl.watch import ALARMS, Watcher

log = logging.getLogger(__name__)


def train(cfg: RLConfig, job: ServedJob) -> Path:
    """Run one RL stage; return the checkpoint folder that the next stage starts from.

    `job.out` takes checkpoint/, metrics.jsonl, completions.jsonl, record.jsonl and alarms.jsonl. With `save_every`, an
    interrupted call continues there if the configuration, the policy's weights, the seed and the rows' ids are the
    same. `job.seed` is the seed of prompts, completions and updates.
    """
    from datasets import Dataset
    from transformers import set_seed

    from rl.trainer import RolloutTrainer, reward_function

    model, out, seed, sets = job.start, job.out, job.seed, job.sets
    pool, urls, folders = job.pool, job.urls, job.folders
    join_process_group(cfg.learner)

    def askable(source: DataSource, rows: Records) -> Records:
        return limits.askable(rows, source, pool, model, cfg.rollout.max_completion_tokens)

    records = load_rows(cfg.data, sets, seed, askable)
    unfinished = _unfinished(cfg, model, out, seed, records)
    # Before the model: ZeRO-3 splits weights as they load.
    arguments = trl_config(cfg, unfinished.folder, seed)
    set_seed(seed)
    probes = _probes(records, cfg.parity.sequences)
    guard = ParityGuard(
        cfg.parity,
        [Prompt(prompt_messages(row), seed=i) for i, row in enumerate(probes)],
        cfg.rollout.temperature,
    )
    policy, processor = load_model(model, cfg.learner), load_processor(model)
    apply_freeze(policy, cfg.learner.freeze)
    record, lead = RunLog(cfg, out), None
    if os.environ.get("RANK", "0") == "0":
        if cfg.save_every:
            record.drop_after(**unfinished.done)
        client = RolloutClient.of_pool(pool, urls, model, record.alarm_of_servers)
        watcher = _watcher(cfg, client, out, sets, folders, seed, askable)
        left = cfg.batches - unfinished.done["batches"]
        lead = Lead(client, _rollouts(cfg, client, records, folders, seed, left), watcher, record, records)
        if unfinished.checkpoint:
            lead.state.read(unfinished.checkpoint)
    trainer = RolloutTrainer(
        rollouts=lead.rollouts if lead else None,
        sync=_sync(pool, lead.client if lead else None, len(urls), policy, job.weights),
        guard=guard,
        records=records,
        probes=probes,
        banned_ids=CoreFacts.of(model).banned_ids,
        share_gpus=pool.share_gpus,
        on_batch=lead.on_batch if lead else None,
        model=policy,
        processing_class=processor,
        # TRL draws from this; RolloutTrainer puts collected prompts in its place.
        train_dataset=Dataset.from_dict(
            {"prompt": [[{"role": "user", "content": ""}]] * cfg.completions_per_batch}
        ),
        reward_funcs=[reward_function(name) for name in _columns(cfg)],
        args=arguments,
        prefix=cfg.learner.prefix,
        token_budget=cfg.learner.token_budget,
        budget_rows=cfg.optim.micro_batch_size,
        peft_config=peft_config(cfg.learner),
        callbacks=[
            record.callback(),
            marker(lambda: {"batches": record.batches}, lead.state.write if lead else None),
        ],
    )
    try:
        unfinished.train(trainer)
        return save_checkpoint(trainer, processor, out / "checkpoint")
    finally:
        if lead:
            lead.client.close()


def _unfinished(cfg: RLConfig, model: Path, out: Path, seed: int, records: Sequence[Record]) -> Unfinished:
    """The checkpoints of this very stage."""
    if not cfg.save_every:
        return Unfinished(out / "trainer", "batches")
    rows = [record["id"] for record in records]
    same = identity(config=cfg.model_dump(mode="json"), weights=weights_hash(model), seed=seed, rows=rows)
    return Unfinished(out / FOLDER / same, "batches")


class Lead:
    """What rank 0 has beside its trainer: servers, batches, watcher, files; and their state, for a checkpoint."""

    def __init__(
        self,
        client: RolloutClient,
        rollouts: Pipeline,
        watcher: Watcher,
        record: RunLog,
        records: Sequence[Record],
    ) -> None:
        self.client, self.rollouts, self.watcher, self.record = client, rollouts, watcher, record
        self.state = StageState(
            {"collector": rollouts.collector, "watcher": watcher, "record": record}, records
        )

    def on_batch(
        self, batch: Sequence[Group], sampled: Sequence[Group], metrics: Mapping[str, float]
    ) -> None:
        """Look at a batch and write it down. Raises rl.watch.RewardAlarm."""
        seen, alarms = self.watcher.batch(sampled)
        figures = {**metrics, **seen, **{f"judge/{name}": count for name, count in statistics().items()}}
        figures |= self.client.fleet.figures()
        self.record.batch(batch, sampled, figures, with_completions=bool(alarms))
        self.watcher.stop_for(alarms)
        every = self.record.cfg.save_every
        # The trainer saves after the last batch too. Noted now: with overlap the next batch is under way then.
        if every and (self.record.batches % every == 0 or not self.rollouts.left):
            self.state.note()


def trl_config(cfg: RLConfig, folder: Path, seed: int) -> Any:
    """The stage as TRL's GRPOConfig; `folder` takes its checkpoints."""
    from trl import GRPOConfig

    algorithm, rollout, correction = cfg.algorithm, cfg.rollout, cfg.algorithm.importance_sampling
    shared = cfg.learner.shares_prefix  # an update's rows come at once and are cut by tokens
    per_pass = cfg.mini_batch if shared else cfg.optim.micro_batch_size * cfg.learner.processes
    arguments = training_arguments(cfg.optim, cfg.learner, seed=seed)
    if cfg.save_every:  # between two batches
        arguments |= {"save_strategy": "steps", "save_steps": cfg.save_every * cfg.updates_per_batch}
    return GRPOConfig(
        **arguments | {"per_device_train_batch_size": per_pass // cfg.learner.processes},
        output_dir=str(folder),
        max_steps=cfg.max_steps,
        num_generations=rollout.group_size,
        gradient_accumulation_steps=cfg.mini_batch // per_pass,
        steps_per_generation=cfg.completions_per_batch // per_pass,
        num_iterations=cfg.passes,
        max_completion_length=rollout.max_completion_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        # DAPO: mean over the batch's tokens; GSPO: one ratio per sequence, mean over sequences (arXiv:2507.18071).
        loss_type="dapo" if algorithm.name == "dapo" else "grpo",
        importance_sampling_level="token" if algorithm.name == "dapo" else "sequence",
        epsilon=algorithm.clip_low,
        epsilon_high=algorithm.clip_high,
        beta=algorithm.kl_beta,
        scale_rewards="group" if algorithm.scale_by_std else "none",
        mask_truncated_completions=algorithm.mask_truncated,
        vllm_importance_sampling_correction=correction.mode != "off",
        vllm_importance_sampling_mode="token_truncate" if correction.mode == "off" else correction.mode,
        vllm_importance_sampling_clip_max=correction.cap,
        reward_weights=list(_columns(cfg).values()),
        logging_steps=1,
        remove_unused_columns=False,
    )


class RunLog:
    """The stage's files, written by rank 0.

    metrics.jsonl: one line per optimizer update, `elapsed` in seconds since the start; completions.jsonl: graded
    completions with every verdict;
    record.jsonl: one line per sampled group with how many of its completions were correct (mixed RL's hard cases).
    """

    def __init__(self, cfg: RLConfig, out: Path) -> None:
        self.cfg, self.out = cfg, out
        self.batches = 0
        self.started = time.monotonic()
        self.pending: dict[str, float] = {}
        out.mkdir(parents=True, exist_ok=True)

    def batch(
        self,
        batch: Sequence[Group],
        sampled: Sequence[Group],
        metrics: Mapping[str, float],
        with_completions: bool = False,
    ) -> None:
        """Record one rollout batch; its completions when it is their turn, or on request."""
        self.pending |= metrics
        kept = {id(group) for group in batch}
        for group in sampled:
            scores = [sample.correct.score for sample in group.samples if sample.correct.score is not None]
            line = {
                "batch": self.batches,
                "id": group.row["id"],
                "correct": sum(scores),
                "of": len(scores),
                "kind": group.kind,
                "trained": id(group) in kept,
            }
            append_jsonl(self.out / "record.jsonl", line)
        if with_completions or self.batches % self.cfg.log_completions_every == 0:
            for group in batch:
                for sample in group.samples:
                    append_jsonl(self.out / "completions.jsonl", self._completion(group, sample))
        self.batches += 1

    def state(self) -> dict[str, Any]:
        """How far it is, for `restore`."""
        return {"batches": self.batches, "seconds": time.monotonic() - self.started}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where another record of the same stage was."""
        self.batches, self.started = state["batches"], time.monotonic() - state["seconds"]

    def drop_after(self, updates: int, batches: int) -> None:
        """Forget what was written after so many updates and batches: they are made again."""
        drop_lines_after(self.out / "metrics.jsonl", "step", updates)
        for name in ("record.jsonl", "completions.jsonl", ALARMS):
            drop_lines_after(self.out / name, "batch", batches - 1)

    def alarm_of_servers(self, text: str) -> None:
        """Tell of a rollout server that was lost or came back, where alarms are told."""
        log.warning("%s", text)
        append_jsonl(self.out / ALARMS, {"batch": self.batches, "name": "rollout_server", "text": text})

    def _completion(self, group: Group, sample: Sample) -> dict[str, Any]:
        return {
            "batch": self.batches,
            "id": group.row["id"],
            "mode": group.row["mode"],
            "question": group.row["question"],
            "answer": group.row["answer"],
            "verifier": group.row["verifier"],
            "meta": group.row["meta"],
            "completion": sample.completion.text,
            "tokens": len(sample.completion.token_ids),
            "finished": sample.completion.finished,
            "reward": sample.reward,
            "staleness": group.staleness,
            "verdicts": {name: verdict.to_dict() for name, verdict in sample.graded.verdicts.items()},
        }

    def metrics(self, step: int, logs: Mapping[str, Any]) -> None:
        numbers = {key: value for key, value in logs.items() if isinstance(value, int | float)}
        line = {"step": step, "elapsed": time.monotonic() - self.started, **numbers, **self.pending}
        append_jsonl(self.out / "metrics.jsonl", line)
        self.pending = {}

    def callback(self) -> Any:
        from transformers import TrainerCallback

        record = self

        class WriteMetrics(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **_):
                # The closing line sums the run up in other units; it is no step.
                if state.is_world_process_zero and "train_runtime" not in logs:
                    record.metrics(state.global_step, logs)

        return WriteMetrics()


def _columns(cfg: RLConfig) -> dict[str, float]:
    """Reward columns and their weights, as TRL sums them."""
    columns = {term.name: term.weight for term in cfg.rewards}
    return columns | ({"overlong": 1.0} if cfg.overlong else {})


def _probes(records: Sequence[Any], count: int) -> list[Any]:
    """Probe rows: ones with images first, as they test the most."""
    return sorted(records, key=lambda row: not row["images"])[:count]


def _rollouts(
    cfg: RLConfig,
    client: RolloutClient,
    records: Sequence[Record],
    folders: Sequence[Path],
    seed: int,
    batches: int,
) -> Pipeline:
    overlong = None
    if cfg.overlong:
        overlong = SoftOverlong(cfg.rollout.max_completion_tokens, cfg.overlong.cache_tokens)
    mixture = mixture_of(cfg.rewards, folders)
    check_rewards(mixture, records, cfg.self_test_rows, seed)
    collector = Collector(cfg, client, records, mixture, AnswerReward(), overlong, seed)
    return Pipeline(collector, batches, cfg.rollout.overlap)


class RewardsFail(RuntimeError):
    """The stage's rewards do not do on its own rows what rewards must."""


def check_rewards(mixture: Mixture, records: Sequence[Record], rows: int, seed: int) -> None:
    """Refuse to train if a row has no reward, if a judge can be talked round, or if on a sample of `rows` a gold
    answer earns too little or a corrupted one too much (rewards.selftest).

    Raises ValueError, rewards.judge.canaries.JudgeRefused or RewardsFail.
    """
    examples = [example_of(record) for record in records]
    for example in examples:
        mixture.terms_of(example)
    for term in mixture.terms:
        check_columns(term.reward, term.name, examples)
        if isinstance(term.reward, Judge) and term.reward.canaries:
            report = term.reward.check_canaries()
            if not report.complete:
                log.warning(
                    "reward %s: the judge could not be checked yet (%s); its rows stay unscored until it can be",
                    term.name,
                    report.unanswered,
                )
    failures = self_test(mixture, examples, rows=rows, seed=seed) if rows else []
    if failures:
        shown = "\n".join(f"  {failure}" for failure in failures[:5])
        raise RewardsFail(
            f"{len(failures)} failures in the rewards' self-test on {min(rows, len(examples))} of the stage's rows:\n"
            f"{shown}\ncorrect the rows or the rewards (`posttrain rewards test` shows all), or set self_test_rows=0"
        )


def _watcher(
    cfg: RLConfig,
    client: RolloutClient,
    out: Path,
    sets: Mapping[str, Path],
    folders: Sequence[Path],
    seed: int,
    askable: Callable[[DataSource, Records], Records],
) -> Watcher:
    watch = cfg.watch
    second = (
        load_limited(watch.second_verifier, watch.second_params, folders) if watch.second_verifier else None
    )
    rows = load_rows([watch.held_out], sets, seed, askable) if watch.held_out else []

    return Watcher(
        watch, out, second, rows, lambda records: accuracy(records, client, cfg.rollout.max_completion_tokens)
    )


def _sync(
    pool: PoolConfig, client: RolloutClient | None, servers: int, policy: Any, folder: Path
) -> WeightSync:
    return FileSync(client, folder) if pool.sends_files else NcclSync(client, servers, policy.device)
