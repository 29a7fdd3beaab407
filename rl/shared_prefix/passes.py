"""The passes of a GRPO learner over packed rows: log-probabilities, and the loss with its backward passes.

TRL repeats a group's prompt, its image tokens and their tower pass for each completion, and pads. Here the rows of a
batch are packed, completions attend to their prompt's keys and values with gradients, and only scored tokens reach the
output layer. TRL's own `_compute_loss` then turns the log-probabilities into the loss, so the objective, its masks and
its statistics stay TRL's.

A micro-batch that exceeds the token budget is cut into packs with a backward pass each:

- Most objectives are weighted sums over rows. Each pack runs TRL's loss and its backward pass; TRL's loss then runs
  once more on all log-probabilities together, without gradients, for its value and its statistics.
- The others (an entropy bonus, a quantile of entropies) need every log-probability before any gradient. A first pass
  without gradients computes them, TRL's loss gives one slope per token, and each pack's backward pass starts from
  those slopes (gradient caching, arXiv:2101.06983).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from core.model.modeling import no_images
from rl.correction import Correction
from rl.shared_prefix.core import core_of, take_packed_rows
from rl.shared_prefix.rows import Packed, Row, fitting, groups_of, pack, rows_of
from rl.shared_prefix.tiles import TileStore, joined, tile_numbers

Loss = Callable[[Any, dict[str, Any]], torch.Tensor]
"""TRL's `_compute_loss`: model and inputs to the loss."""


class Scores(NamedTuple):
    """What TRL's `_get_per_token_logps_and_entropies` returns."""

    logps: torch.Tensor
    """(rows, completion tokens), 0 where nothing is scored."""
    entropies: torch.Tensor | None
    aux_loss: torch.Tensor | None
    """The router's balancing loss of a mixture of experts."""


