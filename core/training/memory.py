"""The memory that a rank needs to train a core: arithmetic over shapes, without torch. All figures are bytes.

The counts follow the source of transformers, TRL and DeepSpeed tensor by tensor, in the pinned versions.
tests/core/test_memory.py compares them with the tensors that autograd keeps and with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from core.model.names import Module
from core.model.shape import BF16, CoreShape
from core.training.config import LearnerConfig

GIB = 2**30
LIVE = 1_000_000_000
"""DeepSpeed's stage3_max_live_parameters: the number of gathered weights that ZeRO-3 holds at a time."""
HEAD_TOKENS, HEAD_VOCABULARY = 4096, 32768
"""Size of the tile of logits that TRL's fused output layer computes at a time; it never builds the whole matrix."""
HEAD_COPIES = {"cpu": 7, "gpu": 0}
"""float32 copies of a tile in its backward pass: several torch operations on a CPU, one Triton kernel on a GPU."""
FP32 = 4


@dataclass(frozen=True)
class Work:
    """The largest forward-backward pass of one rank."""

    tokens: int
    """Tokens in the packed row."""
    tiles: int = 0
    scored: int | None = None
    """Positions that the output layer scores; None: all."""
    attended: int | None = None
    """Tokens whose keys and values attention keeps. A prompt's count once per completion if attention copies them
    (shared prefix on a GPU). None: each token once."""
    repeats_heads: bool = False
    """Whether keys and values are copied for every query head before attention (shared prefix)."""
    accumulates: bool = True
    """Whether gradients of earlier passes are kept during this pass: several passes per update."""
    reference: bool = False
    """Whether a frozen copy of the policy is loaded (the KL term of full-parameter training)."""


@dataclass(frozen=True)
class Memory:
    """One rank's bytes on its device, by purpose, and on the host."""

    weights: int
    optimizer: int
    """Master weights and AdamW's moments."""
    gradients: int
    activations: int
    """Activations that the forward pass keeps for the backward pass."""
    recomputed: int
    """Activations of one layer of the language model while it is recomputed; 0 without gradient checkpointing."""
    tower: int
    """Activations while the tower's last layer is recomputed. The language model's are freed by then. 0 if the tower is
    frozen, and without gradient checkpointing."""
    head: int
    """The output layer's tile of logits and its gradient in float32."""
    buffers: int
    """Communication buckets, and the copies from which they are filled."""
    step: int
    """Temporary copies in the optimizer step."""
    accumulates: bool
    host: int
    """Offloaded states, gradients included."""
    head_gradient: int
    """Gradient of the output layer's weight, which exists from the start of the backward pass."""
    tied: bool
    """Whether the embedding's gradient is added to `head_gradient` at the end; both and their sum then coexist."""

    @property
    def passing(self) -> int:
        """Most bytes of activations at a time, kept and recomputed."""
        return max(self.activations + self.recomputed, self.tower)

    @property
    def resident(self) -> int:
        """Bytes that stay allocated between two updates, beside a server that shares the GPU."""
        return self.weights + self.optimizer

    @property
    def peak(self) -> int:
        """Peak bytes: at the start of the backward pass, at its end, or in the optimizer step."""
        waiting = self.gradients if self.accumulates else 0
        # The output layer's backward pass ends before the last layer is recomputed; its gradient stays.
        language = self.activations + max(self.head, self.recomputed + self.head_gradient)
        turn = waiting + max(language, self.tower + self.head_gradient) + self.buffers
        end = self.gradients + (2 * self.head_gradient if self.tied else 0) + self.buffers
        return self.resident + max(turn, end, self.gradients + self.step)


def estimate(
    shape: CoreShape,
    learner: LearnerConfig,
    work: Work,
    *,
    frozen: tuple[Module, ...] | None = None,
    gpu: bool = True,
) -> Memory:
    """Memory of one rank of the learner at its largest pass.

    Args:
        shape: the core.
        learner: precision, ZeRO, LoRA, checkpointing.
        work: the pass.
        frozen: modules that are not trained; None: the learner's.
        gpu: False: offloaded states stay in the same memory, AdamW works tensor by tensor, and the output layer
            computes whole tiles.
    """
    parameters = shape.parameters()
    frozen = learner.freeze if frozen is None else frozen
    total = sum(parameters.values())
    lora = learner.lora
    moving: set[Module]
    if lora:
        everywhere = lora.everywhere
        trained = shape.adapter_parameters(lora.r, everywhere)
        moving = {"language_model", "tower", "adapter"} if everywhere else {"language_model"}
        total_held = total + trained
    else:
        moving = set(parameters) - set(frozen)
        trained = sum(parameters[name] for name in moving)
        total_held = total
    widths = _widths(learner)
    states = _states(learner, total_held, trained, widths, gpu, work, shape)
    headed = "language_model" in moving and not lora
    kept, recomputed, tower = _activations(shape, learner, work, moving, widths)
    return Memory(
        activations=kept,
        recomputed=recomputed,
        tower=tower,
        head=_head(shape, work, widths, gpu, weight=headed),
        head_gradient=shape.embedding * widths.weight if headed else 0,
        tied=shape.tied,
        accumulates=work.accumulates,
        **states,
    )


