"""TRL's GRPO trainer with every prompt and image computed once per group: the same objective for less work.

TRL repeats a group's prompt, image tokens and tower pass for each of its completions, and pads. Here the rows of a
batch are packed into one row, [prompt, its completions, next prompt, ...]; completions attend to their prompt's keys
and values with gradients (rl/prefix_attention.py), and only tokens that are scored reach the output layer. TRL's own
`_compute_loss` runs on the result, so the loss, its masks and its statistics stay TRL's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import BatchFeature
from trl import GRPOTrainer
from trl.trainer.utils import split_pixel_values_by_grid, unsplit_pixel_values_by_grid

from core.model.modeling import no_images
from rl.correction import Correction
from rl.prefix_attention import SHARED_PREFIX, SHARED_PREFIX_FLEX, PrefixGroup, PrefixLayout

TILES_AT_ONCE = 16
"""Tiles in one pass of a frozen tower. Images of any resolution, of up to 16 tiles' patches, pass one by one."""


@dataclass(frozen=True)
class Row:
    """A prompt with one completion, without padding; the completion is empty where it was masked."""

    prompt: tuple[int, ...]
    tiles: tuple[int, ...]
    """Indices of the prompt's image tiles, in order. An image of any resolution is one tile, of a size of its own."""
    completion: tuple[int, ...]

    @property
    def group(self) -> tuple[Any, ...]:
        """What rows must have in common to share their prompt."""
        return self.prompt, self.tiles


def rows_of(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    completion_tokens: int,
    tiles: Sequence[Sequence[int]],
) -> list[Row]:
    """The rows of TRL's padded batch: prompts padded on the left, completions (the last columns) on the right."""
    rows = []
    for ids, mask, own in zip(input_ids.tolist(), attention_mask.tolist(), tiles, strict=True):
        kept = [
            [i for i, m in zip(ids[part], mask[part], strict=True) if m] for part in _parts(completion_tokens)
        ]
        rows.append(Row(tuple(kept[0]), tuple(own), tuple(kept[1])))
    return rows


def _parts(completion_tokens: int) -> tuple[slice, slice]:
    return slice(None, -completion_tokens), slice(-completion_tokens, None)


@dataclass(frozen=True)
class Pack:
    """Rows in one packed row of N tokens, of which K hidden states are scored.

    A completion's last token predicts nothing and is left out, unless the router's balance is to be measured.
    """

    input_ids: torch.Tensor
    """(1, N)"""
    position_ids: torch.Tensor
    """(1, N); completions continue after their prompt."""
    weights: torch.Tensor
    """(1, N): the rows that a token stands for."""
    layout: PrefixLayout
    keep: torch.Tensor
    """(K,) positions that predict a completion token; a prompt's last one appears once per completion."""
    labels: torch.Tensor
    """(1, K)"""
    places: tuple[torch.Tensor, torch.Tensor]
    """Row and column of every scored token in the padded batch."""
    tiles: list[int]
    """Tiles in the order of their tokens."""


def pack(rows: Sequence[Row], device: torch.device, *, whole: bool = False) -> Pack:
    """Rows of the same prompt and images next to each other, after one copy of that prompt.

    Rows whose completion is masked take no part, unless `whole`: then everything that TRL's pass would compute is
    there, last tokens and prompts of masked rows included.

    >>> two = [Row((7, 8), (), (1, 2)), Row((7, 8), (), (3,))]
    >>> packed = pack(two, torch.device("cpu"))
    >>> packed.input_ids.tolist(), packed.keep.tolist(), packed.labels.tolist()
    ([[7, 8, 1]], [1, 2, 1], [[1, 2, 3]])
    """
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        if row.completion or whole:
            groups.setdefault(row.group, []).append(index)
    if not groups:  # nothing is scored, but ranks run in step and TRL wants a gradient
        groups = {rows[0].group: [0]}
    ids: list[int] = []
    positions: list[int] = []
    weights: list[int] = []
    keep: list[int] = []
    labels: list[int] = []
    places: list[tuple[int, int]] = []
    tiles: list[int] = []
    layout = []
    for (prompt, own_tiles), members in groups.items():
        ids += prompt
        positions += range(len(prompt))
        weights += [len(members)] * len(prompt)
        tiles += own_tiles
        last, lengths = len(ids) - 1, []
        for index in members:
            completion = rows[index].completion
            if not completion:
                continue
            read = completion if whole else completion[:-1]
            keep += [last, *range(len(ids), len(ids) + len(completion) - 1)]
            labels += completion
            places += [(index, column) for column in range(len(completion))]
            ids += read
            positions += range(len(prompt), len(prompt) + len(read))
            weights += [1] * len(read)
            lengths.append(len(read))
        layout.append(PrefixGroup(len(prompt), tuple(lengths)))
    if not keep:
        keep, labels = [0], [0]

    def tensor(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=device)

    return Pack(
        input_ids=tensor(ids)[None],
        position_ids=tensor(positions)[None],
        weights=tensor(weights)[None],
        layout=PrefixLayout(tuple(layout)),
        keep=tensor(keep),
        labels=tensor(labels)[None],
        places=(tensor([row for row, _ in places]), tensor([column for _, column in places])),
        tiles=tiles,
    )


