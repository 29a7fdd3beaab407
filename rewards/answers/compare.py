r"""Two values compared by their types.

If the types cannot decide, the comparison stays open for sympy (rewards.answers.outcome). Some rules are stricter
than math-verify (huggingface/Math-Verify 0.9), which accepts wrong answers of these forms: chained relations, anagrams
of letters, other units, other bases, an ordered list against an unordered one, the question restated, a negligible
term.
"""

import re
from itertools import pairwise

from rewards.answers import notation
from rewards.answers.algebra import (
    FUNCTIONS,
    GREEK,
    Value,
    approximate,
    difference,
    same,
    same_equation,
    value,
)
from rewards.answers.notation import elements, is_words, named, relation, speaks_of, split_noun, symbols_of
from rewards.answers.number import comma_number, exact_number, plain_number
from rewards.answers.outcome import Outcome, Pair, Result, all_of, one_to_one
from rewards.answers.plain import plain_text, strange, unwrapped
from rewards.answers.quantity import exact_value, same_unit_value, split
from rewards.answers.region import Interval, Region, as_region
from rewards.answers.values import Answer, Chain, Collection, Matrix, Named, Relation, Term, Words, parse

MAX_CHARS = 4000
"""Largest length of a text that is parsed; a longer text must equal the gold character by character."""
MAX_UNORDERED = 64
"""Most elements of a list that are matched with each other. Longer lists must be written alike."""
_BASED = re.compile(r"\(?([0-9A-Za-z]+)\)? ?_ ?(?:\{ ?\(?([0-9]{1,2})\)? ?\}|([0-9]))")
_FREE_SPACE = re.compile(r" (?![0-9])|(?<![0-9]) ")
_PLUS_MINUS = re.compile(r"\\(?:pm|mp)(?![A-Za-z])")
_PRODUCT = re.compile(r"(?<=[A-Za-z]) ?(?:\\cdot|\\times|\*) ?(?=[A-Za-z])")
_ELEMENT = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se Br Kr Rb Sr Ag "
    "Cd Sn Sb I Xe Cs Ba Pt Au Hg Pb U"
).split()
_FORMULA = re.compile(rf"(?:\(?(?:{'|'.join(sorted(_ELEMENT, key=len, reverse=True))})\)?[0-9]*)+")
_PRIMED = re.compile(r"(?!').*[A-Za-z)]'")
_OF_LETTER = re.compile(r"([A-Za-z])\(([kmnr-z])\)")
_COMMAND = re.compile(r"\\([A-Za-z]+|[^A-Za-z])")
_COMMANDS = (
    GREEK
    | FUNCTIONS
    | frozenset(
        (
            *(
                "frac sqrt cdot times div pm mp infty emptyset cup cap setminus in le leq leqslant ge geq geqslant lt "
                "gt ne neq begin end text operatorname mathbb binom dbinom tbinom lg lfloor rfloor "
                "lceil rceil vert lvert rvert langle rangle notin land lor hline vartheta Pi hat bar vec overline ell"
            ).split(),
            *r"{ } \ | - / & _ #".split(),
        )
    )
)
"""Symbols that any answer may use; others must occur in the gold, because a parser may skip unknown symbols."""
_UNDONE = re.compile(
    r"\\(?:i{1,3}nt|oint|sum|prod|lim|limsup|liminf|sup|gcd|lcm|max|min|det|[bp]?mod)(?![A-Za-z])"
    r"|\\(?:operatorname|text)\{ ?(?:lim|gcd|lcm|max|min|det|mod|sum) ?\}|\\begin\{vmatrix\}"
    r"|(?<![A-Za-z\\])(?:gcd|lcm|max|min|mod|lim)(?![A-Za-z])"
    r"|\\frac\{(?:d|\\partial|\\text\{d\})[^{}]{0,20}\}\{(?:d|\\partial|\\text\{d\})"
)
"""Matches expressions that still have to be evaluated."""
_ARITHMETIC = re.compile(
    r"(?<=[0-9)}\]!%])[-+*]|\\(?:times|cdot|div|lfloor|lceil|l?vert)(?![A-Za-z])|[0-9)}]\(|\||[0-9)] ?/ ?[0-9(].*/"
)


