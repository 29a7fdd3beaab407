r"""Are two mathematical answers equal? Exact rules first, guards next, math-verify last.

Source: math-verify 0.9 (huggingface/Math-Verify) over sympy; the guards answer what it credits too kindly
(shared/reward-notes.md): chained relations, anagrams of letters, other units, other bases, an ordered list
against an unordered one, the question restated, a negligible term.

`quick` takes microseconds and may run anywhere. `compare` and `readable` may hang, exhaust the memory or
crash on a hostile answer: rewards.mathworker runs them in a process that can be killed. No expression is ever
turned into text: sympy's printer can hang too.
"""

import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from functools import lru_cache
from typing import Any, NamedTuple

from rewards.algebra import FUNCTIONS, GREEK, Value, difference, same, same_equation, value
from rewards.latex import to_sympy
from rewards.matching import matches_all
from rewards.normal import plain_latex, plain_number, plain_text, strange, unwrapped
from rewards.quantity import Unit, exact_value, same_unit_value, split


class Outcome(StrEnum):
    """What comparing a prediction with a gold answer ended in."""

    EQUAL = "equal"
    DIFFERENT = "different"
    UNPARSEABLE = "unparseable"
    """The prediction is no mathematics."""
    BAD_GOLD = "bad_gold"
    """The gold answer is no mathematics."""
    OVER_TIME = "over_time"
    """The prediction used up the deadline: it is hostile, no honest one does."""
    OVER_MEMORY = "over_memory"
    """The prediction used up the worker's memory: hostile too."""
    TIMEOUT = "timeout"
    """Not found out in time, for a reason that is not the prediction's."""
    CRASHED = "crashed"
    """Not found out: the worker died."""


_FUNCTIONS = (
    *("arcsin", "arccos", "arctan", "sinh", "cosh", "tanh", "sin", "cos", "tan", "cot", "sec", "csc"),
    *("infinity", "infty", "inf", "log", "exp", "ln", "lg", "sqrt", "pi"),
    *("gcd", "lcm", "max", "min", "mod", "det"),
)
_FUNCTION = re.compile("|".join(_FUNCTIONS))
_TEXT = r"\\(?:text|textrm|mathrm|mbox)\{([^{}]*)\}"
_WORD = re.compile(rf"{_TEXT}|\\(?:begin|end|operatorname)\{{[A-Za-z]*\}}|\\[A-Za-z]+|([A-Za-z]+)")
_JOINT = re.compile(
    rf" ?,? ?(?:{_TEXT.replace('[^{}]*', ' ?(?:and|or) ?')}|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])) ?"
)
_SYMBOL = r"(?:\\[A-Za-z]+|[A-Za-z]+)(?:_\w|_\{\w+\})?(?:\([A-Za-z]\))?"
_NAME = re.compile(rf"({_SYMBOL}|\((?:[A-Za-z],)+[A-Za-z]\))(?:=|\\in(?![A-Za-z]) ?)")
_NAME_LAST = re.compile(r"=((?:\\(?!pi)[A-Za-z]+|(?!i|e)[A-Za-z])(?:_\w|_\{\w+\})?)")
_LESS = r"(?:<=?|\\l(?:eq?(?:slant)?|t)(?![A-Za-z]) ?)"
_MORE = r"(?:>=?|\\g(?:eq?(?:slant)?|t)(?![A-Za-z]) ?)"
_ONE_SIDED = re.compile(rf"(.+?)({_LESS}|{_MORE})(.+)")
_TWO_SIDED = re.compile(rf"(.+?)({_LESS}|{_MORE})({_SYMBOL})({_LESS}|{_MORE})(.+)")
_RELATION = re.compile(
    r"\\(?:leq?(?:slant)?|geq?(?:slant)?|neq?|lt|gt|approx|equiv|sim|simeq|cong|propto|ll|gg|iff|implies|to|mid)(?![A-Za-z])"
    r"|[<>!]=|[=<>]"
)
_BASED = re.compile(r"\(?([0-9A-Za-z]+)\)? ?_ ?(?:\{ ?\(?([0-9]{1,2})\)? ?\}|([0-9]))")
_OTHER_BASE = re.compile(r"[0-9)] ?_|^[0-9][0-9A-Fa-f]+ ?_")
_FREE_SPACE = re.compile(r" (?![0-9])|(?<![0-9]) ")
_LETTER = re.compile(r"\\?[A-Za-z]+")
_CLOCK = re.compile(r"[0-9] ?[apAP]\.?[mM]\.?$")
_UNDONE = re.compile(
    r"\\(?:i{1,3}nt|oint|sum|prod|lim|limsup|liminf|sup|gcd|lcm|max|min|det|[bp]?mod)(?![A-Za-z])"
    r"|\\(?:operatorname|text|mathrm)\{ ?(?:lim|gcd|lcm|max|min|det|mod|sum) ?\}"
    r"|(?<![A-Za-z\\])(?:gcd|lcm|max|min|mod|lim)(?![A-Za-z])"
    r"|\\frac\{(?:d|\\partial|\\mathrm\{d\})[^{}]{0,20}\}\{(?:d|\\partial|\\mathrm\{d\})"
)
"""What is still to be worked out."""
_ARITHMETIC = re.compile(
    r"(?<=[0-9)}\]!%])[-+*]|\\(?:times|cdot|div|lfloor|lceil|l?vert)(?![A-Za-z])|[0-9)}]\(|\||[0-9)] ?/ ?[0-9(].*/"
)
_MATRIX = re.compile(r"\\begin\{([pbB]?matrix)\}(.*)\\end\{\1\}")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z]) ?")
_COMMAND = re.compile(r"\\([A-Za-z]+|[^A-Za-z])")
_COMMANDS = (
    GREEK
    | FUNCTIONS
    | frozenset(
        (
            *(
                "frac sqrt cdot times div pm mp infty emptyset cup cap setminus in le leq leqslant ge geq geqslant lt "
                "gt ne neq begin end text mathrm textrm mbox operatorname mathbb binom dbinom tbinom lg lfloor rfloor "
                "lceil rceil vert lvert rvert langle rangle notin land lor hline vartheta Pi hat bar vec overline ell"
            ).split(),
            *r"{ } \ | - / & _ #".split(),
        )
    )
)
"""What an answer may use; beyond it only what its gold uses. A parser may skip what it does not know."""
_BRACKETS = {"(": ")", "[": "]"}
MAX_CHARS = 4000
"""Of a prediction; what is longer is looked at no further."""
MAX_UNORDERED = 64
"""Elements of a list that are matched with each other; longer ones must be written alike."""

