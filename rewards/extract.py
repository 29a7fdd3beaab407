r"""Where the answer is in a completion, or why there is none: the format contract, read in one linear pass.

A thinking completion is optional white space, one `<think>...</think>` with something in it, then an answer
part with exactly one `\boxed{...}`; no box inside the thought, nothing nested, no chat token anywhere. A
direct completion has neither think tags nor chat tokens. White space around a thought or a box's content
means nothing.

The model is rewarded for what is read here, so nothing is guessed: not the last of several boxes, not a box
inside a thought, not what follows an invented next turn. No regex backtracks: the text may be hostile.
"""

import re
from dataclasses import dataclass

from rewards.verdict import Status

MAX_BOX_CHARS = 2000
MAX_BOX_DEPTH = 30
"""Braces inside one another within a box."""
OPEN, CLOSE = "<think>", "</think>"
CHAT_TOKEN = re.compile(r"<\|[A-Za-z0-9_]{3,32}\|>|<IMG_CONTEXT>|</?img>")
"""What only a template may write: turn markers and image placeholders."""

_MARK = re.compile(r"(?P<box>\\boxed(?![A-Za-z]))|\\.|[{}]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Parsed:
    """A completion taken apart."""

    thought: str | None
    """Without its tags; None if there is none (a direct completion has none)."""
    answer_part: str
    """What follows the thought; the whole of a direct completion."""
    boxes: tuple[str, ...]
    """Contents of the outermost closed boxes of the answer part, as far as they keep the caps."""
    answer: str | None
    """The text that counts as the answer; None if none does."""
    well_formed: bool
    """The completion keeps its mode's contract."""
    problem: str
    """The first breach of the contract, or what keeps the answer from counting; "" if nothing does."""
    status: Status
    """Why there is no answer: no_answer or over_limit; correct if there is one."""


@dataclass(frozen=True, slots=True)
class _Boxes:
    contents: tuple[str, ...] = ()
    problem: str = ""
    over_limit: bool = False


def parse(completion: str, mode: str, thought_open: bool = False) -> Parsed:
    """A completion taken apart under the contract of its row's mode, "think" or "direct"."""
    return parse_thinking(completion, thought_open) if mode == "think" else parse_direct(completion)


def parse_thinking(completion: str, thought_open: bool = False) -> Parsed:
    r"""A thinking completion, taken apart under the contract.

    Args:
        completion: the model's text, as it came.
        thought_open: the template has already opened `<think>`, the completion starts inside the thought.

    >>> parse_thinking(r"<think> 2 + 2 </think> \boxed{ 4 }").answer
    '4'
    >>> parse_thinking(r"2 + 2 </think> \boxed{4}", thought_open=True).thought
    '2 + 2'
    >>> parse_thinking(r"<think>x</think> \boxed{3} or \boxed{4}").problem
    '2 boxes, not one'

    An empty thought or a box inside the thought breaks the contract but leaves no doubt which box is the answer: it
    still counts. Where the template opens the thought, neither is a breach: a template may close the thought that it
    opens, and its <think> is no claim of the model's. Every other breach leaves no answer.
    """
    text = completion if thought_open else completion.lstrip()
    thought, answer_part, fault = _split(text, thought_open)
    boxes = _read_boxes(answer_part)
    fault = _chat_token(completion) or fault
    problem = fault or boxes.problem
    if problem:
        return _unanswered(thought, answer_part, boxes, problem, over_limit=boxes.over_limit and not fault)
    if not thought and not thought_open:
        problem = "the thought is empty"
    elif not thought_open and _boxes_in(thought or ""):
        problem = "a box inside the thought"
    return Parsed(
        thought, answer_part, boxes.contents, boxes.contents[0], not problem, problem, Status.CORRECT
    )


def parse_direct(completion: str) -> Parsed:
    r"""A direct completion, taken apart: its answer is the one box's content, or else the whole text.

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
    problem = breach or boxes.problem
    if not problem:
        return Parsed(None, text, boxes.contents, boxes.contents[0], True, "", Status.CORRECT)
    parsed = _unanswered(None, text, boxes, problem, over_limit=boxes.over_limit and not breach)
    # What is wrong with its boxes leaves a direct text without an answer, but keeps the direct contract.
    return Parsed(None, text, parsed.boxes, None, not breach, problem, parsed.status)


def _unanswered(
    thought: str | None, answer_part: str, boxes: _Boxes, problem: str, over_limit: bool
) -> Parsed:
    status = Status.OVER_LIMIT if over_limit else Status.NO_ANSWER
    return Parsed(thought, answer_part, boxes.contents, None, False, problem, status)


def _split(text: str, thought_open: bool) -> tuple[str | None, str, str]:
    """Thought, answer part, and the fault of the tags; on a fault the first two are a best effort."""
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
    r"""The outermost boxes of a text; one pass with a stack, so thousands of unclosed ones cost no more.

    `\{` and `\}` are letters, not braces. A prose brace that is never closed does not hide the box after it.
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