def decide(gold: str, answer: str, question: str = "") -> Result:
    r"""How an answer compares with its gold, as texts.

    >>> [decide(r"\frac{1}{2}", answer) for answer in ("0.5", "1/3", r"\sin 30")]
    [<Outcome.EQUAL: 'equal'>, <Outcome.DIFFERENT: 'different'>, Pair(gold='\\frac{1}{2}', given='\\sin 30')]
    """
    if len(answer) > MAX_CHARS or len(gold) > MAX_CHARS:
        return Outcome.EQUAL if answer == gold else Outcome.UNPARSEABLE
    if ";" in gold:
        gold = _as_tuples(gold) if notation.joined(answer).startswith("(") else gold
        gold, answer = gold.replace(";", ","), answer.replace(";", ",")
    comma = _decimal_comma(gold, answer)
    return comma or compare(parse(notation.joined(gold)), parse(notation.joined(answer)), question)


def _as_tuples(gold: str) -> str:
    """Solutions of one system, as p=5,q=2;p=7,q=2, as tuples of the values; the gold itself if it is something else."""
    solutions = [[named(part) for part in elements(one).parts] for one in notation.joined(gold).split(";")]
    names = {tuple(name for name, _ in solution) for solution in solutions}
    if len(names) != 1 or len(solutions[0]) < 2 or not all(names.pop()):
        return gold
    return ",".join(f"({','.join(values[-1] for _, values in solution)})" for solution in solutions)


def _decimal_comma(gold: str, answer: str) -> Outcome | None:
    """How two numbers compare if one has a decimal comma; None if neither has.

    An answer's comma between digits is a decimal comma if the gold is a number with a point. A gold's comma is one if
    three or more digits follow a leading zero, since 0,5 may be a list of two.
    """
    if "," not in gold + answer:
        return None
    wanted, given = exact_number(gold), exact_number(answer)
    if wanted and not given and wanted.step:
        given = comma_number(answer)
    elif given and not wanted and re.search(r"(?<![0-9])0,[0-9]{3}", gold):
        wanted = comma_number(gold)
    else:
        return None
    return (Outcome.EQUAL if wanted.equals(given) else Outcome.DIFFERENT) if wanted and given else None


def compare(gold: Answer, given: Answer, question: str = "", part: bool = False) -> Result:
    """How a value compares with the gold's, by their types. A `part` is an element of a list."""
    if unwrapped(gold.text) == unwrapped(given.text):
        return Outcome.EQUAL
    regions = _compare_regions(gold, given)
    if regions is not None:
        return regions
    gold, given = _unnamed(gold, given)
    if unwrapped(gold.text) == unwrapped(given.text):
        return Outcome.EQUAL
    if isinstance(given, Chain) or (isinstance(given, Relation) and _is_chain(given) and _is_value(gold)):
        return _compare_chain(gold, given, question)
    if isinstance(gold, Relation) and _is_chain(gold) and not symbols_of(gold.text) and _is_value(given):
        return compare(parse(gold.members[-1]), given, question, part)
    if isinstance(gold, Term | Words) and isinstance(given, Term | Words):
        return _compare_terms(gold.text, given.text, question)
    unsuited = _unsuited(gold.text, given.text)
    if unsuited:
        return unsuited
    if isinstance(gold, Words) or isinstance(given, Words):
        return Outcome.DIFFERENT if isinstance(gold, Words) else Outcome.UNPARSEABLE
    if isinstance(gold, Matrix) and isinstance(given, Matrix):
        return _compare_matrices(gold, given, question)
    if isinstance(gold, Collection) or isinstance(given, Collection):
        return _compare_collections(_bindings(gold), _bindings(given), question)
    if isinstance(gold, Named) and isinstance(given, Named) and re.search(r"[(|:]", gold.name + given.name):
        return Outcome.DIFFERENT  # f(3)=9 does not say that f(4)=9
    if isinstance(gold, Relation | Named) and isinstance(given, Relation | Named):
        return _compare_relations(_as_relation(gold), _as_relation(given))
    if isinstance(gold, Matrix | Term) and isinstance(given, Matrix | Term):
        return Pair(gold.text, given.text)
    return Outcome.DIFFERENT


