"""Feeds the trainer: pushes new weights to the servers, checks parity, and brings a graded batch to every rank.

Rank 0 talks to the servers and owns the batches and the files; the other ranks receive its broadcasts. `Lead` (rank 0)
and `Follower` have the same methods, which all ranks call in step.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch

from core.model.prompts import shown
from core.model.videos import tiles
from rewards.judge.judges import statistics
from rl.collect import Batch, Group, Pipeline
from rl.data import Record, prompt_messages
from rl.record import RunLog
from rl.resume import StageState
from rl.rollout.client import RolloutClient
from rl.rollout.messages import Answer
from rl.rollout.parity import ParityGuard
from rl.rollout.weights import WeightSync
from rl.watch import Watcher


class Rank(Protocol):
    """One rank's part in feeding the trainers. Every method is called on all ranks in step."""

    def settle(self) -> None:
        """Wait until the running batch is sampled: the servers' weights must not change while they sample."""
        ...

    def probe(self, guard: ParityGuard) -> list[Answer]:
        """The servers' answers to the guard's probes, after new weights."""
        ...

    def checked(self, guard: ParityGuard, answers: Sequence[Answer], servers: int) -> None:
        """Note that the learner's log-probabilities agree with these answers."""
        ...

    def batch(self, figures: Mapping[str, float]) -> list[dict[str, Any]]:
        """The next graded batch, one row per completion, group by group. `figures` join its metrics."""
        ...


class Lead:
    """Rank 0: servers, batches, watcher and files, and their state for a checkpoint.

    Args:
        share_gpus: whether the servers run on the learners' GPUs. They then sleep from the last completion of a batch
            to the next weight update.
        look: from the number of a batch to further metrics of the policy that the servers hold.
    """

    def __init__(
        self,
        client: RolloutClient,
        rollouts: Pipeline,
        watcher: Watcher,
        record: RunLog,
        records: Sequence[Record],
        *,
        share_gpus: bool = False,
        look: Callable[[int], Mapping[str, float]] = lambda batch: {},
    ) -> None:
        self.client, self.rollouts, self.watcher, self.record = client, rollouts, watcher, record
        self.share_gpus, self.look = share_gpus, look
        self.state = StageState(
            {"collector": rollouts.collector, "watcher": watcher, "record": record}, records
        )

    def settle(self) -> None:
        self.rollouts.settle()

    def probe(self, guard: ParityGuard) -> list[Answer]:
        self.rollouts.collector.version += 1
        return _from_rank_0(guard.sample(self.client))

    def checked(self, guard: ParityGuard, answers: Sequence[Answer], servers: int) -> None:
        if answers:
            self.client.served.gate = guard.gate(self.client, answers, servers)

    def batch(self, figures: Mapping[str, float]) -> list[dict[str, Any]]:
        batch = self.rollouts.take()
        rows = [row for group in batch.groups for row in trl_rows(group)]
        self._look_at(batch, figures)
        if self.share_gpus:
            self.client.sleep()
        self.rollouts.sample_ahead()
        return _from_rank_0(rows)

    def _look_at(self, batch: Batch, figures: Mapping[str, float]) -> None:
        """Let the watcher check a batch, and log it. Raises rl.watch.RewardAlarm."""
        seen, alarms = self.watcher.batch(batch.sampled)
        judges = {f"judge/{name}": count for name, count in statistics().items()}
        looks = self.look(self.record.batches)
        metrics = {**batch.metrics, **figures, **seen, **looks, **judges, **self.client.fleet.figures()}
        self.record.batch(batch.groups, batch.sampled, metrics, with_completions=bool(alarms))
        self.watcher.stop_for(alarms)
        every = self.record.cfg.save_every
        # The trainer saves after the batch's last update. Note the state now: with overlap, the next batch is being
        # sampled by then.
        if every and (self.record.batches % every == 0 or not self.rollouts.left):
            self.state.note()

    def write(self, folder: Path) -> None:
        """Write the noted state into a checkpoint's folder."""
        self.state.write(folder)

    def close(self) -> None:
        self.client.close()
        if teacher := self.rollouts.collector.teacher:
            teacher.close()


class Follower:
    """Every other rank: it receives what rank 0 broadcasts."""

    client = None
    """The client of the servers, which exists only on rank 0."""

    def settle(self) -> None:
        pass

    def probe(self, guard: ParityGuard) -> list[Answer]:
        return _from_rank_0(None)

    def checked(self, guard: ParityGuard, answers: Sequence[Answer], servers: int) -> None:
        pass

    def batch(self, figures: Mapping[str, float]) -> list[dict[str, Any]]:
        return _from_rank_0(None)

    def write(self, folder: Path) -> None:
        """Rank 0 writes the state."""

    def close(self) -> None:
        pass


