"""Benchmarks of checkpoints: one benchmark after another in each mode; what fails is named, and the rest runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chain.bench.harness import Harness, HarnessFailed, outcome
from chain.bench.local import local_task
from chain.bench.relay import JudgeServer, Relay
from chain.bench.servers import for_suite, own_tiles
from chain.bench.suite import Benchmark, Suite
from chain.bench.track import BENCH, track
from chain.display import Display
from chain.pool import OpenPool, Pool
from chain.recipe import STAGE_NAMES, Recipe
from core.checkpoint.check import check_checkpoint
from core.files import read_json, write_json
from core.manifest import hash_config, now
from core.strict import ConfigError
from rl.rollout.client import RolloutClient

CONCURRENCY = 16
"""Requests that the harness keeps in flight."""
MODES = {"thinking": "think", "direct": "direct"}


@dataclass(frozen=True)
class Options:
    """What to run, as the command line says."""

    modes: tuple[str, ...]
    max_completion_tokens: int
    seed: int = 0
    """Seed of the harness, and of requests that are sampled; most tasks are greedy."""
    limit: int | None = None
    judge: JudgeServer | None = None
    blind: bool = False
    include: tuple[Path, ...] = ()
    data: Mapping[str, str] = field(default_factory=dict)
    """Benchmark -> local folder in place of its data set on the hub."""
    local: Mapping[str, Path] = field(default_factory=dict)
    """Name -> record file or TSV, benchmarks of their own."""


def checkpoints(paths: Sequence[Path]) -> list[Path]:
    """The checkpoint folders that the paths name; a run stands for all its finished stages. Raises ConfigError."""
    found: list[Path] = []
    for path in paths:
        if (path / "config.json").is_file() and not (path / "checkpoint").exists():
            found.append(path)
            continue
        stages = [path, *(path / name for name in STAGE_NAMES)]
        own = [stage / "checkpoint" for stage in stages if (stage / "checkpoint" / "config.json").is_file()]
        if not own:
            raise ConfigError(f"{path}: no checkpoint; name a checkpoint folder, a stage's folder or a run")
        found += own
    return found


def bench(
    recipe: Recipe,
    models: Sequence[Path],
    suite: Suite,
    harness: Harness,
    options: Options,
    *,
    out: Path | None = None,
    open_pool: OpenPool | None = None,
    display: Display | None = None,
) -> list[Path]:
    """Run the suite for each checkpoint; return the folders with bench.json (default: beside the checkpoint)."""
    display = display or Display()
    folders = [model.parent / "bench" if out is None else out for model in models]
    if out is not None and len(models) > 1:
        folders = [out / model.resolve().parent.name for model in models]
    if len(set(folders)) < len(folders):
        raise ConfigError(
            "two checkpoints would write to one folder; bench them one at a time, each with its --out"
        )
    servers = recipe.servers and for_suite(recipe.servers, suite, models)
    with Pool(servers, folders[0] / "logs", open_pool) as pool:
        for model, folder in zip(models, folders, strict=True):
            check_checkpoint(model)
            with display.step(f"bench {model}"):
                new = _one(pool, model.resolve(), suite, harness, options, folder.resolve(), display)
            track(recipe, model.resolve(), folder.resolve(), new, display.line)
    return folders


@dataclass(frozen=True)
class Run:
    """One benchmark in one mode."""

    name: str
    benchmark: Benchmark
    mode: str
    blind: bool

    @property
    def key(self) -> str:
        """The name in bench.json: the benchmark's, in thinking mode and with its images."""
        return (
            self.name
            + ("" if self.mode == "thinking" else f".{self.mode}")
            + (".blind" if self.blind else "")
        )

    def fingerprint(self, options: Options, model: str, version: str) -> str:
        """A hash of everything that determines the score; `version` is the harness's."""
        judge = options.judge and (options.judge.url, options.judge.model)
        return hash_config(
            {
                "run": [self.name, self.benchmark.model_dump(mode="json"), self.mode, self.blind],
                "data": options.data.get(self.name),
                "limit": options.limit,
                "length": options.max_completion_tokens,
                "seed": options.seed,
                "judge": judge if self.benchmark.judge else None,
                "model": model,
                "harness": version,
            }
        )


def _one(
    pool: Pool, model: Path, suite: Suite, harness: Harness, options: Options, folder: Path, display: Display
) -> list[str]:
    """Score all benchmarks of one checkpoint; return the names of the new scores. bench.json is written after each."""
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(model.iterdir())}
    report: dict[str, Any] = {
        "model": str(model),
        "harness": {"name": "lmms-eval", "version": harness.version},
        "seed": options.seed,
        "suite": suite.about,
        "published": suite.published,
        "judge": options.judge and {"url": options.judge.url, "model": options.judge.model},
        "tasks": read_json(folder / BENCH)["tasks"] if (folder / BENCH).exists() else {},
    }
    new: list[str] = []
    local = {name: local_task(name, place, folder / "local" / name) for name, place in options.local.items()}
    blind = (False, True) if options.blind else (False,)
    named = {**suite.benchmarks, **local}.items()
    for run in [
        Run(name, one, mode, grey) for name, one in named for mode in options.modes for grey in blind
    ]:
        key, fingerprint = run.key, run.fingerprint(options, hash_config(files), harness.version)
        if report["tasks"].get(key, {}).get("fingerprint") == fingerprint:
            display.line(f"{key}: finished, unchanged — skipped")
            continue
        head = {"benchmark": run.name, "mode": run.mode, "blind": run.blind, "limit": options.limit}
        head["judge"] = options.judge.model if options.judge and run.benchmark.judge else None
        try:
            client, own = pool.serve(model), own_tiles(model) if suite.has_caps else None
            found = scored(client, own, harness, options, run, folder / fingerprint[:16])
            display.line(f"{key}: {found['score']:.1f} (n = {found['n']})")
            report["tasks"][key] = {**head, "fingerprint": fingerprint, **found}
            new.append(key)
        except (HarnessFailed, ConfigError) as error:
            display.line(f"{key}: no score: {error}")
            report["tasks"][key] = {**head, "failed": str(error)}
        write_json(folder / BENCH, {**report, "written": now()})
    return new


def scored(
    client: RolloutClient, own: int | None, harness: Harness, options: Options, run: Run, folder: Path
) -> dict[str, Any]:
    """Score and samples of one benchmark in one mode. Raises HarnessFailed or ConfigError if it has no score.

    `own` is the checkpoint's tile cap; None: requests name no tile cap.
    """
    benchmark, name = run.benchmark, run.name
    if benchmark.judge and options.judge is None:
        raise HarnessFailed("its scoring asks a judge; name one with --judge URL")
    folder.mkdir(parents=True, exist_ok=True)
    include = [*options.include, *((folder.parent / "local" / name,) if name in options.local else ())]
    task = benchmark.task or f"posttrain_{name}"
    if benchmark.yaml:
        harness.write_task(benchmark, name, options.data.get(name), folder / "task")
        include.append(folder / "task")
    length = benchmark.max_completion_tokens or options.max_completion_tokens
    with Relay(
        client, folder, MODES[run.mode], benchmark, length, run.blind, options.judge, own, options.seed
    ) as relay:
        videos = Path(options.data[name]) if benchmark.frames and name in options.data else None
        results = harness.run(task, folder, relay, include, options.limit, CONCURRENCY, videos)
        return outcome(benchmark, task, folder, results, relay)
