r"""The structure of an answer in plain LaTeX: elements, connectives, relations, names, words, nouns.

Everything is linear in the length of the text, which the caps bound.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from rewards.answers.algebra import FUNCTIONS, GREEK, value
from rewards.answers.plain import plain_latex, unwrapped

_MORE_FUNCTIONS = frozenset("infinity infty inf lg sqrt pi gcd lcm max min mod det lim sup".split())
_FUNCTION = re.compile("|".join(sorted(FUNCTIONS | _MORE_FUNCTIONS, key=len, reverse=True)))

_CONNECTIVE = re.compile(r",? ?(?:\\text\{[ ,]*(and|or)[ ,]*\}|(?<![A-Za-z\\])(and|or)(?![a-z])) ?")
_MARK = re.compile(r"\\[{}]|[(\[{)\]},\0\1]")
_RELATION = re.compile(
    r"\\(?:leq?(?:slant)?|geq?(?:slant)?|neq?|lt|gt|approx|equiv|sim|simeq|cong|propto|ll|gg|iff|implies|to|mid|in)"
    r"(?![A-Za-z])|[<>!]=|[=<>]"
)
_SIGNS = {
    **dict.fromkeys((r"\le", r"\leq", r"\leqslant", r"\leslant", "<="), r"\le"),
    **dict.fromkeys((r"\ge", r"\geq", r"\geqslant", r"\geslant", ">="), r"\ge"),
    **dict.fromkeys((r"\ne", r"\neq", "!="), r"\ne"),
    **{r"\lt": "<", r"\gt": ">"},
}
INEQUALITIES = frozenset(("<", ">", r"\le", r"\ge"))

_GREEK_NAME = "|".join(sorted(GREEK - {"pi"}, key=len, reverse=True))
_SYMBOL = rf"(?:\\(?:{_GREEK_NAME}|ell)(?![A-Za-z])|[A-Za-z]+|\\text\{{[A-Za-z ]+\}})'*(?:_\w|_\{{[^{{}}=]{{1,20}}\}})?"
_NAME = re.compile(
    rf"{_SYMBOL}(?:\([^()=]{{1,20}}\))?|\({_SYMBOL}(?:,{_SYMBOL})+\)|{_SYMBOL}(?::{_SYMBOL})+"
    r"|\|(?:[A-Z]{2}|\\(?:overline|vec|overrightarrow)\{[A-Z]{1,2}\})\||m?\\angle ?[A-Z]{1,3}|\\triangle ?[A-Z]{3}"
    r"|\\(?:overline|vec|hat|bar|overrightarrow)\{[A-Za-z]{1,3}\}|\\frac\{(?:d[A-Za-z]\}\{d[A-Za-z]|[A-Z]{2}\}\{[A-Z]{2})\}"
)
_NAME_LAST = re.compile(rf"(?!\\pi(?![A-Za-z])|[ie]$)(?:\\(?:{_GREEK_NAME})|[A-Za-z])(?:_\w|_\{{\w+\}})?")
SYMBOL = re.compile(rf"{_SYMBOL}(?:\([A-Za-z]\))?")
_COMMAND = re.compile(r"\\text\{[^{}]*\}|\\[A-Za-z]+")
_QUANTITY = re.compile(r"[-+]?[0-9][0-9.,]* ?[A-Za-z/^0-9 ]*|[-+]?[$€£¥][0-9.,]+")
_OPTION = re.compile(r"\\text\{ ?\(([A-Za-z])\) ?\}")

_WORD = re.compile(r"\\text\{([^{}]*)\}|\\(?:begin|end|operatorname)\{[A-Za-z]*\}|\\[A-Za-z]+|([A-Za-z]+)")
_OTHER_BASE = re.compile(r"[0-9)] ?_|^[0-9][0-9A-Fa-f]+ ?_")
_CLOCK = re.compile(r"[0-9] ?[apAP]\.?[mM]\.?$")
_SHORT_WORDS = frozenset(("no", "ok"))
ARITHMETIC_WORDS = frozenset(
    (
        "and or not no nor to than minus plus times over less more divided multiplied by half halves third thirds "
        "quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth "
        "tenths hundredth hundredths thousandth thousandths factorial mod modulo base choose power root squared cubed "
        "percent pct percentage negative dozen hundred thousand million billion trillion quadrillion quintillion "
        "zero one two three four five six seven eight nine ten eleven twelve twenty"
    ).split()
)
"""Words that change a number. They are never the noun that it counts."""
_COUNTED = re.compile(r"(?<=[0-9}).%]) ?(?:\\text\{ ?([A-Za-z][A-Za-z .-]*)\}|(?<= )([A-Za-z][A-Za-z .-]*))$")
MAX_COUNTED_CHARS = 120


class Elements(NamedTuple):
    """A list as it is written."""

    brackets: str
    """Two characters, or "" for none."""
    parts: list[str]
    connectives: frozenset[str]
    """The separators that occur between the parts: ",", "and", "or"."""


def joined(text: str) -> str:
    """Plain LaTeX of an answer, with one spelling of brackets, of an option's letter and of the empty set."""
    text = plain_latex(text).replace(r"\langle", "(").replace(r"\rangle", ")")
    text = _OPTION.sub(r"(\\text{\1})", text)
    return r"\emptyset" if text in (r"\{\}", r"\{ \}") else text


