"""The kind `choice`: an option by its letter, or by its text if meta["choices"] lists the options."""

import re
from collections.abc import Mapping, Sequence

from rewards.answers.kind import GoldError, Kind, Limits, decided, unparseable
from rewards.answers.plain import plain_latex, plain_text
from rewards.example import Example
from rewards.verdict import Verdict

_LETTER = re.compile(r"\(?([A-Za-z])[).:]?")
_SAID = re.compile(r"^(?:option|choice|answer) ?:? ?(?=\(?[a-z]\)?(?:[).:]|$))")
_LETTER_AND_TEXT = re.compile(r"\(?([A-Za-z])[).:]\s*(\S.*)", re.DOTALL)


def options_of(choices: Mapping[str, str] | Sequence[str]) -> dict[str, str]:
    """Options by capital letter: a list's first option is A.

    >>> options_of(["red", "blue"])
    {'A': 'red', 'B': 'blue'}
    """
    if isinstance(choices, Mapping):
        return {str(letter).strip().upper(): str(text) for letter, text in choices.items()}
    return {chr(ord("A") + place): str(text) for place, text in enumerate(choices)}


def option_letter(text: str, options: Mapping[str, str]) -> str | None:
    r"""The letter of the one option that the text names by letter, by text or by both; else None.

    >>> options = {"A": "red", "B": "blue"}
    >>> [option_letter(t, options) for t in ("b", "(B)", "Blue", "B. blue", "B. red", "A, B")]
    ['B', 'B', 'B', 'B', None, None]

    Without options, any single letter names an option.
    """
    words = _SAID.sub("", plain_text(text))
    letter = _LETTER.fullmatch(words)
    if letter and (not options or letter[1].upper() in options):
        return letter[1].upper()
    named = [letter for letter, option in options.items() if plain_text(option) == words]
    if not named:
        named = [letter for letter, option in options.items() if plain_latex(option) == plain_latex(text)]
    if len(named) == 1:
        return named[0]
    both = _LETTER_AND_TEXT.fullmatch(words)
    if both and plain_text(options.get(both[1].upper(), "")) == both[2]:
        return both[1].upper()
    return None


def _gold(example: Example) -> tuple[dict[str, str], str]:
    """The options, and the letter of the right one."""
    options = options_of(example.meta.get("choices") or ())
    letter = option_letter(example.answer, options)
    if letter is None:
        known = ", ".join(f"{letter}: {text}" for letter, text in options.items()) or "any single letter"
        raise GoldError(
            f"gold answer {example.answer!r} is not an option ({known}); correct it or meta's choices"
        )
    return options, letter


def _judge(answer: str, gold: tuple[dict[str, str], str], example: Example, limits: Limits) -> Verdict:
    options, letter = gold
    given = option_letter(answer, options)
    return unparseable(answer, "single option") if given is None else decided(given == letter, answer)


CHOICE = Kind(_gold, _judge, capped=False)
