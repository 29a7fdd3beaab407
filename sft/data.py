"""Records as lessons: token ids in which only the assistant's turns have labels, padded into batches.

Axes: B rows, T tokens. Each prompt is tokenized separately from the assistant's turn after it. So a lesson's prompt ids
equal those of a rollout server for the same record, and no token spans the boundary. An assistant's turn (with its
end-of-turn token) is the chat up to it minus its prompt, both rendered by the chat template.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from core.model.prompts import messages, shown
from core.strict import ConfigError, nearest
from corpus.records import DataSource, Record, load_source

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that is not trained."""
CACHE_BYTES = 1 << 30
"""Bytes of prepared rows that a process caches; other rows are prepared again in each epoch."""

IMAGES = ("pixel_values", "image_grid_thw")
"""Image inputs of a lesson; only any-resolution cores have the second."""

Lesson = dict[str, Any]


class OverlongError(ValueError):
    """A row is longer than the stage's context."""


class Lessons(Sequence[Lesson]):
    """Records prepared for training, one by one and on demand.

    An item has `input_ids` and `labels` (T,), int64, and `pixel_values` (tiles, 3, size, size), float32, or None for a
    row without images. Labels are the ids of the assistant's turns and IGNORED elsewhere. For an any-resolution core
    an item has `pixel_values` (patches, 3 x patch_size^2) and `image_grid_thw` (images, 3).
    """

    def __init__(self, records: Sequence[Record], processor: Any) -> None:
        self.records, self.processor = records, processor
        self._cache: dict[int, Lesson] = {}
        self._cached_bytes = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        if index in self._cache:
            return self._cache[index]
        lesson = prepare(self.records[index], self.processor)
        size = sum(value.nbytes for value in lesson.values() if value is not None)
        if self._cached_bytes + size <= CACHE_BYTES:
            self._cache[index] = lesson
            self._cached_bytes += size
        return lesson


def prepare(record: Record, processor: Any) -> Lesson:
    """One lesson, see `Lessons`. Raises ValueError as `render`."""
    import torch

    exchanges = render(record, processor)
    prompts = [prompt for prompt, _ in exchanges]
    waiting = iter(shown(record))
    images = [list(islice(waiting, prompt.count(processor.image_token))) for prompt in prompts]
    inputs = processor(
        images=images if any(images) else None, text=prompts, padding=True, return_tensors="pt", **_PLAIN
    )
    ids, labels = [], []
    for (_, target), row, mask in zip(exchanges, inputs["input_ids"], inputs["attention_mask"], strict=True):
        prompt_ids = row[mask.bool()]
        target_ids = torch.tensor(processor.tokenizer(target, **_PLAIN)["input_ids"])
        ids += [prompt_ids, target_ids]
        labels += [torch.full_like(prompt_ids, IGNORED), target_ids]
    return {
        "input_ids": torch.cat(ids),
        "labels": torch.cat(labels),
        **{"pixel_values": None, **{name: inputs[name] for name in IMAGES if name in inputs}},
    }


# The chat template has written every special token already.
_PLAIN = {"add_special_tokens": False}


def render(record: Record, processor: Any) -> list[tuple[str, str]]:
    """The record's exchanges: the text up to an assistant's turn, with unexpanded image placeholders, and that turn.

    Raises ValueError if the chat template renders a turn differently once others follow.
    """
    chat, exchanges, before = messages(record, with_target=True), [], ""
    for number, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        prompt = processor.apply_chat_template(chat[:number], add_generation_prompt=True, tokenize=False)
        whole = processor.apply_chat_template(chat[: number + 1], tokenize=False)
        if not (prompt.startswith(before) and whole.startswith(prompt) and whole != prompt):
            raise ValueError(
                f"row {record['id']!r}: the chat template renders the prompt differently once an answer follows; "
                "use one whose generation prompt is how the assistant's turn starts, and that keeps earlier turns "
                "as they were"
            )
        exchanges.append((prompt[len(before) :], whole[len(prompt) :]))
        before = whole
    return exchanges


def count_tokens(record: Record, processor: Any) -> tuple[int, int]:
    """Text tokens and image tokens of a record's lesson, without reading a pixel."""
    parts = [part for exchange in render(record, processor) for part in exchange]
    text = sum(len(processor.tokenizer(part, **_PLAIN)["input_ids"]) for part in parts)
    expanded = processor.image_lengths(shown(record))
    # Each expansion, <img> and </img> included, replaces its one placeholder.
    return text + len(expanded), sum(count - 2 for count in expanded)