@lru_cache(maxsize=8192)
def elements(text: str) -> Elements:
    r"""Brackets around a list, its parts, and the separators between them (commas, "and", "or").

    >>> elements(r"\{1,2\}")[:2], elements("(1,f(2,3)]")[:2], elements(r"1 \text{ or } 2").connectives
    (('{}', ['1', '2']), ('(]', ['1', 'f(2,3)']), frozenset({'or'}))
    """
    marked = _CONNECTIVE.sub(lambda found: "\0" if (found[1] or found[2]) == "and" else "\1", text)
    if (
        "\0" not in marked
        and "\1" not in marked
        and "," not in text
        and text[:1] not in ("(", "[", "{", "\\")
    ):
        return Elements("", [text.strip()], frozenset())
    marked = marked.replace(r"\{", "\2").replace(r"\}", "\3")
    brackets, inner = "", marked
    braces = marked[:1] == "{" and "," in marked
    if (marked[:1] in "([\2" or braces) and marked[-1:] in ")]\3}" and _encloses(marked):
        brackets, inner = marked[0] + marked[-1], marked[1:-1]
    depth, start, parts, connectives = 0, 0, [], set()
    for at, letter in enumerate(inner):
        depth += (letter in "([{\2") - (letter in ")]}\3")
        if letter in ",\0\1" and not depth:
            parts.append(inner[start:at])
            start = at + 1
            connectives.add({",": ",", "\0": "and", "\1": "or"}[letter])
    parts.append(inner[start:])
    return Elements(_restored(brackets), [_restored(part.strip()) for part in parts], frozenset(connectives))


def _restored(text: str) -> str:
    if len(text) == 2 and text[0] in "([{\2" and text[1] in ")]}\3":
        return text.replace("\2", "{").replace("\3", "}")
    for mark, spelled in (("\2", r"\{"), ("\3", r"\}"), ("\0", " and "), ("\1", " or ")):
        text = text.replace(mark, spelled)
    return text


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last character and no earlier."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{\2") - (letter in ")]}\3")
        if depth == 0:
            return at == len(text) - 1
    return False


@lru_cache(maxsize=8192)
def relation(text: str) -> tuple[list[str], list[str]]:
    r"""Members of a chain of relations, and the signs between them, each in its canonical spelling.

    >>> relation(r"1\leq x<2"), relation(r"\sum_{k=1}^3 k = 6")
    ((['1', 'x', '2'], ['\\le', '<']), (['\\sum_{k=1}^3 k', '6'], ['=']))
    """
    members, signs, start = [], [], 0
    for found in _RELATION.finditer(text):
        before = text[: found.start()]
        if before.count("{") - before.count("}") or before.count("(") - before.count(")"):
            continue
        members.append(text[start : found.start()].strip())
        signs.append(_SIGNS.get(found[0], found[0]))
        start = found.end()
    return [*members, text[start:].strip()], signs


def has_relation(text: str) -> bool:
    """Whether there is a relation sign in a text."""
    return _RELATION.search(text) is not None


def is_name(text: str, values: list[str]) -> bool:
    r"""Whether a text is a name for the values: a designation whose symbol does not occur in them.

    >>> is_name("x", ["4"]), is_name("x", ["x^2+1"]), is_name(r"\pi", ["3"]), is_name("x^2", ["2"])
    (True, False, False, False)
    """
    heads = {text, text.partition("(")[0], text.partition("_")[0]}
    if not _NAME.fullmatch(text) or heads & (FUNCTIONS | _MORE_FUNCTIONS):
        return False
    symbols = {symbol for part in names_in(text) for symbol in symbols_of(part)}
    return not any(symbols & symbols_of(value) for value in values if not _QUANTITY.fullmatch(value))


