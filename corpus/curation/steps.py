"""All operators, as one type for recipes: the key `op` of a step chooses the operator."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from corpus.curation.asking import Describe, DistilAnswer, FreeResponse, GuidedChain, Score
from corpus.curation.base import Operator
from corpus.curation.difficulty import PassAtK
from corpus.curation.sampling import BalanceLengths, LatentClasses
from corpus.curation.similar import Decontaminate, Duplicates
from corpus.curation.texts import Redundancy, StripInstructions, UnifyFormat

Step = Annotated[
    StripInstructions
    | UnifyFormat
    | Duplicates
    | Decontaminate
    | Redundancy
    | DistilAnswer
    | BalanceLengths
    | FreeResponse
    | GuidedChain
    | Score
    | Describe
    | LatentClasses
    | PassAtK,
    Field(discriminator="op"),
]
OPERATORS: dict[str, type[Operator]] = {
    get_args(kind.model_fields["op"].annotation)[0]: kind for kind in get_args(get_args(Step)[0])
}
"""Name of an operator -> its class."""
