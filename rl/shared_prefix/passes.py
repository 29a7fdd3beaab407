"""The passes of a GRPO learner over packed rows: generation batches, and log-probabilities.

TRL repeats a group's prompt, its image tokens and their tower pass for each completion, and pads. Here the rows of a
batch are packed, completions attend to their prompt's keys and values with gradients, and only scored tokens reach the
output layer. TRL's own `_compute_loss` then turns the log-probabilities into the loss (rl.shared_prefix.loss), so the
objective, its masks and its statistics stay TRL's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from core.model.modeling import no_images
from rl.shared_prefix.core import core_of, take_packed_rows
from rl.shared_prefix.loss import PackedLoss
from rl.shared_prefix.rows import Experts, Packed, Row, fitting, groups_of, pack, rows_of
from rl.shared_prefix.scores import Scores, joined_scores, taken
from rl.shared_prefix.tiles import TileStore, joined, tile_numbers


class SharedPasses:
    """TRL's passes and loss, with each prompt and image computed once per group. Implements rl.trainer.Passes.

    If one update follows each generation batch, the policy's pass also gives the old policy's values (rl.correction).

    Args:
        trainer: the GRPOTrainer, whose models get attention over packed rows. It must receive all rows of an update as
            one micro-batch (`per_device_train_batch_size`) and one accumulation step.
        token_budget: most tokens of one pack; None: the tokens of TRL's pass over `budget_rows` padded rows.
        budget_rows: number of rows for the default budget; None: the whole micro-batch.
        flex: use torch's flex attention, on a GPU.
    """

    def __init__(
        self,
        trainer: Any,
        *,
        token_budget: int | None = None,
        budget_rows: int | None = None,
        flex: bool = False,
    ) -> None:
        if flex and trainer.accelerator.device.type != "cuda":
            raise ValueError(
                f"learner.prefix=shared_flex on {trainer.accelerator.device}: flex attention has a backward pass on "
                "GPUs only; use prefix=shared"
            )
        self.trainer, self.token_budget = trainer, token_budget
        self.budget_rows = budget_rows or trainer.args.per_device_train_batch_size
        self.tiles: TileStore | None = None
        self.given: Scores | None = None
        """Computed scores for TRL's loss: TRL's call for the policy's pass returns them."""
        self.experts: Sequence[Experts] = ()
        """The servers' choices for the rows that are scored, see `replaying`."""
        for model in (trainer.model, trainer.ref_model):
            if model is not None:
                take_packed_rows(core_of(trainer.accelerator.unwrap_model(model)), flex=flex)

    # The generation batch

    def build(self, stock: Callable[[Any], dict[str, Any]], rows: Any) -> dict[str, Any]:
        """TRL's batch of `rows`, with tile numbers in place of pixels."""
        trainer = self.trainer
        processor, corrected = trainer.processing_class, trainer.vllm_importance_sampling_correction
        original = processor.image_processor
        self.tiles = processor.image_processor = TileStore(original)
        if trainer.args.steps_per_generation * trainer.num_iterations == 1 and trainer.model.training:
            # With one update per batch the policy is the old policy. Without the correction TRL skips that pass.
            trainer.vllm_importance_sampling_correction = False
        experts = [row["experts"] for row in rows if "experts" in row]
        try:
            with self.replaying(experts):
                batch = stock(rows)
            return {**batch, "experts": experts} if experts else batch
        finally:
            processor.image_processor = original
            trainer.vllm_importance_sampling_correction = corrected

    def split(self, batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
        """The batch in `parts` mini-batches of whole groups, in an order drawn from torch's generator."""
        groups = list(groups_of(self.rows(batch)).values())
        order = [row for group in torch.randperm(len(groups)).tolist() for row in groups[group]]
        size = len(order) // parts
        return [taken(batch, order[part * size : (part + 1) * size]) for part in range(parts)]

    def rows(self, batch: dict[str, Any]) -> list[Row]:
        """The rows of TRL's batch."""
        counts = batch.get("num_tiles") or batch.get("num_images") or [0] * len(batch["prompt_ids"])
        return rows_of(
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            tile_numbers(batch.get("pixel_values"), counts),
            batch.get("experts"),
        )

    @contextmanager
    def replaying(self, experts: Sequence[Experts]) -> Iterator[None]:
        """Inside, `score` lets the model visit these experts, one entry per row; without entries it chooses itself.

        TRL scores a new batch for the old policy and for the reference; both visit the servers' experts.
        """
        self.experts = experts
        try:
            yield
        finally:
            self.experts = ()

    # Log-probabilities

    def score(
        self,
        stock: Callable[..., Any],
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        num_images: list[int] | None = None,
        num_tiles: list[int] | None = None,
        **_: Any,
    ) -> Scores:
        """TRL's log-probabilities and entropies (rows, completion tokens), 0 at positions that are not scored.

        Inside TRL's loss the result is the scores that rl.shared_prefix.loss has computed.
        """
        if self.given is not None:
            return self.given
        counts = num_tiles or num_images or [0] * len(input_ids)
        tiles = tile_numbers(pixel_values, counts)
        rows = rows_of(input_ids, attention_mask, logits_to_keep, tiles, self.experts)
        parts = [
            self._pass(
                model,
                [rows[row] for row in part],
                logits_to_keep,
                input_ids.device,
                {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw},
                compute_aux_loss,
            )
            for part in self.parts(rows, input_ids.shape[1])
        ]
        scores = joined_scores(parts)
        return scores if compute_entropy else scores._replace(entropies=None)

    def _pass(
        self,
        model: Any,
        rows: Sequence[Row],
        completion_tokens: int,
        device: torch.device,
        images: dict[str, torch.Tensor | None],
        router: bool,
    ) -> Scores:
        """One forward pass over one pack."""
        packed = pack(rows, device, whole=router)
        extra = {"output_router_logits": True} if router else {}
        with self.trainer.accelerator.autocast():
            outputs = model(
                input_ids=packed.input_ids,
                attention_mask=packed.weights,  # TRL's fused head weighs the router's balance by it
                position_ids=packed.position_ids,
                packed=packed,
                shift_labels=packed.labels,
                fused_lm_head=True,
                **self._image_inputs(packed, device, **images),
                **extra,
            )
        entropy = None if outputs.entropy is None else packed.unpacked(outputs.entropy, completion_tokens)
        return Scores(packed.unpacked(outputs.log_probs, completion_tokens), entropy, outputs.aux_loss)

    def over(self, model: Any, inputs: dict[str, Any], rows: Sequence[Row]) -> Scores:
        """One forward pass over some rows of TRL's batch."""
        images = {name: inputs.get(name) for name in ("pixel_values", "image_grid_thw")}
        completions = inputs["completion_ids"]
        router = self.trainer.aux_loss_enabled
        return self._pass(model, rows, completions.shape[1], completions.device, images, router)

    def _image_inputs(
        self,
        packed: Packed,
        device: torch.device,
        pixel_values: torch.Tensor | None,
        image_grid_thw: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The model's images, or a frozen tower's features, computed once per image and rollout batch."""
        if pixel_values is None or (not len(pixel_values) and not pixel_values.is_floating_point()):
            return self._no_images(pixel_values is not None, device)
        if (
            pixel_values.is_floating_point()
        ):  # pixels: a batch that does not come from `build`, such as a parity probe
            if image_grid_thw is None:
                return {"pixel_values": pixel_values[packed.tiles]}
            patches = pixel_values.split(image_grid_thw.prod(-1).tolist())
            return {
                "pixel_values": joined(patches, packed.tiles),
                "image_grid_thw": image_grid_thw[packed.tiles],
            }
        if self.tiles is None:
            raise RuntimeError("tile numbers without a store: such batches must come from `build`")
        if self._frozen_tower():
            return {"features": self.tiles.features(self._core().model.tower_features, packed.tiles, device)}
        return self.tiles.images(packed.tiles, device)

    def _no_images(self, cut_from_images: bool, device: torch.device) -> dict[str, torch.Tensor]:
        """Empty image inputs, which run a blank image, if TRL's pass or another rank's pass has images."""
        if not cut_from_images and self.trainer.accelerator.num_processes == 1:
            return {}
        return {name: value.to(device) for name, value in no_images(self._core().config).items()}

    def _frozen_tower(self) -> bool:
        plugin = self.trainer.accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            return False  # ranks gather weights in step, so each pass runs the tower on every rank
        return not any(parameter.requires_grad for parameter in self._core().model.vision_tower.parameters())

    def _core(self) -> Any:
        return core_of(self.trainer.accelerator.unwrap_model(self.trainer.model))

    # Packs

    def parts(self, rows: Sequence[Row], width: int) -> list[range]:
        """The rows of each pack, in order; `width` is the padded batch's number of columns. All ranks cut alike."""
        budget = self.token_budget or self.budget_rows * width
        parts, start = [], 0
        while start < len(rows):
            size = self._smallest(fitting(rows[start:], budget))
            parts.append(range(start, start + size))
            start += size
        return parts

    def _smallest(self, count: int) -> int:
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return count
        smallest = torch.tensor(count, device=accelerator.device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        return int(smallest)

    # The loss

    def loss(self, stock: Callable[..., torch.Tensor], model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss of the micro-batch. The backward passes of all packs but the last are done."""
        return (
            PackedLoss(self, stock, model, inputs).value()
            if torch.is_grad_enabled()
            else stock(model, inputs)
        )
