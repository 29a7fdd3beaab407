"""The kind of a gold answer and its verifier, and the options of multiple choice."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from corpus.formats.fields import Rejected, text

LETTERS = "ABCDEFGH"
_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?")
_EXPRESSION = re.compile(r"[\\^=√π]|\$.+\$|\d\s*[-+*/]\s*\d|\d[a-z]\b|^[a-z]\d?$")
_LETTER = re.compile(r"\(?([A-H])\)?(?:[.:)]\s.*|[.:)])?", re.DOTALL)
_LISTED = re.compile(r"^\s*\(?([A-H])[.:)]\s+(\S.*)$", re.MULTILINE)
_WORDS = 5
"""Most words of a gold answer that is compared as exact text."""


def kind_of(answer: str, options: bool) -> tuple[str, str]:
    r"""The kind of a gold answer (number, choice, expression, text or none), and its verifier.

    >>> kind_of("1,234.5", False), kind_of(r"\frac{1}{2}", False), kind_of("B", True), kind_of("a bus", False)
    (('number', 'number'), ('expression', 'math'), ('choice', 'choice'), ('text', 'exact'))
    """
    if not answer:
        return "none", "none"
    if options and answer in LETTERS:
        return "choice", "choice"
    if _NUMBER.fullmatch(answer):
        return "number", "number"
    if _EXPRESSION.search(answer):
        return "expression", "math"
    return "text", "exact" if len(answer.split()) <= _WORDS else "judge"


def listed_options(question: str) -> list[str]:
    """The options that a question lists, one a line, as in "A. red"; [] if there are none."""
    found = _LISTED.findall(question)
    return (
        [words for _, words in found]
        if [letter for letter, _ in found] == list(LETTERS[: len(found)])
        else []
    )


def options_of(row: Mapping[str, Any], column: str | None) -> list[str]:
    """The options of a row: a list (or its text) in one column, or columns A, B, C, ...; [] if there are none."""
    value = row.get(column) if column else None
    if value in (None, "", []):
        letters = [row.get(letter) for letter in LETTERS]
        count = next((at for at, option in enumerate(letters) if option in (None, "")), len(letters))
        return [text(option, LETTERS[at]) for at, option in enumerate(letters[:count])] if count > 1 else []
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            value = None
    if isinstance(value, Mapping):
        value = list(value.values())
    if not isinstance(value, list | tuple) or len(value) > len(LETTERS):
        raise Rejected(
            column or "options", "must be a list of 2 to 8 options", row.get(column or ""), "write a list"
        )
    return [text(option, "options") for option in value]


def with_options(question: str, options: Sequence[str]) -> str:
    """The question with its options below, unless it lists them itself."""
    if not options or listed_options(question):
        return question
    return "\n".join(
        [question, *(f"{letter}. {words}" for letter, words in zip(LETTERS, options, strict=False))]
    )


def choice_of(answer: Any, options: Sequence[str]) -> str:
    """The letter of an answer to a question with options: a letter, an option's number from 0, or its words.

    Raises Rejected for any other answer.
    """
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return LETTERS[answer]
    words = text(answer, "answer").strip()
    plain = [option.strip().casefold() for option in options]
    if plain.count(words.casefold()) == 1:
        return LETTERS[plain.index(words.casefold())]
    if plain.count(words.casefold()) > 1:
        raise Rejected("answer", "is several of the options", answer, "write the letter of one option")
    letter = _LETTER.fullmatch(words)
    if letter and LETTERS.index(letter[1]) < len(options):
        return letter[1]
    raise Rejected(
        "answer", "is none of the options", answer, f"write a letter from A to {LETTERS[len(options) - 1]}"
    )
