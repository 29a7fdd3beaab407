"""The shapes of SAIL-VL2's three cores, as transformers configurations. Imports neither transformers nor torch."""

from typing import Any

from core.model.tokenizer import PAD, RELEASED_IDS, RELEASED_VOCABULARY, TURN_END

DEFAULT_VISION = {
    "model_type": "aimv2_vision_model",
    **{"hidden_size": 1536, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 12},
    **{"image_size": 448, "patch_size": 14, "rms_norm_eps": 1e-5, "use_head": False},
}
"""SAIL-ViT-Huge. Source: the released `vision_config` (hidden 1536, 24 blocks, 12 heads, SwiGLU 4096)."""
_QWEN3 = {
    **{"model_type": "qwen3", "vocab_size": RELEASED_VOCABULARY, "head_dim": 128, "rms_norm_eps": 1e-6},
    **{"num_key_value_heads": 8, "max_position_embeddings": 40960},
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
    **{"pad_token_id": RELEASED_IDS[PAD], "eos_token_id": RELEASED_IDS[TURN_END]},
}
TEXT: dict[str, dict[str, Any]] = {
    "2b": _QWEN3
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "tie_word_embeddings": True},
    "8b": _QWEN3
    | {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
    | {"num_attention_heads": 32, "tie_word_embeddings": False},
    "a3b": _QWEN3
    | {"model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48}
    | {"num_attention_heads": 32, "num_key_value_heads": 4, "tie_word_embeddings": False}
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
}
"""Language models of SAIL-VL2-2B, -8B and -A3B: Qwen3-1.7B, Qwen3-8B and Qwen3-30B-A3B. Source: their config.json."""
