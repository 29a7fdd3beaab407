r"""The format contract: finds the answer in a completion, or the reason why it has none, in one linear pass.

A thinking completion has optional white space, one non-empty `<think>...</think>`, and then an answer part with exactly
one `\boxed{...}`. Boxes inside the thought, nested boxes and chat tokens break the contract. A direct completion has
neither think tags nor chat tokens. White space around a thought or around a box's content is ignored.

The model is rewarded for the extracted answer, so the parser never guesses: it does not take the last of several boxes,
a box inside a thought, or text after an invented next turn. The regular expressions cannot backtrack, because the text
may be hostile.
"""

import re
from dataclasses import dataclass

from rewards.verdict import Status

MAX_BOX_CHARS = 2000
MAX_BOX_DEPTH = 30
"""Deepest nesting of braces within a box."""
OPEN, CLOSE = "<think>", "</think>"
CHAT_TOKEN = re.compile(r"<\|[A-Za-z0-9_]{3,32}\|>|<IMG_CONTEXT>|</?img>")
"""Tokens that only the chat template may write: turn markers and image placeholders."""

_MARK = re.compile(r"(?P<box>\\boxed(?![A-Za-z]))|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A parsed completion."""

    thought: str | None
    """The thought without its tags; None if it is missing, as in a direct completion."""
    answer_part: str
    """The text after the thought; for a direct completion, the whole text."""
    boxes: tuple[str, ...]
    """Contents of the outermost closed boxes of the answer part that are within the limits."""
    answer: str | None
    """The text that counts as the answer; None if there is no answer."""
    well_formed: bool
    """Whether the completion keeps its mode's contract."""
    problem: str
    """The first breach of the contract, or the reason why there is no answer; "" without either."""
    status: Status
    """no_answer or over_limit if there is no answer; correct if there is an answer."""


@dataclass(frozen=True, slots=True)
class _Boxes:
    contents: tuple[str, ...] = ()
    problem: str = ""
    over_limit: bool = False


def parse(completion: str, mode: str, thought_open: bool = False) -> Parsed:
    """Parse a completion under the contract of its row's mode, "think" or "direct"."""
    return parse_thinking(completion, thought_open) if mode == "think" else parse_direct(completion)


def parse_thinking(completion: str, thought_open: bool = False) -> Parsed:
    r"""Parse a thinking completion under the contract.

    Args:
        completion: the model's unchanged text.
        thought_open: whether the template has already opened `<think>`, so that the completion starts in the thought.

    >>> parse_thinking(r"<think> 2 + 2 </think> \boxed{ 4 }").answer
    '4'
    >>> parse_thinking(r"2 + 2 </think> \boxed{4}", thought_open=True).thought
    '2 + 2'
    >>> parse_thinking(r"<think>x</think> \boxed{3} or \boxed{4}").problem
    '2 boxes, not one'

    An empty thought or a box inside the thought breaks the contract, but the answer's box is still unambiguous and
    counts. If the template opens the thought, neither is a breach: the template may also close the thought, and the
    model did not write that <think>. After any other breach there is no answer.
    """
    text = completion if thought_open else completion.lstrip()
    thought, answer_part, fault = _split(text, thought_open)
    boxes = _read_boxes(answer_part)
    flaw = ""
    if not thought and not thought_open:
        flaw = "the thought is empty"
    elif not thought_open and _boxes_in(thought or ""):
        flaw = "a box inside the thought"
    breach = _chat_token(completion) or fault
    return _parsed(
        thought, answer_part, boxes, breach, flaw, well_formed=not (breach or boxes.problem or flaw)
    )


def parse_direct(completion: str) -> Parsed:
    r"""Parse a direct completion: the answer is the content of the single box, or else the whole text.

    >>> parse_direct(" 4 ").answer, parse_direct(r"That is \boxed{4}.").answer
    ('4', '4')
    >>> parse_direct("<think>2 + 2</think> 4").problem
    'think tags in a direct answer'
    """
    text = completion.strip()
    boxes = _read_boxes(text) if _boxes_in(text) else _Boxes((text,))
    breach = _chat_token(text)
    if not text:
        breach = "empty"
    elif OPEN in text or CLOSE in text:
        breach = breach or "think tags in a direct answer"
    # Faulty boxes leave a direct text without an answer, but they do not break the direct contract.
    return _parsed(None, text, boxes, breach, "", well_formed=not breach)


def _parsed(
    thought: str | None, answer_part: str, boxes: _Boxes, breach: str, flaw: str, well_formed: bool
) -> Parsed:
    """A breach or faulty boxes leave no answer; a flaw leaves it."""
    answer: str | None = None
    status = Status.OVER_LIMIT if boxes.over_limit and not breach else Status.NO_ANSWER
    if not (breach or boxes.problem):
        answer, status = boxes.contents[0], Status.CORRECT
    problem = breach or boxes.problem or flaw
    return Parsed(thought, answer_part, boxes.contents, answer, well_formed, problem, status)


def _split(text: str, thought_open: bool) -> tuple[str | None, str, str]:
    """Thought, answer part, and the fault of the tags. With a fault, the first two are a best effort."""
    opens, closes = text.count(OPEN), text.count(CLOSE)
    before, _, inside = ("", "", text) if thought_open else text.partition(OPEN)
    if not thought_open and not opens:
        return None, text, "no thought"
    thought, closed, answer_part = inside.partition(CLOSE)
    thought, fault = thought.strip(), ""
    if before:
        fault = "text before the thought"
    elif opens > (0 if thought_open else 1):
        fault = "the thought is opened again"
    elif not closed:
        fault = "the thought is never closed"
    elif closes > 1:
        fault = "the thought is closed twice"
    return thought, answer_part, fault


def _chat_token(text: str) -> str:
    found = CHAT_TOKEN.search(text)
    return f"a chat token, as of an invented next turn: {found[0]}" if found else ""


def _boxes_in(text: str) -> bool:
    return any(mark["box"] for mark in _MARK.finditer(text))


def _read_boxes(text: str) -> _Boxes:
    r"""The outermost boxes of a text. One pass with a stack is linear even with thousands of unclosed boxes.

    `\{` and `\}` are characters, not braces. An unclosed brace in prose does not hide a later box.
    """
    contents: list[str] = []
    count = nested = over = 0
    stack: list[int] = []  # for every open brace the start of its content if it belongs to a box, else -1
    box_level = deepest = 0  # stack height outside the outermost open box, and its largest within
    expect = -1  # where a box's brace must open
    for found in _MARK.finditer(text):
        token = found[0]
        if found["box"]:
            nested += box_level > 0
            count += box_level == 0
            expect = found.end()
        elif token == "{":
            is_box = expect >= 0 and not text[expect : found.start()].strip()
            expect = -1
            stack.append(found.end() if is_box else -1)
            if box_level:
                deepest = max(deepest, len(stack) - box_level)
            elif is_box:
                box_level, deepest = len(stack), 0
        elif token == "}" and stack:
            start = stack.pop()
            if start >= 0 and len(stack) + 1 == box_level:
                content = text[start : found.start()].strip()
                box_level = 0
                if len(content) > MAX_BOX_CHARS or deepest > MAX_BOX_DEPTH:
                    over += 1
                else:
                    contents.append(content)
    return _judge_boxes(tuple(contents), count, nested, over)


def _judge_boxes(contents: tuple[str, ...], count: int, nested: int, over: int) -> _Boxes:
    limit = f"a box over {MAX_BOX_CHARS} characters or {MAX_BOX_DEPTH} braces deep"
    rules = (
        (not count, "no box"),
        (count > 1, f"{count} boxes, not one"),
        (nested, "a box inside a box"),
        (over, limit),
        (not over and not contents, "the box has no pair of braces"),
        (contents and not contents[0], "the box is empty"),
    )
    problem = next((text for broken, text in rules if broken), "")
    return _Boxes(contents, problem, over_limit=problem == limit)
