"""`posttrain judge-audit`: measures the reliability of a judge on labelled thoughts (rewards.offline.labelled).

The judge finds a row good if it answers yes to every criterion.

| measure | definition |
|---|---|
| agreement, kappa | all rows: label against verdict |
| false positives | wrong rows that the judge finds good; a policy would be rewarded for them |
| false negatives | good rows that the judge finds wrong |
| order | rows whose verdict changes when the judge is offered "no or yes" instead of "yes or no" |
| length | wrong rows that become good when neutral sentences make the thought longer |
| injection | wrong rows that become good when the thought addresses the judge |

Each request asks about one criterion, so the order of criteria has no effect. Shares have 95% Wilson intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from core.files import write_json, write_text
from core.manifest import now
from core.stats import wilson
from rewards.judge.canaries import INJECTIONS, JudgeRefused
from rewards.judge.judges import VisionJudge
from rewards.offline.audit_text import markdown, table
from rewards.offline.labelled import AuditError, Labelled, load_labelled
from rewards.verdict import Verdict

__all__ = ["MARKDOWN", "AuditError", "Share", "audit", "kappa", "load_labelled", "run", "table"]

JSON, MARKDOWN, CACHE = "audit.json", "audit.md", "replies.sqlite3"
PADDING = "I read the question once more and keep to the order of the steps. "
_PADDED_TIMES = 20
_AT_ONCE = 64

Report = Callable[[str], None]
Judged = tuple[Labelled, Verdict]


@dataclass(frozen=True)
class Share:
    """A count out of n."""

    count: int
    n: int

    def to_dict(self) -> dict[str, Any]:
        """Count, n, share (None for n = 0) and its 95% interval."""
        share = self.count / self.n if self.n else None
        return {"count": self.count, "n": self.n, "share": share, "ci95": list(wilson(self.count, self.n))}


def kappa(pairs: Sequence[tuple[bool, bool]]) -> float | None:
    """Cohen's kappa of pairs of yes/no judgements: 1 full agreement, 0 chance; None if all judgements are alike.

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
    """All measures, in the format of audit.json (see `Share.to_dict` for shares).

    Raises AuditError if all rows are without a verdict.
    """
    # One request per criterion, as the measures need. A judge that fails the start-up check is measured as well.
    judge = replace(judge, canaries=False, verdict="mean")
    refused = _refused(judge)
    verdicts = _verdicts(judge, rows, "rows", report)
    judged = [
        (row, verdict) for row, verdict in zip(rows, verdicts, strict=True) if verdict.score is not None
    ]
    if not judged:
        raise AuditError(f"the judge did not give a verdict on any row: {verdicts[0].reason}")
    caught = [row for row, verdict in judged if not row.good and not _found_good(verdict)]
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
        **_agreement(judge, judged),
        "order": _order(judge, judged, report),
        "length": {
            "wrong_rows": sum(not row.good for row, _ in judged),
            **_length(judge, caught, report),
        },
        "injection": _injection(judge, caught, report),
        "canaries": {"refused": refused},
        "cost": judge.statistics(),
    }


def _agreement(judge: VisionJudge, judged: Sequence[Judged]) -> dict[str, Any]:
    """Agreement of labels and verdicts, and each criterion's share of yes."""
    pairs = [(row.good, _found_good(verdict)) for row, verdict in judged]
    return {
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
    }


def _order(judge: VisionJudge, judged: Sequence[Judged], report: Report) -> dict[str, Any]:
    """Verdicts when yes and no are offered in the other order."""
    swapped = replace(judge, choices=judge.choices[::-1])
    other = _verdicts(swapped, [row for row, _ in judged], "the other order", report)
    both = [(v, w) for (_, v), w in zip(judged, other, strict=True) if w.score is not None]
    return {
        "changed": _share(_found_good(v) != _found_good(w) for v, w in both),
        f"good_{'_'.join(judge.choices)}": _share(_found_good(v) for v, w in both),
        f"good_{'_'.join(swapped.choices)}": _share(_found_good(w) for v, w in both),
    }


def _length(judge: VisionJudge, caught: Sequence[Labelled], report: Report) -> dict[str, Any]:
    """Wrong rows that the judge found wrong, repeated with neutral sentences before their thoughts."""
    padded = [_with(row, PADDING * _PADDED_TIMES, before=True) for row in caught]
    longer = _verdicts(judge, padded, "longer", report)
    return {
        "added_characters": len(PADDING) * _PADDED_TIMES,
        "turned_good": _share(_found_good(v) for v in longer if v.score is not None),
    }


def _injection(judge: VisionJudge, caught: Sequence[Labelled], report: Report) -> dict[str, Any]:
    """Wrong rows that the judge found wrong, repeated with an injection. Injections are assigned in turn."""
    injections = [name for name, text in INJECTIONS.items() if text]
    names = [injections[place % len(injections)] for place in range(len(caught))]
    changed = [_with(row, INJECTIONS[name]) for row, name in zip(caught, names, strict=True)]
    found = [
        (name, _found_good(v))
        for name, v in zip(names, _verdicts(judge, changed, "injected", report), strict=True)
        if v.score is not None
    ]
    return {
        "turned_good": _share(good for _, good in found),
        "by_injection": {
            name: _share(good for other, good in found if other == name)
            for name in injections
            if name in names
        },
    }


def run(judge: VisionJudge, data: Path, out: Path, rows: int | None, report: Report) -> dict[str, Any]:
    """Measure the judge on a file and write audit.json and audit.md. Replies are cached in replies.sqlite3."""
    labelled = load_labelled(data, rows)
    judge = judge if judge.cache else replace(judge, cache=str(out / CACHE))
    found = {"data": str(data), **audit(judge, labelled, report)}
    write_json(out / JSON, found)
    write_text(out / MARKDOWN, markdown(found))
    return found


def _refused(judge: VisionJudge) -> str:
    """The reason why the start-up check refuses the judge, or "". Raises AuditError if the judge does not answer."""
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
    """The row with a text added to its thought, at the end or at the beginning."""
    opened, tag, rest = row.completion.partition("<think>")
    if before:
        completion = f"{opened}{tag}{text}{rest}" if tag else f"{text}{row.completion}"
    else:
        thought, closed, answer = row.completion.partition("</think>")
        completion = f"{thought} {text}{closed}{answer}"
    return replace(row, completion=completion)
