"""Attention over one packed row in which the completions of a group share their prompt's keys and values.

The row is [prompt, its completions, next prompt, its completions, ...] without padding. A token sees its own
segment up to itself and, in a completion, the whole prompt of its group. transformers calls the function here by
the name `SHARED_PREFIX` (or `SHARED_PREFIX_FLEX`); a forward pass without a `prefix` runs plain sdpa.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

SHARED_PREFIX = "shared_prefix"
SHARED_PREFIX_FLEX = "shared_prefix_flex"
"""The same with torch's flex attention: one compiled kernel for the whole row. GPU only, as it has no backward on a
CPU."""


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

    def sees(self, device: torch.device | str) -> Callable[..., torch.Tensor]:
        """Whether a query sees a key, both by place in the row: flex attention's `mask_mod`."""
        lengths = [length for group in self.groups for length in (group.prompt, *group.completions)]
        # Numbers that a prompt and its completions share, and 0 for a prompt, else its completion's own.
        group = [number for number, one in enumerate(self.groups) for _ in (0, *one.completions)]
        own = [number for one in self.groups for number in range(len(one.completions) + 1)]

        def per_token(values: list[int]) -> torch.Tensor:
            return torch.tensor(values, device=device).repeat_interleave(torch.tensor(lengths, device=device))

        groups, segments = per_token(group), per_token(own)

        def mask(batch: Any, head: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            within = (segments[key] == 0) | (segments[key] == segments[query])
            return (key <= query) & (groups[key] == groups[query]) & within

        return mask

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
    flex: bool = False,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: (1, heads, tokens, dim) in, (1, tokens, heads, dim) and None out.

    With `prefix` the row is packed as it says and `attention_mask` is not looked at; `flex` takes flex attention
    (arXiv:2412.05496), whose mask skips what no query sees. Raises ValueError for attention dropout or a sliding
    window there.
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
    """The states in the type that sdpa would compute in, and the scale of the scores."""
    if dropout or options.get("sliding_window"):
        raise ValueError(
            f"attention dropout {dropout}, sliding window {options.get('sliding_window')}: the shared-prefix pass has "
            "neither; set learner.prefix=stock"
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
    """Of one packed row, for all layers and passes over it."""
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
