"""Converts tokenizer, chat template and generation config of a released checkpoint to those of a native core."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from core.checkpoint.shards import LayoutError, own_file, read_object
from core.deadline import TooSlow, deadline
from core.files import write_json
from core.model.tokenizer import IMAGE_END, IMAGE_START, IMAGE_TOKEN, PAD, TURN_END, chat_template, token_id

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
_VOCABULARY = ("vocab.json", "merges.txt")
_BESIDE = ("special_tokens_map.json", "added_tokens.json")
_PLACEHOLDERS = (IMAGE_TOKEN, f"{IMAGE_START}{IMAGE_TOKEN}{IMAGE_END}", "<image>")
"""Placeholders that templates write for an image; the native processor expands the first."""


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The released tokenizer without its remote code: tokenizer.json unchanged, or else vocab.json and merges.txt.

    Raises LayoutError if both forms are missing, or if a token that every core needs is missing.
    """
    from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

    whole = (folder / TOKENIZER).exists()
    needed = (TOKENIZER,) if whole else _VOCABULARY
    if missing := [name for name in needed if not (folder / name).exists()]:
        raise LayoutError(f"{folder}: no {TOKENIZER} and no {missing[0]}; download the tokenizer's files too")
    with tempfile.TemporaryDirectory() as scratch:
        for name in (*needed, *(name for name in _BESIDE if (folder / name).exists())):
            shutil.copyfile(own_file(folder / name), Path(scratch, name))
        described = read_object(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).exists() else {}
        # The tokenizer's named class would rebuild it from its parts. The file already holds the result.
        for key in ("auto_map", "tokenizer_class", "processor_class", "chat_template"):
            described.pop(key, None)
        write_json(Path(scratch, TOKENIZER_CONFIG), described)
        kind: Any = PreTrainedTokenizerFast if whole else Qwen2Tokenizer
        try:
            tokenizer = kind.from_pretrained(scratch, local_files_only=True)
        except Exception as error:  # tokenizers raises a bare Exception for a file it cannot parse
            raise LayoutError(f"{folder / needed[0]}: not a tokenizer ({error}); download it again") from None
    for key in ("is_local", "local_files_only", "name_or_path"):  # its location is not part of the tokenizer
        tokenizer.init_kwargs.pop(key, None)
    tokenizer.name_or_path = ""
    try:
        for token in (IMAGE_TOKEN, IMAGE_START, IMAGE_END, TURN_END, PAD):
            token_id(tokenizer, token)
    except ValueError as error:
        raise LayoutError(f"{folder}: {error}") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = PAD
    return tokenizer


def native_template(folder: Path, tokenizer: PreTrainedTokenizerBase, notes: list[str]) -> str:
    """The chat template shipped with a checkpoint, changed to write images as the native processor reads them.

    If the release ships no template, or one that writes no images, the result is ours; `notes` says so.
    """
    shipped = _shipped_template(folder)
    if shipped is None:
        notes.append(
            "no chat template is shipped: the core gets ours, ChatML without a default system prompt"
        )
        return chat_template()
    for placeholder in _PLACEHOLDERS:
        template = shipped.replace(placeholder, IMAGE_TOKEN)
        rendered = _render(tokenizer, template, images=2)
        if rendered is None or rendered.count(IMAGE_TOKEN) != 2 or IMAGE_START in rendered:
            continue
        if template != shipped:
            notes.append(f"chat template: {placeholder} became {IMAGE_TOKEN}, which the processor expands")
        if "<|im_start|>system" in rendered:
            notes.append("chat template: adds a default system prompt, as shipped")
        if not _continues(tokenizer, template):
            notes.append(
                "chat template: a chat with its answer does not begin with its prompt, which SFT needs; "
                f"compare {CHAT_TEMPLATE} with ours in core/"
            )
        return template
    notes.append("the shipped chat template writes no image as a placeholder: the core gets ours instead")
    return chat_template()


