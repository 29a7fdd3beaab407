r"""The chat tokens of a SAIL-VL2 core, its chat template, and the word-level tokenizer of the tiny cores.

The word-level tokenizer drops white space and decodes without it ("C=9;9+7=16"). So encoding a decoded text gives the
same ids, except that two adjacent words decode to one ("read A" -> "readA") and that symbols given as words can spell
a tag ("<", "think", ">"). The texts that a tiny core learns to write have a symbol, a digit or a tag between any two
words. Questions do not, but they are never re-encoded.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from string import ascii_lowercase
from typing import TYPE_CHECKING

from core.model.prompts import THINK_CONTRACT

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

PAD = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
IMAGE_START = "<img>"
IMAGE_END = "</img>"
IMAGE_TOKEN = "<IMG_CONTEXT>"
UNKNOWN = "[UNK]"

SPECIAL_TOKENS = (PAD, TURN_START, TURN_END, IMAGE_START, IMAGE_END, IMAGE_TOKEN, UNKNOWN)
"""Special tokens, which `skip_special_tokens=True` drops."""
MARKUP_TOKENS = ("<think>", "</think>", r"\boxed{", "}", THINK_CONTRACT)
"""Single tokens that are part of the text: `skip_special_tokens=True` keeps them, so rewards see them."""
RELEASED_IDS = {
    **{PAD: 151643, TURN_START: 151644, TURN_END: 151645, "<think>": 151667, "</think>": 151668},
    **{IMAGE_START: 151669, IMAGE_END: 151670, IMAGE_TOKEN: 151671},
}
"""Ids in the released vocabulary of the tokens that every core needs."""
RELEASED_VOCABULARY = 151936
"""Rows of the released embeddings; there are more rows than tokens. Source: Qwen3's config.json."""
SYMBOLS = tuple("+-*/=.,;:?!()")
ROLES = ("system", "user", "assistant")

_PIECE = r"[A-Za-z]+|[^A-Za-z\s]"


def chat_template() -> str:
    """The Jinja source of the chat template that every native core is saved with."""
    source = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    return source.replace("@THINK_CONTRACT@", THINK_CONTRACT)


def generation_config(tokenizer: "PreTrainedTokenizerBase") -> "GenerationConfig":
    """The ids at which `generate` and vLLM stop (end of turn, end of text) and the padding id (end of text).

    It omits sampling parameters on purpose: vLLM would make them the defaults of every request. Raises ValueError
    if the tokenizer lacks one of the two tokens.
    """
    from transformers import GenerationConfig

    ends = [token_id(tokenizer, token) for token in (TURN_END, PAD)]
    return GenerationConfig(eos_token_id=ends, pad_token_id=ends[-1])


def token_id(tokenizer: "PreTrainedTokenizerBase", token: str) -> int:
    """The id of a token that every SAIL-VL2 tokenizer needs. Raises ValueError if this tokenizer lacks it."""
    found = tokenizer.convert_tokens_to_ids(token)
    if not isinstance(found, int) or found == tokenizer.unk_token_id:
        raise ValueError(f"the tokenizer has no token {token}: it is not the tokenizer of a SAIL-VL2 core")
    return found


def pieces(text: str) -> list[str]:
    r"""The words, digits and symbols of a text, each of which is one token of a word-level tokenizer; without markup.

    >>> pieces(r"Is it red? \boxed{yes}")
    ['Is', 'it', 'red', '?', 'yes']
    """
    markup = re.compile("|".join(re.escape(token) for token in (*SPECIAL_TOKENS, *MARKUP_TOKENS)))
    return re.findall(_PIECE, markup.sub(" ", text))


def build_word_tokenizer(words: Iterable[str]) -> "PreTrainedTokenizerBase":
    """A tokenizer with one token per word, digit and symbol, and the chat tokens of the real one.

    Ids depend only on the order of `words`. A word is letters only, or one symbol; repeated words count once. Raises
    ValueError for anything else, because the pre-tokenizer would split it and never match it.
    """
    return _tokenizer({word: i for i, word in enumerate(_vocabulary(words))})


def build_padded_tokenizer(words: Iterable[str]) -> "PreTrainedTokenizerBase":
    """The word-level tokenizer with the size of the released one: `RELEASED_VOCABULARY` tokens, chat tokens at
    their released ids, and placeholder words ("unusedaaaa") at the ids in between.

    It serves cores of the real sizes with random weights: every id that such a core samples is one word, and every id
    that a configuration names has its released meaning. Raises ValueError as `build_word_tokenizer`.
    """
    vocabulary = [word for word in _vocabulary(words) if word not in RELEASED_IDS]
    fillers = (f"unused{''.join(letters)}" for letters in product(ascii_lowercase, repeat=4))
    taken = {*vocabulary, *RELEASED_IDS}
    given = chain(vocabulary, (filler for filler in fillers if filler not in taken))
    at = {number: word for word, number in RELEASED_IDS.items()}
    return _tokenizer(
        {
            at[number] if number in at else next(given): number
            for number in range(max(RELEASED_VOCABULARY, len(vocabulary) + len(at)))
        }
    )


def _tokenizer(vocabulary: Mapping[str, int]) -> "PreTrainedTokenizerBase":
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel(dict(vocabulary), unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\s+"), behavior="removed"),
            pre_tokenizers.Split(Regex(_PIECE), behavior="isolated"),
        ]
    )
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    backend.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=TURN_END,
        unk_token=UNKNOWN,
        extra_special_tokens=[TURN_START, IMAGE_START, IMAGE_END, IMAGE_TOKEN],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=chat_template(),
    )


def _vocabulary(words: Iterable[str]) -> Sequence[str]:
    asked = list(words)
    for word in asked:
        if not re.fullmatch(_PIECE, word):
            raise ValueError(
                f"word {word!r}: a word is letters A-Z a-z only, or one other character; split it up"
            )
    return list(dict.fromkeys([*SPECIAL_TOKENS, *MARKUP_TOKENS, *"0123456789", *SYMBOLS, *ROLES, *asked]))
