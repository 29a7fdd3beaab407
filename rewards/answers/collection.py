"""The kinds `set` (elements in any order) and `list` (in the gold's order); elements are compared as mathematics."""

from functools import partial

from rewards.answers import checker, json
from rewards.answers.compare import compare_parts
from rewards.answers.kind import GoldError, Kind, Limits, verdict_of
from rewards.answers.math import checked
from rewards.answers.notation import elements, joined, named
from rewards.answers.values import Answer, Collection, parse
from rewards.example import Example
from rewards.verdict import Verdict

_ORDERED, _UNORDERED = ("()", "[]"), ("{}", "[]")


def read(text: str, ordered: bool) -> list[str] | None:
    r"""The elements of a text; None if its brackets belong to the other kind (a set's for `ordered`, and vice versa).

    >>> read(r"\{1, \frac{1}{2}\}", ordered=False), read('["a, b", 2]', ordered=True)
    (['1', '\\frac{1}{2}'], ['a, b', '2'])
    >>> read("(1, 2)", ordered=False), read(r"\{1, 2\}", ordered=True)
    (None, None)
    """
    listed = json.texts(text)
    if listed is not None:
        return listed
    brackets, parts = _parts(joined(text))
    if brackets and brackets not in (_ORDERED if ordered else _UNORDERED):
        return None
    return parts


def _parts(text: str) -> tuple[str, list[str]]:
    r"""Brackets and elements; a leading name is dropped, and a \pm becomes two elements."""
    name, values = named(text)
    if name and len(values) == 1:
        text = values[0]
    value = parse(text)
    value = getattr(value, "value", value)
    if isinstance(value, Collection):
        return value.brackets, [part.text for part in value.parts]
    listed = elements(text)
    return listed.brackets, listed.parts if listed.brackets != "()" or len(listed.parts) > 1 else [text]


def _gold(example: Example, ordered: bool) -> tuple[Answer, ...]:
    parts = read(example.answer, ordered)
    what = "list" if ordered else "set"
    if not parts:
        wanted = "(1, 2)" if ordered else r"\{1, 2\}"
        raise GoldError(f"gold answer {example.answer!r} is not a {what}; write its elements as in {wanted}")
    for part in parts:
        if not part:
            raise GoldError(f"{what}: an element is empty; correct it")
        try:
            checked(part)
        except GoldError as error:
            raise GoldError(f"{what}: {error}") from None
    return _answers(parts)


def _judge(answer: str, gold: tuple[Answer, ...], example: Example, limits: Limits, ordered: bool) -> Verdict:
    given = read(answer, ordered)
    if given is None:
        return Verdict.wrong(answer, f"its brackets are not those of a {'list' if ordered else 'set'}")
    result = compare_parts(gold, _answers(given), ordered, example.question)
    return verdict_of(checker.SHARED.settle(result), answer)


def _answers(parts: list[str]) -> tuple[Answer, ...]:
    return tuple(parse(joined(part)) for part in parts)


SET, LIST = (
    Kind(partial(_gold, ordered=ordered), partial(_judge, ordered=ordered)) for ordered in (False, True)
)
