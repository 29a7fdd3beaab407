"""report.json: the measurements of a chain, in a stable schema. report.html shows them with the stages' files.

    {
      "schema_version": 1,
      "recipe": "demo", "about": "...", "seed": 0,
      "chain": "demo-1f0c2a9b",            W&B group
      "commit": "0123456789ab" or null,    of the code that ran the last stage
      "versions": {"python": "3.11.7", "torch": "2.13.0", ...},
      "written": "2026-01-31T12:00:00+00:00",
      "stages": [                          finished ones, in the chain's order
        {
          "name": "rlvr", "parent": "longcot_sft", "finished": "2026-01-31T11:58:00+00:00",
          "seconds": 61.2,                 training and the data made for it
          "eval_seconds": 9.8,
          "eval": {                        {} without held-out sets
            "thinking": {"accuracy": 0.87, "n": 500, "ci95": [0.84, 0.90], "format_rate": 1.0,
                         "mean_tokens": 24.1, ...},    by the set's name; rl/scores.py lists the figures
            "direct": {...}
          },
          "train": {"steps": 40, "last": {"reward": 0.81, ...}},    each metric's last logged value
          "prepare": {"pass_at_k": {"kept": 812, "dropped": {"never solved": 1185, "always solved": 3}}},
          "alarms": [{"batch": 12, "name": "repeats", "text": "..."}],   signs of reward hacking; RL stages
          "bench": {"mathvista": 68.5}     points, from `posttrain bench`
        }
      ],
      "outdated": [],                      left out of stages: made from an earlier run of a stage before them
      "unfinished": [],                    stages that train now, or whose run was killed
      "failed": null or {                  the stage that ended the last run
        "stage": "mixed_rl", "at": "2026-01-31T12:00:00+00:00", "error": "StageFailed: ...",
        "train": {...}, "alarms": [...]    as for finished stages, up to the failure
      },
      "soup": null or {
        "ingredients": [                   the first is basic SFT's own checkpoint
          {"name": "basic_sft", "score": 0.97, "distance": 0.08, "eval": {"thinking": {...}, "direct": {...}}}
        ],
        "merged": {"method": "uniform", "used": [0, 1], "score": 0.98, "eval": {...}},
        "distances": {"pairwise": {"0-1": 0.1}, "cosine": {"0-1": 0.4}}
      }                                    scores on the validation split; distances relative to the start
    }

Accuracies and rates lie in [0, 1]; lengths are in tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from rich import box
from rich.table import Table

from chain import soup
from chain.display import Tail
from chain.fingerprints import identity
from chain.recipe import STAGE_NAMES
from core.files import PARTIAL, read_json, write_json
from core.manifest import Manifest, now
from core.strict import ConfigError
from rl.watch import ALARMS

JSON, HTML = "report.json", "report.html"
BENCH = "bench/bench.json"
"""File in a stage's folder: the result of `posttrain bench`."""
FAILED = "failed.json"
"""File in the partial folder of a failed stage: time and error of the failure."""


class SetScores(BaseModel):
    """Scores on one held-out set; rl.scores.summary documents them and adds further figures."""

    model_config = ConfigDict(extra="allow")

    accuracy: float
    n: int
    ci95: tuple[float, float]
    format_rate: float
    mean_tokens: float
    truncated_rate: float | None = None
    tokens_per_correct: float | None = None
    by_length: list[dict[str, Any]] = []
    length_auc: float | None = None
    blind: dict[str, Any] | None = None
    drawn: dict[str, Any] | None = None


class StageReport(BaseModel):
    """One finished stage."""

    name: str
    parent: str | None
    finished: str
    seconds: float
    eval_seconds: float | None
    eval: dict[str, SetScores]
    train: dict[str, Any]
    prepare: dict[str, Any]
    alarms: list[dict[str, Any]] = []
    bench: dict[str, float] = {}
    """Public benchmark -> score in points, from `posttrain bench` of the stage."""


class Failure(BaseModel):
    """A stage that failed in the last run."""

    stage: str
    at: str
    error: str
    """Class and message of the exception; for a failed stage process also the end of its log."""
    train: dict[str, Any] = {}
    alarms: list[dict[str, Any]] = []


