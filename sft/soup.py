"""Model soup: several fine-tunings of one start, averaged into one model (arXiv:2203.05482).

Only homogeneous ingredients make a good soup: in the report two homogeneous checkpoints (74.9 and 74.5) merge
to 76.6, heterogeneous ones to 12.9. So ingredients must share architecture, tokenizer and start; their distances are
measured; and a merge that scores below its worst ingredient is reported or refused.

Weights are read slice by slice and written file by file, in memory for one file of one model. Guards are written so
that NaN fails them: `not far <= limit`, never `far > limit`.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from math import isfinite, prod, sqrt
from pathlib import Path
from typing import Any

from core.checkpoint import released_files
from core.checkpoint.check import check_checkpoint
from core.checkpoint.shards import INDEX, Tensors, copy_own, printable
from core.checkpoint.stream import write_stream
from core.files import atomic_dir, read_json
from core.manifest import MANIFEST
from sft.config import SoupConfig

log = logging.getLogger(__name__)

START = "start.json"
"""File beside a checkpoint's weights with the hash of the weights it was fine-tuned from; sft.train writes it."""
_SLICE_ELEMENTS = 1 << 20
_VOLATILE = ("dtype", "torch_dtype", "transformers_version", "_name_or_path", "is_local", "local_files_only")
_SAME_JSON = ("config.json", "tokenizer.json", "tokenizer_config.json", "processor_config.json")
_SAME_TEXT = ("chat_template.jinja",)

_NOT_COPIED = (START, INDEX, MANIFEST)
"""Files that record how the first ingredient was made."""

Score = Callable[[Path], float]
"""Validation score of a checkpoint folder; higher is better."""


class SoupError(ValueError):
    """The ingredients do not fit together, or the merge scores below its worst ingredient. The message is printable."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


@dataclass(frozen=True)
class Distances:
    """Distances of ingredients: L2 over all weights; relative distances are shares of the start's norm."""

    from_start: list[float]
    """Relative distance of each ingredient from the start, or from the first ingredient if no start was given."""
    pairwise: dict[str, float]
    """Relative distance of ingredients i and j, by "i-j"."""
    cosine: dict[str, float]
    """Cosine of two task vectors (ingredient minus start), by "i-j"; empty without a start."""


