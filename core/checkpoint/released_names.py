"""Tensor names of the released SAIL-VL2 layout and of the native one, and how they correspond.

Source of the released names: public ports of the checkpoints (Apple's AIMv2, InternVL's adapter, Qwen3). The
native names and shapes are those of core/model/layout.py.

Native checkpoints hold a mixture's experts one by one: transformers stacks them when it loads and splits the stack
when it saves. A checkpoint saved as stacks is read as well.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from core.checkpoint.cut import Piece, Target
from core.checkpoint.shards import LayoutError, Tensors, listed
from core.model.layout import Shape
from core.model.names import EMBEDDING, HEAD

RELEASED_EMBEDDING = "language_model.model.embed_tokens.weight"
RELEASED_HEAD = "language_model.lm_head.weight"

_BLOCK = r"model\.vision_tower\.encoder\.layers\.(\d+)\."
_TO_RELEASED = tuple(
    (re.compile(pattern), released)
    for pattern, released in (
        (
            r"model\.vision_tower\.embeddings\.patch_embed\.(\w+)",
            r"vision_model.preprocessor.patchifier.proj.\1",
        ),
        (
            r"model\.vision_tower\.embeddings\.rms_norm\.(\w+)",
            r"vision_model.preprocessor.patchifier.norm.\1",
        ),
        (
            r"model\.vision_tower\.embeddings\.position_embedding\.weight",
            "vision_model.preprocessor.pos_embed",
        ),
        (_BLOCK + r"attention\.[qkv]_proj\.(\w+)", r"vision_model.trunk.blocks.\1.attn.qkv.\2"),
        (_BLOCK + r"attention\.out_proj\.(\w+)", r"vision_model.trunk.blocks.\1.attn.proj.\2"),
        (_BLOCK + r"rms_norm([12])\.(\w+)", r"vision_model.trunk.blocks.\1.norm_\2.\3"),
        (_BLOCK + r"ffn\.gate_proj\.(\w+)", r"vision_model.trunk.blocks.\1.mlp.fc1.\2"),
        (_BLOCK + r"ffn\.down_proj\.(\w+)", r"vision_model.trunk.blocks.\1.mlp.fc2.\2"),
        (_BLOCK + r"ffn\.up_proj\.(\w+)", r"vision_model.trunk.blocks.\1.mlp.fc3.\2"),
        (r"model\.vision_tower\.rms_norm\.(\w+)", r"vision_model.trunk.post_trunk_norm.\1"),
        (r"model\.multi_modal_projector\.layer_norm\.(\w+)", r"mlp1.0.\1"),
        (r"model\.multi_modal_projector\.linear_1\.(\w+)", r"mlp1.1.\1"),
        (r"model\.multi_modal_projector\.linear_2\.(\w+)", r"mlp1.3.\1"),
        (r"model\.language_model\.(.+)", r"language_model.model.\1"),
        (r"lm_head\.weight", RELEASED_HEAD),
    )
)
_ROW_ORDER = ("q_proj", "k_proj", "v_proj")
_POSITIONS = "vision_model.preprocessor.pos_embed"
_EXPERT = re.compile(r"(?P<experts>.+\.mlp\.experts)\.(?P<number>\d+)\.(?P<half>gate|up|down)_proj\.weight")
_HALVES = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}
"""The halves of one expert's part of a stack, in the order of their rows."""


@dataclass(frozen=True)
class Link:
    """A released tensor, and the native tensors that equal it when they are stacked along the first axis."""

    released: str
    released_shape: Shape
    native: tuple[tuple[str, Shape], ...]


def links(shapes: dict[str, Shape]) -> list[Link]:
    """The link of every native tensor, in the native order; `shapes` comes from `native_shapes`."""
    parts: dict[str, list[tuple[str, Shape]]] = defaultdict(list)
    for name, shape in shapes.items():
        parts[released_name(name)].append((name, shape))
    found = []
    for released, native in parts.items():
        # The model's attributes are in the order k, v, q; the rows of the released tensor are q, k, v.
        native = (
            sorted(native, key=lambda part: _ROW_ORDER.index(part[0].split(".")[-2]))
            if len(native) > 1
            else native
        )
        rows = sum(shape[0] for _, shape in native)
        shape = (rows, *native[0][1][1:])
        found.append(Link(released, (1, *shape) if released == _POSITIONS else shape, tuple(native)))
    return found


def released_name(native: str) -> str:
    """The name of the released tensor that equals a native tensor or contains it."""
    for pattern, released in _TO_RELEASED:
        if found := pattern.fullmatch(native):
            return found.expand(released)
    raise LayoutError(f"{native}: this tensor of the native model has no name in the released layout")


