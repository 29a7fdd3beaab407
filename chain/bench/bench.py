"""Benchmarks of checkpoints: one benchmark after another in each mode; what fails is named, and the rest runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chain.bench.harness import Harness, HarnessFailed, outcome
from chain.bench.local import local_task
from chain.bench.relay import JudgeServer, Relay
from chain.bench.suite import Benchmark, Suite
from chain.display import Display
from chain.pool import OpenPool, Pool
from chain.recipe import STAGE_NAMES, Recipe
from core.checkpoint.check import check_checkpoint
from core.files import read_json, write_json
from core.manifest import hash_config, now
from core.strict import ConfigError
from rl.rollout.config import PoolConfig

BENCH = "bench.json"
CONCURRENCY = 16
"""Requests that the harness keeps in flight."""
MODES = {"thinking": "think", "direct": "direct"}


@dataclass(frozen=True)
class Options:
    """What to run, as the command line says."""

    modes: tuple[str, ...]
    max_completion_tokens: int
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
                _one(pool, model.resolve(), suite, harness, options, folder.resolve(), display)
    return folders


def own_tiles(model: Path) -> int | None:
    """The checkpoint's tile cap; None if its core does not cut images into tiles."""
    from core.model.image_tiles import SailVL2ImageProcessor

    saved, _ = SailVL2ImageProcessor.get_image_processor_dict(model)
    return (
        saved.get("max_patches")
        if saved.get("image_processor_type") == SailVL2ImageProcessor.__name__
        else None
    )


def for_suite(servers: PoolConfig, suite: Suite, models: Sequence[Path]) -> PoolConfig:
    """The servers with room for the suite's largest images and its frames of a video.

    vLLM takes a tile cap in a request only if the server trusts its clients, which hold the run's token. It sizes its
    encoder's cache by the default cap, so the default becomes the largest cap of all benchmarks and checkpoints; every
    request names its own. Servers that run already keep their settings.
    """
    benchmarks = suite.benchmarks.values()
    changes: dict[str, Any] = {
        "max_images": max([servers.max_images, *(one.frames or 0 for one in benchmarks)])
    }
    own = [tiles for model in models if (tiles := own_tiles(model)) is not None]
    if servers.engine == "vllm" and own and suite.has_caps:
        caps = json.dumps({"max_patches": max([*own, *(one.tiles or 0 for one in benchmarks)])})
        flags = ("--trust-request-mm-kwargs", "--mm-processor-kwargs", caps)
        changes["extra_args"] = (*servers.extra_args, *flags)
    return servers.model_copy(update=changes)


@dataclass(frozen=True)
class Run:
    """One benchmark in one mode."""

    name: str
    benchmark: Benchmark
    mode: str
    blind: bool

    def key(self, modes: Sequence[str]) -> str:
        """The name in bench.json: with the mode if there are several."""
        return self.name + (f".{self.mode}" if len(modes) > 1 else "") + (".blind" if self.blind else "")

    def fingerprint(self, options: Options, model: str, version: str) -> str:
        """A hash of everything that determines the score; `version` is the harness's."""
        judge = options.judge and (options.judge.url, options.judge.model)
        return hash_config(
            {
                "run": [self.name, self.benchmark.model_dump(mode="json"), self.mode, self.blind],
                "data": options.data.get(self.name),
                "limit": options.limit,
                "length": options.max_completion_tokens,
                "judge": judge if self.benchmark.judge else None,
                "model": model,
                "harness": version,
            }
        )


def _one(
    pool: Pool, model: Path, suite: Suite, harness: Harness, options: Options, folder: Path, display: Display
) -> None:
    """All benchmarks of one checkpoint. bench.json is written after each."""
    files = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(model.iterdir())}
    report: dict[str, Any] = {
        "model": str(model),
        "harness": {"name": "lmms-eval", "version": harness.version},
        "suite": suite.about,
        "published": suite.published,
        "judge": options.judge and {"url": options.judge.url, "model": options.judge.model},
        "tasks": read_json(folder / BENCH)["tasks"] if (folder / BENCH).exists() else {},
    }
    local = {name: local_task(name, place, folder / "local" / name) for name, place in options.local.items()}
    blind = (False, True) if options.blind else (False,)
    named = {**suite.benchmarks, **local}.items()
    for run in [
        Run(name, one, mode, grey) for name, one in named for mode in options.modes for grey in blind
    ]:
        key, fingerprint = (
            run.key(options.modes),
            run.fingerprint(options, hash_config(files), harness.version),
        )
        if report["tasks"].get(key, {}).get("fingerprint") == fingerprint:
            display.line(f"{key}: finished, unchanged — skipped")
            continue
        head = {"benchmark": run.name, "mode": run.mode, "blind": run.blind, "limit": options.limit}
        try:
            found = _scored(pool, model, harness, options, run, folder / fingerprint[:16], suite.has_caps)
            display.line(f"{key}: {found['score']:.1f} (n = {found['n']})")
            report["tasks"][key] = {**head, "fingerprint": fingerprint, **found}
        except (HarnessFailed, ConfigError) as error:
            display.line(f"{key}: no score: {error}")
            report["tasks"][key] = {**head, "failed": str(error)}
        write_json(folder / BENCH, {**report, "written": now()})


def _scored(
    pool: Pool, model: Path, harness: Harness, options: Options, run: Run, folder: Path, caps: bool
) -> dict[str, Any]:
    """Score and samples of one benchmark in one mode. Raises HarnessFailed or ConfigError if it has no score.

    `caps` says whether requests name their tile cap.
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
    client = pool.serve(model)
    length = benchmark.max_completion_tokens or options.max_completion_tokens
    own = own_tiles(model) if caps else None
    with Relay(client, folder, MODES[run.mode], benchmark, length, run.blind, options.judge, own) as relay:
        videos = Path(options.data[name]) if benchmark.frames and name in options.data else None
        results = harness.run(task, folder, relay, include, options.limit, CONCURRENCY, videos)
        return outcome(benchmark, task, folder, results, relay)
