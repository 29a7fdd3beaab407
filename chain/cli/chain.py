"""`posttrain run`, `plan`, `report`, `stages` and `clean`: a recipe and its run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chain.cli.options import above_0, command, count, load, recipe_argument


def add(commands: Any) -> None:
    """Add the family to the command line."""
    _add_run(commands)
    _add_plan(commands)
    report = command(commands, "report", _report, "write a run's report again and print its table")
    report.add_argument("run_dir", type=Path, help="the run's folder, runs/<name>")
    report.add_argument(
        "--serve", action="store_true", help="serve it on this machine until Ctrl-C, always up to date"
    )
    report.add_argument("--port", type=count, help="port for --serve; default: a free one")
    command(commands, "stages", _stages, "list the stages and their short names")
    explained = command(commands, "explain", _explain, "explain a recipe's keys: type, default, unit, stages")
    explained.add_argument("key", nargs="?", help="key path, or its last part; default: every section")
    explained.add_argument("--schema", action="store_true", help="print a JSON schema for editors instead")
    command(commands, "clean", _clean, "remove what killed runs left in shared memory")


def _add_run(commands: Any) -> None:
    run = command(commands, "run", _run, "bring a recipe's stages up to date, one after another")
    recipe_argument(run)
    run.add_argument(
        "--from", dest="from_", metavar="STAGE", help="first stage; `posttrain stages` lists them"
    )
    run.add_argument("--until", metavar="STAGE", help="last stage")
    run.add_argument("--force", action="store_true", help="run these stages even if they are unchanged")
    run.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="run ranks and servers on a Ray cluster, as the recipe's `hardware` says; default: this machine's cluster",
    )
    several = run.add_mutually_exclusive_group()
    several.add_argument("--seeds", metavar="N,N", help="one run per seed, and a table over all of them")
    several.add_argument(
        "--sweep", metavar="KEY=V,V", help="one run per value of a key, and a table over all of them"
    )


def _add_plan(commands: Any) -> None:
    plan = command(commands, "plan", _plan, "resolve and check a recipe without training")
    recipe_argument(plan)
    plan.add_argument("--json", action="store_true", help="print the plan and the resolved recipe as JSON")
    plan.add_argument(
        "--gpu-gib",
        type=above_0,
        metavar="GIB",
        help="memory of one GPU; default: this machine's, else the recipe's hardware.gpu_gib",
    )
    plan.add_argument(
        "--allow-missing", action="store_true", help="list missing sets and cores instead of failing"
    )
    plan.add_argument("--online", action="store_true", help="check that every judge answers its canaries")


def _run(options: argparse.Namespace) -> None:
    from chain.run import run

    if options.seeds or options.sweep:
        from chain.cli.members import run_members

        run_members(options)
        return
    run(
        load(options),
        runs_dir=options.runs_dir,
        from_=options.from_,
        until=options.until,
        force=options.force,
        ray=options.ray,
    )


def _plan(options: argparse.Namespace) -> None:
    import json

    from chain.checks import check, check_rows
    from chain.inputs import locate_sets
    from chain.plan import text as plan
    from chain.plan.resources import core_folder, resources

    recipe = load(options)
    found = resources(recipe, options.runs_dir, options.gpu_gib)
    plans = plan.plan(recipe, options.runs_dir, resources=found)
    if options.json:
        print(json.dumps(plan.as_json(recipe, plans, found), indent=2))
    else:
        print(plan.text(recipe, plans, options.runs_dir, found))
    run_dir = (options.runs_dir / recipe.name).resolve()
    core = core_folder(recipe, run_dir)
    check(recipe, model=core, online=options.online, allow_missing=options.allow_missing)
    check_rows(recipe, locate_sets(recipe, run_dir), core, run_dir, _say_aside)
    found.check()


def _say_aside(text: str) -> None:
    """Print to standard error, as standard output may be JSON."""
    import sys

    print(text, file=sys.stderr)


def _report(options: argparse.Namespace) -> None:
    from chain.report import data as report
    from chain.report.write import write
    from core.console import new_console

    if options.serve:
        _serve_report(options.run_dir, options.port or 0)
        return
    console = new_console()
    console.print(report.table(write(options.run_dir)))
    console.print(f"report: {options.run_dir / report.HTML}", markup=False, soft_wrap=True)


def _serve_report(run_dir: Path, port: int) -> None:
    import contextlib
    import threading

    from chain.report.serving import serving

    with serving(run_dir, port) as url, contextlib.suppress(KeyboardInterrupt):
        print(f"{url}  (Ctrl-C ends it)", flush=True)
        threading.Event().wait()


def _stages(options: argparse.Namespace) -> None:
    from chain.recipe import ALIASES
    from chain.stages import STAGES

    for stage in STAGES:
        short = [alias for alias, name in ALIASES.items() if name == stage.name]
        print(f"{stage.name:13} {stage.title}" + (f" ({', '.join(short)})" if short else ""))


def _explain(options: argparse.Namespace) -> None:
    import json

    from chain import reference

    print(json.dumps(reference.schema(), indent=2) if options.schema else reference.explain(options.key))


def _clean(options: argparse.Namespace) -> None:
    from core.processes import remove_leftovers

    for path in remove_leftovers():
        print(f"removed {path}")