def _is_value(answer: Answer) -> bool:
    return not isinstance(answer, Relation | Named | Chain | Region)


def _is_chain(one: Relation) -> bool:
    return set(one.signs) == {"="} and all(one.members)


def _unnamed(gold: Answer, given: Answer) -> tuple[Answer, Answer]:
    """Gold and given value without their names, unless the names differ."""
    given = _same_argument(gold, given)
    wanted, found = (one.name if isinstance(one, Named) else "" for one in (gold, given))
    if wanted == found and isinstance(gold, Named) and isinstance(given, Named):
        return gold.value, given.value
    if isinstance(gold, Named) and isinstance(given, Named):
        return gold, _reordered(given, wanted)
    if isinstance(gold, Named) and (_is_value(given) or isinstance(given, Chain)):
        return gold.value, given
    names = notation.names_in(found)
    if isinstance(given, Named) and _is_value(gold) and names == sorted(names) and not _names_parts(gold):
        return gold, given.value
    return gold, given


def _same_argument(gold: Answer, given: Answer) -> Answer:
    """A function with the gold's letter for its argument: f(y)=y^2 is f(x)=x^2, but f(a) is a value at a point."""
    if not isinstance(gold, Named) or not isinstance(given, Named):
        return given
    wanted, found = _OF_LETTER.fullmatch(gold.name), _OF_LETTER.fullmatch(given.name)
    if not wanted or not found or wanted[1] != found[1] or wanted[2] == found[2]:
        return given
    own, other = (re.sub(r"\\[A-Za-z]+", "", one.value.text) for one in (gold, given))
    if found[2] in own or wanted[2] in other:
        return given
    text = re.sub(rf"(?<![A-Za-z\\]){found[2]}(?![A-Za-z])", wanted[2], given.value.text)
    return Named(f"{gold.name}={text}", gold.name, parse(text))


def _names_parts(one: Answer) -> bool:
    return isinstance(one, Collection) and any(isinstance(part, Named) for part in one.parts)


def _reordered(given: Named, name: str) -> Answer:
    """A named tuple with its elements in the order of another tuple of the same names."""
    names, wanted = notation.names_in(given.name), notation.names_in(name)
    if len(names) < 2 or sorted(names) != sorted(wanted) or not isinstance(given.value, Collection):
        return given
    if given.value.brackets != "()" or len(given.value.parts) != len(names):
        return given
    by_name = dict(zip(names, given.value.parts, strict=True))
    parts = tuple(by_name[one] for one in wanted)
    text = f"({','.join(part.text for part in parts)})"
    return Named(f"{name}={text}", name, Collection(text, "()", parts, given.value.connectives))


def _bindings(one: Answer) -> Answer:
    """A named tuple as the list of its named elements: (x,y)=(1,2) is x=1, y=2."""
    if not isinstance(one, Named) or not isinstance(one.value, Collection):
        return one
    names, parts = notation.names_in(one.name), one.value.parts
    if len(names) != len(parts) or len(names) < 2:
        return one
    bound = tuple(Named(f"{name}={part.text}", name, part) for name, part in zip(names, parts, strict=True))
    return Collection(one.text, "", bound, frozenset(","))


def _as_relation(one: Relation | Named) -> Relation:
    if isinstance(one, Relation):
        return one
    members, signs = relation(one.text)
    return Relation(one.text, tuple(members), tuple(signs))


def _compare_chain(gold: Answer, given: Chain | Relation, question: str) -> Result:
    """Compare a chain's last member, if that member is evaluated and every step of the chain is true."""
    members = given.members if isinstance(given, Chain) else tuple(parse(member) for member in given.members)
    last = compare(gold, members[-1], question)
    if isinstance(last, Outcome) and last != Outcome.EQUAL:
        return Outcome.DIFFERENT
    texts = [notation.joined(member.text).replace(" ", "") for member in members]
    if (
        len(set(texts)) < len(texts)
        or not all(map(_is_value, members))
        or symbols_of(members[-1].text) - symbols_of(gold.text)
    ):
        return Outcome.DIFFERENT
    steps = (_step(one, other) for one, other in pairwise(members))
    result = all_of([last, *steps])
    return Outcome.DIFFERENT if isinstance(result, Outcome) and result != Outcome.EQUAL else result