Slow = Callable[[str, str], Outcome]


class _Region(NamedTuple):
    """An interval, of a variable if it is written as an inequality."""

    name: str
    low: str
    high: str
    closed: tuple[bool, bool]


def quick(gold: str, prediction: str) -> Outcome | None:
    r"""Equal, different or unparseable as far as that shows without algebra of sympy's; None if it does not.

    >>> [quick(r"\frac{1}{2}", p) for p in ("0.5", "1/3", r"\sin 30")]
    [<Outcome.EQUAL: 'equal'>, <Outcome.DIFFERENT: 'different'>, None]
    """
    if len(prediction) > MAX_CHARS:
        return Outcome.EQUAL if prediction == gold else Outcome.UNPARSEABLE
    return _decide(_joined(gold), _joined(prediction), None)


def is_plain(gold: str) -> bool:
    """Whether a gold answer needs no parser to make sense: a number, words, or what rewards.algebra knows.

    >>> is_plain("1,024"), is_plain("Tuesday"), is_plain("x^2"), is_plain("x^^2")
    (True, True, True, False)
    """
    gold = _joined(gold)
    if not gold or strange(gold):
        return False
    _, parts = _elements(_without_names(gold, gold)[0])
    return all(_is_plain_part(split(part)[0]) for part in parts)


def is_words(text: str) -> bool:
    """Whether a text is words and no mathematics.

    >>> is_words("dark blue"), is_words("3:4"), is_words("5 apples"), is_words("xy")
    (True, False, False, False)
    """
    text = _joined(text)
    return _is_text(text) and not re.search(r"[0-9=<>^_]", text)


def compare(gold: str, prediction: str) -> Outcome:
    """Whether two answers are equal. May hang or crash on a hostile prediction: call it in the worker."""
    if len(prediction) > MAX_CHARS:
        return Outcome.EQUAL if prediction == gold else Outcome.UNPARSEABLE
    return _decide(_joined(gold), _joined(prediction), compare_expressions) or Outcome.DIFFERENT


def readable(gold: str) -> bool:
    """Whether math-verify can parse a gold answer. May hang: call it in the worker."""
    if is_plain(gold):
        return True
    gold, _ = split(_joined(gold))
    _, elements = _elements(gold)
    return _parse(gold.replace("°", "")) is not None or (len(elements) > 1 and all(map(readable, elements)))


