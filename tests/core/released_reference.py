"""A random checkpoint in the released SAIL-VL2 layout, and what that checkpoint computes, in plain torch.

Nothing here comes from `core` or from a model class of transformers: the tests compare those with this file.
Behaviours of the released code (SAIL-VL2-2B, remote code of September 2025) that matter here:

* `select_layer` indexes the outputs of the tower's blocks; -1 alone means the last one after `post_trunk_norm`.
* `lm_head.weight` is stored even where the embeddings are tied.
* the image processor's own `max_dynamic_patch` (preprocessor_config.json) differs from config.json's.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>"),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>"),
    *("<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<tool_response>"),
    *("</tool_response>", "<think>", "</think>", "<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"),
    *("<ref>", "</ref>", "<box>", "</box>"),
)
"""The added tokens of the released tokenizer in their order; those of MARKUP are not special."""
MARKUP = frozenset(SPECIAL_TOKENS[14:26])
MERGES = [("h", "e"), ("t", "he"), ("i", "n"), ("o", "u"), ("Ġ", "the")]
FIRST_ADDED_ID = 256 + len(MERGES)
IDS = {token: FIRST_ADDED_ID + place for place, token in enumerate(SPECIAL_TOKENS)}
VOCABULARY = 320
"""Rows of the embedding: as in the released models, more than the tokenizer has tokens."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message['role'] != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a tiny model.<|im_end|>' }}{%- endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}{%- else -%}"
    "{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- else -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}{{ '<|im_end|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
"""As the released ones: no newline between turns, a default system prompt, `<image>` for an image."""


@dataclass(frozen=True)
class Sizes:
    """Shapes in which no two axes of a tensor are of one length, so that a transposition cannot hide."""

    vision_hidden: int = 32
    vision_mlp: int = 56
    vision_blocks: int = 5
    vision_heads: int = 4
    image_px: int = 56
    patch_px: int = 14
    hidden: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 88
    expert_mlp: int = 40
    experts_per_token: int = 2


def write_released(
    folder: Path,
    *,
    seed: int = 0,
    experts: int = 0,
    tied: bool = True,
    lm_head: bool = True,
    qwen2_label: bool = False,
    select_layer: int = -1,
    dtype: str = "float32",
    shards: int = 1,
    use_thumbnail: bool = True,
    min_dynamic_patch: int = 1,
    max_dynamic_patch: int = 12,
    processor_max_dynamic_patch: int = 10,
    chat_template: str = CHAT_TEMPLATE,
    sizes: Sizes | None = None,
    config_changes: dict[str, Any] | None = None,
) -> Path:
    """Write a random checkpoint in the released layout to `folder` and return it.

    `experts` of 0 is the dense Qwen3, more a Qwen3-MoE with a tensor per expert. `lm_head=False` leaves the
    output layer out, which only `tied` embeddings can do without; `qwen2_label` writes the older
    configurations that call a Qwen3 a Qwen2. `config_changes` are laid over config.json's own keys.
    """
    if not (tied or lm_head):
        raise ValueError("a checkpoint without tied embeddings needs its lm_head")
    sizes = sizes or Sizes()
    folder.mkdir(parents=True)
    config = {
        **_config(sizes, dtype),
        "llm_config": _llm_config(sizes, experts, tied, qwen2_label, dtype),
        "max_dynamic_patch": max_dynamic_patch,
        "min_dynamic_patch": min_dynamic_patch,
        "select_layer": select_layer,
        "use_thumbnail": use_thumbnail,
        **(config_changes or {}),
    }
    _write_json(folder / "config.json", config)
    state = random_state(sizes, seed=seed, experts=experts, tied=tied, lm_head=lm_head)
    _write_shards(folder, {name: value.to(getattr(torch, dtype)) for name, value in state.items()}, shards)
    _write_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    _write_json(folder / "preprocessor_config.json", _processor(sizes, processor_max_dynamic_patch))
    ends = [IDS["<|im_end|>"], IDS["<|endoftext|>"]]
    _write_json(
        folder / "generation_config.json",
        {"_from_model_config": True, "eos_token_id": ends, "pad_token_id": IDS["<|endoftext|>"]},
    )
    (folder / "LICENSE").write_text("Apache License, Version 2.0: a tiny random checkpoint\n")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nA tiny random checkpoint.\n")
    for module in ("configuration_sailvl", "modeling_sailvl", "processing_sailvl", "image_processing_sailvl"):
        (folder / f"{module}.py").write_text(f'raise RuntimeError("remote code was executed: {module}")\n')
    return folder