class SoupReport(BaseModel):
    """The soup's ingredients and their merge."""

    model_config = ConfigDict(extra="allow")

    ingredients: list[dict[str, Any]]
    merged: dict[str, Any]


class Report(BaseModel):
    """The whole of report.json."""

    schema_version: int = 1
    recipe: str
    about: str
    seed: int
    chain: str
    commit: str | None
    versions: dict[str, str]
    written: str
    stages: list[StageReport]
    outdated: list[str]
    failed: Failure | None = None
    unfinished: list[str] = []
    soup: SoupReport | None


def build(run_dir: Path) -> Report:
    """The report of a run's finished stages and its failed stage. Raises ConfigError if the folder is not a run's."""
    if not (run_dir / "recipe.json").exists():
        raise ConfigError(
            f"{run_dir}: this is not a run's folder (recipe.json is missing); `posttrain run` creates one"
        )
    recipe, chain = read_json(run_dir / "recipe.json"), read_json(run_dir / "chain.json")
    manifests = {name: Manifest.read(run_dir / name) for name in _names(recipe)}
    finished = {name: manifest for name, manifest in manifests.items() if manifest}
    shown = _chain(_names(recipe), finished)
    cooked = soup.record(run_dir / "soup") if "soup" in shown else None
    last = max((finished[name] for name in shown), key=lambda manifest: manifest.finished, default=None)
    return Report(
        recipe=recipe["name"],
        about=recipe["about"],
        seed=recipe["seed"],
        chain=chain["id"],
        commit=last.commit if last else None,
        versions=last.versions if last else {},
        written=now(),
        stages=[_stage(run_dir / name, finished[name]) for name in shown],
        outdated=[name for name in finished if name not in shown],
        failed=_failure(run_dir, _names(recipe)),
        unfinished=_unfinished(run_dir, _names(recipe)),
        soup=SoupReport.model_validate(cooked) if cooked else None,
    )


def note_failure(run_dir: Path, stage: str, error: BaseException) -> None:
    """Write the error to the stage's partial folder for the report."""
    write_json(
        run_dir / f"{stage}{PARTIAL}" / FAILED, {"at": now(), "error": f"{type(error).__name__}: {error}"}
    )


def read(run_dir: Path) -> Report:
    """Read the report that `write` wrote to a run's folder."""
    return Report.model_validate(read_json(run_dir / JSON))


def table(report: Report) -> Table:
    """The chain as a table: a row per stage, accuracies with their 95% intervals."""
    names = set_names(report)
    rows = Table(
        title=f"{report.recipe}, seed {report.seed}: held-out, greedy, 95% intervals",
        caption=f"format rate and mean tokens: {'/'.join(names)}" + _outdated_text(report),
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_edge=False,
        padding=0,
    )
    rows.add_column("stage", no_wrap=True)
    for heading in (*names, *extra_columns(report), "format", "tokens", "seconds"):
        rows.add_column(heading, justify="right", no_wrap=True)
    for stage in report.stages:
        scores = [stage.eval.get(name) for name in names]
        rows.add_row(
            stage.name,
            *(accuracy_text(score) for score in scores),
            *extra_columns(report, stage),
            "/".join(f"{score.format_rate:.2f}" if score else "-" for score in scores),
            "/".join(f"{score.mean_tokens:.1f}" if score else "-" for score in scores),
            f"{stage.seconds:.0f}",
        )
    return rows


def set_names(report: Report) -> list[str]:
    """Names of the evaluation sets, in the recipe's order."""
    return list(dict.fromkeys(name for stage in report.stages for name in stage.eval))


def extra_columns(report: Report, stage: StageReport | None = None) -> list[str]:
    """Columns that not every run has, blind accuracy and pass@k: their headings, or a stage's cells."""
    cells = []
    for name in set_names(report):
        known = [found for one in report.stages if (found := one.eval.get(name))]
        own = stage.eval.get(name) if stage else None
        if any(one.blind for one in known):
            share = own.blind["accuracy"] if own and own.blind else None
            cells.append(f"{name} blind" if stage is None else "-" if share is None else f"{share:.3f}")
        if drawn := next((one.drawn for one in known if one.drawn), None):
            k = str(drawn["k"])
            heading = f"{name} pass@{k}, majority@{k}"
            part = own.drawn if own and own.drawn and str(own.drawn["k"]) == k else None
            text = f"{part['pass_at'][k]:.3f}, {part['majority_at'][k]:.3f}" if part else "-"
            cells.append(heading if stage is None else text)
    return cells