def names_in(text: str) -> list[str]:
    """The names in a tuple of names; the name itself if it is not a tuple."""
    return text[1:-1].split(",") if text.startswith("(") else [text]


@lru_cache(maxsize=8192)
def symbols_of(text: str) -> frozenset[str]:
    r"""The letters, words and Greek letters of a text; for a function, its name alone.

    >>> sorted(symbols_of(r"2xy+\alpha")), sorted(symbols_of("f(x)"))
    (['\\alpha', 'x', 'y'], ['f'])
    """
    if re.fullmatch(rf"{_SYMBOL}\([^()]*\)", text):
        text = text.partition("(")[0]
    found = {name for name in re.findall(r"\\[A-Za-z]+", text) if name[1:] in GREEK - {"pi"}}
    bare = _COMMAND.sub(" ", text)
    for run in re.findall(r"[A-Za-z]+", bare):
        found |= {run} if len(run) > 2 else set(run)
    if len(bare) < 30 and re.fullmatch(r"[A-Za-z]{2}", bare):  # a segment's name, as AB
        return frozenset((bare,))
    return frozenset(found)


def named(part: str) -> tuple[str, list[str]]:
    """Name and values of an equation or chain of equations; "" and the members if it has no name."""
    members, signs = relation(part)
    if not signs or any(sign not in ("=", r"\in") for sign in signs) or r"\in" in signs[1:]:
        return "", [part]
    if all(members) and is_name(members[0], members[1:]):
        return members[0].replace(" ", ""), members[1:]
    if (
        len(members) == 2
        and members[0]
        and _NAME_LAST.fullmatch(members[1])
        and not re.search("[A-Za-z]", members[0])
    ):
        return members[1], members[:1]
    return "", members if set(signs) == {"="} else [part]


@lru_cache(maxsize=8192)
def is_words(text: str) -> bool:
    """Whether a text must be compared letter by letter: words, numbers in another base, ratios, times.

    math-verify reads words as products of letters, where "elbow" is "below", and 101_2 as 101.
    """
    if any(letter.isalpha() and not letter.isascii() for letter in text):
        return True
    if ":" in text or _OTHER_BASE.search(text) or _CLOCK.search(text) or text.casefold() in _SHORT_WORDS:
        return True
    words = False
    for in_text, bare in _WORD.findall(text):
        word = _FUNCTION.sub("", bare)
        if len(in_text.strip()) > 1:
            return True
        words = words or len(word) > 2 or (len(word) == 2 and word.isupper())
    # 6xyz is a product of variables; xyz alone is a word.
    return words and (" " in text or not re.search(r"[0-9+*/^=]", text) or value(text) is None)


def split_noun(text: str) -> tuple[str, str]:
    r"""A number's text and the noun phrase after it, in the singular; the text and "" if there is no noun.

    >>> split_noun(r"3\text{ red apples}"), split_noun("10 less three"), split_noun("42")
    (('3', 'red apple'), ('10 less three', ''), ('42', ''))
    """
    found = _COUNTED.search(text) if len(text) < MAX_COUNTED_CHARS else None
    if not found:
        return text, ""
    words = (found[1] or found[2]).casefold().strip(" .").split()
    if not words or len(words) > 4 or ARITHMETIC_WORDS.intersection(words) or len("".join(words)) < 3:
        return text, ""
    return text[: found.start()].strip(), " ".join(map(_singular, words))


@lru_cache(maxsize=4096)
def speaks_of(question: str, phrase: str) -> bool:
    """Whether a question contains a phrase of `split_noun`, word by word, in singular or plural.

    >>> speaks_of("How many red apples are there?", "red apple"), speaks_of("How many?", "apple")
    (True, False)
    """
    words = [_singular(word) for word in re.findall(r"[a-z][a-z-]*", unwrapped(question).casefold())]
    wanted = phrase.split(" ")
    return any(words[at : at + len(wanted)] == wanted for at in range(len(words)))


def _singular(word: str) -> str:
    for ending, usual in (("ies", "y"), ("xes", "x"), ("ches", "ch"), ("shes", "sh"), ("s", "")):
        if len(word) > 3 and word.endswith(ending) and not word.endswith("ss"):
            return word.removesuffix(ending) + usual
    return word
