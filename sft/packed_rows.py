"""Packs as model inputs: samples are concatenated in one row, and each attends only to itself.

Axes: T tokens of a pack, S samples. Positions restart at each sample and attention stays within it, so a sample's
logits are the same as in a row of its own. Lengths are passed in transformers' arguments for flash attention with
variable lengths; sdpa uses `packed_sdpa`. Measured for sdpa on one CPU thread, forward and backward, for 32 samples of
about 50 tokens and for 16 of 50 to 800 tokens: a loop over the samples takes 15 and 330 ms; samples of similar length
padded into batches 22 and 405 ms; all padded 52 and 633 ms; transformers' block mask over the whole row (the default
for restarting positions) 196 and 5,300 ms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sft.data import IGNORED, Lesson, images_of
from sft.packing import Plan

PACKED_SDPA = "packed_sdpa"
"""Name of the attention function in transformers' AttentionInterface."""


class PackedCollator:
    """Packs, by index in the plan -> one row: input_ids, labels, position_ids (1, T), cu_seq_lens (S + 1).

    `sample_lengths` (S) are the samples' lengths as numbers: reading them from a GPU would make every layer wait.

    `keep` (K,) are the positions that predict a labelled token and `shift_labels` (1, K) are those tokens. Only these
    positions reach the output layer, because without a GPU it scores every position it receives (TRL 1.16).
    The images are those of all samples in order. A pack without images gets `no_images` if given
    (core.model.modeling.no_images). The core then runs a blank image times zero, so that the tower and the adapter
    get a gradient (of zeros) on every rank in every step; ZeRO-2 and ZeRO-3 wait for it.
    An empty pack, which occurs if an update has fewer rows than packs, holds two padding tokens without labels.
    """

    def __init__(
        self,
        lessons: Sequence[Lesson],
        plan: Plan,
        pad_token_id: int,
        no_images: Mapping[str, Any] | None = None,
    ) -> None:
        self.lessons, self.plan, self.pad_token_id, self.no_images = lessons, plan, pad_token_id, no_images

    def __call__(self, examples: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        (example,) = examples
        pack = self.plan[example["pack"]]
        rows = [self.lessons[row] for row in pack]
        for row, lesson in zip(pack, rows, strict=True):
            if len(lesson["input_ids"]) != (planned := int(self.plan.sizes[row].sum())):
                raise ValueError(
                    f"row {row} has {len(lesson['input_ids'])} tokens, but {planned} were counted: the data or "
                    "the processor changed after the plan was made; start the stage again"
                )
        return pack_rows(rows, self.pad_token_id, self.no_images)


def pack_rows(
    rows: Sequence[Lesson], pad_token_id: int, no_images: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """One packed row of these lessons, see `PackedCollator`."""
    import torch

    blank = torch.full((2,), pad_token_id)
    samples = rows or [{"input_ids": blank, "labels": torch.full_like(blank, IGNORED), "pixel_values": None}]
    labels = [row["labels"].clone() for row in samples]
    for label in labels:
        label[0] = IGNORED  # otherwise the previous sample's last token would have to predict it
    joined = torch.cat(labels)
    targets = (joined != IGNORED).nonzero()[:, 0]
    # Without labels, keep one unlabelled position: it gives a loss of 0 with gradients.
    keep = targets - 1 if len(targets) else torch.zeros(1, dtype=torch.long)
    lengths = torch.tensor([len(row["input_ids"]) for row in samples])
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    batch: dict[str, Any] = {
        "input_ids": torch.cat([row["input_ids"] for row in samples])[None],
        "labels": joined[None],  # transformers' trainer requires labels; the loss uses shift_labels
        "keep": keep,
        "shift_labels": joined[targets if len(targets) else keep][None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths.tolist()])[None],
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
        "sample_lengths": tuple(lengths.tolist()),
    }
    return batch | (images_of(samples) or dict(no_images or {}))


def attend_within_samples(model: Any) -> None:
    """Make the core's language model attend within the samples of packed rows, and return only scored positions.

    Flash attention uses the lengths from the collator directly; other implementations are replaced by `packed_sdpa`.
    """
    from transformers import AttentionInterface

    from core.training.kept import take_keep

    take_keep(model)
    AttentionInterface.register(PACKED_SDPA, packed_sdpa)
    if "flash" not in model.config.text_config._attn_implementation:
        model.set_attn_implementation({"text_config": PACKED_SDPA})


def packed_sdpa(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    *,
    sample_lengths: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[Any, None]:
    """Causal attention within each sample of a packed row: (1, heads, T, dim) -> (1, T, heads, dim).

    It needs no mask and computes no scores between samples: the cost is the sum of the squared lengths, not the square
    of their sum. Raises ValueError without the samples' lengths, or for several rows.
    """
    import torch
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if sample_lengths is None or attention_mask is not None or query.shape[0] != 1:
        raise ValueError(
            f"packed_sdpa reads one packed row with sample_lengths and no mask, got {query.shape[0]} rows; "
            "other batches need attn_implementation='sdpa'"
        )
    # One split instead of a slice per sample: its backward pass joins the gradients once.
    parts = (states.split(list(sample_lengths), dim=2) for states in (query, key, value))
    samples = [
        sdpa_attention_forward(module, q, k, v, None, **kwargs)[0] for q, k, v in zip(*parts, strict=True)
    ]
    return torch.cat(samples, dim=1), None
