r"""Tests a reward on its own data before training: the cheapest audit of both.

The test renders every row's gold answer as a completion under the row's contract, and also as completions that must
score 0: empty, without the answer, with another answer, without a box, with two boxes, with the box inside the thought,
and with an unclosed thought. The reward's attribute `self_test` selects the tests:

| self_test | gold | empty | corrupted | for |
|---|---|---|---|---|
| "answer" | scores 1 | scores 0 | scores 0 | rewards that check the answer |
| "form" | scores 1 | scores 0 | not tested | format rewards |
| "runs" | gets a verdict | | | rewards with other criteria: length, language, a rubric |
| "skip" | not tested | | | judges: they cost requests, and `posttrain judge-audit` measures them |

A reward without the attribute is tested as "answer" when it is tested alone, and as "runs" when it is a term of a
mixture. A reward with an attribute `contract_of`, "think" or "direct", that is tested alone is tested only on rows of
that mode. For a mixture, the total is tested as well: on a row with an "answer" term, the gold must score more than all
corrupted completions. On rows that rules cannot grade (verifier judge or none), "answer" terms may leave gold and
corrupted completions unscored.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from rewards.answers.choice import option_letter, options_of
from rewards.answers.number import exact_number
from rewards.calls import Caller, Reward, RewardError
from rewards.example import Example
from rewards.extract import CHAT_TOKEN, CLOSE, OPEN
from rewards.mix import Mixture, cell_of
from rewards.verdict import Verdict

LEVELS = ("answer", "form", "runs", "skip")
NONSENSE = "blimp zorn wuff"
"""A text that is not the answer of any row."""
_CHUNK = 256
_MARKS = re.compile(r"</?think>|\\boxed|[{}]")


@dataclass(frozen=True)
class Failure:
    """A completion with a wrong score."""

    row: int
    """Index into the given examples."""
    id: str
    """The row's."""
    reward: str
    """Term name, or "total"."""
    case: str
    """Kind of the completion: gold, empty, another answer, ..."""
    completion: str
    expected: str
    """The expected result as text: "1", "0", "a verdict", "less than the gold's 0.9"."""
    found: str
    """The verdict or the error as text."""

    def __str__(self) -> str:
        shown = self.completion if len(self.completion) <= 120 else f"{self.completion[:117]}..."
        return (
            f"row {self.row} ({self.id!r}): {self.reward}: {self.case}: expected {self.expected}, got {self.found}; "
            f"the completion: {shown!r}"
        )


def self_test(
    reward: Reward | Mixture,
    examples: Sequence[Example],
    rows: int | None = None,
    seed: int = 0,
    name: str = "reward",
) -> list[Failure]:
    r"""The failures of a reward or a mixture on gold and corrupted answers; [] without failures.

    Args:
        examples: rows with gold answers.
        rows: size of a random sample; None: all rows.
        seed: seed of the sample.
        name: name of a single reward in messages.

    >>> rows = [Example("row-1", "2 + 2?", "4", "think")]
    >>> from rewards.answer import AnswerReward
    >>> self_test(AnswerReward(), rows)
    []
    >>> print(self_test(lambda completion, example: 1.0, rows, name="kind")[0])
    row 0 ('row-1'): kind: empty: expected 0, got 1 (correct); the completion: ''

    An exception of the reward is a failure and is not raised. Raises ValueError for an unknown `self_test` attribute,
    for an empty set of rows, and for a row that no term of the mixture grades.
    """
    mode = getattr(reward, "contract_of", None)
    chosen = chosen_rows(examples, mode, rows, seed)
    if not chosen:
        raise ValueError(
            f"reward {name!r}: there is no row{f' of mode {mode!r}' if mode else ''} to test it on"
        )
    caller = Caller()
    failures: list[Failure] = []
    for start in range(0, len(chosen), _CHUNK):
        part = [(row, examples[row]) for row in chosen[start : start + _CHUNK]]
        if isinstance(reward, Mixture):
            failures += _test_mixture(reward, part, caller)
        else:
            level = _level(reward, "answer")
            # A judge that is tested alone is called as well.
            level = "form" if level == "skip" else level
            failures += _test_term(reward, name, level, part, caller, _opens_the_thought(reward))[0]
    return sorted(failures, key=lambda failure: failure.row)


