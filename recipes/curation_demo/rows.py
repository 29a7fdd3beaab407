"""The curation demo's data: panels of the demo in the formats of other data sets, with defects of every kind.

| file | rows |
|---|---|
| chains.parquet | chains in three formats, system prompts, wordy answers, duplicates, leaks, restating chains |
| sums.parquet | records without pictures: arithmetic without chains, and multiple choice with numeric options |
| digits.jsonl | questions and answers with picture files; some rows lack a picture or an answer |
| held.parquet | held-out rows |
| base.parquet, validation.parquet | for the incremental check |
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random
from typing import Any

from recipes.demo.panels import rows
from recipes.demo.scenes import HELDOUT, REASONING, TRAIN, VALIDATION, Question

Row = dict[str, Any]


def generate(
    out: Path, *, seed: int, chains: int = 300, sums: int = 80, digits: int = 200, held: int = 60
) -> None:
    """Write the files to the folder `out`; the arguments are numbers of rows before defects are added."""
    from corpus.records import write_records

    rng = Random(f"{seed} curation demo")
    whole = list(rows("curated", seed, chains, TRAIN, REASONING, _chain))
    heldout = list(rows("held", seed, held, HELDOUT, REASONING, _chain))
    write_records(out / "held.parquet", heldout)
    made = [_dressed(row, rng) for row in whole]
    made += [{**row, "id": f"again-{row['id']}"} for row in rng.sample(made, chains // 10)]
    made += [_recompressed(row) for row in rng.sample(whole, chains // 10)]
    made += [{**row, "id": f"leak-{row['id']}"} for row in rng.sample(heldout, held // 4)]
    made += [_restating(row) for row in rows("restating", seed, chains // 10, TRAIN, REASONING, _chain)]
    write_records(out / "chains.parquet", made)
    write_records(out / "sums.parquet", [_sum(rng, number) for number in range(sums)])
    _write_digits(out, list(rows("digits", seed, digits, TRAIN, ("digit",), _plain)), rng)
    write_records(out / "base.parquet", rows("base", seed, 200, TRAIN, ("digit",), _direct))
    write_records(out / "validation.parquet", rows("validation", seed, 60, VALIDATION, REASONING, _chain))


def _chain(question: Question) -> Row:
    return {"mode": "think", "verifier": "number", "chain": question.chain, "source": "made/chains"}


def _direct(question: Question) -> Row:
    return {"mode": "direct", "verifier": "number", "source": "made/base"}


def _plain(question: Question) -> Row:
    return {"mode": "direct", "verifier": "number", "source": "made/digits"}


def _dressed(row: Row, rng: Random) -> Row:
    """The row in the format of one of three data sets."""
    chain, answer = row["chain"], row["answer"]
    form = rng.randrange(4)
    if form == 0:
        return {**row, "response": f"<think>{chain}</think> The answer is {answer}.", "chain": None}
    if form == 1:
        reply = f"<REASONING>{chain}</REASONING><CONCLUSION>{answer}</CONCLUSION>"
        asked = f"You are a helpful assistant.\n{row['question']} Answer the question using a single word or phrase."
        return {**row, "question": asked, "response": reply, "chain": None}
    if form == 2:
        return {**row, "response": f"{chain}\nThe final answer is \\boxed{{{answer}}}", "chain": None}
    return {**row, "answer": f"The result of this computation is {answer}", "verifier": "judge"}


def _recompressed(row: Row) -> Row:
    """A near-duplicate: the picture enlarged and compressed."""
    from PIL import Image

    image = Image.open(io.BytesIO(row["images"][0]))
    buffer = io.BytesIO()
    image.convert("RGB").resize((112, 112), Image.Resampling.NEAREST).save(buffer, format="JPEG", quality=85)
    return {
        **row,
        "id": f"near-{row['id']}",
        "images": [buffer.getvalue()],
        "question": f"{row['question']} ",
    }


def _restating(row: Row) -> Row:
    """The row with a chain that only restates the answer."""
    return {**row, "chain": f"The answer is {row['answer']}."}


def _sum(rng: Random, number: int) -> Row:
    """Arithmetic without a picture; every fourth row as multiple choice."""
    numbers = [rng.randint(2, 9) for _ in range(3)]
    text, answer = f"compute {numbers[0]}+{numbers[1]}-{numbers[2]}", numbers[0] + numbers[1] - numbers[2]
    plain = {"id": f"sum-{number}", "source": "made/sums", "mode": "think", "verifier": "number"}
    if number % 4:
        return {**plain, "question": text, "answer": str(answer)}
    options = [answer, answer + 1, answer + 3]
    rng.shuffle(options)
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options, strict=True))
    return {
        **plain,
        "question": f"{text}\n{listed}",
        "answer": "ABC"[options.index(answer)],
        "verifier": "choice",
    }


def _write_digits(out: Path, given: list[Row], rng: Random) -> None:
    """Write pictures as files and rows as JSON lines; every twentieth row has no picture file or no answer."""
    lines = []
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for number, row in enumerate(given):
        name = f"pictures/{number:04d}.png"
        if number % 40 != 7:
            (out / name).write_bytes(row["images"][0])
        line = {"query": row["question"], "label": row["answer"], "image": name}
        if number % 40 == 27:
            del line["label"]
        lines.append(json.dumps(line))
    (out / "digits.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