class Mixture(Sequence[Record]):
    """The concatenated rows of several sets, read from disk when indexed.

    `dropped` counts the dropped rows by the rule they broke.
    """

    sizes: list[tuple[int, int]]
    """Text tokens and image tokens of each row; `fit` counts them."""

    def __init__(self, places: Sequence[tuple[Sequence[Record], int]], dropped: Mapping[str, int]) -> None:
        self._places, self.dropped, self.sizes = places, Counter(dropped), []

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [records[row] for records, row in self._places[index]]
        records, row = self._places[index]
        return records[row]

    def without(self, rows: set[int], rule: str) -> Mixture:
        """The mixture without those rows, which `dropped` counts under the rule."""
        kept = [place for row, place in enumerate(self._places) if row not in rows]
        return Mixture(kept, self.dropped + Counter({rule: len(rows)}))


def load_mixture(
    sources: Sequence[DataSource],
    sets: Mapping[str, Path],
    seed: int,
    on_bad: Literal["raise", "drop"] = "raise",
) -> Mixture:
    """The rows of the named sets; if a source limits its rows, the seed draws them.

    Raises ConfigError naming the known sets for an unknown one, and corpus.records.RecordError for bad rows.
    """
    places: list[tuple[Sequence[Record], int]] = []
    dropped: Counter[str] = Counter()
    for source in sources:
        if source.set not in sets:
            raise ConfigError(f"set {source.set!r} is unknown; {nearest(source.set, sets)}")
        records = load_source(source, sets, seed, on_bad)
        dropped.update(records.dropped)
        places += [(records, row) for row in range(len(records))]
    return Mixture(places, dropped)


def fit(
    mixture: Mixture, processor: Any, max_tokens: int, overlong: Literal["refuse", "drop"] = "refuse"
) -> Mixture:
    """The rows of at most `max_tokens`, with their sizes.

    Raises OverlongError with the first longer row unless such rows are dropped, and ValueError if no row is left.
    """
    long: set[int] = set()
    sizes: list[tuple[int, int]] = []
    for row, record in enumerate(mixture):
        size = count_tokens(record, processor)
        tokens = sum(size)
        if tokens <= max_tokens:
            sizes.append(size)
            continue
        if overlong == "refuse":
            raise OverlongError(
                f"row {record['id']!r} has {tokens} tokens, max_tokens is {max_tokens}; raise it, shorten "
                "the row, or set overlong: drop"
            )
        long.add(row)
    if len(long) == len(mixture):
        raise ValueError(f"none of the {len(mixture)} rows has at most max_tokens={max_tokens} tokens")
    if long:
        log.warning("dropped %d of %d rows longer than %d tokens", len(long), len(mixture), max_tokens)
    fitting = mixture.without(long, "tokens: longer than max_tokens") if long else mixture
    fitting.sizes = sizes
    return fitting


class Collator:
    """Lessons by index -> one right-padded batch: input_ids, attention_mask, labels (B, T), and the images.

    `blank`, if given, is added as an unlabelled row to batches without an image. The tower and the adapter then get a
    gradient (of zeros) on every rank in every step. Without it, a rank with a text-only batch would not take part in
    reducing these gradients, and ZeRO-2 would wait forever.
    """

    def __init__(self, lessons: Sequence[Lesson], pad_token_id: int, blank: Lesson | None = None) -> None:
        self.lessons, self.pad_token_id, self.blank = lessons, pad_token_id, blank

    def __call__(self, examples: Sequence[Mapping[str, int]]) -> dict[str, Any]:
        import torch

        rows = [self.lessons[example["row"]] for example in examples]
        if self.blank and all(row["pixel_values"] is None for row in rows):
            rows.append(self.blank)
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        return {
            "input_ids": _padded([row["input_ids"] for row in rows], self.pad_token_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "labels": _padded([row["labels"] for row in rows], IGNORED),
            **images_of(rows),
        }


def images_of(rows: Sequence[Lesson]) -> dict[str, Any]:
    """The image inputs of all rows in order, as the model takes them; {} without images."""
    import torch

    held = {name: [row[name] for row in rows if row.get(name) is not None] for name in IMAGES}
    return {name: torch.cat(values) for name, values in held.items() if values}


def blank_lesson(processor: Any) -> Lesson:
    """A short row for `Collator.blank`: one small black picture and no labels."""
    import torch
    from PIL import Image

    picture = {"id": "blank", "images": [Image.new("RGB", (28, 28))], "question": "?", "mode": "direct"}
    lesson = prepare({**picture, "answer": ".", "response": None}, processor)
    return {**lesson, "labels": torch.full_like(lesson["labels"], IGNORED)}


def _padded(rows: Sequence[Any], value: int) -> Any:
    import torch

    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