def _step(one: Answer, other: Answer) -> Result:
    """Whether two members of a chain are equal; here either may be an unevaluated expression."""
    if strange(one.text) or {found[1] for found in _COMMAND.finditer(one.text)} - _COMMANDS - _WORKED_OUT:
        return Outcome.DIFFERENT
    if isinstance(one, Term) and isinstance(other, Term):
        known = _compare_values(one.text, other.text)
        return known if known is not None else Pair(other.text, one.text)
    return Pair(other.text, one.text)


_WORKED_OUT = frozenset("int sum prod lim to gcd lcm max min det mod bmod pmod".split())
"""Commands that the members of a chain may contain before its last one."""


def _compare_terms(gold: str, given: str, question: str) -> Result:
    """Numbers with and without units, words and expressions."""
    noun = ""
    if _FREE_SPACE.sub("", gold) != _FREE_SPACE.sub("", given):
        (wanted, gold_unit), (found, unit) = split(gold), split(given)
        if gold_unit and not unit:
            found, unit = split(given, loose=True)
        elif unit and not gold_unit:
            wanted, gold_unit = split(gold, loose=True)
        if gold_unit and unit and gold_unit != unit:
            alike = same_unit_value(wanted, gold_unit, found, unit)
            return Outcome.EQUAL if alike else Outcome.DIFFERENT
        if (gold_unit and found.endswith("%")) or (unit and wanted.endswith("%")):
            return Outcome.DIFFERENT
        gold, given, noun = _without_nouns(wanted, found, question, bool(gold_unit or unit))
    number, other = plain_number(gold), plain_number(given)
    if number and other:
        if noun:
            return Outcome.DIFFERENT if noun == "another" else Outcome.UNPARSEABLE
        return Outcome.EQUAL if number.equals(other) else Outcome.DIFFERENT
    if noun:
        return Outcome.UNPARSEABLE
    if unwrapped(gold) == unwrapped(given):
        return Outcome.EQUAL
    if _formula(gold) == _formula(given) != "":
        return Outcome.EQUAL
    texts = _compare_texts(gold, given)
    if texts:
        return texts
    if _PRIMED.match(gold) and gold.count("'") > given.count("'"):  # math-verify ignores primes
        return Outcome.DIFFERENT
    return _unsuited(gold, given) or _compare_values(gold, given) or Pair(gold, given)


def _without_nouns(gold: str, given: str, question: str, has_unit: bool) -> tuple[str, str, str]:
    """Both texts without the nouns that they count, and "another" for a different noun or "unknown" for a new one."""
    (wanted, noun), (found, other) = split_noun(gold), split_noun(given)
    if noun and other:
        return wanted, found, "" if noun == other else "another"
    if noun and not has_unit and plain_number(given):
        return wanted, given, ""
    if other and not has_unit and (speaks_of(question, other)):
        return gold, found, ""
    if (noun or other) and has_unit:
        return wanted, found, "another"
    return gold, given, ""


def _compare_texts(gold: str, given: str) -> Outcome | None:
    """How two texts compare if either is words; None if neither is."""
    if not is_words(gold) and not is_words(given):
        return None
    based, other = _BASED.fullmatch(unwrapped(gold)), _BASED.fullmatch(unwrapped(given))
    if based and other:
        return Outcome.EQUAL if _in_base(based) == _in_base(other) else Outcome.DIFFERENT
    if plain_text(gold) == plain_text(given) and not (
        _is_symbols(gold) and unwrapped(gold) != unwrapped(given)
    ):
        return Outcome.EQUAL
    if _PRODUCT.sub("", gold) == _PRODUCT.sub("", given):
        return Outcome.EQUAL
    return Outcome.DIFFERENT if is_words(gold) else Outcome.UNPARSEABLE


def _is_symbols(text: str) -> bool:
    """Whether letters are symbols and not a word; two letters are symbols if both are capitals."""
    bare = unwrapped(text)
    return len(bare) == 2 and bare.isupper() and bare.casefold() not in ("no", "ok")