def elements_of(text: str) -> tuple[str, list[str]]:
    r"""Brackets and elements of a list as it came.

    >>> elements_of(r"1 \text{ and } 2"), elements_of(r"x = \pm 2"), elements_of("[1,2)")
    (('', ['1', '2']), ('', ['2', '-2']), ('[)', ['1', '2']))
    """
    return _list(bare(text))


def bare(text: str) -> str:
    """Plain LaTeX without the name of what it is the value of: `x = 4` is "4"."""
    return _named(_joined(text))[1]


def quick_list(gold: list[str], given: list[str], ordered: bool) -> Outcome | None:
    """As `quick`, of two lists in order or one to one."""
    if len(gold) != len(given):
        return Outcome.DIFFERENT
    if ordered:
        return _all(quick(one, other) for one, other in zip(gold, given, strict=True))
    if len(gold) > MAX_UNORDERED:
        return Outcome.EQUAL if sorted(gold) == sorted(given) else Outcome.DIFFERENT
    return _match(gold, given, quick)


def restates(question: str, gold: str, prediction: str) -> bool:
    r"""Whether a prediction is an expression of the question's that is left to be worked out.

    >>> restates(r"Expand $(x-1)(x+1)$.", "x^2-1", "(x-1)(x+1)"), restates("Factor x^2-1.", "x^2-1", "x^2-1")
    (True, False)

    What the question offers, as in "which of x+1 and x-1 ...", its gold is part of as well.
    """
    asked, answer = _dense(question), _dense(prediction)
    if len(answer) < 2 or answer not in asked or _dense(gold) in asked:
        return False
    worked_out = plain_number(plain_latex(prediction)) or re.fullmatch(r"[-+]?\\?[A-Za-z]+", answer)
    return not worked_out and re.search(r"[-+*/^(!]|\\[A-Za-z]", answer.lstrip("+-")) is not None


@lru_cache(maxsize=1024)
def _dense(text: str) -> str:
    return plain_latex(text).replace(" ", "")


@lru_cache(maxsize=8192)
def _joined(text: str) -> str:
    """Plain LaTeX with "and" and "or" between answers as commas."""
    text = plain_latex(text).replace(r"\langle", "(").replace(r"\rangle", ")")
    text = _JOINT.sub(", ", text)
    return r"\emptyset" if text == r"\{\}" else text


def _is_plain_part(text: str) -> bool:
    return _is_text(text) or exact_value(text) is not None


def _decide(gold: str, prediction: str, slow: Slow | None, part: bool = False) -> Outcome | None:
    """How two joined texts compare, a `part` of an answer or all; None if only `slow` could tell and there is none."""
    if unwrapped(gold) == unwrapped(prediction):
        return Outcome.EQUAL
    regions = _compare_regions(gold, prediction, slow)
    if regions:
        return regions
    if not part or _named(gold)[0] == _named(prediction)[0]:  # 2, 3 does not say that x=2, y=3
        gold, prediction = _without_names(gold, prediction)
    gold, gold_unit, prediction, unit = _without_units(gold, prediction)
    if gold_unit and unit and gold_unit != unit:
        if gold_unit.dimension != unit.dimension:
            return Outcome.DIFFERENT
        equal = same_unit_value(gold, gold_unit, prediction, unit)
        return Outcome.EQUAL if equal else Outcome.DIFFERENT
    if (gold_unit and prediction.endswith("%")) or (unit and gold.endswith("%")):
        return Outcome.DIFFERENT
    number, other = plain_number(gold), plain_number(prediction)
    if number and other:
        return Outcome.EQUAL if number.equals(other) else Outcome.DIFFERENT
    if unwrapped(gold) == unwrapped(prediction):
        return Outcome.EQUAL
    if _is_text(gold) or _is_text(prediction):
        return _compare_texts(gold, prediction)
    unknown = _unsuited(gold, prediction)
    if unknown:
        return unknown
    return _compare_structures(gold, prediction, slow)


def _without_units(gold: str, prediction: str) -> tuple[str, Unit | None, str, Unit | None]:
    """Both numbers and units; where the one surely has a unit, a letter behind the other's number is one too."""
    if _FREE_SPACE.sub("", gold) == _FREE_SPACE.sub("", prediction):
        return gold, None, gold, None
    (wanted, gold_unit), (given, unit) = split(gold), split(prediction)
    if gold_unit and not unit and gold_unit.known:
        given, unit = split(prediction, loose=True)
    elif unit and not gold_unit and unit.known:
        wanted, gold_unit = split(gold, loose=True)
    return wanted, gold_unit, given, unit