def chosen_rows(examples: Sequence[Example], mode: str | None, rows: int | None, seed: int) -> list[int]:
    """Indices of the rows of a mode (None: all modes), or of a random sample of `rows` of them."""
    chosen = [row for row in range(len(examples)) if mode is None or examples[row].mode == mode]
    if rows is None or rows >= len(chosen):
        return chosen
    return sorted(random.Random(seed).sample(chosen, rows))


def cases(example: Example, thought_open: bool = False) -> Iterator[tuple[str, str]]:
    r"""Pairs (kind, completion) for a row: first gold, then empty, then the corrupted completions.

    >>> for case, completion in cases(Example("row-1", "2 + 2?", "4", "direct")):
    ...     print(case, repr(completion))
    gold '4'
    empty ''
    another answer '1012'
    nonsense 'blimp zorn wuff'
    two boxes '\\boxed{1012} \\boxed{4}'
    """
    gold, wrong = example.answer, _another(example)
    if example.mode == "direct":
        yield from (("gold", gold), ("empty", ""), ("another answer", wrong), ("nonsense", NONSENSE))
        yield "two boxes", rf"\boxed{{{wrong}}} \boxed{{{gold}}}"
        return
    thought = _thought(example)
    start = "" if thought_open else OPEN
    opened = f"{start}{thought}{CLOSE}"
    yield "gold", rf"{opened} \boxed{{{gold}}}"
    yield "empty", ""
    yield "another answer", rf"{opened} \boxed{{{wrong}}}"
    yield "nonsense", rf"{opened} \boxed{{{NONSENSE}}}"
    yield "answer dropped", opened
    yield "no box", f"{opened} {gold}"
    yield "an empty box", rf"{opened} \boxed{{}}"
    yield "two boxes", rf"{opened} \boxed{{{wrong}}} \boxed{{{gold}}}"
    yield "box inside the thought", rf"{start}{thought} \boxed{{{gold}}}{CLOSE}"
    yield "unclosed thought", rf"{start}{thought} \boxed{{{gold}}}"


def thought_problem(reward: Any, thought_open: bool) -> str:
    """Why a reward's own `thought_open` does not fit the chat template's; "" if it does.

    >>> from rewards.style.format import ThinkFormat
    >>> thought_problem(ThinkFormat(), thought_open=False)
    ''
    >>> thought_problem(ThinkFormat(), thought_open=True)[:60]
    'thought_open=False, but the chat template ends a thinking pr'

    A reward without the attribute has no such rule.
    """
    own = getattr(reward, "thought_open", thought_open)
    if bool(own) == thought_open:
        return ""
    if thought_open:
        template = "ends a thinking prompt with <think>, so that completions begin inside the thought"
    else:
        template = (
            "does not end a thinking prompt with <think>, so that completions open the thought themselves"
        )
    wanted = str(thought_open).lower()
    return f"thought_open={own!r}, but the chat template {template}; set its parameter thought_open: {wanted}"


def _level(reward: Any, otherwise: str) -> str:
    level = getattr(reward, "self_test", otherwise)
    if level not in LEVELS:
        raise ValueError(
            f"{type(reward).__name__}.self_test = {level!r}: it must be one of {', '.join(LEVELS)}"
        )
    return level


def _opens_the_thought(reward: Any) -> bool:
    return bool(getattr(reward, "thought_open", False))


Scores = dict[tuple[int, str], float | None]
"""(row, case) -> score."""


def _test_term(
    reward: Reward,
    name: str,
    level: str,
    rows: Sequence[tuple[int, Example]],
    caller: Caller,
    thought_open: bool,
) -> tuple[list[Failure], Scores]:
    if level == "skip":
        return [], {}
    asked = [
        (row, example, case, completion)
        for row, example in rows
        for case, completion in cases(example, thought_open)
    ]
    results = caller.start(reward, name, [one[3] for one in asked], [one[1] for one in asked]).results()
    failures: list[Failure] = []
    scores: Scores = {}
    for (row, example, case, completion), result in zip(asked, results, strict=True):
        if isinstance(result, Verdict):
            scores[row, case] = result.score
        expected = _expected(level, case, example)
        if not _met(expected, result):
            failures.append(Failure(row, example.id, name, case, completion, expected, _found(result)))
    return failures, scores