def accuracy_text(scores: SetScores | None) -> str:
    """Accuracy and its 95% interval, `0.874 [.842, .900]`; `-` without scores."""
    if scores is None:
        return "-"
    low, high = (f"{end:.3f}".removeprefix("0") for end in scores.ci95)
    return f"{scores.accuracy:.3f} [{low}, {high}]"


def scores_text(scores: dict[str, dict[str, Any]]) -> str:
    """An evaluation in one line."""
    parts = [f"{name} {accuracy_text(SetScores.model_validate(found))}" for name, found in scores.items()]
    return ", ".join(parts) or "not evaluated"


def _outdated_text(report: Report) -> str:
    if not report.outdated:
        return ""
    return f"\nnot shown: {', '.join(report.outdated)}, made from an earlier run of a stage before them"


def _chain(names: Sequence[str], finished: Mapping[str, Manifest]) -> list[str]:
    """The finished stages, in order, that started from the current result of the stage before.

    After a stage runs again, the folders of later stages stay until those stages run again. The checkpoints from which
    they started no longer exist, so they are not shown.
    """
    chain: list[str] = []
    for before, name in zip([None, *names], names, strict=False):
        manifest = finished.get(name)
        if manifest is None or manifest.parent != before:
            continue
        known = manifest.inputs.get(f"stage:{before}")
        if before is None or (before in chain and known == identity(finished[before])):
            chain.append(name)
    return chain


def _names(recipe: dict[str, Any]) -> list[str]:
    """Stages of a resolved recipe, in order."""
    return [name for name in STAGE_NAMES if recipe.get(name) is not None]


def _stage(folder: Path, manifest: Manifest) -> StageReport:
    def optional(name: str) -> dict[str, Any]:
        return read_json(folder / name) if (folder / name).exists() else {}

    scored = optional("eval.json")
    return StageReport(
        name=manifest.stage,
        parent=manifest.parent,
        finished=manifest.finished,
        seconds=manifest.seconds,
        eval_seconds=scored.get("seconds"),
        eval=scored.get("scores", {}),
        train=_train(Tail(folder / "metrics.jsonl").new()),
        prepare=optional("prepare.json"),
        alarms=Tail(folder / ALARMS).new(),
        bench={name: task["score"] for name, task in _bench(folder).items() if "score" in task},
    )


def published(run_dir: Path, report: Report) -> dict[str, dict[str, float]]:
    """Model -> benchmark -> published score, from the benches of the run's stages."""
    found: dict[str, dict[str, float]] = {}
    for stage in report.stages:
        file = run_dir / stage.name / BENCH
        for model, scores in (read_json(file).get("published", {}) if file.exists() else {}).items():
            found.setdefault(model, {}).update(scores)
    return found


def _bench(folder: Path) -> dict[str, Any]:
    return read_json(folder / BENCH)["tasks"] if (folder / BENCH).exists() else {}


def _failure(run_dir: Path, names: Sequence[str]) -> Failure | None:
    """The last failure of a stage that has not finished since then."""
    found = []
    for name in names:
        folder = run_dir / f"{name}{PARTIAL}"
        if (folder / FAILED).exists():
            train, alarms = _train(Tail(folder / "metrics.jsonl").new()), Tail(folder / ALARMS).new()
            found.append(Failure(stage=name, **read_json(folder / FAILED), train=train, alarms=alarms))
    return max(found, key=lambda failure: failure.at, default=None)


def _unfinished(run_dir: Path, names: Sequence[str]) -> list[str]:
    """Stages that have logged steps, and have neither finished nor failed since."""
    folders = {name: run_dir / f"{name}{PARTIAL}" for name in names}
    return [
        name
        for name, folder in folders.items()
        if not (folder / FAILED).exists() and Tail(folder / "metrics.jsonl").new()
    ]


def _train(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    last: dict[str, float] = {}
    for record in metrics:
        last |= {key: value for key, value in record.items() if isinstance(value, int | float)}
    steps = last.pop("step", 0)
    return {"steps": steps, "last": last}