def _config(sizes: Sizes, dtype: str) -> dict[str, Any]:
    """The keys of config.json that the arguments of `write_released` do not change."""
    return {
        "architectures": ["SAILVLModel"],
        "auto_map": {
            "AutoConfig": "configuration_sailvl.SAILVLConfig",
            "AutoModel": "modeling_sailvl.SAILVLModel",
            "AutoModelForCausalLM": "modeling_sailvl.SAILVLModel",
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": sizes.image_px,
        "model_type": "sailvl",
        "pad2square": False,
        "ps_version": "v2",
        "template": "univl-chat",
        "torch_dtype": dtype,
        "transformers_version": None,
        "use_backbone_lora": 0,
        "use_llm_lora": 0,
        "vision_config": _vision_config(sizes, dtype),
    }


def _processor(sizes: Sizes, max_dynamic_patch: int) -> dict[str, Any]:
    """preprocessor_config.json."""
    return {
        "auto_map": {
            "AutoImageProcessor": "image_processing_sailvl.SAILVLImageProcessor",
            "AutoProcessor": "processing_sailvl.SAILVLProcessor",
        },
        "max_dynamic_patch": max_dynamic_patch,
        "patch_size": sizes.patch_px,
        "image_size": sizes.image_px,
        "use_msac": False,
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "pad_input": True,
    }


def read_released(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the tensors, of all shards, of a checkpoint in the released layout."""
    state: dict[str, torch.Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        state |= load_file(shard)
    return json.loads((folder / "config.json").read_text()), state


class Drawn:
    """Random tensors; scaled so that every one of them moves the logits."""

    def __init__(self, seed: int) -> None:
        self.random = torch.Generator().manual_seed(seed)

    def matrix(self, rows: int, columns: int, gain: float = 1.0) -> torch.Tensor:
        return torch.randn(rows, columns, generator=self.random) * gain * columns**-0.5

    def vector(self, length: int, mean: float = 0.0) -> torch.Tensor:
        return mean + 0.2 * torch.randn(length, generator=self.random)


def random_state(
    sizes: Sizes, *, seed: int, experts: int, tied: bool, lm_head: bool
) -> dict[str, torch.Tensor]:
    """Random float32 tensors by their released names."""
    draw = Drawn(seed)
    state = _tower_state(sizes, draw)
    embedding = draw.matrix(VOCABULARY, sizes.hidden)
    state["language_model.model.embed_tokens.weight"] = embedding
    for layer in range(sizes.layers):
        state |= _layer_state(sizes, draw, layer, experts)
    state["language_model.model.norm.weight"] = draw.vector(sizes.hidden, 1.0)
    output = embedding.clone() if tied else draw.matrix(VOCABULARY, sizes.hidden, gain=3.0)
    return {**state, "language_model.lm_head.weight": output} if lm_head else state


def _tower_state(sizes: Sizes, draw: Drawn) -> dict[str, torch.Tensor]:
    """The tower and the adapter."""
    matrix, vector = draw.matrix, draw.vector
    wide, deep = sizes.vision_hidden, sizes.vision_mlp
    patches = (sizes.image_px // sizes.patch_px) ** 2
    patch = "vision_model.preprocessor."
    state = {
        f"{patch}patchifier.proj.weight": matrix(wide, 3 * sizes.patch_px**2).reshape(
            wide, 3, sizes.patch_px, sizes.patch_px
        ),
        f"{patch}patchifier.proj.bias": vector(wide),
        f"{patch}patchifier.norm.weight": vector(wide, 1.0),
        f"{patch}pos_embed": 0.5 * torch.randn(1, patches, wide, generator=draw.random),
    }
    for block in range(sizes.vision_blocks):
        at = f"vision_model.trunk.blocks.{block}."
        state |= {
            f"{at}attn.qkv.weight": matrix(3 * wide, wide),
            f"{at}attn.proj.weight": matrix(wide, wide),
            f"{at}norm_1.weight": vector(wide, 1.0),
            f"{at}norm_2.weight": vector(wide, 1.0),
            f"{at}mlp.fc1.weight": matrix(deep, wide),
            f"{at}mlp.fc2.weight": matrix(wide, deep),
            f"{at}mlp.fc3.weight": matrix(deep, wide),
        }
    state["vision_model.trunk.post_trunk_norm.weight"] = vector(wide, 1.0)
    hidden = sizes.hidden
    state |= {
        "mlp1.0.weight": vector(4 * wide, 1.0),
        "mlp1.0.bias": vector(4 * wide),
        "mlp1.1.weight": matrix(hidden, 4 * wide),
        "mlp1.1.bias": vector(hidden),
        "mlp1.3.weight": matrix(hidden, hidden),
        "mlp1.3.bias": vector(hidden),
    }
    return state


def _layer_state(sizes: Sizes, draw: Drawn, layer: int, experts: int) -> dict[str, torch.Tensor]:
    """One layer of the language model, dense or with experts."""
    matrix, vector, hidden = draw.matrix, draw.vector, sizes.hidden
    at = f"language_model.model.layers.{layer}."
    state = {
        f"{at}input_layernorm.weight": vector(hidden, 1.0),
        f"{at}post_attention_layernorm.weight": vector(hidden, 1.0),
        f"{at}self_attn.q_proj.weight": matrix(sizes.heads * sizes.head_dim, hidden),
        f"{at}self_attn.k_proj.weight": matrix(sizes.kv_heads * sizes.head_dim, hidden),
        f"{at}self_attn.v_proj.weight": matrix(sizes.kv_heads * sizes.head_dim, hidden),
        f"{at}self_attn.o_proj.weight": matrix(hidden, sizes.heads * sizes.head_dim),
        f"{at}self_attn.q_norm.weight": vector(sizes.head_dim, 1.0),
        f"{at}self_attn.k_norm.weight": vector(sizes.head_dim, 1.0),
    }
    mlps = [f"{at}mlp.experts.{expert}." for expert in range(experts)] or [f"{at}mlp."]
    inner = sizes.expert_mlp if experts else sizes.mlp
    if experts:
        state[f"{at}mlp.gate.weight"] = matrix(experts, hidden)
    for mlp in mlps:
        state |= {
            f"{mlp}gate_proj.weight": matrix(inner, hidden),
            f"{mlp}up_proj.weight": matrix(inner, hidden),
            f"{mlp}down_proj.weight": matrix(hidden, inner),
        }
    return state


@dataclass
class Computed:
    """What a released checkpoint computes on the way from tiles and token ids to logits."""

    tower: list[torch.Tensor]
    """(tiles, patches, vision hidden) each: the embedded patches, then every block's output."""
    tower_normed: torch.Tensor
    image_features: torch.Tensor
    """(tiles, tokens per tile, hidden): the adapter's output."""
    hidden: list[torch.Tensor]
    """(rows, tokens, hidden) each: the embeddings, then every layer's output."""
    hidden_normed: torch.Tensor
    logits: torch.Tensor
    """(rows, tokens, vocabulary)."""


@torch.no_grad()
def compute(
    config: dict[str, Any],
    state: dict[str, torch.Tensor],
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
) -> Computed:
    """Run `input_ids` (rows, tokens), without padding, and the tiles of its image tokens, in reading order."""
    vision, llm = config["vision_config"], config["llm_config"]
    tower = _tower(vision, state, pixel_values)
    normed = _rms_norm(tower[-1], state["vision_model.trunk.post_trunk_norm.weight"], vision["rms_norm_eps"])
    layer = config["select_layer"]
    seen = normed if layer == -1 else tower[1:][layer]
    features = _adapter(state, _merge_two_by_two(seen))

    embeddings = state["language_model.model.embed_tokens.weight"]
    x = embeddings[input_ids]
    x[input_ids == IDS["<IMG_CONTEXT>"]] = features.reshape(-1, features.shape[-1])
    hidden = [x]
    for index in range(llm["num_hidden_layers"]):
        hidden.append(_decoder_layer(llm, state, f"language_model.model.layers.{index}.", hidden[-1]))
    last = _rms_norm(hidden[-1], state["language_model.model.norm.weight"], llm["rms_norm_eps"])
    output = embeddings if llm["tie_word_embeddings"] else state["language_model.lm_head.weight"]
    return Computed(tower, normed, features, hidden, last, last @ output.T)


def continue_greedily(
    config: dict[str, Any],
    state: dict[str, torch.Tensor],
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor,
    tokens: int,
) -> torch.Tensor:
    """The `tokens` likeliest next ids, one after the other, of every row: (rows, tokens).

    Never the image token, which has no tile behind it; no end of turn stops a row.
    """
    ids = input_ids
    for _ in range(tokens):
        logits = compute(config, state, ids, pixel_values).logits[:, -1]
        logits[:, IDS["<IMG_CONTEXT>"]] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids[:, input_ids.shape[1] :]


def _tower(
    vision: dict[str, Any], state: dict[str, torch.Tensor], pixels: torch.Tensor
) -> list[torch.Tensor]:
    eps, heads = vision["rms_norm_eps"], vision["num_attention_heads"]
    at = "vision_model.preprocessor."
    size = vision["patch_size"]
    tiles, channels, height, width = pixels.shape
    # A convolution whose stride is its kernel is a matrix product over flattened patches.
    patches = pixels.reshape(tiles, channels, height // size, size, width // size, size)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(tiles, -1, channels * size * size)
    weight = state[f"{at}patchifier.proj.weight"]
    x = patches @ weight.reshape(len(weight), -1).T + state[f"{at}patchifier.proj.bias"]
    x = _rms_norm(x, state[f"{at}patchifier.norm.weight"], eps) + state[f"{at}pos_embed"]
    outputs = [x]
    for block in range(vision["num_hidden_layers"]):
        at = f"vision_model.trunk.blocks.{block}."
        qkv = _rms_norm(x, state[f"{at}norm_1.weight"], eps) @ state[f"{at}attn.qkv.weight"].T
        q, k, v = (_split_heads(part, heads) for part in qkv.chunk(3, dim=-1))
        x = x + _join_heads(_attention(q, k, v, causal=False)) @ state[f"{at}attn.proj.weight"].T
        normed = _rms_norm(x, state[f"{at}norm_2.weight"], eps)
        x = x + _swiglu(normed, *(state[f"{at}mlp.{name}.weight"] for name in ("fc1", "fc3", "fc2")))
        outputs.append(x)
    return outputs


def _merge_two_by_two(seen: torch.Tensor) -> torch.Tensor:
    """InternVL's second pixel shuffle: four neighbours, row by row, side by side in one token."""
    tiles, patches, hidden = seen.shape
    side = round(patches**0.5)
    grid = seen.reshape(tiles, side, side, hidden)
    corners = [grid[:, row::2, column::2] for row in (0, 1) for column in (0, 1)]
    return torch.cat(corners, dim=-1).reshape(tiles, patches // 4, 4 * hidden)


def _adapter(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    x = centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5)
    x = x * state["mlp1.0.weight"] + state["mlp1.0.bias"]
    x = F.gelu(x @ state["mlp1.1.weight"].T + state["mlp1.1.bias"])
    return x @ state["mlp1.3.weight"].T + state["mlp1.3.bias"]


def _decoder_layer(
    llm: dict[str, Any], state: dict[str, torch.Tensor], at: str, x: torch.Tensor
) -> torch.Tensor:
    eps, heads, kv_heads = llm["rms_norm_eps"], llm["num_attention_heads"], llm["num_key_value_heads"]
    normed = _rms_norm(x, state[f"{at}input_layernorm.weight"], eps)
    q, k, v = (normed @ state[f"{at}self_attn.{name}_proj.weight"].T for name in "qkv")
    q = _rms_norm(_split_heads(q, heads), state[f"{at}self_attn.q_norm.weight"], eps)
    k = _rms_norm(_split_heads(k, kv_heads), state[f"{at}self_attn.k_norm.weight"], eps)
    q, k = (_rotate(part, llm["rope_theta"]) for part in (q, k))
    # Each key head serves the query heads of its group.
    k, v = (part.repeat_interleave(heads // kv_heads, dim=1) for part in (k, _split_heads(v, kv_heads)))
    x = x + _join_heads(_attention(q, k, v, causal=True)) @ state[f"{at}self_attn.o_proj.weight"].T
    normed = _rms_norm(x, state[f"{at}post_attention_layernorm.weight"], eps)
    if f"{at}mlp.gate.weight" in state:
        return x + _mixture_of_experts(llm, state, f"{at}mlp.", normed)
    return x + _swiglu(normed, *(state[f"{at}mlp.{name}_proj.weight"] for name in ("gate", "up", "down")))


def _mixture_of_experts(
    llm: dict[str, Any], state: dict[str, torch.Tensor], at: str, x: torch.Tensor
) -> torch.Tensor:
    shares = torch.softmax(x @ state[f"{at}gate.weight"].T, dim=-1)
    chosen, experts = shares.topk(llm["num_experts_per_tok"], dim=-1)
    if llm["norm_topk_prob"]:
        chosen = chosen / chosen.sum(-1, keepdim=True)
    shares = torch.zeros_like(shares).scatter(-1, experts, chosen)
    mixed = torch.zeros_like(x)
    for expert in range(llm["num_experts"]):  # all of them on every token: slow and without indexing
        weights = (state[f"{at}experts.{expert}.{name}_proj.weight"] for name in ("gate", "up", "down"))
        mixed += shares[..., expert, None] * _swiglu(x, *weights)
    return mixed


def _swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    gated = x @ gate.T
    return (gated * torch.sigmoid(gated) * (x @ up.T)) @ down.T


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def _split_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    rows, tokens, width = x.shape
    return x.reshape(rows, tokens, heads, width // heads).transpose(1, 2)


def _join_heads(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


def _rotate(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary positions from 0: dimension i turns with dimension i + half by position * theta^(-i/half)."""
    tokens, half = x.shape[-2], x.shape[-1] // 2
    angles = torch.arange(tokens)[:, None] * theta ** (-torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _llm_config(sizes: Sizes, experts: int, tied: bool, qwen2_label: bool, dtype: str) -> dict[str, Any]:
    name, model_type = ("Qwen3MoeForCausalLM", "qwen3_moe") if experts else ("Qwen3ForCausalLM", "qwen3")
    if qwen2_label:
        name, model_type = "Qwen2ForCausalLM", "qwen2"
    config = {
        "architectures": [name],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": IDS["<|endoftext|>"],
        "eos_token_id": IDS["<|im_end|>"],
        "pad_token_id": IDS["<|endoftext|>"],
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "hidden_size": sizes.hidden,
        "initializer_range": 0.02,
        "intermediate_size": sizes.mlp,
        "max_position_embeddings": 4096,
        "max_window_layers": sizes.layers,
        "model_type": model_type,
        "num_attention_heads": sizes.heads,
        "num_hidden_layers": sizes.layers,
        "num_key_value_heads": sizes.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": VOCABULARY,
    }
    if experts:
        config |= {
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": sizes.expert_mlp,
            "norm_topk_prob": True,
            "num_experts": experts,
            "num_experts_per_tok": sizes.experts_per_token,
            "output_router_logits": False,
            "router_aux_loss_coef": 0.001,
        }
    return config


def _vision_config(sizes: Sizes, dtype: str) -> dict[str, Any]:
    return {
        "architectures": ["SAILViTModel"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_sailvit.SAILViTConfig",
            "AutoModel": "modeling_sailvit.SAILViTModel",
        },
        "hidden_size": sizes.vision_hidden,
        "image_size": sizes.image_px,
        "intermediate_size": sizes.vision_mlp,
        "model_type": "sailvit",
        "num_attention_heads": sizes.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": sizes.vision_blocks,
        "patch_size": sizes.patch_px,
        "projection_dropout": 0.0,
        "qkv_bias": False,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        "transformers_version": "4.51.0",
        "use_bias": False,
    }


def _write_shards(folder: Path, state: dict[str, torch.Tensor], shards: int) -> None:
    metadata = {"format": "pt"}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata)
        return
    names = list(state)
    homes = {name: f"model-{place % shards + 1:05d}-of-{shards:05d}" for place, name in enumerate(names)}
    for shard in dict.fromkeys(homes.values()):
        held = {name: state[name] for name in names if homes[name] == shard}
        save_file(held, folder / f"{shard}.safetensors", metadata)
    total = sum(value.numel() * value.element_size() for value in state.values())
    weight_map = {name: f"{homes[name]}.safetensors" for name in sorted(names)}
    _write_json(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 256 bytes, a few merges and the released added tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*letters, *("".join(pair) for pair in MERGES)])}
    backend = Tokenizer(BPE(vocabulary, MERGES))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    added = {
        IDS[token]: AddedToken(token, special=token not in MARKUP, normalized=False)
        for token in SPECIAL_TOKENS
    }
    backend.add_tokens(list(added.values()))
    backend.save(str(folder / "tokenizer.json"))
    described = {
        "added_tokens_decoder": {
            str(i): {
                "content": token.content,
                "lstrip": False,
                "normalized": False,
                "rstrip": False,
                "single_word": False,
                "special": token.special,
            }
            for i, token in added.items()
        },
        "additional_special_tokens": list(SPECIAL_TOKENS[1:14]),
        "add_bos_token": False,
        "add_prefix_space": False,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    _write_json(folder / "tokenizer_config.json", described)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
