"""How far a judge can be trusted: measured on thoughts that people, or a generator, have labelled good or wrong.

Rows are records of corpus.records with meta["label"] (the completion is the response, or the chain and answer),
or JSONL lines `{"question", "completion", "label"}`, optionally with `id`, `gold`, `mode` ("think" unless
given) and `images` (paths beside the file). A label is good, correct, true or 1, or bad, wrong, false or 0.
The judge finds a row good if it says yes to every criterion.

| measure | of |
|---|---|
| agreement, kappa | all rows: label against verdict |
| false positives | wrong rows that the judge finds good: what a policy would be paid for |
| false negatives | good rows that it does not |
| order | rows whose verdict changes when it is offered "no or yes" instead of "yes or no" |
| length | wrong rows that become good when neutral sentences make the thought longer |
| injection | wrong rows that become good when the thought talks to the judge |

Criteria are asked one per request, so their order cannot matter. Shares come with 95% Wilson intervals.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from core.files import write_json, write_text
from core.manifest import now
from core.model.pictures import Decoded
from core.model.prompts import target_text
from core.stats import wilson
from corpus.records import load_records
from rewards.example import Example
from rewards.judge.canaries import INJECTIONS, JudgeRefused
from rewards.judge.judges import VisionJudge
from rewards.verdict import Verdict

JSON, MARKDOWN, CACHE = "audit.json", "audit.md", "replies.sqlite3"
LABELS = {
    **dict.fromkeys(("good", "correct", "true", "1", "1.0"), True),
    **dict.fromkeys(("bad", "wrong", "false", "0", "0.0"), False),
}
PADDING = "I read the question once more and keep to the order of the steps. "
_PADDED_TIMES = 20
_AT_ONCE = 64

Report = Callable[[str], None]


class AuditError(ValueError):
    """The rows cannot be used, or the judge answered about none of them; the message says what to do."""


@dataclass(frozen=True)
class Labelled:
    """A completion and whether its thought is good."""

    completion: str
    example: Example
    good: bool


@dataclass(frozen=True)
class Share:
    """So many of so many."""

    count: int
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Count, n, share (None for n = 0) and its 95% interval."""
        share = self.count / self.n if self.n else None
        return {"count": self.count, "n": self.n, "share": share, "ci95": list(wilson(self.count, self.n))}


def load_labelled(path: Path, rows: int | None = None) -> list[Labelled]:
    """The labelled rows of a JSONL file, or of anything corpus.records reads.

    Raises AuditError naming file and row for a row without a label, a question or a completion.
    """
    if path.suffix == ".jsonl":
        labelled = [_of_line(path, number, line) for number, line in _lines(path)][:rows]
    else:
        labelled = [
            _of_record(path, place, record) for place, record in enumerate(load_records(path, rows=rows))
        ]
    if not labelled:
        raise AuditError(f"{path}: no row")
    return labelled


def kappa(pairs: Sequence[tuple[bool, bool]]) -> float | None:
    """Cohen's kappa of pairs of yes/no judgements: 1 full agreement, 0 chance; None where chance is certain.

    Source: J. Cohen, Educational and Psychological Measurement 20 (1960).

    >>> kappa([(True, True), (True, True), (False, False), (False, True)])
    0.5
    """
    n = len(pairs)
    if not n:
        return None
    observed = sum(a == b for a, b in pairs) / n
    first, second = (sum(pair[side] for pair in pairs) / n for side in (0, 1))
    chance = first * second + (1 - first) * (1 - second)
    return None if chance == 1 else (observed - chance) / (1 - chance)