def _compare_texts(gold: str, prediction: str) -> Outcome:
    based, other = _BASED.fullmatch(unwrapped(gold)), _BASED.fullmatch(unwrapped(prediction))
    if based and other:
        alike = _in_base(based) == _in_base(other)
    else:
        alike = plain_text(gold) == plain_text(prediction)
    if alike:
        return Outcome.EQUAL
    return Outcome.DIFFERENT if _is_text(gold) else Outcome.UNPARSEABLE


def _in_base(found: re.Match[str]) -> tuple[str, int]:
    return found[1].lstrip("0").casefold(), int(found[2] or found[3])


def _unsuited(gold: str, prediction: str) -> Outcome | None:
    """What keeps a prediction from being compared as mathematics, whatever it is worth."""
    if (
        strange(prediction)
        or prediction.count("'") > gold.count("'")
        or "?" in prediction
        or ";" in prediction
    ):
        return Outcome.UNPARSEABLE
    unknown = {found[1] for found in _COMMAND.finditer(prediction)} - _COMMANDS
    if _UNDONE.search(prediction) and not _UNDONE.search(gold):
        return Outcome.DIFFERENT  # the question restated
    if unknown and not unknown <= {found[1] for found in _COMMAND.finditer(gold)}:
        return Outcome.UNPARSEABLE
    if plain_number(gold) and _ARITHMETIC.search(prediction) and not _PLUS_MINUS.search(prediction):
        return Outcome.DIFFERENT  # restated as well
    return None


def _compare_structures(gold: str, prediction: str, slow: Slow | None) -> Outcome | None:
    """Matrices, lists, equations and single expressions."""
    wanted, given = _matrix(gold), _matrix(prediction)
    if wanted and given:
        if [len(row) for row in wanted] != [len(row) for row in given]:
            return Outcome.DIFFERENT
        rows = zip(wanted, given, strict=True)
        return _all(_decide(*pair, slow, part=True) for row in rows for pair in zip(*row, strict=True))
    lists = _list(gold), _list(prediction)
    if any(len(elements) > 1 for _, elements in lists):
        return _compare_lists(*lists, slow)
    relations = len(_RELATION.findall(prediction))
    if relations != len(_RELATION.findall(gold)) and (relations or "=" in gold):
        return Outcome.DIFFERENT
    if relations:
        return _compare_equations(gold, prediction, slow)
    return _compare_values(gold, prediction) or (slow and slow(gold, prediction))


def _compare_values(gold: str, prediction: str) -> Outcome | None:
    if len(gold) == len(prediction) == 1 and gold.casefold() == prediction.casefold():
        return Outcome.EQUAL  # a letter alone is a name, and a name's case is spelling
    wanted, given = exact_value(gold), exact_value(prediction)
    if wanted is None or given is None:
        return None
    equal = same(wanted, given)
    if equal is False and _rounded(gold, prediction) and wanted.is_constant and given.is_constant:
        return None  # an irrational number and its decimals
    return None if equal is None else Outcome.EQUAL if equal else Outcome.DIFFERENT


def _rounded(gold: str, prediction: str) -> bool:
    """Whether just one of two is a decimal number, and nothing but that."""
    numbers = plain_number(gold), plain_number(prediction)
    decimal = gold if numbers[0] else prediction
    return (numbers[0] is None) != (numbers[1] is None) and "." in decimal


def _compare_equations(gold: str, prediction: str, slow: Slow | None) -> Outcome | None:
    """Equations and other relations: equal if one is a multiple of the other, or the sides are."""
    sides = [text.split("=") for text in (gold, prediction)]
    if any(len(side) != 2 or _RELATION.search("".join(side)) for side in sides):
        return slow and slow(gold, prediction)
    gaps = [_gap(*map(str.strip, side)) for side in sides]
    if gaps[0] and gaps[1]:
        if same_equation(gaps[0], gaps[1]):
            return Outcome.EQUAL
        if not (gaps[0].has_functions or gaps[1].has_functions):
            return Outcome.DIFFERENT
    # math-verify looks at right-hand sides: 2+2=4 must not pass for x=4.
    if {*_LETTER.findall(gold)} != {*_LETTER.findall(prediction)}:
        return Outcome.DIFFERENT
    return slow and slow(gold, prediction)