class RolloutFeed:
    """Implements rl.trainer.Feed.

    Args:
        rank: this rank's part.
        sync: pushes weights to the servers.
        guard: compares servers and learner after every push.
        records: every record that the collector draws from.
        probes: the records of the guard's prompts.
        share_gpus: whether the servers sleep between batches; they then need the weights again for each batch.
    """

    def __init__(
        self,
        rank: Rank,
        sync: WeightSync,
        guard: ParityGuard,
        records: Sequence[Record],
        probes: Sequence[Record],
        *,
        share_gpus: bool = False,
    ) -> None:
        self.rank, self.sync, self.guard, self.probes = rank, sync, guard, probes
        self.records = {record["id"]: record for record in records}
        self.share_gpus = share_gpus
        self._probe_inputs: dict[int, Any] = {}

    def rows(self, trainer: Any, count: int) -> list[dict[str, Any]]:
        """This rank's `count` rows of the next batch, with prompts and images."""
        rows = self.rank.batch(self._update_servers(trainer))
        self.sync.served.asleep = self.share_gpus
        ranks, rank = trainer.accelerator.num_processes, trainer.accelerator.process_index
        if len(rows) != count * ranks:
            raise RuntimeError(
                f"collected {len(rows)} completions for {ranks} ranks x {count}; "
                "rollout.prompts_per_batch x group_size must equal TRL's generation batch"
            )
        own = rows[rank * count : (rank + 1) * count]
        # The rows of a group share their images as objects: rl.shared_prefix.tiles computes each object once.
        side = trainer.processing_class.frame_px
        images = {row: tiles(shown(self.records[row]), side) for row in {row["id"]: None for row in own}}
        return [self._with_prompt(row, images[row["id"]]) for row in own]

    def _with_prompt(self, row: dict[str, Any], images: Sequence[Any]) -> dict[str, Any]:
        """The row with its prompt and images. Every rank has these, so rank 0 does not broadcast them."""
        prompt = _text_only(prompt_messages(self.records[row["id"]]))
        return {**row, "prompt": prompt, "images": list(images)}

    def _update_servers(self, trainer: Any) -> dict[str, float]:
        """Push the weights if the servers lack them, then compare servers and learner."""
        step = trainer.state.global_step
        if self.sync.served.holds(step):
            return {}
        self.rank.settle()
        if self.share_gpus:
            _make_room(trainer)
        started = time.monotonic()
        self.sync.push(trainer.accelerator.unwrap_model(trainer.model), step)
        pushed_s = time.monotonic() - started
        answers = self.rank.probe(self.guard)
        servers = len(answers) // max(1, len(self.probes))  # the servers that serve at the moment
        difference = self.guard.check(answers, lambda at, one: self._score_probe(trainer, at, one), servers)
        self.rank.checked(self.guard, answers, servers)
        return {"parity/max_logprob_difference": difference, "sync/seconds": pushed_s}

    @torch.no_grad()
    def _score_probe(self, trainer: Any, index: int, answer: Answer) -> list[float]:
        """The learner's log-probabilities of a probe's completion, computed by the code that training uses."""
        inputs = self._probe_inputs.get(index)
        if inputs is None:
            inputs = self._probe_inputs[index] = trainer.processing_class.apply_chat_template(
                [prompt_messages(self.probes[index])],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        prompt_ids = inputs["input_ids"][0].tolist()
        if prompt_ids != answer.prompt_ids:
            raise RuntimeError(
                f"probe {index}: the rollout server rendered {len(answer.prompt_ids)} prompt tokens, the learner "
                f"{len(prompt_ids)}, or different ones; do both use the same chat template and image processor?"
            )
        completion = answer.completions[0].token_ids
        ids = torch.tensor([prompt_ids + completion], device=trainer.accelerator.device)
        extra: dict[str, Any] = {}
        if "pixel_values" in inputs:
            tiles = inputs["pixel_values"].to(ids.device, trainer.model.dtype)
            extra = {"pixel_values": tiles, "num_images": [1], "num_tiles": [tiles.size(0)]}
            if (
                "image_grid_thw" in inputs
            ):  # images of any resolution: both TRL and we split patches by the grids
                grids = inputs["image_grid_thw"].to(ids.device)
                extra |= {"image_grid_thw": grids, "num_images": [len(grids)], "num_tiles": None}
        experts = [(answer.experts, answer.completions[0].experts)] if answer.experts is not None else []
        with trainer.passes.replaying(experts) if experts else nullcontext():
            logps, _, _ = trainer._get_per_token_logps_and_entropies(
                trainer.model, ids, torch.ones_like(ids), len(completion), **extra
            )
        return logps[0].float().tolist()


def _make_room(trainer: Any) -> None:
    """Free the cached memory of the last update's passes, so that waking servers find room on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trainer.accelerator.wait_for_everyone()  # rank 0 wakes the servers of all ranks' GPUs


def trl_rows(group: Group) -> list[dict[str, Any]]:
    """A group's rows as rank 0 broadcasts them, without images and text."""
    rows = []
    for sample in group.samples:
        scores = {}
        if sample.reward is not None:  # an unscored row has no reward; it never counts as 0
            scores = {name: verdict.score for name, verdict in sample.graded.verdicts.items()}
            scores["overlong"] = sample.penalty
        completion = sample.completion
        extra: dict[str, Any] = {}
        if sample.teacher is not None:
            extra["teacher_logprobs"] = sample.teacher or [0.0]
        if group.experts is not None:
            extra["experts"] = group.experts, completion.experts
        rows.append(
            {
                **extra,
                "id": group.row["id"],
                "scores": scores,
                "prompt_ids": group.prompt_ids,
                # TRL needs a token. A token other than end-of-turn makes an empty completion count as truncated, and
                # so it is masked.
                "completion_ids": completion.token_ids or group.prompt_ids[-1:],
                "logprobs": completion.logprobs or [0.0],
            }
        )
    return rows


def _text_only(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation in TRL's form: contents are text, and images are in a separate column."""
    out = []
    for message in conversation:
        content = message["content"]
        if not isinstance(content, str):
            content = "".join(part["text"] for part in content if part["type"] == "text")
        out.append({"role": message["role"], "content": content})
    return out


def _from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0)
    return box[0]
