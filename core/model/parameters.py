"""How many parameters a core has, part by part, from its configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from core.model.configuration import SailVL2Config

EXPERTS = ".mlp.experts."


@dataclass(frozen=True)
class Parameters:
    """Parameters of a core. The language model's are counted as Qwen3's authors do: with and without embeddings."""

    tower: int
    adapter: int
    language_model: int
    """Without the embeddings and the output layer."""
    embeddings: int
    """Input embeddings and, where it is not tied to them, the output layer."""
    idle_experts: int
    """Parameters of the experts that a token does not visit; 0 for a dense model."""

    @property
    def language_model_total(self) -> int:
        """The language model with its embeddings."""
        return self.language_model + self.embeddings

    @property
    def total(self) -> int:
        """All parts; a tied output layer counts once."""
        return self.tower + self.adapter + self.language_model_total

    @property
    def activated(self) -> int:
        """What one token makes use of in the language model, embeddings included."""
        return self.language_model_total - self.idle_experts


def empty_model(config: SailVL2Config) -> Any:
    """The model of a configuration on the meta device: names, shapes and types, no memory."""
    import torch

    from core.model.modeling import SailVL2ForConditionalGeneration

    with torch.device("meta"):
        model = SailVL2ForConditionalGeneration(config)
    model.tie_weights()
    dtype: Any = config.dtype or "float32"  # a name, or torch's own
    return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def count(config: SailVL2Config) -> Parameters:
    """The parameters of a core with this configuration."""
    from core.training.learner import module_of

    counts = dict.fromkeys(("tower", "adapter", "language_model"), 0)
    embeddings = experts = 0
    for name, parameter in empty_model(config).named_parameters():
        if name == "lm_head.weight" or name.endswith(".embed_tokens.weight"):
            embeddings += parameter.numel()
        else:
            counts[module_of(name)] += parameter.numel()
        if EXPERTS in name:
            experts += parameter.numel()
    text = config.text_config
    idle = experts - experts * text.num_experts_per_tok // text.num_experts if experts else 0
    return Parameters(**counts, embeddings=embeddings, idle_experts=idle)