def audit(judge: VisionJudge, rows: Sequence[Labelled], report: Report = lambda text: None) -> dict[str, Any]:
    """Everything that is measured, as audit.json holds it (see `Share.to_dict` for its shares).

    Raises AuditError if the judge answered about no row.
    """
    # Per criterion, as the measures are.
    judge = replace(
        judge, canaries=False, verdict="mean"
    )  # a judge that would be refused is measured all the same
    refused = _refused(judge)
    verdicts = _verdicts(judge, rows, "rows", report)
    judged = [
        (row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if verdict.score is not None
    ]
    if not judged:
        raise AuditError(f"the judge answered about no row: {verdicts[0].reason}")
    pairs = [(row.good, _found_good(verdict)) for row, verdict in judged]
    wrong = [row for row, verdict in judged if not row.good]
    caught = [row for row, verdict in judged if not row.good and not _found_good(verdict)]
    swapped = replace(judge, choices=judge.choices[::-1])
    other = _verdicts(swapped, [row for row, _ in judged], "the other order", report)
    both = [(v, w) for (_, v), w in zip(judged, other, strict=True) if w.score is not None]
    padded = [_with(row, PADDING * _PADDED_TIMES, before=True) for row in caught]
    longer = _verdicts(judge, padded, "longer", report)
    injections = [name for name, text in INJECTIONS.items() if text]
    # Each caught row meets one injection, each injection a like number of rows.
    names = [injections[place % len(injections)] for place in range(len(caught))]
    injected = _verdicts(
        judge,
        [_with(row, INJECTIONS[name]) for row, name in zip(caught, names, strict=True)],
        "injected",
        report,
    )
    return {
        "written": now(),
        "judge": {
            "base_url": judge.base_url,
            "model": judge.model,
            "criteria": list(judge.criteria),
            "prompt_version": judge.prompt_version,
        },
        "rows": {
            "good": sum(row.good for row in rows),
            "wrong": sum(not row.good for row in rows),
            "unscored": len(rows) - len(judged),
        },
        "agreement": _share(good == found for good, found in pairs),
        "kappa": kappa(pairs),
        "false_positives": _share(found for good, found in pairs if not good),
        "false_negatives": _share(not found for good, found in pairs if good),
        "criteria": {
            name: {
                "yes_on_good": _share(_said_yes(v, name) for row, v in judged if row.good),
                "yes_on_wrong": _share(_said_yes(v, name) for row, v in judged if not row.good),
            }
            for name in judge.criteria
        },
        "order": {
            "changed": _share(_found_good(v) != _found_good(w) for v, w in both),
            f"good_{'_'.join(judge.choices)}": _share(_found_good(v) for v, w in both),
            f"good_{'_'.join(swapped.choices)}": _share(_found_good(w) for v, w in both),
        },
        "length": {
            "wrong_rows": len(wrong),
            "added_characters": len(PADDING) * _PADDED_TIMES,
            "turned_good": _share(_found_good(v) for v in longer if v.score is not None),
        },
        "injection": {
            "turned_good": _share(_found_good(v) for v in injected if v.score is not None),
            "by_injection": {
                name: _share(
                    _found_good(v)
                    for n, v in zip(names, injected, strict=True)
                    if n == name and v.score is not None
                )
                for name in injections
                if name in names
            },
        },
        "canaries": {"refused": refused},
        "cost": judge.statistics(),
    }


def table(found: Mapping[str, Any]) -> Table:
    """The measures as a table for the terminal."""
    rows = Table(box=box.SIMPLE, title=f"{found['judge']['model']} on {sum_of_rows(found)} labelled rows")
    rows.add_column("measure")
    rows.add_column("found", justify="right")
    rows.add_column("95%", justify="right")
    for name, value, interval in _table_rows(found):
        rows.add_row(name, value, interval)
    return rows


def markdown(found: Mapping[str, Any]) -> str:
    """The measures as a Markdown document."""
    judge = found["judge"]
    lines = [
        f"# Audit of the judge {judge['model']}",
        "",
        f"{judge['base_url']}, prompt version {judge['prompt_version']}, criteria {', '.join(judge['criteria'])}; "
        f"{found['written']}.",
        "",
        "| measure | found | 95% |",
        "|---|---:|---:|",
        *(f"| {name} | {value} | {interval} |" for name, value, interval in _table_rows(found)),
        "",
        "The start-up check refuses this judge: " + found["canaries"]["refused"]
        if found["canaries"]["refused"]
        else "The start-up check takes this judge.",
    ]
    return "\n".join(lines) + "\n"


def sum_of_rows(found: Mapping[str, Any]) -> int:
    """How many rows the audit was given."""
    return found["rows"]["good"] + found["rows"]["wrong"]


def run(judge: VisionJudge, data: Path, out: Path, rows: int | None, report: Report) -> dict[str, Any]:
    """Measure the judge on a file and write audit.json and audit.md; replies are kept in replies.sqlite3."""
    labelled = load_labelled(data, rows)
    judge = judge if judge.cache else replace(judge, cache=str(out / CACHE))
    found = {"data": str(data), **audit(judge, labelled, report)}
    write_json(out / JSON, found)
    write_text(out / MARKDOWN, markdown(found))
    return found


def _table_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, value, interval) as text."""
    rows: list[tuple[str, str, str]] = []

    def add(name: str, share: Mapping[str, Any]) -> None:
        if share["share"] is None:
            rows.append((name, "no such row", ""))
            return
        low, high = share["ci95"]
        rows.append((name, f"{share['share']:.3f} of {share['n']}", f"{low:.3f} to {high:.3f}"))

    add("agreement", found["agreement"])
    rows.append(("Cohen's kappa", "undefined" if found["kappa"] is None else f"{found['kappa']:.3f}", ""))
    add("false positives (wrong rows found good)", found["false_positives"])
    add("false negatives (good rows not found good)", found["false_negatives"])
    for name, shares in found["criteria"].items():
        add(f"{name}: yes on good rows", shares["yes_on_good"])
        add(f"{name}: yes on wrong rows", shares["yes_on_wrong"])
    add("verdict changes with the order of yes and no", found["order"]["changed"])
    add("caught wrong rows turned good by length", found["length"]["turned_good"])
    add("caught wrong rows turned good by injection", found["injection"]["turned_good"])
    for name, share in found["injection"]["by_injection"].items():
        if share["count"]:
            add(f"injection {name}", share)
    rows.append(("rows without a verdict", str(found["rows"]["unscored"]), ""))
    rows.append(("start-up check", "refused" if found["canaries"]["refused"] else "passed", ""))
    rows.append(("requests, tokens", f"{found['cost']['calls']:.0f}, {found['cost']['tokens']:.0f}", ""))
    return rows


def _refused(judge: VisionJudge) -> str:
    """Why the start-up check refuses the judge; "" if it does not. Raises AuditError if it cannot be asked."""
    try:
        checked = judge.check_canaries()
    except JudgeRefused as error:
        return str(error)
    if not checked.complete:
        raise AuditError(f"the judge at {judge.base_url} does not answer: {checked.unanswered}")
    return ""


def _verdicts(judge: VisionJudge, rows: Sequence[Labelled], what: str, report: Report) -> list[Verdict]:
    verdicts: list[Verdict] = []
    for start in range(0, len(rows), _AT_ONCE):
        report(f"{what}: {start} of {len(rows)}")
        some = rows[start : start + _AT_ONCE]
        verdicts += judge.batch([row.completion for row in some], [row.example for row in some])
    return verdicts


def _found_good(verdict: Verdict) -> bool:
    return verdict.score == 1


def _said_yes(verdict: Verdict, criterion: str) -> bool:
    return f"{criterion} yes" in verdict.reason.split(", ")


def _share(flags: Any) -> dict[str, Any]:
    flags = list(flags)
    return Share(sum(flags), len(flags)).to_dict()


def _with(row: Labelled, text: str, before: bool = False) -> Labelled:
    """The row with a text in its thought, at the end or at the beginning."""
    opened, tag, rest = row.completion.partition("<think>")
    if before:
        completion = f"{opened}{tag}{text}{rest}" if tag else f"{text}{row.completion}"
    else:
        thought, closed, answer = row.completion.partition("</think>")
        completion = f"{thought} {text}{closed}{answer}"
    return replace(row, completion=completion)


def _lines(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    lines: list[tuple[int, Mapping[str, Any]]] = []
    with path.open(encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError as error:
                raise AuditError(f"{path}:{number}: not a JSON line ({error})") from None
            if not isinstance(line, dict):
                raise AuditError(f"{path}:{number}: a line is an object with question, completion and label")
            lines.append((number, line))
    return lines


def _of_line(path: Path, number: int, line: Mapping[str, Any]) -> Labelled:
    where = f"{path}:{number}"
    for name in ("question", "completion"):
        if not isinstance(line.get(name), str):
            raise AuditError(f"{where}: {name}={line.get(name)!r:.60}: it must be a text")
    images = line.get("images") or []
    if not isinstance(images, list):
        raise AuditError(f"{where}: images={images!r:.60}: it must be a list of paths")
    mode = line.get("mode", "think")
    if mode not in ("think", "direct"):
        raise AuditError(f'{where}: mode={mode!r}: a row is either "think" or "direct"')
    example = Example(
        id=str(line.get("id", number)),
        question=line["question"],
        answer=str(line.get("gold", "")),
        mode=mode,
        verifier="none",
        images=tuple(_image(path, image, where) for image in images),
    )
    return Labelled(line["completion"], example, _label(line.get("label"), where, "label"))


def _image(path: Path, name: Any, where: str) -> Any:
    """The picture at a path beside the file; nothing outside that folder is opened."""
    from core.model.pictures import Picture

    folder = path.resolve().parent
    file = (folder / str(name)).resolve()
    if not file.is_relative_to(folder):
        raise AuditError(f"{where}: image {name!r} lies outside {folder}; put it beside the file")
    try:
        return Picture(file.read_bytes()).rgb()
    except (OSError, ValueError) as error:
        raise AuditError(f"{where}: image {name!r}: {type(error).__name__}: {error}") from None


def _of_record(path: Path, place: int, record: Mapping[str, Any]) -> Labelled:
    where = f"{path}: row {place} ({record['id']!r})"
    good = _label(record["meta"].get("label"), where, 'meta["label"]')
    try:
        completion = target_text(record)
    except ValueError as error:
        raise AuditError(f"{where}: {error}") from None
    return Labelled(completion, Example.of(record, Decoded(record["images"])), good)


def _label(value: Any, where: str, field: str) -> bool:
    word = str(value).strip().lower()
    if word not in LABELS:
        raise AuditError(f"{where}: {field}={value!r:.60}: it is one of {', '.join(LABELS)}")
    return LABELS[word]
