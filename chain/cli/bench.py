"""`posttrain bench`: checkpoints on public benchmarks, by lmms-eval."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chain.cli.options import command, count, load, recipe_option


def add(commands: Any) -> None:
    """Add the command to the command line."""
    added = command(commands, "bench", _bench, "score checkpoints on public benchmarks with lmms-eval")
    added.add_argument("models", type=Path, nargs="+", help="checkpoint folders, stages' folders or runs")
    added.add_argument(
        "--suite", help="reasoning, general, video or a YAML file; default: reasoning, without --local"
    )
    added.add_argument("--only", nargs="+", metavar="BENCHMARK", help="benchmarks of the suite to run")
    added.add_argument(
        "--mode", choices=("thinking", "direct", "both"), default="thinking", help="default: thinking"
    )
    added.add_argument("--blind", action="store_true", help="run each benchmark also with grey images")
    added.add_argument("--limit", type=count, help="first N questions of each benchmark")
    added.add_argument(
        "--max-completion-tokens", type=count, help="default: the recipe's eval.max_completion_tokens"
    )
    added.add_argument("--judge", metavar="URL", help="OpenAI-compatible judge, such as http://host:8100/v1")
    added.add_argument("--judge-model", default="gpt-4o-mini", help="the judge's model; default: %(default)s")
    added.add_argument("--judge-key-env", metavar="NAME", help="environment variable with the judge's key")
    added.add_argument("--include", type=Path, action="append", default=[], help="folder of lmms-eval tasks")
    for option, what in (
        ("data", "FOLDER: a local copy of its data set"),
        ("local", "FILE: a .tsv or .parquet file"),
    ):
        added.add_argument(
            f"--{option}", nargs="+", default=[], metavar=f"NAME={what.partition(':')[0]}", help=what
        )
    added.add_argument("--out", type=Path, help="folder of bench.json; default: bench beside the checkpoint")
    added.add_argument("--harness", type=Path, help="Python of lmms-eval's environment; default: .venv-bench")
    recipe_option(added)


def _bench(options: argparse.Namespace) -> None:
    from chain.bench.bench import Options, bench, checkpoints
    from chain.bench.harness import DEFAULT, Harness
    from core.processes import remove_leftovers
    from core.strict import ConfigError

    recipe = load(options)
    length = options.max_completion_tokens or (recipe.eval and recipe.eval.max_completion_tokens)
    if not length:
        raise ConfigError("the recipe has no eval: name the longest completion with --max-completion-tokens")
    remove_leftovers()
    bench(
        recipe,
        checkpoints(options.models),
        _suite(options),
        Harness.at((options.harness or DEFAULT).absolute()),
        Options(
            modes=("thinking", "direct") if options.mode == "both" else (options.mode,),
            max_completion_tokens=length,
            seed=recipe.seed,
            limit=options.limit,
            judge=_judge(options),
            blind=options.blind,
            include=tuple(folder.resolve() for folder in options.include),
            data={name: str(Path(place).resolve()) for name, place in _pairs(options.data, "--data")},
            local={name: Path(place) for name, place in _pairs(options.local, "--local")},
        ),
        out=options.out,
    )


def _suite(options: argparse.Namespace) -> Any:
    from chain.bench.suite import Suite, load_suite

    if options.suite is None and options.local:
        return Suite.model_construct(about="local files", benchmarks={}, published={})
    return load_suite(options.suite or "reasoning").only(options.only or ())


def _judge(options: argparse.Namespace) -> Any:
    import os

    from chain.bench.relay import JudgeServer
    from core.strict import ConfigError

    if options.judge is None:
        return None
    key = ""
    if options.judge_key_env:
        key = os.environ.get(options.judge_key_env, "")
        if not key:
            raise ConfigError(f"--judge-key-env {options.judge_key_env}: this variable is not set")
    return JudgeServer(options.judge.rstrip("/"), options.judge_model, key)


def _pairs(given: list[str], option: str) -> list[tuple[str, str]]:
    from core.strict import ConfigError

    pairs = [
        (name, place) for name, equals, place in (text.partition("=") for text in given) if equals and place
    ]
    if len(pairs) < len(given):
        raise ConfigError(f"{option} {' '.join(given)}: write NAME=PLACE")
    return pairs