@dataclass(frozen=True)
class _Widths:
    """Bytes per number."""

    weight: int
    compute: int
    stream: int
    """Width of the residual stream: float32 if the weights are, even if layers compute in bfloat16."""
    adapter: int
    """Width of LoRA adapters; peft keeps them in float32 unless DeepSpeed casts them."""

    @property
    def autocast(self) -> bool:
        return self.compute < self.weight


def _widths(learner: LearnerConfig) -> _Widths:
    if learner.dtype == "float32":
        return _Widths(FP32, FP32, FP32, FP32)
    half = learner.deepspeed is not None or learner.lora is not None
    weight = BF16 if half else FP32
    return _Widths(weight, BF16, weight, BF16 if learner.deepspeed else FP32)


def _states(
    learner: LearnerConfig,
    total: int,
    trained: int,
    widths: _Widths,
    gpu: bool,
    work: Work,
    shape: CoreShape,
) -> dict[str, int]:
    """Weights, optimizer states, gradients and buffers, on the device and on the host."""
    deepspeed, ranks = learner.deepspeed, learner.processes
    own = widths.adapter if learner.lora else widths.weight
    frozen = total - trained
    weights = frozen * widths.weight + trained * own
    if work.reference and not learner.lora:
        weights += frozen * widths.weight + trained * widths.weight
    if deepspeed is None or deepspeed.zero_stage == 0:
        master = FP32 * trained if deepspeed else 0  # DeepSpeed keeps master weights even for float32 weights
        gradients = own * trained
        buffers = widths.compute * total if widths.autocast else 0  # autocast's copies of the weights
        buffers += gradients if ranks > 1 else 0  # DDP's buckets
        largest = max(shape.embedding, _largest(shape)) if not learner.lora else trained // 64
        return {
            "weights": weights,
            "optimizer": master + 2 * FP32 * trained,
            "gradients": gradients + (FP32 * trained if deepspeed else 0),
            "buffers": buffers,
            # AdamW copies the tensors of a step: all tensors at once on a GPU, one at a time on a CPU.
            "step": FP32 * trained if gpu else 2 * FP32 * min(largest, trained),
            "host": 0,
        }
    stage, offload = deepspeed.zero_stage, deepspeed.offloads
    part = -(-trained // ranks)
    if stage == 3:
        weights = -(-weights // ranks) + own * min(LIVE, total)
    optimizer = 3 * FP32 * part
    gradients = own * (trained if stage == 1 else part)
    bucket = deepspeed.bucket_elements if gpu else min(deepspeed.bucket_elements, trained)
    largest = min(trained, _largest(shape) if learner.lora else max(shape.embedding, _largest(shape)))
    # Two buckets of gradients in transit, and the newest gradient, which offload copies once more.
    buckets = own * ((2 if stage >= 2 else 1) * bucket + largest * (2 if offload else 1))
    step = FP32 * part * (2 if gpu else 3)  # gradients in float32, and AdamW's copies
    device = {"weights": weights, "gradients": gradients, "buffers": buckets}
    if not offload:
        return {**device, "optimizer": optimizer, "step": step, "host": 0}
    # The host keeps this rank's part of the gradients in float32, and whole gradients if passes accumulate.
    host = optimizer + FP32 * part + 2 * FP32 * part
    host += own * trained if work.accumulates else 0
    if stage == 3:
        host += own * -(-total // ranks)
        device["weights"] = own * min(LIVE, total)
    if gpu:
        return {**device, "gradients": 0, "optimizer": 0, "step": 0, "host": host}
    return {**device, "optimizer": optimizer + FP32 * part, "step": step, "host": 0}


def _largest(shape: CoreShape) -> int:
    """Parameters of the largest single tensor of a layer."""
    experts = shape.experts * 2 * shape.expert_mlp * shape.hidden
    return max(experts, shape.mlp * shape.hidden, shape.vision_mlp * shape.vision_hidden)


def _activations(
    shape: CoreShape, learner: LearnerConfig, work: Work, moving: set[Module], widths: _Widths
) -> tuple[int, int, int]:
    """Bytes that the forward pass keeps, of one recomputed language layer, and while the tower is recomputed."""
    text_layer = _text_layer(
        shape, learner, work, widths, full="language_model" in moving and not learner.lora
    )
    sees = "tower" in moving
    lora = learner.lora is not None
    patches = work.tiles * shape.patches
    vision_layer = _vision_layer(shape, patches, widths, full=sees and not lora) if sees else 0
    # Below the language model, activations are kept only if a module there is trained.
    between = _adapter(shape, work.tiles * shape.tile_tokens, widths) if moving & {"tower", "adapter"} else 0
    after = patches * shape.vision_hidden * (widths.stream + FP32) if sees else 0  # the tower's last norm
    stream = work.tokens * shape.hidden * widths.stream
    last = work.tokens * shape.hidden * (FP32 + widths.stream) + stream
    if not learner.gradient_checkpointing:
        return (
            shape.layers * text_layer + shape.vision_layers * vision_layer + between + after + last,
            0,
            0,
        )
    seen = shape.vision_layers * patches * shape.vision_hidden * widths.stream if sees else 0
    # One layer is recomputed at a time; its gradients are computed while its activations exist.
    wide = shape.experts_per_token * shape.expert_mlp if shape.experts else shape.mlp
    again = text_layer + _in_flight(work.tokens, wide, shape.hidden, widths)
    tower = seen + vision_layer + _in_flight(patches, shape.vision_mlp, shape.vision_hidden, widths)
    return shape.layers * stream + seen + between + after + last, again, tower if sees else 0


def _in_flight(positions: int, wide: int, hidden: int, widths: _Widths) -> int:
    """Bytes of a layer's activation gradients that exist at once during its backward pass."""
    return positions * 2 * (widths.compute * wide + widths.stream * hidden)


def _norm(width: int, widths: _Widths, full: bool) -> int:
    """An RMS norm of one position: its input in float32, and the normalised input that its weight scales."""
    return FP32 * width + (widths.stream * width if full else 0)


def _text_layer(shape: CoreShape, learner: LearnerConfig, work: Work, widths: _Widths, *, full: bool) -> int:
    """One layer of the language model; `full` if its weights are trained and not adapters."""
    c, h, q, k = widths.compute, shape.hidden, shape.query, shape.key
    lora = learner.lora is not None
    linear = full or lora  # a linear layer keeps its input for the weight's gradient
    token = 2 * _norm(h, widths, full) + _norm(q + k, widths, full)
    token += 2 * c * h if linear else 0  # inputs of attention and of the feed-forward part
    token += c * (q + q) + FP32 * shape.heads  # rotated queries, attention's output, its log-sum-exp
    token += (
        0 if work.repeats_heads else (c * q if linear else 0)
    )  # packed rows concatenate their segments' outputs: a second copy
    if shape.experts:
        token += 3 * FP32 * shape.experts
        token += shape.experts_per_token * c * (3 * h + 4 * shape.expert_mlp)
    else:
        token += c * shape.mlp * (4 if linear else 3)
    attended = work.tokens if work.attended is None else work.attended
    return work.tokens * token + attended * 2 * c * (q if work.repeats_heads else k)


def _vision_layer(shape: CoreShape, patches: int, widths: _Widths, *, full: bool) -> int:
    """One layer of the tower."""
    c, h = widths.compute, shape.vision_hidden
    patch = (
        2 * _norm(h, widths, full)
        + 2 * c * h
        + 4 * c * h
        + FP32 * shape.vision_heads
        + 4 * c * shape.vision_mlp
    )
    return patches * patch


def _adapter(shape: CoreShape, tokens: int, widths: _Widths) -> int:
    """The projector: its norm's input and output, GELU's input and output."""
    return tokens * widths.compute * (8 * shape.vision_hidden + 2 * shape.hidden)


def _head(shape: CoreShape, work: Work, widths: _Widths, gpu: bool, *, weight: bool) -> int:
    """The output layer's backward pass: a tile of logits, and float32 gradients of hidden states and of the weight."""
    scored = work.tokens if work.scored is None else work.scored
    tile = min(scored, HEAD_TOKENS) * min(shape.vocabulary, HEAD_VOCABULARY)
    copies = FP32 * HEAD_COPIES["gpu" if gpu else "cpu"]
    gradient = (FP32 + (widths.weight if widths.weight < FP32 else 0)) * shape.embedding if weight else 0
    return tile * (widths.compute + copies) + gradient + scored * shape.hidden * (widths.compute + FP32)
