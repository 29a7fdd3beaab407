"""Output of `posttrain core new`: parameters per part, and disk space."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.checkpoint.new import Plan

_LANGUAGE_MODELS = {"2b": "Qwen3-1.7B", "8b": "Qwen3-8B", "a3b": "Qwen3-30B-A3B"}


def parameter_table(plan: Plan) -> Any:
    """A rich table with one row per part of the core."""
    from rich.table import Table

    counts, text = plan.parameters, plan.blueprint.config.text_config
    tied = ", tied" if plan.blueprint.config.tie_word_embeddings else " and output layer"
    model = _LANGUAGE_MODELS.get(plan.size)
    lines = [
        ("tower", counts.tower),
        ("adapter", counts.adapter),
        ("language model without embeddings", counts.language_model),
        (f"embeddings{tied}", counts.embeddings),
        (f"language model{f' ({model})' if model else ''}", counts.language_model_total),
    ]
    if counts.idle_experts:
        visited = f"{text.num_experts_per_tok} of {text.num_experts} experts"
        lines.append((f"  of it active per token ({visited})", counts.activated))
    table = Table(title=f"parameters, size {plan.size}", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("", justify="right")
    for name, number in lines:
        table.add_row(name, f"{number:,}", _short(number))
    table.add_section()
    table.add_row("total", f"{counts.total:,}", _short(counts.total))
    return table


def disk_text(plan: Plan) -> str:
    """Disk space: of the weights, needed to write them, and free."""
    dtype = str(plan.blueprint.config.dtype).removeprefix("torch.")
    return (
        f"weights {_gigabytes(plan.weight_bytes)} in {dtype}; takes {_gigabytes(plan.disk_bytes)} of disk while it is "
        f"written, {_gigabytes(plan.free_bytes)} are free"
    )


def tokenizer_text(plan: Plan) -> str:
    """A line about the tokenizer that replaces the released one."""
    tokenizer, image = plan.blueprint.tokenizer, plan.blueprint.config.image_token_id
    padded = ", padded to the released vocabulary," if plan.size in _LANGUAGE_MODELS else ""
    return (
        f"random weights; a word-level tokenizer{padded} replaces the released one: {len(tokenizer):,} tokens, "
        f"<IMG_CONTEXT> has id {image}"
    )


def _short(number: int) -> str:
    return f"{number / 1e9:.2f}B" if number >= 1e9 else f"{number / 1e6:.1f}M"


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
