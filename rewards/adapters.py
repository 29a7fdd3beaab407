"""Adapters: use unchanged reward functions of TRL and verl as rewards here, and rewards of this package in TRL.

In a recipe: `use: "trl:package.module:fn"` or `use: "verl:file.py:compute_score"`. The functions receive a row as in
their own trainer:

| row | TRL, keyword arguments | verl |
|---|---|---|
| completion | completions: `[{"role": "assistant", "content": ...}]` each | solution_str |
| question | prompts: `[{"role": "user", "content": ...}]` each, question | extra_info["question"] |
| gold answer | answer, solution, ground_truth | ground_truth |
| source | source | data_source |
| id, mode, verifier, images, chain | columns of these names | extra_info |
| meta | a column per key, None where a row lacks it | extra_info |

A column of meta takes precedence over `solution` and `ground_truth`. A score outside [0, 1] is an error unless the
parameter `scale: [low, high]` gives its range.
"""

import inspect
import json
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from numbers import Real
from typing import Any

from rewards.calls import Caller, Reward, form_of
from rewards.example import MODES, Example
from rewards.names import nearest
from rewards.registry import with_params
from rewards.verdict import Status, Verdict

ROUNDING = 1e-6
"""Tolerance for a score outside its range, as a share of the range's width."""
_ROW_FIELDS = ("id", "question", "answer", "mode", "verifier", "images", "chain", "source")
_GOLD_FIELDS = ("answer", "solution", "ground_truth")
TRL_COLUMNS = frozenset(("prompts", "completions", "log_extra", "log_metric", *_ROW_FIELDS, *_GOLD_FIELDS))
"""Arguments that every TRL reward function may take here, in addition to the keys of meta."""
_SHOWN_CHARS = 200


def from_trl(function: Callable[..., Any], params: Mapping[str, Any], name: str) -> Reward:
    """A TRL reward function `fn(prompts, completions, **columns) -> list[float | None]` as a batched reward.

    Args:
        function: plain or async. A class is instantiated with the parameters.
        params: `scale`: [low, high], the range of the scores; `conversational`: false passes prompts and completions as
            plain text, not as messages. All other parameters are passed to the function.
        name: name of the reward in messages.

    TRL's `log_extra` and `log_metric` are accepted and do nothing. Token ids and the trainer's state are not
    available. An argument that has no default and is not in TRL_COLUMNS is a key of the rows' meta. `check_columns`
    checks that the rows have it.

    Raises ValueError for unknown parameters, and TypeError if the function requires an unavailable argument.
    """
    own, rest = _own_params(params, name, ("scale", "conversational"))
    read, chat = _Scale.of(own.get("scale"), name, nan_is_none=True), own.get("conversational", True)
    bound = _bound(function, rest, name, "completions")
    named, wants_all = _arguments(bound)
    for argument in ("completion_ids", "trainer_state"):
        if named.get(argument):
            raise TypeError(
                f"reward {name!r} needs {argument}, which is not available to rewards here; "
                "a penalty for length is the stage's `overlong`"
            )

    needs = sorted(key for key, required in named.items() if required and key not in TRL_COLUMNS | set(rest))

    def arguments(completions: Sequence[str], examples: Sequence[Example]) -> dict[str, Any]:
        columns: dict[str, Any] = {key: [None] * len(examples) for key in needs}
        for key in dict.fromkeys(key for example in examples for key in example.meta):
            columns[key] = [example.meta.get(key) for example in examples]
        columns |= {key: [getattr(example, key) for example in examples] for key in _ROW_FIELDS}
        for key in _GOLD_FIELDS:
            columns.setdefault(key, columns["answer"])
        columns |= {
            "prompts": [_said("user", example.question, chat) for example in examples],
            "completions": [_said("assistant", completion, chat) for completion in completions],
            "log_extra": _ignore,
            "log_metric": _ignore,
        }
        return {
            key: value for key, value in columns.items() if (wants_all or key in named) and key not in rest
        }

    # `form_of` recognises a batched reward by these names of its parameters.
    def reward(completions: Sequence[str], examples: Sequence[Example]) -> Any:
        values = bound(**arguments(completions, examples))
        return read.later(values) if inspect.isawaitable(values) else read.all(values)

    reward.needs = needs  # type: ignore[attr-defined]
    return reward