def _in_base(found: re.Match[str]) -> tuple[str, int]:
    return found[1].lstrip("0").casefold(), int(found[2] or found[3])


def _formula(text: str) -> str:
    """A chemical formula without its typography; "" if the text is not a formula."""
    bare = unwrapped(text).replace("_", "").replace("{", "").replace("}", "")
    return bare if _FORMULA.fullmatch(bare) and any(map(str.isdigit, bare)) else ""


def _unsuited(gold: str, given: str) -> Outcome | None:
    """The outcome for an answer that must not be compared as mathematics; None if it may be."""
    if strange(given) or given.count("'") > gold.count("'") or "?" in given or ";" in given:
        return Outcome.UNPARSEABLE
    unknown = {found[1] for found in _COMMAND.finditer(given)} - _COMMANDS
    if relation(given)[1] == [r"\in"] and relation(gold)[1] != [r"\in"]:
        return Outcome.UNPARSEABLE
    if _UNDONE.search(given) and not _UNDONE.search(gold):
        return Outcome.DIFFERENT  # the question restated
    if unknown and not unknown <= {found[1] for found in _COMMAND.finditer(gold)}:
        return Outcome.UNPARSEABLE
    if plain_number(gold) and _ARITHMETIC.search(given) and not _PLUS_MINUS.search(given):
        return Outcome.DIFFERENT  # restated as well
    return None


def _compare_values(gold: str, given: str) -> Outcome | None:
    """How two expressions compare by exact algebra, or as a number and its rounded decimal; None if undecided."""
    wanted, found = exact_value(gold), exact_value(given)
    if wanted is None or found is None:
        return None
    equal = same(wanted, found)
    if equal is False and wanted.is_constant and found.is_constant:
        for decimal, other, exact in ((gold, given, found), (given, gold, wanted)):
            number = plain_number(decimal)
            if number and number.step and plain_number(other) is None:
                size = approximate(exact)
                if size is None:
                    return None
                equal = exact.rational is None and number.rounds(size)
    return None if equal is None else Outcome.EQUAL if equal else Outcome.DIFFERENT


def _compare_relations(gold: Relation, given: Relation) -> Result:
    """Equations: equal if one is a multiple of the other. Other relations: equal sides."""
    if len(gold.signs) != len(given.signs):
        return Outcome.DIFFERENT
    if len(gold.signs) != 1 or gold.signs != given.signs:
        return Pair(gold.text, given.text) if gold.signs == given.signs else Outcome.DIFFERENT
    if gold.signs != ("=",):
        return all_of(
            compare(parse(one), parse(other)) for one, other in zip(gold.members, given.members, strict=True)
        )
    if given.members[0] == given.members[1]:
        return Outcome.DIFFERENT
    gaps = [_gap(*one.members) for one in (gold, given)]
    if gaps[0] and gaps[1]:
        if same_equation(gaps[0], gaps[1]):
            return Outcome.EQUAL
        if not (gaps[0].has_functions or gaps[1].has_functions):
            return Outcome.DIFFERENT
    # math-verify looks at right-hand sides: 2+2=4 must not pass for x=4.
    if symbols_of(gold.text) != symbols_of(given.text):
        return Outcome.DIFFERENT
    return Pair(gold.text, given.text)


def _gap(left: str, right: str) -> Value | None:
    one, other = value(left), value(right)
    return difference(one, other) if one and other else None


def _compare_regions(gold: Answer, given: Answer) -> Result | None:
    """How two sets of numbers compare; None unless one text can only be a set of numbers."""
    if not isinstance(gold, Region) and not isinstance(given, Region):
        return None
    wanted, found = as_region(gold.text), as_region(given.text)
    if not wanted or not found:
        return None
    if len({wanted.name, found.name} - {""}) > 1 or wanted.connective != found.connective:
        return Outcome.DIFFERENT
    if wanted.connective == "":
        if len(wanted.pieces) != len(found.pieces):
            return Outcome.DIFFERENT
        return all_of(_compare_intervals(*pair) for pair in zip(wanted.pieces, found.pieces, strict=True))
    return one_to_one(wanted.pieces, found.pieces, _compare_intervals)