def native_generation_config(
    folder: Path, llm_config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, notes: list[str]
) -> GenerationConfig:
    """Every end-of-text id that the checkpoint names anywhere, and the padding id; no sampling parameters.

    vLLM would make sampling parameters the defaults of every request, rollouts included. The shipped file stays with
    the other released files. Raises LayoutError for an id outside the vocabulary.
    """
    from transformers import GenerationConfig

    shipped = read_object(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).exists() else {}
    named = [
        *_ids(shipped.get("eos_token_id"), GENERATION_CONFIG),
        *_ids(llm_config.get("eos_token_id"), "llm_config"),
        *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
        token_id(tokenizer, TURN_END),
        token_id(tokenizer, PAD),
    ]
    pad = _ids(shipped.get("pad_token_id"), GENERATION_CONFIG) or [tokenizer.pad_token_id]
    for found in (*named, *pad):
        if not 0 <= found < llm_config["vocab_size"]:
            raise LayoutError(
                f"{folder}: token id {found} (end of text or padding) is outside the vocabulary of "
                f"{llm_config['vocab_size']} ids"
            )
    dropped = sorted(shipped.keys() & {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"})
    if dropped:
        notes.append(
            f"{GENERATION_CONFIG}: {', '.join(f'{key}={shipped[key]}' for key in dropped)} left out: servers would "
            "make them the defaults of every request"
        )
    return GenerationConfig(eos_token_id=list(dict.fromkeys(named)), pad_token_id=pad[0])


def released_text(tokenizer: PreTrainedTokenizerBase, folder: Path) -> dict[str, dict[str, Any]]:
    """tokenizer_config.json and generation_config.json of a native core, as transformers 4 reads them.

    tokenizer.json and the chat template of the core in `folder` are shipped with them unchanged.
    """
    described = read_object(folder / TOKENIZER_CONFIG)
    for key in ("backend", "processor_class"):
        described.pop(key, None)
    described["tokenizer_class"] = "PreTrainedTokenizerFast"
    # transformers 5 writes a list under this name; transformers 4 expects a dictionary and fails.
    described["additional_special_tokens"] = described.pop("extra_special_tokens", [])
    described["chat_template"] = tokenizer.chat_template
    generation = read_object(folder / GENERATION_CONFIG)
    generation.pop("transformers_version", None)
    return {TOKENIZER_CONFIG: described, GENERATION_CONFIG: generation}


def _shipped_template(folder: Path) -> str | None:
    if (folder / CHAT_TEMPLATE).exists():
        return own_file(folder / CHAT_TEMPLATE).read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json", TOKENIZER_CONFIG):
        found = read_object(folder / name).get("chat_template") if (folder / name).exists() else None
        if isinstance(found, list):  # several templates by name; the one named "default" is for chats
            found = next((one.get("template") for one in found if one.get("name") == "default"), None)
        if isinstance(found, str):
            return found
    return None


def _render(tokenizer: PreTrainedTokenizerBase, template: str, images: int) -> str | None:
    parts: list[Any] = [{"type": "image"}] * images
    chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}]
    return _written(tokenizer, template, chat, add_generation_prompt=True)


def _continues(tokenizer: PreTrainedTokenizerBase, template: str) -> bool:
    chat = [
        {"role": "user", "content": [{"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "<think>a</think>b"}]},
    ]
    prompt = _written(tokenizer, template, chat[:1], add_generation_prompt=True)
    whole = _written(tokenizer, template, chat)
    return prompt is not None and whole is not None and whole.startswith(f"{prompt}<think>a</think>b")


def _written(tokenizer: PreTrainedTokenizerBase, template: str, chat: Any, **options: Any) -> str | None:
    """A chat rendered by an untrusted template; None if it fails. Raises LayoutError if it does not end."""
    try:
        with deadline(f"the shipped chat template ({CHAT_TEMPLATE}, or chat_template in a .json)"):
            return str(tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, **options))
    except TooSlow as error:
        raise LayoutError(f"{error}; remove the template, and the core gets ours") from None
    except Exception:  # a template may raise anything; it cannot render this chat
        return None


def _ids(value: Any, where: str) -> list[int]:
    found = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in found):
        raise LayoutError(f"{where}: token ids are whole numbers, got {value!r:.80}")
    return found