def _gap(left: str, right: str) -> Value | None:
    one, other = value(left), value(right)
    return difference(one, other) if one and other else None


def _without_names(gold: str, prediction: str) -> tuple[str, str]:
    r"""Without `x=` or `x \in` in front of what is named, unless the two name different things."""
    (name, bare_gold), (other, bare) = _named(gold), _named(prediction)
    unnamed = (name and not other and _RELATION.search(bare)) or (
        other and not name and _RELATION.search(bare_gold)
    )
    return (gold, prediction) if unnamed or (name and other and name != other) else (bare_gold, bare)


@lru_cache(maxsize=8192)
def _named(text: str) -> tuple[str, str]:
    """The one name of all answers in a text, and they: `x=1,x=2` is ("x", "1, 2"). Else "" and the text."""
    if not _RELATION.search(text) and r"\in" not in text:
        return "", text
    brackets, parts = _elements(text)
    pairs = [_name_of(part) for part in parts]
    names = {name for name, _ in pairs}
    bare = ", ".join(rest for _, rest in pairs)
    if brackets or "" in names or len(names) > 1 or _RELATION.search(bare):
        return "", text
    return names.pop(), bare


def _name_of(part: str) -> tuple[str, str]:
    found = _NAME.match(part)
    if found:
        return found[1], part[found.end() :]
    found = _NAME_LAST.search(part)
    if found and found.end() == len(part) and not re.search(r"[A-Za-z]", part[: found.start()]):
        return found[1], part[: found.start()]
    return "", part


@lru_cache(maxsize=8192)
def _is_text(text: str) -> bool:
    """Whether only the letters as they stand can be compared: words, numbers in another base, ratios, times.

    math-verify reads words as products of letters, where "elbow" is "below", and 101_2 as 101.
    """
    if any(letter.isalpha() and not letter.isascii() for letter in text):
        return True
    if ":" in text or _OTHER_BASE.search(text) or _CLOCK.search(text):
        return True
    words = False
    for in_text, bare in _WORD.findall(text):
        word = _FUNCTION.sub("", bare)
        if len(in_text.strip()) > 1:
            return True
        words = words or len(word) > 2 or (len(word) == 2 and word.isupper())
    # 6xyz is a product of variables, xyz alone a word.
    return words and (" " in text or not re.search(r"[0-9+*/^=]", text) or value(text) is None)


def _elements(text: str) -> tuple[str, list[str]]:
    r"""Brackets around a list and what its commas separate: `\{1,2\}` is ("{}", ["1", "2"]).

    >>> _elements("(1,f(2,3)]"), _elements("1,2")
    (('(]', ['1', 'f(2,3)']), ('', ['1', '2']))
    """
    text = text.replace(r"\{", "\0").replace(r"\}", "\1")
    brackets, inner = "", text
    if text[:1] in "([\0" and text[-1:] in ")]\1" and _encloses(text):
        brackets, inner = text[0] + text[-1], text[1:-1]
    depth, start, parts = 0, 0, []
    for at, letter in enumerate(inner):
        depth += (letter in "([{\0") - (letter in ")]}\1")
        if letter == "," and not depth:
            parts.append(inner[start:at])
            start = at + 1
    parts.append(inner[start:])
    restored = [part.strip().replace("\0", r"\{").replace("\1", r"\}") for part in parts]
    return brackets.replace("\0", "{").replace("\1", "}"), restored


def _encloses(text: str) -> bool:
    """Whether the first bracket is closed by the last character and no earlier."""
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in "([{\0") - (letter in ")]}\1")
        if depth == 0:
            return at == len(text) - 1
    return False


def _list(text: str) -> tuple[str, list[str]]:
    r"""As `_elements`, with both signs of a \pm written out."""
    brackets, parts = _elements(text)
    if r"\pm" not in text and r"\mp" not in text:
        return brackets, parts
    both: list[str] = []
    for part in parts:
        signs = _PLUS_MINUS.findall(part)
        if signs and len(signs) <= 2:
            for plus, minus in (("+", "-"), ("-", "+")):
                one = _PLUS_MINUS.sub(lambda found, p=plus, m=minus: p if found[1] == "pm" else m, part)  # type: ignore[misc]
                both.append(one.removeprefix("+"))
        else:
            both.append(part)
    return brackets, both