def fitting(rows: Sequence[Row], budget: int) -> int:
    """How many of the first rows one pack of `budget` tokens holds: at least one, and whole groups if any fits.

    >>> rows = [Row((1, 2, 3), (), (4, 5))] * 2 + [Row((6, 7), (), (8, 9))] * 2
    >>> [fitting(rows, budget) for budget in (4, 6, 7, 11, 13)]
    [1, 1, 2, 2, 4]
    """
    tokens, seen, boundary = 0, set(), 0
    for index, row in enumerate(rows):
        if index and row.group != rows[index - 1].group:
            boundary = index
        if row.completion:
            tokens += len(row.completion) + (0 if row.group in seen else len(row.prompt))
            seen.add(row.group)
        if tokens > budget and index:
            return boundary or index
    return len(rows)


class TileStore:
    """An image processor that computes each image once and hands out tile numbers in place of pixels.

    TRL asks for the images of every row, moves, shuffles and splits what it gets; `pixel_values` here are indices of
    shape (tiles, 1, 1, 1) into `images`, so that nothing is repeated and equal images are known by their number.
    Images are told apart by identity: the rows of a group hold the same objects. An image of any resolution counts
    as one tile; its grid stays here.

    Args:
        processor: the image processor behind it; other attributes are looked up there.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._numbers: dict[int, list[int]] = {}
        self._images: list[Any] = []  # kept alive, as an id may be used again
        self._patches: dict[int, int] = {}
        self._pixels: list[torch.Tensor] = []
        self._grids: list[torch.Tensor] = []
        self._features: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._processor, name)

    def __call__(self, images: Any, **kwargs: Any) -> BatchFeature:
        """`pixel_values` (tiles, 1, 1, 1) and the image processor's `num_patches` of nested lists of images."""
        flat = list(_flat(images))
        for image in flat:
            if id(image) not in self._numbers:
                inputs = self._processor([image], **{**kwargs, "return_tensors": "pt"})
                grids = inputs.get("image_grid_thw")
                tiles = inputs["pixel_values"].split(1 if grids is None else len(inputs["pixel_values"]))
                self._numbers[id(image)] = list(range(len(self._pixels), len(self._pixels) + len(tiles)))
                self._patches[id(image)] = int(inputs["num_patches"][0])
                self._images.append(image)
                self._pixels += tiles
                self._grids += [] if grids is None else [grids]
        numbers = [self._numbers[id(image)] for image in flat]
        handles = torch.tensor([number for own in numbers for number in own])
        return BatchFeature(
            {
                "pixel_values": handles.view(-1, 1, 1, 1),
                "num_patches": torch.tensor([self._patches[id(image)] for image in flat]),
            }
        )

    def images(self, tiles: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
        """The model's inputs for these tiles, the same one as often as it is asked for."""
        held = {"pixel_values": self._pixels, "image_grid_thw": self._grids}
        return {name: _joined(values, tiles).to(device) for name, values in held.items() if values}

    def features(self, tower: Any, tiles: Sequence[int], device: torch.device) -> torch.Tensor:
        """What `tower` makes of these tiles, computed for all tiles of the store when first asked."""
        if not self._features:
            every, at_once = range(len(self._pixels)), 1 if self._grids else TILES_AT_ONCE
            with torch.no_grad():
                for start in range(0, len(every), at_once):
                    seen = tower(**self.images(every[start : start + at_once], device))
                    self._features += [seen] if self._grids else seen.split(1)
        return _joined(self._features, tiles)


def _joined(tensors: Sequence[torch.Tensor], places: Sequence[int]) -> torch.Tensor:
    """Those at `places`, one after the other along their first axis."""
    return torch.cat([tensors[place] for place in places] or [tensors[0][:0]])


def _flat(images: Any) -> Iterator[Any]:
    if isinstance(images, list | tuple):
        for part in images:
            yield from _flat(part)
    elif images is not None:
        yield images


class SharedPrefixTrainer(GRPOTrainer):
    """GRPO whose three passes (old, reference, policy) compute prompts and images once per group.

    Where one update follows each generation batch, the policy's pass also serves as the old one (rl/correction.py).
    A rank's micro-batch (`per_device_train_batch_size` rows) is cut into packs of at most `token_budget` tokens, each
    with a backward pass of its own: give all rows of an update and one accumulation step. Groups stay together when
    the generation batch is shuffled (TRL shuffles rows). tests/rl/test_trl_contract.py fails when TRL changes what
    this relies on.

    Args:
        prefix: shared, shared_flex (with flex attention, on a GPU), or stock: TRL's own passes.
        token_budget: tokens of one pack; None takes what TRL's pass over `budget_rows` padded rows would hold.
        budget_rows: rows behind the default budget.
        **trl: arguments of GRPOTrainer.
    """

    def __init__(
        self,
        *,
        prefix: Literal["shared", "shared_flex", "stock"] = "shared",
        token_budget: int | None = None,
        budget_rows: int | None = None,
        **trl: Any,
    ) -> None:
        super().__init__(**trl)
        self._buffered_inputs: Any = None
        self.prefix, self.token_budget = prefix, token_budget
        self.budget_rows = budget_rows or self.args.per_device_train_batch_size
        self._tiles: TileStore | None = None
        self._correction: Correction | None = None
        self._scored: dict[str, Any] | None = None
        if prefix == "shared_flex" and self.accelerator.device.type != "cuda":
            raise ValueError(
                f"learner.prefix=shared_flex on {self.accelerator.device}: flex attention has a backward pass on GPUs "
                "only; use prefix=shared"
            )
        if prefix != "stock":
            attention = SHARED_PREFIX_FLEX if prefix == "shared_flex" else SHARED_PREFIX
            for model in (self.model, self.ref_model):
                if model is not None:
                    core = _core_of(self.accelerator.unwrap_model(model))
                    core.config.text_config._attn_implementation = attention

    # Images and shuffling

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if self.prefix == "stock":
            return super()._generate_and_score_completions(inputs)
        processor: Any = self.processing_class
        original = processor.image_processor
        self._tiles = processor.image_processor = TileStore(original)
        corrected = self.vllm_importance_sampling_correction
        if self._one_update and self.model.training:  # type: ignore[union-attr]
            self.vllm_importance_sampling_correction = False  # with it goes the pass for the old policy
        try:
            return super()._generate_and_score_completions(inputs)
        finally:
            processor.image_processor = original
            self.vllm_importance_sampling_correction = corrected

    @property
    def _one_update(self) -> bool:
        """Whether a generation batch is one micro-batch of one update: its old policy is the policy."""
        return self.args.steps_per_generation * self.num_iterations == 1  # type: ignore[attr-defined]

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's, but groups are shuffled, not rows, so that those of a group land in the same mini-batch."""
        if self.prefix == "stock" or not self.model.training:  # type: ignore[union-attr]
            return super()._prepare_inputs(generation_batch)
        arguments: Any = self.args
        parts = arguments.steps_per_generation
        if self._step % (parts * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            order = _shuffled_groups(self._rows(batch))
            size = len(order) // parts
            self._buffered_inputs = [
                _take(batch, order[part * size : (part + 1) * size]) for part in range(parts)
            ]
        return self._buffered_inputs[self._step % parts]

    # The passes

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        pixel_values: torch.Tensor | None = None,
        image_grid_thw: torch.Tensor | None = None,
        num_images: list[int] | None = None,
        num_tiles: list[int] | None = None,
        **others: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """TRL's (rows, completion tokens) of log-probabilities and entropies, 0 where nothing is scored."""
        if self.prefix == "stock":
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                pixel_values=pixel_values,
                image_grid_thw=image_grid_thw,
                num_images=num_images,
                num_tiles=num_tiles,
                **others,
            )
        counts = num_tiles or num_images or [0] * len(input_ids)
        images = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw}
        numbers = range(sum(counts)) if pixel_values is None else _numbers(pixel_values)
        rows = rows_of(input_ids, attention_mask, logits_to_keep, _split(numbers, counts))
        # With gradients the caller has cut the batch: each pack has its own backward pass.
        sizes = [len(rows)] if torch.is_grad_enabled() else self._plan(rows, input_ids.shape[1])
        outputs, start = [], 0
        for size in sizes:
            packed = pack(rows[start : start + size], input_ids.device, whole=compute_aux_loss)
            outputs.append(self._score(model, packed, size, logits_to_keep, images, compute_aux_loss))
            start += size
        logps, entropies, aux_losses = zip(*outputs, strict=True)
        if self._scored is not None:
            self._correct(self._scored, torch.cat(logps))
        return (
            torch.cat(logps),
            torch.cat(entropies) if compute_entropy else None,
            torch.stack(aux_losses).mean() if compute_aux_loss else None,
        )

    def _score(
        self,
        model: Any,
        packed: Pack,
        rows: int,
        completion_tokens: int,
        images: dict[str, torch.Tensor | None],
        router: bool,
    ) -> tuple[Any, Any, Any]:
        extra = {"output_router_logits": True} if router else {}
        with self.accelerator.autocast():
            outputs = model(
                input_ids=packed.input_ids,
                # Attention goes by the layout; TRL weighs the router's balance by this.
                attention_mask=packed.weights,
                position_ids=packed.position_ids,
                prefix=packed.layout,
                keep=packed.keep,
                shift_labels=packed.labels,
                fused_lm_head=True,
                **self._image_inputs(packed, **images),
                **extra,
            )
        return (
            *(
                self._unpacked(values, packed, rows, completion_tokens)
                for values in (outputs.log_probs, outputs.entropy)
            ),
            outputs.aux_loss,
        )

    @staticmethod
    def _unpacked(values: torch.Tensor | None, packed: Pack, rows: int, completion_tokens: int) -> Any:
        if values is None:
            return None
        scored = values[0, : len(packed.places[0])]
        grid = values.new_zeros((rows, completion_tokens)).index_put(packed.places, scored)
        return grid if len(scored) else grid + 0 * values.sum()

    def _image_inputs(
        self, packed: Pack, pixel_values: torch.Tensor | None, image_grid_thw: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The model's images. The tower's output where it is frozen: computed once per image and rollout batch."""
        device = packed.input_ids.device
        if pixel_values is None or (not len(pixel_values) and not pixel_values.is_floating_point()):
            return self._no_images(pixel_values is not None, device)
        if pixel_values.is_floating_point():  # a batch that was not collected here, such as a parity probe
            if image_grid_thw is None:
                return {"pixel_values": pixel_values[packed.tiles]}
            patches = pixel_values.split(image_grid_thw.prod(-1).tolist())
            return {
                "pixel_values": _joined(patches, packed.tiles),
                "image_grid_thw": image_grid_thw[packed.tiles],
            }
        if self._tiles is None:
            raise RuntimeError(
                "tile numbers without a store: images come from _generate_and_score_completions"
            )
        if self._frozen_tower():
            tower = _core_of(self.accelerator.unwrap_model(self.model)).model.tower_features
            return {"tower_features": self._tiles.features(tower, packed.tiles, device)}
        return self._tiles.images(packed.tiles, device)

    def _no_images(self, cut_from_images: bool, device: torch.device) -> dict[str, torch.Tensor]:
        """No tile, which runs a blank one: beside images in this batch as TRL's pass does, or on another rank's."""
        if not cut_from_images and self.accelerator.num_processes == 1:
            return {}
        nothing = no_images(_core_of(self.accelerator.unwrap_model(self.model)).config)
        return {name: value.to(device) for name, value in nothing.items()}

    def _frozen_tower(self) -> bool:
        plugin = self.accelerator.state.deepspeed_plugin
        if plugin is not None and plugin.zero_stage == 3:
            return False  # its ranks gather weights in step, so each pass runs the tower on every rank
        core = _core_of(self.accelerator.unwrap_model(self.model))
        return not any(parameter.requires_grad for parameter in core.model.vision_tower.parameters())

    # Packs and their backward passes

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        """TRL's loss of the micro-batch, pack by pack: all but the last have had their backward pass."""
        if self.prefix == "stock" or not torch.is_grad_enabled():
            return super()._compute_loss(model, inputs)
        packs = self._packs(inputs)
        done: Any = 0.0
        with self._corrections_to_come(inputs):
            for part, weight in packs[:-1]:
                with self._gradients_held_back(model):
                    loss = self._loss_of(model, part) * weight
                    deepspeed = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                    with torch.autocast(loss.device.type, enabled=False):
                        self.accelerator.backward(loss, **deepspeed)
                done = done + loss.detach()
            part, weight = packs[-1]
            return self._loss_of(model, part) * weight + done

    def _loss_of(self, model: Any, part: dict[str, Any]) -> torch.Tensor:
        if self._correction is None:
            return super()._compute_loss(model, part)
        self._scored = {**part}
        try:
            return super()._compute_loss(model, self._scored)
        finally:
            self._scored = None

    @contextmanager
    def _corrections_to_come(self, inputs: dict[str, Any]) -> Iterator[None]:
        """TRL's loss reads `importance_sampling_ratio` after its pass: of a batch without one it is made in between."""
        wanted = self.use_vllm and self.vllm_importance_sampling_correction
        if not wanted or "importance_sampling_ratio" in inputs:
            yield
            return
        self._correction = Correction(
            self.vllm_importance_sampling_mode,
            self.vllm_importance_sampling_clip_min,
            self.vllm_importance_sampling_clip_max,
        )
        try:
            yield
            for name, figure in self._correction.statistics(self.accelerator.gather).items():
                self._metrics["train"][name].append(figure)
        finally:
            self._correction = None

    def _correct(self, part: dict[str, Any], logps: torch.Tensor) -> None:
        assert self._correction is not None
        mask = part["completion_mask"] * part.get("tool_mask", 1)
        part["importance_sampling_ratio"] = self._correction.ratio(
            logps, part["sampling_per_token_logps"], mask
        )

    def _packs(self, inputs: dict[str, Any]) -> list[tuple[dict[str, Any], float]]:
        """The micro-batch cut by tokens, each part with the weight that makes the sum the loss of the whole."""
        rows = self._rows(inputs)
        width = inputs["prompt_ids"].shape[1] + inputs["completion_ids"].shape[1]
        sizes = self._plan(rows, width) if self._additive else [len(rows)]
        if len(sizes) == 1:
            return [(inputs, 1.0)]
        out, start = [], 0
        for size in sizes:
            # dapo divides a sum by the whole batch's tokens; grpo (gspo too) takes the mean over rows
            weight = 1.0 if self.loss_type == "dapo" else size / len(rows)
            out.append((_take(inputs, range(start, start + size)), weight))
            start += size
        return out

    @property
    def _additive(self) -> bool:
        """Whether the loss is a weighted sum of the losses of parts; the others run as one pack."""
        if self._entropy_bonus_enabled or self.top_entropy_quantile < 1.0:
            return False
        return self.loss_type == "grpo" or (self.loss_type == "dapo" and not self.aux_loss_enabled)

    def _rows(self, inputs: dict[str, Any]) -> list[Row]:
        pixels, ids = inputs.get("pixel_values"), inputs["prompt_ids"]
        counts = inputs.get("num_tiles") or inputs.get("num_images") or [0] * len(ids)
        numbers = _numbers(pixels) if pixels is not None else range(sum(counts))
        return rows_of(
            torch.cat([ids, inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].shape[1],
            _split(numbers, counts),
        )

    def _plan(self, rows: Sequence[Row], width: int) -> list[int]:
        """Rows of each pack, in order. All ranks cut alike, as they run and reduce in step."""
        budget = self.token_budget or self.budget_rows * width
        sizes, start = [], 0
        while start < len(rows):
            size = self._smallest(fitting(rows[start:], budget))
            sizes.append(size)
            start += size
        return sizes

    def _smallest(self, count: int) -> int:
        if self.accelerator.num_processes == 1:
            return count
        smallest = torch.tensor(count, device=self.accelerator.device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        return int(smallest)

    @contextmanager
    def _gradients_held_back(self, model: Any) -> Iterator[None]:
        """Gradients of the backward passes inside wait for the next one: no step, and DDP reduces nothing."""
        state = self.accelerator.gradient_state
        synchronised = state.sync_gradients
        state._set_sync_gradients(False)
        try:
            with self.accelerator.no_sync(model):
                yield
        finally:
            state._set_sync_gradients(synchronised)


def _core_of(model: Any) -> Any:
    """The native core inside a LoRA model, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _numbers(pixel_values: torch.Tensor) -> Sequence[int]:
    """Tile numbers; pixels are numbered in order."""
    if pixel_values.is_floating_point():
        return range(len(pixel_values))
    return pixel_values.flatten().tolist()


def _split(values: Sequence[int], counts: Sequence[int]) -> list[Sequence[int]]:
    ends = [sum(counts[: index + 1]) for index in range(len(counts))]
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]


def _shuffled_groups(rows: Sequence[Row]) -> list[int]:
    """Row numbers, group by group, the groups in an order drawn from torch's generator."""
    groups: dict[Any, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row.group, []).append(index)
    members = list(groups.values())
    return [row for group in torch.randperm(len(members)).tolist() for row in members[group]]


def _take(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
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