class SharedPasses:
    """TRL's passes and loss, with each prompt and image computed once per group. Implements rl.trainer.Passes.

    Where one update follows each generation batch, the policy's pass also serves as the old one (rl.correction).

    Args:
        trainer: the GRPOTrainer, whose models get attention over packed rows. Give it all rows of an update as one
            micro-batch (`per_device_train_batch_size`) and one accumulation step.
        token_budget: tokens of one pack; None takes what TRL's pass over `budget_rows` padded rows would hold.
        budget_rows: rows behind the default budget; None takes the whole micro-batch.
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
        self._given: Scores | None = None
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
            # One update: its policy is the old policy. Without the correction TRL makes no pass for that one.
            trainer.vllm_importance_sampling_correction = False
        try:
            return stock(rows)
        finally:
            processor.image_processor = original
            trainer.vllm_importance_sampling_correction = corrected

    def split(self, batch: dict[str, Any], parts: int) -> list[dict[str, Any]]:
        """The batch in `parts` mini-batches of whole groups, in an order drawn from torch's generator."""
        groups = list(groups_of(self.rows(batch)).values())
        order = [row for group in torch.randperm(len(groups)).tolist() for row in groups[group]]
        size = len(order) // parts
        return [_taken(batch, order[part * size : (part + 1) * size]) for part in range(parts)]

    def rows(self, batch: dict[str, Any]) -> list[Row]:
        """The rows of TRL's batch."""
        counts = batch.get("num_tiles") or batch.get("num_images") or [0] * len(batch["prompt_ids"])
        return rows_of(
            torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1),
            torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1),
            batch["completion_ids"].shape[1],
            tile_numbers(batch.get("pixel_values"), counts),
        )

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
        """TRL's log-probabilities and entropies (rows, completion tokens), 0 where nothing is scored.

        Inside TRL's loss these are the scores that `_loss_of` gave.
        """
        if self._given is not None:
            return self._given
        counts = num_tiles or num_images or [0] * len(input_ids)
        rows = rows_of(input_ids, attention_mask, logits_to_keep, tile_numbers(pixel_values, counts))
        parts = [
            self._pass(
                model,
                [rows[row] for row in part],
                logits_to_keep,
                input_ids.device,
                {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw},
                compute_aux_loss,
            )
            for part in self._parts(rows, input_ids.shape[1])
        ]
        scores = _joined(parts)
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

    def _pass_over(self, model: Any, inputs: dict[str, Any], rows: Sequence[Row]) -> Scores:
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
        """The model's images, or of a frozen tower its features, computed once per image and rollout batch."""
        if pixel_values is None or (not len(pixel_values) and not pixel_values.is_floating_point()):
            return self._no_images(pixel_values is not None, device)
        if pixel_values.is_floating_point():  # a batch that `build` did not make, such as a parity probe
            if image_grid_thw is None:
                return {"pixel_values": pixel_values[packed.tiles]}
            patches = pixel_values.split(image_grid_thw.prod(-1).tolist())
            return {
                "pixel_values": joined(patches, packed.tiles),
                "image_grid_thw": image_grid_thw[packed.tiles],
            }
        if self.tiles is None:
            raise RuntimeError("tile numbers without a store: `build` makes the batches that hold some")
        if self._frozen_tower():
            return {"features": self.tiles.features(self._core().model.tower_features, packed.tiles, device)}
        return self.tiles.images(packed.tiles, device)

    def _no_images(self, cut_from_images: bool, device: torch.device) -> dict[str, torch.Tensor]:
        """Images of no tile, which run a blank one, where TRL's pass or another rank's has images."""
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

    # The loss

    def loss(self, stock: Loss, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss of the micro-batch. All packs but the last have had their backward pass."""
        if not torch.is_grad_enabled():
            return stock(model, inputs)
        rows = self.rows(inputs)
        parts = self._parts(rows, inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1])
        if len(parts) == 1:
            scores = self._pass_over(model, inputs, rows)
            return self._loss_of(stock, model, inputs, scores, statistics=True)
        weights = self._weights(inputs, parts)
        if weights is None:
            return self._loss_by_slopes(stock, model, inputs, rows, parts)
        return self._loss_by_parts(stock, model, inputs, rows, parts, weights)

    def _loss_by_parts(
        self,
        stock: Loss,
        model: Any,
        inputs: dict[str, Any],
        rows: Sequence[Row],
        parts: Sequence[range],
        weights: Sequence[Any],
    ) -> torch.Tensor:
        """The loss of an objective that is a weighted sum over packs."""
        done: list[Scores] = []

        def loss_of(number: int) -> torch.Tensor:
            part = parts[number]
            scores = self._pass_over(model, inputs, rows[part.start : part.stop])
            done.append(_detached(scores))
            return self._loss_of(stock, model, _taken(inputs, part), scores) * weights[number]

        metrics = self.trainer._metrics
        kept, metrics["train"] = metrics["train"], defaultdict(list)  # of single packs; the whole's follow
        last = self._accumulated(model, len(parts), loss_of)
        metrics["train"] = kept
        with torch.no_grad():
            whole = self._loss_of(stock, model, inputs, _joined(done), statistics=True)
        return last + (whole - last).detach()

    def _loss_by_slopes(
        self, stock: Loss, model: Any, inputs: dict[str, Any], rows: Sequence[Row], parts: Sequence[range]
    ) -> torch.Tensor:
        """The loss of an objective that looks at the whole micro-batch, by one slope per token."""
        trainer = self.trainer
        cut = [rows[part.start : part.stop] for part in parts]
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(trainer.model, trainer.args.gradient_checkpointing_kwargs),
        ):
            scores = _joined([self._pass_over(model, inputs, own) for own in cut])
        leaves = [values.requires_grad_() for values in scores if values is not None]
        whole = self._loss_of(stock, model, inputs, scores, statistics=True)
        slopes = torch.autograd.grad(whole, leaves, allow_unused=True, materialize_grads=True)

        def loss_of(number: int) -> torch.Tensor:
            part = parts[number]
            values = [value for value in self._pass_over(model, inputs, cut[number]) if value is not None]
            terms = [
                (value * slope[part.start : part.stop]).sum()
                if slope.ndim
                else value * slope * len(part) / len(rows)  # the router's
                for value, slope in zip(values, slopes, strict=True)
            ]
            return torch.stack(terms).sum()

        last = self._accumulated(model, len(parts), loss_of)
        return last + (whole - last).detach()

    def _accumulated(self, model: Any, count: int, loss_of: Callable[[int], torch.Tensor]) -> torch.Tensor:
        """The last pack's loss; the backward passes of the others are done."""
        deepspeed = {"scale_wrt_gas": False} if self.trainer.is_deepspeed_enabled else {}
        for number in range(count - 1):
            with self._gradients_held_back(model):  # DDP wants the forward pass in there as well
                loss = loss_of(number)
                with torch.autocast(loss.device.type, enabled=False):
                    self.trainer.accelerator.backward(loss, **deepspeed)
        return loss_of(count - 1)

    def _loss_of(
        self, stock: Loss, model: Any, inputs: dict[str, Any], scores: Scores, *, statistics: bool = False
    ) -> torch.Tensor:
        """TRL's loss from scores that are there already: its call for the policy's pass returns them (`score`).

        TRL reads `importance_sampling_ratio` from its inputs. A batch without one gets it here, from these scores.
        """
        trainer = self.trainer
        corrects = trainer.use_vllm and trainer.vllm_importance_sampling_correction
        if corrects and "importance_sampling_ratio" not in inputs:
            correction = Correction(
                trainer.vllm_importance_sampling_mode,
                trainer.vllm_importance_sampling_clip_min,
                trainer.vllm_importance_sampling_clip_max,
            )
            mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
            both = scores.logps, inputs["sampling_per_token_logps"], mask
            ratio = correction.ratio(*both)
            inputs = {**inputs, "importance_sampling_ratio": ratio}
            if statistics:
                figures = correction.statistics(*both, ratio, trainer.accelerator.gather)
                for name, figure in figures.items():
                    trainer._metrics["train"][name].append(figure)
        self._given = scores
        try:
            return stock(model, inputs)
        finally:
            self._given = None

    def _weights(self, inputs: dict[str, Any], parts: Sequence[range]) -> list[Any] | None:
        """Weights that make the packs' losses add up to the whole's; None if the loss is no such sum."""
        trainer = self.trainer
        if trainer._entropy_bonus_enabled or trainer.top_entropy_quantile < 1.0:
            return None
        if trainer.loss_type in ("grpo", "sapo", "dr_grpo"):  # means over rows; so is our balancing loss
            rows = sum(len(part) for part in parts)
            return [len(part) / rows for part in parts]
        if trainer.aux_loss_enabled:
            return None
        if trainer.loss_type in ("dapo", "cispo"):  # a sum over the whole batch's number of tokens
            return [1.0] * len(parts)
        if trainer.loss_type == "bnpo":  # a mean over tokens
            tokens = torch.stack([inputs["completion_mask"][part.start : part.stop].sum() for part in parts])
            return list(tokens / tokens.sum().clamp(min=1))
        return None

    def _parts(self, rows: Sequence[Row], width: int) -> list[range]:
        """The rows of each pack, in order; `width` is that of the padded batch. All ranks cut alike."""
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

    @contextmanager
    def _gradients_held_back(self, model: Any) -> Iterator[None]:
        """Inside, a backward pass takes no step (DeepSpeed) and reduces nothing (DDP)."""
        accelerator = self.trainer.accelerator
        synchronised = accelerator.gradient_state.sync_gradients
        accelerator.gradient_state._set_sync_gradients(False)
        try:
            with accelerator.no_sync(model):
                yield
        finally:
            accelerator.gradient_state._set_sync_gradients(synchronised)


def _joined(parts: Sequence[Scores]) -> Scores:
    """The scores of all rows; the router's loss is the mean over rows."""
    if len(parts) == 1:
        return parts[0]
    logps, entropies, aux = ([part[at] for part in parts] for at in range(3))
    rows = sum(len(values) for values in logps)
    return Scores(
        torch.cat(logps),
        None if entropies[0] is None else torch.cat(entropies),
        None
        if aux[0] is None
        else torch.stack([value * len(own) / rows for value, own in zip(aux, logps, strict=True)]).sum(),
    )


def _detached(scores: Scores) -> Scores:
    return Scores(*(None if values is None else values.detach() for values in scores))


def _taken(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of TRL's batch; scalars as they are, pixels row by row."""
    by_row = split_pixel_values_by_grid(batch)
    taken: dict[str, Any] = {}
    for name, value in by_row.items():
        if isinstance(value, list):
            taken[name] = [value[row] for row in rows]
        elif isinstance(value, torch.Tensor) and value.ndim:
            taken[name] = value[list(rows)]
        else:
            taken[name] = value
    return unsplit_pixel_values_by_grid(taken)
