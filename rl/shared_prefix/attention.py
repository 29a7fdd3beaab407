"""Attention over one packed row in which the completions of a group share their prompt's keys and values.

A token attends to its own segment up to itself and, in a completion, to the whole prompt of its group. transformers
calls this function by the name `SHARED_PREFIX` (or `SHARED_PREFIX_FLEX`); a pass without a `prefix` runs plain sdpa.
"""

from functools import lru_cache, partial
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from rl.shared_prefix.layout import PrefixLayout

SHARED_PREFIX = "shared_prefix"
SHARED_PREFIX_FLEX = "shared_prefix_flex"
"""Name of the variant with torch's flex attention: one compiled kernel for the whole row. It needs a GPU, because flex
attention has no backward pass on a CPU."""


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    prefix: PrefixLayout | None = None,
    flex: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, tokens, dim) in, (1, tokens, heads, dim) and None out.

    `prefix` describes the packed row and replaces `attention_mask`. `flex` uses flex attention (arXiv:2412.05496),
    whose mask skips fully masked blocks. With `prefix`, raises ValueError for attention dropout or a sliding window.
    """
    if prefix is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key, value, scale = _checked(query, key, value, scaling, dropout, kwargs)
    if flex:
        return _flex(query, key, value, prefix, scale), None
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    if query.device.type == "cpu":
        return _Merged.apply(query, key, value, prefix, scale), None
    return _concatenated(query, key, value, prefix, scale), None


def _checked(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    dropout: float,
    options: dict[str, Any],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Query, key and value in the data type that sdpa would compute in, and the scale of the scores."""
    if dropout or options.get("sliding_window"):
        raise ValueError(
            f"attention dropout {dropout}, sliding window {options.get('sliding_window')}: the shared-prefix pass "
            "supports neither; set learner.prefix=stock"
        )
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as sdpa under autocast does
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    return query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling


def _flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PrefixLayout, scale: float
) -> torch.Tensor:
    mask, grouped = _block_mask(layout, query.device), query.shape[1] != key.shape[1]
    attend = _compiled(flex_attention)
    return attend(query, key, value, block_mask=mask, scale=scale, enable_gqa=grouped).transpose(1, 2)


@lru_cache(maxsize=2)
def _block_mask(layout: PrefixLayout, device: torch.device) -> Any:
    """Flex attention's mask of a packed row, made once for all layers and passes."""
    tokens = layout.tokens
    return create_block_mask(layout.sees(device), None, None, tokens, tokens, device=str(device))


@lru_cache(maxsize=1)
def _compiled(function: Any) -> Any:
    return torch.compile(function, dynamic=True)


AttentionInterface.register(SHARED_PREFIX, shared_prefix_attention)
AttentionInterface.register(SHARED_PREFIX_FLEX, partial(shared_prefix_attention, flex=True))
for name in (SHARED_PREFIX, SHARED_PREFIX_FLEX):
    AttentionMaskInterface.register(name, sdpa_mask)


class _Merged(torch.autograd.Function):
    """Two flash-attention parts, own segment and prompt, merged by their log-sum-exps.

    No key is copied: each completion reads its prompt's keys in place. In the backward pass each part gets the merged
    output and log-sum-exp. The kernel's gradients of a part are then the gradients of the whole (as in ring
    attention, arXiv:2310.01889).
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
    """Shared-prefix attention with sdpa only, for devices whose kernels return no log-sum-exp.

    Each completion attends to its prompt's keys and its own, concatenated, causal from the lower right.
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
