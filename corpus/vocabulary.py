"""Words of records that a core's tokenizer does not know. The word-level tokenizer of the tiny cores has such words.

They become [UNK], silently: the model can neither read nor write them. Released tokenizers know all bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from core.files import read_json
from core.model.prompts import messages, target_text
from core.strict import ConfigError

PARTS = ("questions", "targets")
_BATCH = 1000
_SHOWN = 5


def has_unknown(model: Path) -> bool:
    """Whether the tokenizer of a checkpoint folder has a token for unknown words; large sets are then not read."""
    file = model / "tokenizer_config.json"
    return file.is_file() and read_json(file).get("unk_token") is not None


def texts_of(record: Mapping[str, Any]) -> tuple[str, str]:
    """The text of a record's prompt, and the text that the policy is trained to write or graded against."""
    trains = record["mode"] == "direct" or record["chain"] or record["response"]
    parts = (part for message in messages(record) for part in message["content"])
    prompt = " ".join(part["text"] for part in parts if part["type"] == "text")
    return prompt, target_text(record) if trains else record["answer"]


def unknown(records: Iterable[Mapping[str, Any]], tokenizer: Any) -> dict[str, tuple[float, Counter[str]]]:
    """Per part of the records with unknown words: their share of the part's tokens, and the words with their counts."""
    totals, words = Counter[str](), {part: Counter[str]() for part in PARTS}
    parts: dict[str, list[str]] = {part: [] for part in PARTS}

    def count() -> None:
        for part, texts in parts.items():
            if not texts:
                continue
            encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
            for text, ids, places in zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                totals[part] += len(ids)
                unread = [
                    at for token, at in zip(ids, places, strict=True) if token == tokenizer.unk_token_id
                ]
                words[part].update(text[start:end] for start, end in unread)
            texts.clear()

    for record in records:
        for part, text in zip(PARTS, texts_of(record), strict=True):
            parts[part].append(text)
        if len(parts[PARTS[0]]) == _BATCH:
            count()
    count()
    return {part: (found.total() / totals[part], found) for part, found in words.items() if found}


def unknown_text(name: str, part: str, share: float, words: Counter[str]) -> str:
    """One line about a set's unknown words."""
    shown = ", ".join(f"{word!r}" for word, _ in words.most_common(_SHOWN))
    more = f" and {len(words) - _SHOWN} more words" if len(words) > _SHOWN else ""
    return (
        f"set {name}: the core's tokenizer does not know {share:.1%} of the tokens of its {part}, which become [UNK]: "
        f"{shown}{more}"
    )


def check_words(name: str, records: Iterable[Mapping[str, Any]], tokenizer: Any, most: float) -> list[str]:
    """Warnings about a set's unknown words; raises ConfigError if they are more than a share `most` of a part."""
    found = unknown(records, tokenizer)
    lines = [unknown_text(name, part, share, words) for part, (share, words) in found.items()]
    if any(share > most for share, _ in found.values()):
        raise ConfigError(
            "\n".join(
                f"{line}; at most core.max_unknown={most:g} may be unknown. If the run builds the core, add {name} to "
                "core.vocabulary; else use a core that knows these words, or leave the rows out"
                for line, (share, _) in zip(lines, found.values(), strict=True)
                if share > most
            )
        )
    return lines
