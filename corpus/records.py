"""Records: the one schema of all stages (corpus.schema), read (corpus.reading) and written (corpus.writing)."""

from corpus.reading import Records, load_records, load_source
from corpus.schema import (
    DEFAULTS,
    FIELDS,
    MARKUP,
    MODES,
    REQUIRED,
    VERIFIERS,
    DataSource,
    OnBad,
    Problem,
    Record,
    RecordError,
    picture_of,
    problem_of,
)
from corpus.writing import write_records

__all__ = [
    "DEFAULTS",
    "FIELDS",
    "MARKUP",
    "MODES",
    "REQUIRED",
    "VERIFIERS",
    "DataSource",
    "OnBad",
    "Problem",
    "Record",
    "RecordError",
    "Records",
    "load_records",
    "load_source",
    "picture_of",
    "problem_of",
    "write_records",
]
