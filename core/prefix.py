"""Attention over one packed row in which the completions of a group share their prompt's keys and values.

The row is [prompt, its completions, next prompt, its completions, ...] without padding. A token sees its own
segment up to itself and, in a completion, the whole prompt of its group. transformers calls the function here by
the name `SHARED_PREFIX`; a forward pass without a `prefix` runs plain sdpa.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

SHARED_PREFIX = "shared_prefix"


@dataclass(frozen=True)
class PrefixGroup:
    """One prompt and its completions, lengths in tokens."""

    prompt: int
    completions: tuple[int, ...]


@dataclass(frozen=True)
class PrefixLayout:
    """What lies where in a packed row.

    >>> layout = PrefixLayout((PrefixGroup(5, (2, 3)), PrefixGroup(4, (1,))))
    >>> layout.tokens, list(layout.segments()), list(layout.shared())
    (15, [(0, 5), (5, 7), (7, 10), (10, 15)], [(0, 5, 10)])
    """

    groups: tuple[PrefixGroup, ...]

    @property
    def tokens(self) -> int:
        """Length of the row."""
        return sum(group.prompt + sum(group.completions) for group in self.groups)

    def segments(self) -> Iterator[tuple[int, int]]:
        """(start, end) of what is causal within itself: prompts and completions; a prompt's only one joins it."""
        start = 0
        for group in self.groups:
            lengths = [length for length in group.completions if length]
            parts = [group.prompt + sum(lengths)] if len(lengths) == 1 else [group.prompt, *lengths]
            for length in parts:
                yield start, start + length
                start += length

    def shared(self) -> Iterator[tuple[int, int, int]]:
        """(prompt start, prompt end, end of its last completion) of every group of several completions."""
        start = 0
        for group in self.groups:
            middle = start + group.prompt
            end = middle + sum(group.completions)
            if sum(length > 0 for length in group.completions) > 1:
                yield start, middle, end
            start = end


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefix: PrefixLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, tokens, dim) in, (1, tokens, heads, dim) and None out.

    With `prefix` the row is packed as it says and `attention_mask` is not looked at. Raises ValueError for
    attention dropout or a sliding window there.
    """
    if prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout or kwargs.get("sliding_window"):
        raise ValueError(
            f"attention dropout {dropout}, sliding window {kwargs.get('sliding_window')}: the shared-prefix pass has "
            "neither; set learner.prefix=stock"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as sdpa under autocast does
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if device == "cpu":
        return _Merged.apply(query, key, value, prefix, scale), None
    return _concatenated(query, key, value, prefix, scale), None


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)


class _Merged(torch.autograd.Function):
    """Two flash-attention parts, own segment and prompt, put together by their log-sum-exps.

    The prompt's keys are read where they lie: neither repeated for each completion nor padded. In the backward
    pass each part gets the merged output and log-sum-exp, with which the kernel's gradients of a part are the
    gradients of the whole (as in ring attention, arXiv:2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any, query: Any, key: Any, value: Any, layout: PrefixLayout, scale: float
    ) -> torch.Tensor:
        _, heads, tokens, width = query.shape
        rows = query.new_empty(1, tokens, heads, width)
        out = rows.transpose(1, 2)
        lse = query.new_empty((1, heads, tokens), dtype=torch.float32)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        for start, end in layout.segments():
            own = slice(start, end)
            out[:, :, own], lse[:, :, own] = flash(
                query[:, :, own], key[:, :, own], value[:, :, own], is_causal=True, scale=scale
            )
        for start, middle, end in layout.shared():
            prompt, own = slice(start, middle), slice(middle, end)
            seen, seen_lse = flash(query[:, :, own], key[:, :, prompt], value[:, :, prompt], scale=scale)
            total = torch.logaddexp(lse[:, :, own], seen_lse)
            share = (lse[:, :, own] - total).exp().unsqueeze(-1)
            out[:, :, own] = torch.lerp(seen.float(), out[:, :, own].float(), share)
            lse[:, :, own] = total
        ctx.save_for_backward(query, key, value, rows, lse)
        ctx.layout, ctx.scale = layout, scale
        return rows

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, rows, lse = ctx.saved_tensors
        out, grad = rows.transpose(1, 2), grads[0].transpose(1, 2)
        dq, dk, dv = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

        def part(own: slice, seen: slice, causal: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            return flash(
                grad[:, :, own],
                query[:, :, own],
                key[:, :, seen],
                value[:, :, seen],
                out[:, :, own],
                lse[:, :, own],
                0.0,
                causal,
                scale=ctx.scale,
            )

        for start, end in ctx.layout.segments():
            own = slice(start, end)
            dq[:, :, own], dk[:, :, own], dv[:, :, own] = part(own, own, True)
        for start, middle, end in ctx.layout.shared():
            prompt, own = slice(start, middle), slice(middle, end)
            more_q, more_k, more_v = part(own, prompt, False)
            dq[:, :, own] += more_q
            dk[:, :, prompt] += more_k
            dv[:, :, prompt] += more_v
        return dq, dk, dv, None, None


def _concatenated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PrefixLayout, scale: float
) -> torch.Tensor:
    """The same by sdpa alone, for devices whose kernels keep their log-sum-exp to themselves.

    Each completion attends to the concatenation of its prompt's keys and its own, causal from the lower right.
    """
    parts, start = [], 0
    for group in layout.groups:
        prompt = slice(start, start + group.prompt)
        parts.append(
            scaled_dot_product_attention(
                query[:, :, prompt], key[:, :, prompt], value[:, :, prompt], is_causal=True, scale=scale
            )
        )
        start = prompt.stop
        for length in group.completions:
            if not length:
                continue
            own = slice(start, start + length)
            keys = torch.cat([key[:, :, prompt], key[:, :, own]], dim=2)
            values = torch.cat([value[:, :, prompt], value[:, :, own]], dim=2)
            mask: Any = causal_lower_right(length, group.prompt + length)
            parts.append(
                scaled_dot_product_attention(query[:, :, own], keys, values, attn_mask=mask, scale=scale)
            )
            start = own.stop
    return torch.cat(parts, dim=2).transpose(1, 2)