def check_columns(reward: Reward, name: str, examples: Sequence[Example]) -> None:
    """Raise ValueError if a reward needs a column of meta that all rows lack. The message names the known columns.

    >>> def graded(completions, difficulty): return [1.0] * len(completions)
    >>> row = Example("a", "q", "4", "think", meta={"level": 3})
    >>> check_columns(from_trl(graded, {}, "mine"), "mine", [row])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ValueError: reward 'mine' needs the column 'difficulty', which no row has. Known: answer, ... level, ...
    """
    needs = getattr(reward, "needs", ())
    keys = {key for example in examples for key in example.meta} if needs else set()
    for column in needs:
        if column not in keys:
            known = nearest(column, keys | TRL_COLUMNS)
            raise ValueError(f"reward {name!r} needs the column {column!r}, which no row has. {known}")


def from_verl(function: Callable[..., Any], params: Mapping[str, Any], name: str) -> Reward:
    """verl's `compute_score(data_source, solution_str, ground_truth, extra_info)` as a reward.

    Args:
        function: plain or async; returns a number, a dict with "score", or a sequence that begins with the score. It
            may omit some of the four arguments. "pred" of the dict becomes the verdict's answer, and the other keys
            become its reason.
        params: `scale`: [low, high], the range of the scores. All other parameters are passed to the function.
        name: name of the reward in messages.

    Raises ValueError for unknown parameters, TypeError if the function takes no solution_str.
    """
    own, rest = _own_params(params, name, ("scale",))
    read = _Scale.of(own.get("scale"), name, nan_is_none=False)
    bound = _bound(function, rest, name, "solution_str")
    named, wants_all = _arguments(bound)

    def arguments(completion: str, example: Example) -> dict[str, Any]:
        row = {key: getattr(example, key) for key in _ROW_FIELDS if key not in ("answer", "source")}
        given = {
            "data_source": example.source,
            "solution_str": completion,
            "ground_truth": example.answer,
            "extra_info": {**example.meta, **row, "index": example.id},
        }
        return {key: value for key, value in given.items() if wants_all or key in named}

    if form_of(bound).is_async:

        async def later(completion: str, example: Example) -> Verdict:
            return read.one(await bound(**arguments(completion, example)))

        return later

    def now(completion: str, example: Example) -> Verdict:
        return read.one(bound(**arguments(completion, example)))

    return now