def import_targets(found: Sequence[Link], source: Tensors, *, head_is_embedding: bool) -> list[Target]:
    """The native tensors to cut from a released checkpoint, in its order.

    `head_is_embedding` allows (and leaves out) an output layer that equals the embedding. Raises LayoutError
    listing every tensor that is unknown, missing or of another shape, with its file.
    """
    expected = {link.released: link.released_shape for link in found}
    if head_is_embedding:
        expected[RELEASED_HEAD] = expected[RELEASED_EMBEDDING]
    _check(source, expected, optional={RELEASED_HEAD} if head_is_embedding else set())
    by_name = {link.released: link for link in found}
    targets = []
    for name in source.entries:
        if name not in by_name:
            continue
        first, native = 0, by_name[name].native
        for part, shape in native:
            index = (slice(first, first + shape[0]),) if len(native) > 1 else ()
            targets.append(Target(part, shape, (Piece(name, index),)))
            first += shape[0]
    return targets


def export_targets(found: Sequence[Link], source: Tensors, *, copy_head: bool) -> list[Target]:
    """The released tensors to put together from a native checkpoint, in its order.

    `copy_head` writes the embedding again as the output layer. Raises LayoutError listing every tensor that
    is unknown, missing or of another shape, with its file.
    """
    native = {name: shape for link in found for name, shape in link.native}
    homes = {name: home for name, home in _stack_homes(native).items() if home.name in source}
    stacks = {stack: _stack_shape(stack, native) for stack in {home.name for home in homes.values()}}
    expected = {name: shape for name, shape in native.items() if name not in homes} | stacks
    tied = HEAD not in native
    if tied:  # transformers does not store a tied head; other writers may
        expected[HEAD] = expected[EMBEDDING]
    _check(source, expected, optional={HEAD} if tied else set())
    if tied and HEAD in source and not source.equal(HEAD, EMBEDDING):
        raise LayoutError(
            f"{source.folder}: config.json ties the output layer to the embedding, but {HEAD} in "
            f"{source.entries[HEAD].file} differs from {EMBEDDING}; correct tie_word_embeddings"
        )
    targets, problems = [], []
    for link in found:
        pieces = tuple(homes.get(name, Piece(name)) for name, _ in link.native)
        kinds = {piece.name: source.entries[piece.name].dtype for piece in pieces}
        if len(set(kinds.values())) > 1:
            problems.append(f"{link.released}: its parts differ in data type: {kinds}")
        targets.append(Target(link.released, link.released_shape, pieces))
        if copy_head and link.released == RELEASED_EMBEDDING:
            targets.append(Target(RELEASED_HEAD, link.released_shape, pieces))
    if problems:
        raise LayoutError(listed(f"{source.folder}: tensors cannot be joined", problems))
    place = {name: number for number, name in enumerate(source.entries)}
    return sorted(targets, key=lambda target: place[target.pieces[0].name])


def _check(source: Tensors, expected: dict[str, Shape], optional: set[str]) -> None:
    problems = [
        f"{name}: unknown, in {entry.file}" for name, entry in source.entries.items() if name not in expected
    ]
    for name, shape in expected.items():
        if name not in source:
            if name not in optional:
                problems.append(f"{name}: missing, {list(shape)} is expected")
        elif source.entries[name].shape != shape:
            entry = source.entries[name]
            problems.append(
                f"{name}: {list(entry.shape)} in {entry.file}, {list(shape)} is expected by config.json"
            )
    if problems:
        raise LayoutError(listed(f"{source.folder}: config.json and weights disagree", problems))


def _stack_homes(native: dict[str, Shape]) -> dict[str, Piece]:
    """The place of each expert's tensor in a checkpoint that stores experts as stacks."""
    homes = {}
    for name, (rows, _) in ((name, shape) for name, shape in native.items() if _EXPERT.fullmatch(name)):
        expert = _EXPERT.fullmatch(name)
        assert expert
        stack = next(stack for stack, halves in _HALVES.items() if expert["half"] in halves)
        first = rows * _HALVES[stack].index(expert["half"])
        index = (int(expert["number"]), slice(first, first + rows))
        homes[name] = Piece(f"{expert['experts']}.{stack}", index)
    return homes


def _stack_shape(stack: str, native: dict[str, Shape]) -> Shape:
    experts, _, kind = stack.rpartition(".")
    parts = [shape for name, shape in native.items() if name.startswith(f"{experts}.")]
    halves = _HALVES[kind]
    rows, columns = native[f"{experts}.0.{halves[0]}_proj.weight"]
    return (len(parts) // 3, len(halves) * rows, columns)