class _Checkpoint:
    """The tensors of one checkpoint folder, opened but not read."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        from safetensors import safe_open

        self.path, self.tensors = path, Tensors(path)
        files = {file: stack.enter_context(safe_open(path / file, "pt")) for file in self.tensors.files}
        self._slices = {
            name: files[entry.file].get_slice(name) for name, entry in self.tensors.entries.items()
        }

    def names(self) -> set[str]:
        return set(self._slices)

    def slice_of(self, name: str) -> Any:
        return self._slices[name]


def check_ingredients(paths: Sequence[Path]) -> None:
    """Raise SoupError unless the checkpoints agree in architecture, tensors, tokenizer and start.

    Raises LayoutError for an ingredient that contains code or a tensor with NaN or infinity.
    """
    if len(paths) < 2:
        raise SoupError(f"a soup needs two ingredients or more, got {[str(path) for path in paths]}")
    first = Path(paths[0])
    for other in map(Path, paths[1:]):
        for name in (*_SAME_JSON, *_SAME_TEXT):
            difference = _file_difference(first / name, other / name)
            if difference:
                raise SoupError(
                    f"{other}: {name} differs from that of {first} ({difference}); merge fine-tunings of one "
                    "core only"
                )
    for path in paths:
        check_checkpoint(Path(path))
    starts = {str(path): _start_of(Path(path)) for path in paths}
    if len(set(starts.values())) > 1:
        listed = "; ".join(f"{path}: {start[:12]}" for path, start in starts.items())
        raise SoupError(
            f"the ingredients were fine-tuned from different weights ({listed}); use one start for all"
        )
    with ExitStack() as stack:
        opened = [_Checkpoint(Path(path), stack) for path in paths]
        for checkpoint in opened[1:]:
            _check_tensors(opened[0], checkpoint)


def distances(paths: Sequence[Path], start: Path | None = None) -> Distances:
    """The distances of the ingredients from their start and from one another, in one pass over the weights."""
    import torch

    with ExitStack() as stack:
        opened = [_Checkpoint(Path(path), stack) for path in paths]
        origin = _Checkpoint(Path(start), stack) if start else opened[0]
        for checkpoint in opened:
            _check_tensors(origin, checkpoint)
        gram = torch.zeros(len(opened), len(opened), dtype=torch.float64)
        norm = 0.0
        for name in sorted(origin.names()):
            for here in _slices(origin.slice_of(name)):
                base = origin.slice_of(name)[here].float().flatten()
                moved = torch.stack([c.slice_of(name)[here].float().flatten() - base for c in opened])
                gram += moved @ moved.T  # float32 within a slice, float64 over the slices
                norm += float(base @ base)
    scale = sqrt(norm) or 1.0
    pairs = list(combinations(range(len(opened)), 2))
    squared = {(i, j): float(gram[i, i] + gram[j, j] - 2 * gram[i, j]) for i, j in pairs}
    return Distances(
        from_start=[sqrt(float(gram[i, i])) / scale for i in range(len(opened))],
        pairwise={f"{i}-{j}": sqrt(max(squared[i, j], 0.0)) / scale for i, j in pairs},
        cosine={f"{i}-{j}": _cosine(gram, i, j) for i, j in pairs} if start else {},
    )


def merge(paths: Sequence[Path], out: Path, weights: Sequence[float] | None = None) -> Path:
    """Write the weighted mean of the checkpoints (equal weights by default) as a checkpoint; returns `out`.

    Sums are in float32, and each tensor keeps its data type; configuration and tokenizer are the first ingredient's.
    Raises SoupError if the tensors do not match or the weights do not sum to 1, NonFinite for a mean with NaN or
    infinity.
    """
    shares = [1 / len(paths)] * len(paths) if weights is None else list(weights)
    if len(shares) != len(paths) or not abs(sum(shares) - 1) <= 1e-6:
        raise SoupError(f"weights={shares}: one per ingredient ({len(paths)}), summing to 1")
    with ExitStack() as stack:
        opened = [_Checkpoint(Path(path), stack) for path in paths]
        for checkpoint in opened[1:]:
            _check_tensors(opened[0], checkpoint)
        means = ((name, _mean(name, opened, shares)) for name in opened[0].tensors.entries)
        first = Path(paths[0])
        with atomic_dir(Path(out)) as folder:
            write_stream(means, folder)
            for file in sorted(first.iterdir()):
                if file.is_file() and file.suffix != ".safetensors" and file.name not in _NOT_COPIED:
                    copy_own(file, folder / file.name)
            released_files.hand_on(first, folder)
    return Path(out)


def uniform(paths: Sequence[Path], out: Path) -> list[int]:
    """Merge all ingredients with equal weights into `out`; return the numbers of the used ones, which are all."""
    merge(paths, out)
    return list(range(len(paths)))


def greedy(paths: Sequence[Path], out: Path, score: Score, scores: Sequence[float]) -> list[int]:
    """Merge, from the best down, every ingredient that does not lower the validation score; return their numbers.

    Source: arXiv:2203.05482, Recipe 1. `scores` are the scores of the ingredients.
    """
    order = sorted(range(len(paths)), key=lambda number: -scores[number])
    used, best = order[:1], scores[order[0]]
    trial = Path(out).with_name(Path(out).name + ".trial")
    for number in order[1:]:
        merge([paths[i] for i in (*used, number)], trial)
        reached = _scored(score, trial)
        log.info("greedy soup: %s + %d scores %.4f, without it %.4f", used, number, reached, best)
        if reached >= best:
            used, best = [*used, number], reached
    shutil.rmtree(trial, ignore_errors=True)
    merge([paths[i] for i in used], out)
    return used


def soup(
    cfg: SoupConfig, paths: Sequence[Path], out: Path, *, score: Score, start: Path | None = None
) -> dict[str, Any]:
    """Check, measure, merge and score; returns the record for the report.

    Args:
        paths: checkpoint folders, ingredient 0 first.
        out: the merged checkpoint.
        score: scores a checkpoint on the validation split, never on held-out rows.
        start: the checkpoint that all were fine-tuned from.

    Returns {"ingredients": [{"path", "score", "distance"}], "distances": {"pairwise", "cosine"}, "merged":
    {"method", "used", "score"}}. Raises SoupError for ingredients that do not fit or lie too far apart, and,
    with on_worse="refuse", for a merge that scores below its worst ingredient.
    """
    check_ingredients(paths)
    apart = distances(paths, start)
    _refuse_far(paths, apart, cfg.max_distance)
    scores = [_scored(score, Path(path)) for path in paths]
    used = uniform(paths, out) if cfg.method == "uniform" else greedy(paths, out, score, scores)
    reached = _scored(score, Path(out))
    worst = min(scores)
    if reached < worst:
        message = (
            f"the merge scores {reached:.4f}, its worst ingredient {worst:.4f}; distances {apart.pairwise}: "
            "use fewer variants, closer learning rates, or method: greedy"
        )
        if cfg.on_worse == "refuse":
            shutil.rmtree(out)
            raise SoupError(message)
        log.warning(message)
    return {
        "ingredients": [
            {"path": str(path), "score": value, "distance": far}
            for path, value, far in zip(paths, scores, apart.from_start, strict=True)
        ],
        "distances": {"pairwise": apart.pairwise, "cosine": apart.cosine},
        "merged": {"method": cfg.method, "used": used, "score": reached},
    }


def _scored(score: Score, path: Path) -> float:
    """The score of a checkpoint. Raises SoupError unless it is a finite number: comparisons with NaN are false."""
    value = score(path)
    if not isfinite(value):
        raise SoupError(f"{path}: its validation score is {value}; it must be a finite number")
    return value


def _refuse_far(paths: Sequence[Path], apart: Distances, limit: float) -> None:
    for pair, far in sorted(apart.pairwise.items(), key=lambda item: -item[1]):
        if not far <= limit:  # NaN counts as too far
            i, j = (int(number) for number in pair.split("-"))
            raise SoupError(
                f"{paths[i]} and {paths[j]} lie {far:.3f} of the start's norm apart, max_distance is {limit}: "
                "too heterogeneous to merge; train them with closer data and rates, or raise max_distance"
            )


def _mean(name: str, checkpoints: Sequence[_Checkpoint], shares: Sequence[float]) -> Any:
    """The weighted mean of one tensor, slice by slice."""
    import torch

    first = checkpoints[0].slice_of(name)
    parts = []
    for here in _slices(first):
        total = torch.zeros(first[here].shape, dtype=torch.float32)
        for checkpoint, share in zip(checkpoints, shares, strict=True):
            total += share * checkpoint.slice_of(name)[here].float()
        parts.append(total.to(first[here].dtype))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _slices(tensor: Any) -> Iterator[Any]:
    """Indices that cut a tensor along its first axis into pieces of about a million elements."""
    shape = tensor.get_shape()
    if not shape:
        yield ...
        return
    step = max(1, _SLICE_ELEMENTS // max(prod(shape[1:]), 1))
    for first in range(0, shape[0], step):
        yield slice(first, first + step)


def _check_tensors(one: _Checkpoint, other: _Checkpoint) -> None:
    difference = sorted(one.names() ^ other.names())
    if difference:
        raise SoupError(
            f"{one.path} and {other.path}: {len(difference)} tensors are in only one of them, "
            f"e.g. {difference[0]}"
        )
    for name in sorted(one.names()):
        kinds = [
            (checkpoint.tensors.entries[name].shape, checkpoint.tensors.entries[name].dtype)
            for checkpoint in (one, other)
        ]
        if kinds[0] != kinds[1]:
            raise SoupError(f"{name}: {kinds[0]} in {one.path}, {kinds[1]} in {other.path}")


def _start_of(path: Path) -> str:
    if not (path / START).exists():
        raise SoupError(
            f"{path}: no {START}, so its start is unknown; sft.train writes it, or put "
            '{"weights": <core.checkpoint.shards.weights_hash of the start>} there'
        )
    return str(read_json(path / START)["weights"])


def _file_difference(one: Path, other: Path) -> str:
    """The first relevant difference of two files; "" if there is none."""
    if not one.exists() and not other.exists():
        return ""
    if one.exists() != other.exists():
        return f"only one folder has it: {one if one.exists() else other}"
    texts = [file.read_text(encoding="utf-8") for file in (one, other)]
    if texts[0] == texts[1]:
        return ""
    if one.suffix != ".json":
        return "another text"
    here, there = (_stable(json.loads(text)) for text in texts)
    keys = sorted(key for key in here.keys() | there.keys() if here.get(key) != there.get(key))
    return f"{keys[0]}: {here.get(keys[0])!r:.60} and {there.get(keys[0])!r:.60}" if keys else ""


def _stable(value: Any) -> Any:
    """The JSON value without keys that do not describe the model."""
    if isinstance(value, dict):
        return {key: _stable(item) for key, item in value.items() if key not in _VOLATILE}
    return [_stable(item) for item in value] if isinstance(value, list) else value


def _cosine(gram: Any, i: int, j: int) -> float:
    size = sqrt(float(gram[i, i] * gram[j, j]))
    return float(gram[i, j]) / size if size else 0.0