def _matrix(text: str) -> list[list[str]] | None:
    found = _MATRIX.fullmatch(text) if text.startswith(r"\begin") else None
    if not found or r"\begin" in found[2]:
        return None
    rows = found[2].strip().removesuffix(r"\\").split(r"\\")
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _compare_regions(gold: str, prediction: str, slow: Slow | None) -> Outcome | None:
    """Intervals, unions of them, and inequalities in one variable; None if the two are not such."""
    inequality = [re.search(rf"{_LESS}|{_MORE}", text) is not None for text in (gold, prediction)]
    union = r"\cup" in gold or r"\cup" in prediction
    if not any(inequality) and not union:
        return None
    wanted, given = _regions(gold), _regions(prediction)
    if not wanted or not given or len(wanted) != len(given) or len(wanted) > MAX_UNORDERED:
        return None
    names = {region.name for region in wanted + given} - {""}
    if len(names) > 1:
        return None
    return _match(wanted, given, lambda one, other: _same_region(one, other, slow))


def _same_region(one: _Region, other: _Region, slow: Slow | None) -> Outcome | None:
    if one.closed != other.closed:
        return Outcome.DIFFERENT
    return _all(_decide(*pair, slow, part=True) for pair in ((one.low, other.low), (one.high, other.high)))


def _regions(text: str) -> list[_Region] | None:
    parts = _elements(text)[1] if re.search(rf"{_LESS}|{_MORE}", text) else text.split(r"\cup")
    regions = [_region(part.strip()) for part in parts]
    return None if None in regions else [region for region in regions if region]


def _region(text: str) -> _Region | None:
    r"""One interval.

    >>> tuple(_region("(1,2]")), tuple(_region("2<x"))
    (('', '1', '2', (False, True)), ('x', '2', '\\infty', (False, False)))
    """
    name = _NAME.match(text)
    if name and r"\in" in name[0]:
        text = text[name.end() :]
    brackets, parts = _elements(text)
    if len(brackets) == 2 and brackets[0] in _BRACKETS and len(parts) == 2:
        low, high = (_infinite(part) for part in parts)
        return _Region(name[1] if name else "", low, high, (brackets[0] == "[", brackets[1] == "]"))
    if len(_RELATION.findall(text)) == 2:
        found = _TWO_SIDED.fullmatch(text)
        if not found or _is_more(found[2]) != _is_more(found[4]) or _RELATION.search(found[1] + found[5]):
            return None
        ends, closed = (found[1], found[5]), (_is_closed(found[2]), _is_closed(found[4]))
        if _is_more(found[2]):
            ends, closed = ends[::-1], closed[::-1]
        return _Region(found[3], _infinite(ends[0]), _infinite(ends[1]), closed)
    return _one_sided(text)


def _one_sided(text: str) -> _Region | None:
    found = _ONE_SIDED.fullmatch(text)
    if not found or len(_RELATION.findall(text)) != 1:
        return None
    left, relation, right = found.groups()
    more, closed = _is_more(relation), _is_closed(relation)
    if re.fullmatch(_SYMBOL, left):
        name, end = left, right
    elif re.fullmatch(_SYMBOL, right):
        name, end, more = right, left, not more
    else:
        return None
    if re.search(rf"(?<![A-Za-z\\]){re.escape(name)}(?![A-Za-z])", end):
        return None
    if more:
        return _Region(name, end, r"\infty", (closed, False))
    return _Region(name, r"-\infty", end, (False, closed))


def _is_more(relation: str) -> bool:
    return relation.startswith((">", r"\g"))


def _is_closed(relation: str) -> bool:
    return "e" in relation or "=" in relation


def _infinite(text: str) -> str:
    text = re.sub(r"^\+?\\infty$|^\+?(?:infinity|inf|oo)$", r"\\infty", text)
    return re.sub(r"^-(?:infinity|inf|oo)$", r"-\\infty", text)


def _compare_lists(
    gold: tuple[str, list[str]], prediction: tuple[str, list[str]], slow: Slow | None
) -> Outcome | None:
    """In order within parentheses and brackets, in any order within braces or none."""
    (brackets, wanted), (others, given) = gold, prediction
    if len(wanted) != len(given) or (brackets and others and brackets != others):
        return Outcome.DIFFERENT
    ordered = any(kind not in ("", "{}") for kind in (brackets, others))
    if ordered and (not brackets or not others):
        return Outcome.DIFFERENT
    if ordered:
        return _all(_decide(*pair, slow, part=True) for pair in zip(wanted, given, strict=True))
    if len(wanted) > MAX_UNORDERED:
        return Outcome.EQUAL if sorted(wanted) == sorted(given) else Outcome.DIFFERENT
    return _match(wanted, given, lambda one, other: _decide(one, other, slow, part=True))


