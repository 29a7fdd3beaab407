"""The shape of a core and its number of parameters: arithmetic over its configuration, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.model.names import Module
from core.model.released_sizes import DEFAULT_VISION, TEXT

if TYPE_CHECKING:
    from core.model.configuration import SailVL2Config

BF16 = 2


@dataclass(frozen=True)
class Parameters:
    """Parameters of a core. As Qwen3's authors do, the language model is counted with and without embeddings."""

    tower: int
    adapter: int
    language_model: int
    """Without the embeddings and the output layer."""
    embeddings: int
    """Input embeddings, plus the output layer if it is not tied to them."""
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
        """Parameters of the language model that one token uses, embeddings included."""
        return self.language_model_total - self.idle_experts


@dataclass(frozen=True)
class CoreShape:
    """The sizes of a core that determine its memory; read from its config.json."""

    image_px: int
    patch_px: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocabulary: int
    tied: bool
    experts: int = 0
    experts_per_token: int = 0
    expert_mlp: int = 0
    vision_bias: bool = False
    """Whether the tower's attention has biases; `vision_mlp_bias`: whether its feed-forward part has."""
    vision_mlp_bias: bool = False
    text_bias: bool = False
    """Whether the language model's attention has biases."""

    @classmethod
    def read(cls, folder: Path) -> CoreShape:
        """The shape of the native core in a folder; its weights are not read."""
        return cls.of(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> CoreShape:
        """The shape in a native core's config.json. Raises KeyError that names a missing key."""
        vision, text = config["vision_config"], config["text_config"]
        return cls(
            image_px=vision["image_size"],
            patch_px=vision["patch_size"],
            vision_hidden=vision["hidden_size"],
            vision_layers=vision["num_hidden_layers"],
            vision_heads=vision["num_attention_heads"],
            vision_mlp=vision["intermediate_size"],
            hidden=text["hidden_size"],
            layers=text["num_hidden_layers"],
            heads=text["num_attention_heads"],
            kv_heads=text["num_key_value_heads"],
            head_dim=text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"],
            mlp=text["intermediate_size"],
            vocabulary=text["vocab_size"],
            tied=bool(text.get("tie_word_embeddings", config.get("tie_word_embeddings", False))),
            experts=text.get("num_experts") or text.get("num_local_experts") or 0,
            experts_per_token=text.get("num_experts_per_tok") or 0,
            expert_mlp=text.get("moe_intermediate_size") or 0,
            vision_bias=bool(vision.get("qkv_bias")),
            vision_mlp_bias=bool(vision.get("mlp_bias")),
            text_bias=bool(text.get("attention_bias")),
        )

    @property
    def patches(self) -> int:
        """Patches of one tile."""
        return (self.image_px // self.patch_px) ** 2

    @property
    def tile_tokens(self) -> int:
        """Language-model tokens of one tile: two by two patches become one."""
        return self.patches // 4

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding; an untied output layer has as many."""
        return self.vocabulary * self.hidden

    def count(self) -> Parameters:
        """Parameters of each part."""
        h, m, t = self.vision_hidden, self.vision_mlp, self.hidden
        tower = (
            (3 * self.patch_px**2 + 1) * h + self.patches * h + 2 * h
        )  # patches, positions, first and last norm
        biases = (4 * h if self.vision_bias else 0) + (2 * m + h if self.vision_mlp_bias else 0)
        tower += self.vision_layers * (4 * h * h + 3 * h * m + 2 * h + biases)
        adapter = 2 * 4 * h + (4 * h + 1) * t + (t + 1) * t
        expert = 3 * t * self.expert_mlp
        feed_forward = self.experts * (expert + t) if self.experts else 3 * t * self.mlp
        layer = t * (2 * self.query + 2 * self.key) + 2 * self.head_dim + 2 * t + feed_forward
        layer += self.query + 2 * self.key + t if self.text_bias else 0
        return Parameters(
            tower=tower,
            adapter=adapter,
            language_model=self.layers * layer + t,
            embeddings=self.embedding * (1 if self.tied else 2),
            idle_experts=self.layers * (self.experts - self.experts_per_token) * expert
            if self.experts
            else 0,
        )

    def parameters(self) -> dict[Module, int]:
        """Parameters of each module; the language model's with its embeddings."""
        counted = self.count()
        return {
            "tower": counted.tower,
            "adapter": counted.adapter,
            "language_model": counted.language_model_total,
        }

    def adapter_parameters(self, rank: int, everywhere: bool) -> int:
        """Parameters of LoRA adapters of this rank on the linear layers of the language model, or `everywhere`.

        A mixture of experts stores a layer's experts as one tensor, which gets no adapter.
        """
        t = self.hidden
        pairs = 2 * (t + self.query) + 2 * (t + self.key)
        pairs += 0 if self.experts else 3 * (t + self.mlp)
        total = self.layers * pairs
        if everywhere:
            h, m = self.vision_hidden, self.vision_mlp
            total += self.vision_layers * (4 * 2 * h + 3 * (h + m)) + (4 * h + t) + 2 * t
        return rank * total

    def cache_token(self, width: int = BF16) -> int:
        """Bytes of one token's keys and values in a server's cache."""
        return 2 * self.layers * self.key * width


SHAPES = {
    size: CoreShape.of({"vision_config": DEFAULT_VISION, "text_config": text}) for size, text in TEXT.items()
}
"""SAIL-VL2-2B, -8B and -A3B: SAIL-ViT-Huge with Qwen3-1.7B, Qwen3-8B and Qwen3-30B-A3B."""


def count(config: SailVL2Config) -> Parameters:
    """The parameters of a core with this configuration."""
    return CoreShape.of(config.to_dict()).count()