def _compare_intervals(gold: Interval, given: Interval) -> Result:
    if gold.closed != given.closed:
        return Outcome.DIFFERENT
    ends = ((gold.low, given.low), (gold.high, given.high))
    return all_of(compare(parse(one), parse(other), part=True) for one, other in ends)


def _compare_matrices(gold: Matrix, given: Matrix, question: str) -> Result:
    if [len(row) for row in gold.rows] != [len(row) for row in given.rows]:
        return Outcome.DIFFERENT
    cells = (pair for rows in zip(gold.rows, given.rows, strict=True) for pair in zip(*rows, strict=True))
    return all_of(compare(one, other, question, part=True) for one, other in cells)


def _compare_collections(gold: Answer, given: Answer, question: str) -> Result:
    """Compare in order within parentheses and brackets, in any order within braces or without brackets."""
    if not isinstance(gold, Collection) or not isinstance(given, Collection):
        return Outcome.DIFFERENT
    if gold.brackets and given.brackets and gold.brackets != given.brackets:
        return Outcome.DIFFERENT
    ordered = any(kind not in ("", "{}") for kind in (gold.brackets, given.brackets))
    if len(gold.parts) != len(given.parts) or (ordered and not (gold.brackets and given.brackets)):
        return Outcome.DIFFERENT
    names = [{part.name for part in one.parts if isinstance(part, Named)} for one in (gold, given)]
    if names[1] and not names[0]:
        return Outcome.DIFFERENT  # 2, 3 does not say that x=2, y=3
    if len(names[0]) > 1 and not names[1]:
        ordered = True  # the values in the order of the gold's names
    if len(names[0]) > 1 and names[1] and ("or" in gold.connectives) != ("or" in given.connectives):
        return Outcome.DIFFERENT
    return compare_parts(gold.parts, given.parts, ordered, question)


def compare_parts(
    gold: tuple[Answer, ...], given: tuple[Answer, ...], ordered: bool, question: str = ""
) -> Result:
    """Compare elements in order, or match them one to one."""
    if len(gold) != len(given):
        return Outcome.DIFFERENT
    if ordered:
        return all_of(
            compare(one, other, question, part=True) for one, other in zip(gold, given, strict=True)
        )
    if len(gold) > MAX_UNORDERED:
        alike = sorted(one.text for one in gold) == sorted(one.text for one in given)
        return Outcome.EQUAL if alike else Outcome.DIFFERENT
    return one_to_one(gold, given, lambda one, other: compare(one, other, question, part=True))


def readable(gold: str) -> Result:
    r"""Whether a gold answer makes sense: EQUAL, BAD_GOLD, or what sympy must be able to read.

    >>> readable("1,024"), readable("Tuesday"), readable("x^2"), readable(r"\frac{")
    (<Outcome.EQUAL: 'equal'>, <Outcome.EQUAL: 'equal'>, <Outcome.EQUAL: 'equal'>, Pair(gold='\\frac{', given=None))
    """
    gold = notation.joined(gold.replace(";", ","))
    if not gold or strange(gold) or len(gold) > MAX_CHARS:
        return Outcome.BAD_GOLD
    return _readable(parse(gold))


def _readable(one: Answer) -> Result:
    if isinstance(one, Words):
        return Outcome.EQUAL
    if isinstance(one, Named):
        return _readable(one.value)
    if isinstance(one, Chain):
        return all_of(map(_readable, one.members))
    if isinstance(one, Region):
        ends = {end for piece in one.pieces for end in (piece.low, piece.high)} - {r"\infty", r"-\infty"}
        return all_of(_readable(parse(end)) for end in sorted(ends))
    if isinstance(one, Collection):
        return all_of(map(_readable, one.parts))
    if isinstance(one, Matrix):
        return all_of(_readable(cell) for row in one.rows for cell in row)
    if isinstance(one, Relation):
        return all_of(_readable(parse(member)) if member else Outcome.BAD_GOLD for member in one.members)
    bare, _ = split(one.text)
    bare, _ = split_noun(bare)
    return Outcome.EQUAL if is_words(bare) or exact_value(bare) is not None else Pair(bare, None)