def as_trl(reward: Reward, name: str = "", mode: str = "think", verifier: str = "math") -> Callable[..., Any]:
    """A reward of this package as a TRL reward function, for `GRPOTrainer(reward_funcs=[...])`.

    The data set's columns become the row. `answer`, or else `solution` or `ground_truth`, is the gold answer. The last
    user message is the question. `id`, `mode`, `verifier`, `images`, `chain`, `source` and `meta` (a mapping, or JSON
    text) keep their names.

    Args:
        reward: a reward in any form of rewards.calls.
        name: name of the function in TRL's metrics; "": the reward's own name.
        mode: mode of rows without a column `mode`.
        verifier: verifier of rows without a column `verifier`.

    >>> from rewards.answer import AnswerReward
    >>> score = as_trl(AnswerReward(), "answer", mode="direct")
    >>> score(prompts=["2 + 2?", "2 + 3?"], completions=["4", "6"], answer=["4", "5"])
    [1.0, 0.0]

    The function returns None for a row that cannot be graded, raises RewardError if the reward raises, and
    ValueError if there is no gold answer.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: {nearest(mode, MODES)}")
    caller = Caller()
    shown = name or str(getattr(reward, "__name__", type(reward).__name__))

    def score(*, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float | None]:
        texts = [_text(completion) for completion in completions]
        examples = [
            _example(
                prompt,
                {k: v[row] for k, v in columns.items() if _is_column(v, len(texts))},
                row,
                mode,
                verifier,
            )
            for row, prompt in enumerate(prompts)
        ]
        scores: list[float | None] = []
        for result in caller.start(reward, shown, texts, examples).results():
            if not isinstance(result, Verdict):
                raise result
            scores.append(result.score)
        return scores

    score.__name__ = shown
    return score


class _Scale:
    """Reads the result of a foreign function and maps its scores to [0, 1]."""

    def __init__(self, low: float, high: float, given: bool, name: str, nan_is_none: bool) -> None:
        self.low, self.high, self.given, self.name, self.nan_is_none = low, high, given, name, nan_is_none

    @classmethod
    def of(cls, scale: Any, name: str, nan_is_none: bool) -> "_Scale":
        if scale is None:
            return cls(0.0, 1.0, False, name, nan_is_none)
        numbers = isinstance(scale, list | tuple) and len(scale) == 2 and all(map(_is_number, scale))
        if not numbers or not scale[0] < scale[1]:
            raise ValueError(
                f"reward {name!r}: scale={scale!r}: write [low, high], two finite numbers, low < high"
            )
        return cls(float(scale[0]), float(scale[1]), True, name, nan_is_none)

    def all(self, values: Any) -> list[Verdict]:
        if hasattr(values, "tolist"):
            values = values.tolist()
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise TypeError(f"it returned {type(values).__name__}, not a list with a score per completion")
        return [self.one(value) for value in values]

    async def later(self, values: Awaitable[Any]) -> list[Verdict]:
        return self.all(await values)

    def one(self, value: Any) -> Verdict:
        """The verdict of a number, a mapping with "score", or a sequence that begins with the score.

        None, and NaN of a TRL function, are unscored.
        """
        answer, reason = None, ""
        if isinstance(value, Mapping):
            if "score" not in value:
                raise ValueError(f'it returned a mapping without "score": {", ".join(map(str, value))}')
            answer = None if value.get("pred") is None else str(value["pred"])[:_SHOWN_CHARS]
            others = (f"{key} {other!r:.60}" for key, other in value.items() if key not in ("score", "pred"))
            reason, value = ", ".join(others)[:_SHOWN_CHARS], value["score"]
        elif isinstance(value, list | tuple) and value:
            value = value[0]
        if hasattr(value, "item"):  # a number of numpy's or torch's
            value = value.item()
        if value is None or (self.nan_is_none and isinstance(value, Real) and math.isnan(value)):
            return Verdict.unscored(reason or f"{self.name} gave no score", answer=answer)
        if not isinstance(value, Real):
            raise TypeError(f"it returned {value!r:.80} as a score, not a number")
        score = (float(value) - self.low) / (self.high - self.low)
        if not -ROUNDING <= score <= 1 + ROUNDING:
            remedy = "correct scale" if self.given else "give its range with params: {scale: [low, high]}"
            raise ValueError(f"its score {float(value):g} is outside [{self.low:g}, {self.high:g}]; {remedy}")
        score = min(max(score, 0.0), 1.0)
        return Verdict(score, Status.CORRECT if score == 1 else Status.WRONG, answer, reason)


def _own_params(
    params: Mapping[str, Any], name: str, known: Sequence[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    own = {key: value for key, value in params.items() if key in known}
    if not isinstance(own.get("conversational", True), bool):
        raise ValueError(f"reward {name!r}: conversational={own['conversational']!r}: true or false")
    return own, {key: value for key, value in params.items() if key not in known}


def _bound(function: Any, params: dict[str, Any], name: str, needed: str) -> Any:
    """The function with its parameters bound. Raises TypeError if it does not take the argument `needed`."""
    bound = with_params(function, params, name, taken=0, also=["scale"])
    named, wants_all = _arguments(bound)
    if needed not in named and not wants_all:
        raise TypeError(
            f"reward {name!r} does not take {needed!r}; rewards.adapters lists the arguments, which are passed by name"
        )
    return bound


def _arguments(function: Any) -> tuple[dict[str, bool], bool]:
    """Argument -> whether it is required; and whether the function takes further keyword arguments."""
    parameters = inspect.signature(function).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {one.name: one.default is one.empty for one in parameters if one.kind not in variable}
    return named, any(one.kind == inspect.Parameter.VAR_KEYWORD for one in parameters)


def _said(role: str, text: str, chat: bool) -> Any:
    return [{"role": role, "content": text}] if chat else text


def _ignore(*args: Any, **kwargs: Any) -> None:
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_column(value: Any, rows: int) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes) and len(value) == rows


def _text(said: Any, role: str = "") -> str:
    """The text of a prompt or completion. For a list of messages, the text of the last message (of `role`)."""
    if isinstance(said, str):
        return said
    messages = [message for message in said if not role or message["role"] == role]
    content = messages[-1]["content"] if messages else ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content or ())


def _example(prompt: Any, row: Mapping[str, Any], number: int, mode: str, verifier: str) -> Example:
    golds = [row[key] for key in _GOLD_FIELDS if row.get(key) is not None]
    if not golds:
        raise ValueError(
            f"row {number}: the gold answer is missing; add a column answer, solution or ground_truth"
        )
    meta = row.get("meta") or {}
    images = row.get("images") or ()
    return Example(
        id=str(row.get("id", number)),
        question=_text(prompt, "user"),
        answer=str(golds[0]),
        mode=row.get("mode") or mode,
        verifier=row.get("verifier") or verifier,
        images=tuple(images),
        chain=row.get("chain"),
        source=row.get("source") or "",
        meta=json.loads(meta) if isinstance(meta, str) else meta,
    )
