"""The base class of every configuration, and the error that a bad recipe raises.

An unknown key is refused, and the message names the nearest known one: a typo costs a second, not a training
run. `parse` turns pydantic's report into one `ConfigError` with a line per problem:

    recipes/demo/3_rlvr.yaml: rlvr.rollout.grup_size: unknown key; did you mean group_size? Known: ...
    recipes/demo/3_rlvr.yaml: rlvr.learning_rate = -1: Input should be greater than 0
"""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", max_length=100)]
"""A name that becomes one part of a path; it cannot contain a separator or lead elsewhere."""
KeyPath = tuple[str | int, ...]
SHOWN = 200
"""Most characters of a value that a message shows."""
LARGEST = 2**31 - 1
"""Largest whole number in a configuration."""
Model = TypeVar("Model", bound=BaseModel)


class ConfigError(ValueError):
    """A recipe, override or command-line value breaks a rule; the message names file, key, value, rule."""


class Strict(BaseModel):
    """A frozen configuration: unknown keys are refused, the docstring under a field is its documentation."""

    renamed: ClassVar[dict[str, str]] = {}
    """Former field names -> current names, for the message that refuses a former name."""
    refused: ClassVar[dict[str, str]] = {}
    """Keys that users of other libraries expect -> why the field does not exist, and the remedy."""
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="after", check_fields=False)
    @classmethod
    def _no_number_without_bound(cls, value: Any) -> Any:
        # Seeds reach vLLM as 64 bits with the row's number in the lower half; no count needs more than 31 bits either.
        if type(value) is int and abs(value) > LARGEST:
            raise ValueError(f"at most {LARGEST} (2^31 - 1)")
        return value

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_unknown_keys(cls, data: Any, handler: ModelWrapValidatorHandler) -> Any:
        """The validated model. Raises one error with every unknown key and every invalid value."""
        known = _known_keys(cls)
        unknown = [key for key in data if key not in known] if isinstance(data, Mapping) else []
        if not unknown:
            return handler(data)
        problems = [_unknown_key(key, data[key], cls) for key in unknown]
        try:
            handler({key: value for key, value in data.items() if key in known})
        except ValidationError as error:
            problems += [_restated(found) for found in error.errors()]
        raise ValidationError.from_exception_data(cls.__name__, problems)


def parse(model: type[Model], data: Any, where: str | Callable[[KeyPath], str] = "") -> Model:
    """The validated model.

    `where` is the file the data came from, or a function from a key path to the file that key came from (a
    recipe is merged from several). Raises ConfigError with a line per problem: file, key path, value, rule.
    """
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(_lines(error, where))) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean X? Known: ...`, or only the known words if no word is near."""
    words = sorted(known)
    close = difflib.get_close_matches(str(word), words, n=1)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"{hint}Known: {', '.join(words) or 'none'}"


def key_path(path: KeyPath) -> str:
    """`("data", "sets", 0, "rows")` as `data.sets[0].rows`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def shown(value: Any) -> str:
    """A value for a message, truncated if it is long."""
    if type(value) is int and abs(value) > 10**20:  # Python refuses to write out 5,000 digits
        return f"a whole number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}... ({len(text)} characters)"


def _known_keys(model: type[BaseModel]) -> set[str]:
    aliases = {field.alias for field in model.model_fields.values() if field.alias}
    return set(model.model_fields) | aliases


def _unknown_key(key: Any, value: Any, model: type[Strict]) -> InitErrorDetails:
    new = model.renamed.get(str(key))
    hint = model.refused.get(str(key)) or (
        f"it is called {new} now" if new else nearest(key, model.model_fields)
    )
    # The hint travels as context: pydantic formats the template, and a key may hold braces.
    kind = PydanticCustomError("unknown_key", "unknown key; {hint}", {"hint": hint})
    return InitErrorDetails(type=kind, loc=(str(key),), input=value)


def _restated(found: Any) -> InitErrorDetails:
    kind = PydanticCustomError(found["type"], "{message}", {"message": found["msg"]})
    return InitErrorDetails(type=kind, loc=found["loc"], input=found["input"])


def _lines(error: ValidationError, where: str | Callable[[KeyPath], str]) -> list[str]:
    lines = []
    for found in error.errors():
        path = found["loc"]
        file = where(path) if callable(where) else where
        rule = found["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
        if found["type"] == "union_tag_invalid":  # the value of a key that chooses among several models
            tag, known = found["ctx"]["tag"], re.findall("'([^']*)'", found["ctx"]["expected_tags"])
            rule = (
                f"{found['ctx']['discriminator'].strip(chr(39))} = {tag!r} is unknown; {nearest(tag, known)}"
            )
        key = key_path(path) or "the whole configuration"
        # A whole sub-tree is too long to show; missing and unknown keys have no value.
        plain = found["input"] is None or isinstance(found["input"], str | int | float)
        value = f" = {shown(found['input'])}" if plain and found["type"] != "unknown_key" else ""
        lines.append(": ".join(part for part in (file, f"{key}{value}", rule) if part))
    return lines