def _expected(level: str, case: str, example: Example) -> str:
    if level == "answer" and cell_of(example)[1] == "judged":
        level = "runs"
    if case == "gold" and level in ("answer", "form"):
        return "1"
    if level == "answer" or (level == "form" and case == "empty"):
        return "0"
    return "a verdict"


def _met(expected: str, result: Verdict | RewardError) -> bool:
    if isinstance(result, RewardError):
        return False
    if expected == "a verdict":
        return True
    return result.score == float(expected)


def _found(result: Verdict | RewardError) -> str:
    if isinstance(result, RewardError):
        return result.problem
    score = "no score" if result.score is None else f"{result.score:g}"
    return f"{score} ({result.status.value}{f': {result.reason}' if result.reason else ''})"


def _test_mixture(mixture: Mixture, rows: Sequence[tuple[int, Example]], caller: Caller) -> list[Failure]:
    failures: list[Failure] = []
    scores: dict[str, Scores] = {}
    # One template writes for all terms (`thought_problem`).
    thought_open = any(_opens_the_thought(term.reward) for term in mixture.terms)
    for term in mixture.terms:
        own = [(row, example) for row, example in rows if term in mixture.terms_of(example)]
        if own:
            level = _level(term.reward, "runs")
            found, scores[term.name] = _test_term(term.reward, term.name, level, own, caller, thought_open)
            failures += found
    failed = {failure.row for failure in failures}  # their totals would repeat these failures
    return failures + _test_totals(
        mixture, [one for one in rows if one[0] not in failed], scores, thought_open
    )


def _test_totals(
    mixture: Mixture, rows: Sequence[tuple[int, Example]], scores: dict[str, Scores], thought_open: bool
) -> list[Failure]:
    """Failures of the total: corrupted answers that score as much as the gold, over the tested terms, with gates."""
    failures = []
    for row, example in rows:
        terms = [term for term in mixture.terms_of(example) if term.weight > 0]
        judged = cell_of(example)[1] == "judged"
        if judged or not any(_level(term.reward, "runs") == "answer" for term in terms):
            continue
        totals: dict[str, float] = {}
        made = dict(cases(example, thought_open))
        for case in made:
            totals[case] = sum(term.weight * (scores[term.name].get((row, case)) or 0.0) for term in terms)
        gold = totals.pop("gold")
        for case, total in totals.items():
            if total >= gold:
                expected, found = f"less than the gold's {gold:g}", f"{total:g}"
                failures.append(Failure(row, example.id, "total", case, made[case], expected, found))
    return failures


def _thought(example: Example) -> str:
    """The row's own chain if it keeps the contract, else a sentence about the question in the question's language."""
    chain = (example.chain or "").strip()
    if chain and not _MARKS.search(chain) and not CHAT_TOKEN.search(chain):
        return chain
    question = CHAT_TOKEN.sub(" ", _MARKS.sub(" ", example.question)).strip()
    return question if any(letter.isalnum() for letter in question) else "1 + 1 = 2"


def _another(example: Example) -> str:
    """An answer that differs from the gold under any tolerance: another letter, a distant number, or nonsense."""
    options = options_of(example.meta.get("choices") or ()) if _choices_are_listed(example) else {}
    letter = option_letter(example.answer, options)
    if example.verifier in ("choice", "auto") and letter:
        return next(other for other in (*options, "A", "B") if other != letter)
    number = exact_number(example.answer)
    if number:
        return _plain(3 * number.value + (1000 if number.value >= 0 else -1000))
    return f"{NONSENSE} {NONSENSE}"


def _choices_are_listed(example: Example) -> bool:
    return isinstance(example.meta.get("choices") or (), list | tuple | dict)


def _plain(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6f}"
