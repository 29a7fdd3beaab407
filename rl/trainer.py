"""TRL's GRPO trainer fed by our rollouts: weights out, parity check, graded groups in. The loss is TRL's."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from typing import Any

import torch
from trl import GRPOTrainer

from rl.collect import Group, Pipeline
from rl.data import Record, prompt_messages
from rl.rollout.messages import Answer
from rl.rollout.parity import ParityGuard
from rl.rollout.weights import WeightSync
from rl.shared_prefix import SharedPrefixTrainer


class RolloutTrainer(SharedPrefixTrainer):
    """GRPO on batches that rank 0 collects from the rollout pool.

    Overrides one private method of TRL, `_generate_and_score_completions`: it swaps TRL's prompts for a collected
    batch before TRL scores it, so that dynamic sampling and grading happen once, for all ranks. TRL's public
    `rollout_func` then hands over the completions. tests/rl/test_trl_contract.py fails when TRL changes what this
    relies on.

    Args:
        rollouts: batches, on rank 0; None elsewhere.
        sync: pushes weights to the pool.
        guard: parity guard.
        records: every record that the collector draws from, on every rank.
        probes: the records behind the guard's prompts, on every rank.
        banned_ids: tokens that sampling gives no probability; policy and reference give them none either.
        share_gpus: the servers have this learner's GPUs: they sleep from a batch's last completion to the next update.
        on_batch: called on rank 0 with a batch's groups, all groups sampled for it, and its metrics.
        **trl: arguments of SharedPrefixTrainer and GRPOTrainer.
    """

    def __init__(
        self,
        *,
        rollouts: Pipeline | None,
        sync: WeightSync,
        guard: ParityGuard,
        records: Sequence[Record],
        probes: Sequence[Record],
        banned_ids: Sequence[int],
        on_batch,
        share_gpus: bool = False,
        **trl: Any,
    ) -> None:
        # TRL warns that rollout_func may change; tests/rl/test_trl_contract.py watches it.
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        super().__init__(rollout_func=self._hand_over, **trl)
        for model in (self.model, self.ref_model):
            if model is not None:
                ban_tokens(self.accelerator.unwrap_model(model), banned_ids)
        self.rollouts, self.sync, self.guard, self.probes = rollouts, sync, guard, probes
        self.records = {record["id"]: record for record in records}
        self.on_batch, self.share_gpus = on_batch, share_gpus
        # TRL's branches for "completions come from vLLM": log-probabilities of the learner's own before the update,
        # and the importance-sampling correction. Its own vLLM client is not built, as it cannot reach CPU servers.
        self.use_vllm = True
        # It gathers pictures from ranks that have some only: with a text-only rank the others would wait for it.
        self.log_multimodal = False
        self._batch: list[dict[str, Any]] = []
        self._probe_inputs: dict[int, Any] = {}

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not self.model.training:  # type: ignore[union-attr]
            raise RuntimeError("evaluation runs through rl.evaluate, not through the trainer")
        metrics = self._update_workers()
        flat = self._collect(metrics)
        per_rank = len(inputs)
        if len(flat) != per_rank * self.accelerator.num_processes:
            raise RuntimeError(
                f"collected {len(flat)} completions for {self.accelerator.num_processes} ranks x {per_rank}; "
                "rollout.prompts_per_batch x group_size must be what TRL's generation batch holds"
            )
        start = self.accelerator.process_index * per_rank
        self._batch = [self._with_prompt(row) for row in flat[start : start + per_rank]]
        return super()._generate_and_score_completions(self._batch)

    def _with_prompt(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its prompt and images, which every rank has at hand and need not be sent."""
        record = self.records[row["id"]]
        return {**row, "prompt": _text_only(prompt_messages(record)), "images": list(record["images"])}

    def _hand_over(self, prompts: list, trainer: GRPOTrainer) -> dict[str, list]:
        """TRL's rollout_func: this rank's completions, already sampled and graded."""
        return {
            "prompt_ids": [row["prompt_ids"] for row in self._batch],
            "completion_ids": [row["completion_token_ids"] for row in self._batch],
            "logprobs": [row["completion_logprobs"] for row in self._batch],
        }

    def _update_workers(self) -> dict[str, float]:
        """Push the weights when they changed or were given up, then compare both sides. Every rank takes part."""
        if self.sync.served.holds(self.state.global_step):
            return {}
        if self.rollouts:
            self.rollouts.settle()
        if self.share_gpus:
            self._make_room()
        started = time.monotonic()
        self.sync.push(self.accelerator.unwrap_model(self.model), self.state.global_step)
        pushed_s = time.monotonic() - started
        self._last_loaded_step = self.state.global_step  # else TRL would sync through its own client
        answers = None
        if self.rollouts:
            self.rollouts.collector.version += 1
            answers = self.guard.sample(self.rollouts.collector.client)
        answers = _from_rank_0(answers)
        servers = len(answers) // max(1, len(self.probes))  # those that serve at the moment
        difference = self.guard.check(answers, self._score_probe, servers)
        if self.rollouts and answers:
            client = self.rollouts.collector.client
            client.served.gate = self.guard.gate(client, answers, servers)
        return {"parity/max_logprob_difference": difference, "sync/seconds": pushed_s}

    def _make_room(self) -> None:
        """Give back what the last update's passes held: servers that wake take their memory from the GPU's free one."""
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.accelerator.wait_for_everyone()  # rank 0 wakes the servers of all ranks' GPUs

    @torch.no_grad()
    def _score_probe(self, index: int, answer: Answer) -> list[float]:
        """The learner's log-probabilities of a probe completion, through the code that training uses."""
        if index not in self._probe_inputs:
            conversation = prompt_messages(self.probes[index])
            self._probe_inputs[index] = self.processing_class.apply_chat_template(  # type: ignore[union-attr]
                [conversation],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            )
        inputs = self._probe_inputs[index]
        prompt_ids = inputs["input_ids"][0].tolist()
        if prompt_ids != answer.prompt_ids:
            raise RuntimeError(
                f"probe {index}: the rollout server rendered {len(answer.prompt_ids)} prompt tokens, the learner "
                f"{len(prompt_ids)}, or other ones; do both use the same chat template and image processor?"
            )
        completion = answer.completions[0].token_ids
        ids = torch.tensor([prompt_ids + completion], device=self.accelerator.device)
        extra = {}
        if "pixel_values" in inputs:
            tiles = inputs["pixel_values"].to(self.accelerator.device, self.model.dtype)  # type: ignore[union-attr]
            extra = {"pixel_values": tiles, "num_images": [1], "num_tiles": [tiles.size(0)]}
            if "image_grid_thw" in inputs:  # of any resolution: TRL and we split the patches by the grids
                grids = inputs["image_grid_thw"].to(self.accelerator.device)
                extra |= {"image_grid_thw": grids, "num_images": [len(grids)], "num_tiles": None}
        logps, _, _ = self._get_per_token_logps_and_entropies(
            self.model, ids, torch.ones_like(ids), len(completion), **extra
        )
        return logps[0].float().tolist()

    def _collect(self, metrics: dict[str, float]) -> list[dict[str, Any]]:
        """The graded batch of all ranks, one row per completion, in groups."""
        flat = None
        if self.rollouts:
            batch = self.rollouts.take()
            flat = [row for group in batch.groups for row in _trl_rows(group)]
            self.on_batch(batch.groups, batch.sampled, batch.metrics | metrics)
            if self.share_gpus:
                self.rollouts.collector.client.sleep()
            self.rollouts.sample_ahead()
        self.sync.served.asleep = self.share_gpus
        return _from_rank_0(flat)


