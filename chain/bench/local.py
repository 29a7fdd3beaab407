"""Local data as lmms-eval tasks: VLMEvalKit's TSV and this project's record files, without a hub.

The task's folder is self-contained: rows as Parquet, a task file, and functions that need only the harness.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from chain.bench.suite import Benchmark
from core.files import write_text
from core.strict import ConfigError
from corpus.importing import import_set
from corpus.records import load_records

FUNCTIONS = '''\
"""Functions of a local task; posttrain has written this file."""

import io

from PIL import Image


def visual(doc):
    return [Image.open(io.BytesIO(one["bytes"])).convert("RGB") for one in doc["pictures"]]


def text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def value(answer):
    try:
        return float(answer)
    except ValueError:
        return answer.strip().strip("().").casefold()


def results(doc, results):
    return {"accuracy": float(value(results[0]) == value(doc["answer"]))}
'''


def local_task(name: str, place: Path, folder: Path) -> Benchmark:
    """Write the task `name` of a record file (.parquet) or a VLMEvalKit table (.tsv) to `folder`.

    An answer is right if it equals the gold answer as a number, or as text without case and outer brackets. Thinking
    completions are reduced to their answer by the format contract, as in `posttrain eval`. Raises ConfigError for a
    missing file, and RecordError for a row that is no question.
    """
    if not place.is_file():
        raise ConfigError(f"--local {name}={place}: there is no such file")
    records = place
    if place.suffix != ".parquet":
        records = folder / "records.parquet"
        import_set(place, records, strict=True)
    _write_rows(records, folder / "test.parquet")
    task = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str((folder / "test.parquet").resolve())}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_new_tokens": 1024, "temperature": 0, "do_sample": False},
        "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
    }
    functions = {"doc_to_visual": "visual", "doc_to_text": "text", "process_results": "results"}
    lines = [f"{key}: !function functions.{one}\n" for key, one in functions.items()]
    write_text(folder / f"{name}.yaml", yaml.safe_dump(task, sort_keys=False) + "".join(lines))
    write_text(folder / "functions.py", FUNCTIONS)
    return Benchmark(
        task=name,
        metric="accuracy",
        score="accuracy",
        extract="contract",
        source=f"ours: local rows, {place.name}",
    )


def _write_rows(records: Path, out: Path) -> None:
    """The rows as the task's functions read them. Other columns stay out of the harness."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {
            "id": row["id"],
            "question": row["question"],
            "answer": row["answer"],
            "pictures": [{"bytes": one.data} for one in row["images"]],
        }
        for row in load_records(records)
    ]
    kind = pa.schema(
        [
            ("id", pa.string()),
            ("question", pa.string()),
            ("answer", pa.string()),
            ("pictures", pa.list_(pa.struct([("bytes", pa.binary())]))),
        ]
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=kind), out)