def _all(outcomes: Iterable[Outcome | None]) -> Outcome | None:
    """The first that is not equal; None only if there is no such and one is not known."""
    unknown = False
    for outcome in outcomes:
        if outcome not in (None, Outcome.EQUAL):
            return outcome
        unknown |= outcome is None
    return None if unknown else Outcome.EQUAL


def _match(
    wanted: list[Any], given: list[Any], outcome_of: Callable[[Any, Any], Outcome | None]
) -> Outcome | None:
    """Whether each wanted element equals a given one of its own; None if that hangs on an unknown pair."""
    known: dict[tuple[int, int], Outcome | None] = {}

    def outcome(want: int, give: int) -> Outcome | None:
        if (want, give) not in known:
            known[want, give] = outcome_of(wanted[want], given[give])
        return known[want, give]

    count = len(wanted)
    if matches_all(count, count, lambda want, give: outcome(want, give) == Outcome.EQUAL):
        return Outcome.EQUAL
    if matches_all(count, count, lambda want, give: outcome(want, give) in (Outcome.EQUAL, None)):
        return None
    return Outcome.DIFFERENT


def compare_expressions(gold: str, prediction: str) -> Outcome:
    """How two expressions compare by math-verify and the guards around it. May hang, as `compare`."""
    from math_verify import verify

    wanted, given = _parse(gold.replace("°", "")), _parse(prediction.replace("°", ""))
    if wanted is None:
        return Outcome.BAD_GOLD
    if given is None:
        return Outcome.UNPARSEABLE
    if not verify([wanted], [given], timeout_seconds=None):
        return Outcome.DIFFERENT
    # "50%" is equal to 50 as well as to 0.5, so its value says nothing here.
    close = "%" in gold + prediction or _same_value(wanted, given)
    return Outcome.EQUAL if close else Outcome.DIFFERENT


def _same_value(gold: Any, prediction: Any) -> bool:
    """Whether two expressions agree to 6 digits where decimals are involved, and to 40 where none are.

    math-verify rounds to 6 decimals, which makes 1e-7 equal to 2e-7, and chops at 15 digits, which lets a
    negligible term pass; a decimal that is one term of several is such a term. Expressions with variables are
    compared at two points. True for anything but two expressions.
    """
    from sympy import Add, Expr, Float, Rational

    if not all(isinstance(side, Expr) for side in (gold, prediction)):
        return True
    names = sorted(gold.free_symbols | prediction.free_symbols, key=lambda symbol: symbol.name)
    decimal = gold.has(Float) or prediction.has(Float)
    term = any(any(part.has(Float) for part in total.args) for total in prediction.atoms(Add))
    digits = 6 if decimal and not term else 12 if decimal else 40
    for numerator in (17, 29) if names else (0,):
        point = {name: Rational(numerator + 2 * place, 13) for place, name in enumerate(names)}
        if not _agree(gold.subs(point), prediction.subs(point), digits):
            return False
    return True


def _agree(gold: Any, prediction: Any, digits: int) -> bool:
    from sympy import Integer

    if not (gold.is_number and prediction.is_number):
        return True
    wanted, given = gold.evalf(digits + 10), prediction.evalf(digits + 10)
    if not (wanted.is_finite and given.is_finite):
        return True
    scale = max(abs(wanted), Integer(10) ** -20)  # a zero that evalf cannot prove is some 1e-60
    return bool(abs(wanted - given) <= scale * Integer(10) ** -digits)


@lru_cache(maxsize=4096)
def _parse(text: str) -> Any:
    """sympy's expression of LaTeX, or None. Cached: the gold answer of a group is parsed once."""
    from latex2sympy2_extended import NormalizationConfig, normalize_latex
    from math_verify.grader import should_treat_as_complex

    config = NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        latex = normalize_latex(text, config=config)
        real = not should_treat_as_complex(latex)
        return to_sympy(latex, real)
    except MemoryError:
        raise
    except Exception:  # antlr, sympy and mpmath raise whatever they stumble over: it is no mathematics
        return None