def ban_tokens(model: Any, token_ids: Sequence[int]) -> None:
    """Give the learner's distribution no probability for `token_ids`, as sampling does.

    Banned on one side only, every importance ratio is off by the banned tokens' share (measured: 0.0056 per token).
    The ban is a bias of the output head, which both the plain forward and TRL's fused head add. It is a buffer that
    no checkpoint holds and no optimizer moves.
    """
    head = model.get_output_embeddings()
    bias = torch.zeros(head.out_features, dtype=head.weight.dtype, device=head.weight.device)
    bias[list(token_ids)] = -1e4  # finite: 0 x -inf would make the entropy NaN
    if hasattr(head.weight, "ds_status"):  # ZeRO-3: TRL asks weight and bias whether they are gathered
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        bias.ds_status = ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
    del head.bias
    head.register_buffer("bias", bias, persistent=False)


def reward_function(name: str):
    """A TRL reward function that reads one term's score off the graded rows: None where it does not apply."""

    def score(scores: list[dict[str, float]], **_: Any) -> list[float | None]:
        return [row.get(name) for row in scores]

    score.__name__ = name
    return score


def _trl_rows(group: Group) -> list[dict[str, Any]]:
    """What travels to the ranks: no images, no text."""
    rows = []
    for sample in group.samples:
        scores = {}
        if sample.reward is not None:  # a row that a term could not judge counts nowhere: never as 0
            scores = {name: verdict.score for name, verdict in sample.graded.verdicts.items()}
            scores["overlong"] = sample.penalty
        completion = sample.completion
        rows.append(
            {
                "id": group.row["id"],
                "scores": scores,
                "prompt_ids": group.prompt_ids,
                # TRL needs a token: a completion that was cut to nothing is one that ends no turn, masked as truncated.
                "completion_token_ids": completion.token_ids or group.prompt_ids[-1:],
                "completion_logprobs": completion.logprobs or [0.0],
            }
        )
    return rows


def _text_only(conversation: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as TRL takes it: text content, images in a column of their own."""
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
