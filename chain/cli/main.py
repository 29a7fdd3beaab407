"""The console command `posttrain`. Heavy imports wait until a subcommand needs them: help answers at once."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chain.cli import core as core_commands

DESCRIPTION = """\
Post-training for SAIL-VL2, stage by stage, from a recipe: a folder of YAML files.

  posttrain plan recipes/demo                       what would run, checked; trains nothing
  posttrain run recipes/demo                        the whole chain; finished stages are skipped
  posttrain run recipes/demo --from rlvr --set rlvr.rollout.group_size=16
  posttrain eval runs/demo/rlvr/checkpoint          score a checkpoint on the held-out set
  posttrain judge-audit rows.jsonl --base-url http://127.0.0.1:8100/v1 --model judge
  posttrain report runs/demo                        write report.json and report.html again
  posttrain rewards test answer data/held.parquet   gold answers must earn 1, corrupted ones 0
  posttrain score --rewards answer,format --input rows.jsonl --output scored.jsonl
  posttrain diff yesterday.jsonl scored.jsonl       which verdicts changed
  posttrain core import SAIL-VL2-2B cores/2b        a released checkpoint as a native core; `core export` back
  posttrain core new --size 2b cores/random-2b      a core of that shape with random weights
  posttrain core merge ADAPTER cores/merged         a LoRA adapter merged into its core
"""
OURS = ("chain", "core", "corpus", "recipes", "rewards", "rl", "sft")
STAGES_HELP = (
    "core, basic_sft (sft), soup, longcot_sft (longcot), rlvr, think_fusion (fusion), mixed_rl (mixed-rl)"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 a stage failed, 2 wrong recipe or command line, 130 interrupted."""
    from core.strict import ConfigError

    options = parser().parse_args(arguments)
    # A user's own rewards are found where the command is given, after everything that is installed: ourselves too,
    # which an editable install would look for only after sys.path.
    sys.path += [str(Path(__file__).resolve().parents[2]), str(Path.cwd())]
    # Ended from outside (CI's time limit, `kill`), the children and servers must be stopped as on Ctrl-C.
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGHUP, _terminated)  # the terminal is gone
    try:
        options.do(options)
    except ConfigError as error:
        print(f"posttrain: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # whoever read our output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("posttrain: interrupted; finished stages are kept, run again to continue", file=sys.stderr)
        return 130
    except OSError as error:
        if error.filename is None:
            raise
        print(f"posttrain: {error.filename}: {error.strerror}", file=sys.stderr)
        return 1
    except Exception as error:
        if not _has_words(error):
            raise
        print(f"posttrain: {error}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="posttrain", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    run = _command(commands, "run", _run, "bring a recipe's stages up to date, one after another")
    _recipe_options(run)
    run.add_argument("--from", dest="from_", metavar="STAGE", help=f"first stage: {STAGES_HELP}")
    run.add_argument("--until", metavar="STAGE", help="last stage")
    run.add_argument("--force", action="store_true", help="run these stages even if they are unchanged")
    run.add_argument(
        "--nnodes", type=_count, help="hosts, on each of which this runs; default: torchrun's or SLURM's"
    )
    run.add_argument("--node-rank", type=int, help="number of this host; 0 leads")
    run.add_argument("--master", metavar="HOST[:PORT]", help="of node 0, as the others reach it")

    plan = _command(commands, "plan", _plan, "resolve and check a recipe without training")
    _recipe_options(plan)
    plan.add_argument("--json", action="store_true", help="for programs: the plan and the resolved recipe")
    plan.add_argument(
        "--gpu-gib",
        type=core_commands.above_0,
        metavar="GIB",
        help="memory of one GPU; default: this machine's, else the recipe's hardware.gpu_gib",
    )

    evaluate = _command(commands, "eval", _eval, "score a checkpoint folder on a recipe's held-out set")
    evaluate.add_argument("model", type=Path, help="checkpoint folder")
    evaluate.add_argument("--recipe", type=Path, default=Path("recipes/demo"), help="default: %(default)s")
    evaluate.add_argument("--out", type=Path, help="folder for eval.json and samples; default: MODEL/../eval")
    _shared_options(evaluate)

    data = _command(commands, "data", _data, "generate a recipe's data")
    _recipe_options(data)
    data.add_argument("--force", action="store_true", help="even if it is there and unchanged")

    report = _command(commands, "report", _report, "write a run's report again and print its table")
    report.add_argument("run_dir", type=Path, help="the run's folder, runs/<name>")

    server = _command(commands, "rollout-server", _rollout_server, "serve a checkpoint until Ctrl-C")
    server.add_argument("model", type=Path, help="checkpoint folder")
    server.add_argument(
        "--adapter", type=Path, help="a LoRA adapter of it, served as the model `adapter` beside it"
    )
    server.add_argument("--recipe", type=Path, default=Path("recipes/demo"), help="default: %(default)s")
    server.add_argument("--host", help="address to bind to; 0.0.0.0 for learners on other machines")
    server.add_argument(
        "--port", type=_count, help="of the first server, the others' follow; default: free ones"
    )
    _shared_options(server)

    judged = _command(commands, "judge-audit", _judge_audit, "measure a judge against labelled thoughts")
    judged.add_argument(
        "data", type=Path, help='records with meta["label"], or JSONL with label, good or wrong'
    )
    judged.add_argument("--base-url", required=True, help="the judge's API root, ending in /v1 for vLLM")
    judged.add_argument("--model", required=True, help="its name on that server")
    judged.add_argument("--criteria", nargs="+", metavar="NAME", help="default: all three")
    judged.add_argument("--out", type=Path, default=Path("judge-audit"), help="default: %(default)s")
    judged.add_argument("--rows", type=int, help="only the first so many rows")
    judged.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the key")
    judged.add_argument("--max-concurrency", type=int, default=16, help="default: %(default)s")
    judged.add_argument("--timeout-s", type=float, default=60, help="for one request; default: %(default)s")

    core_commands.add(commands, _command)

    _command(commands, "stages", _stages, "list the stages and their short names")

    explained = _command(
        commands, "explain", _explain, "explain a recipe's keys: type, default, unit, stages"
    )
    explained.add_argument("key", nargs="?", help="key path, or the end of one; default: every section")
    explained.add_argument("--schema", action="store_true", help="print a JSON schema for editors instead")

    rewards = _command(commands, "rewards", None, "try rewards on data")
    tests = rewards.add_subparsers(metavar="COMMAND", required=True, help="what to do with a reward")
    test = _command(
        tests, "test", _rewards_test, "check that a data set's gold answers earn 1, corrupted ones 0"
    )
    test.add_argument("reward", help="a built-in name, package.module:Name or file.py:Name")
    test.add_argument(
        "data", help="records (Parquet file, folder, hub id), or JSONL rows as `score` reads them"
    )
    test.add_argument(
        "--param", metavar="KEY=VALUE", action="append", default=[], help="a reward's parameter"
    )
    test.add_argument("--rows", type=_count, help="a random sample of so many; default: every row")
    test.add_argument("--seed", type=int, default=0, help="of the sample; default: %(default)s")
    test.add_argument("--mode", choices=("think", "direct"), help="ask every row under this contract")
    test.add_argument("--split", default="train", help="of a data set; default: %(default)s")

    score = _command(commands, "score", _score, "score stored completions, a JSONL row each, without a model")
    score.add_argument("--rewards", required=True, help="names separated by commas; shown=name shows it so")
    score.add_argument(
        "--input", type=Path, required=True, help="JSONL: completion, gold, prompt, kind, mode, ..."
    )
    score.add_argument("--output", type=Path, required=True, help="the rows with their verdicts, in order")
    score.add_argument(
        "--param",
        metavar="REWARD.KEY=VALUE",
        action="append",
        default=[],
        help="a reward's parameter, e.g. answer.tolerance=0.1",
    )
    score.add_argument("--workers", type=_count, default=8, help="graded at once; default: %(default)s")
    score.add_argument("--mode", choices=("think", "direct"), help="of rows that do not name theirs")

    diff = _command(commands, "diff", _diff, "show the verdicts that changed between two scored files")
    diff.add_argument("before", type=Path, help="output of `posttrain score`")
    diff.add_argument("after", type=Path, help="output of `posttrain score` for the same rows")
    diff.add_argument("--limit", type=int, default=20, help="changes to show; default: %(default)s")
    diff.add_argument("--json", action="store_true", help="for programs: totals and every change")
    return top


def _command(commands: Any, name: str, do: Any, summary: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=summary, description=f"{summary[0].upper()}{summary[1:]}.")
    command.set_defaults(do=do)
    return command


def _recipe_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=Path, help="recipe folder, such as recipes/demo")
    _shared_options(command)


def _shared_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help="override values, e.g. rlvr.rollout.group_size=16 rlvr.rewards.0.weight=0.9",
    )
    command.add_argument("--seed", type=int, help="another seed; the run is then runs/<name>-seed<N>")
    command.add_argument("--name", help="another name for the run's folder")
    command.add_argument("--runs-dir", type=Path, default=Path("runs"), help="default: %(default)s")


def _load(options: argparse.Namespace) -> Any:
    from chain.recipe import load_recipe

    return load_recipe(options.recipe, options.overrides, options.seed, options.name)


def _run(options: argparse.Namespace) -> None:
    from chain.placement import placement
    from chain.run import run

    place = placement(nodes=options.nnodes, node=options.node_rank, master=options.master)
    run(
        _load(options),
        runs_dir=options.runs_dir,
        from_=options.from_,
        until=options.until,
        force=options.force,
        place=place,
    )


def _plan(options: argparse.Namespace) -> None:
    import json

    from chain.plan import text as plan
    from chain.plan.resources import resources as resources_of

    recipe = _load(options)
    resources = resources_of(recipe, options.runs_dir, options.gpu_gib)
    plans = plan.plan(recipe, options.runs_dir, resources=resources)
    if options.json:
        print(json.dumps(plan.as_json(recipe, plans, resources), indent=2))
    else:
        print(plan.text(recipe, plans, options.runs_dir, resources))
    resources.check()


def _eval(options: argparse.Namespace) -> None:
    from chain.serve import evaluate_checkpoint

    out = options.out or options.model.resolve().parent / "eval"
    evaluate_checkpoint(_load(options), options.model, out, runs_dir=options.runs_dir)


def _data(options: argparse.Namespace) -> None:
    from chain.run import data

    print(data(_load(options), runs_dir=options.runs_dir, force=options.force))


def _report(options: argparse.Namespace) -> None:
    from chain.display import new_console
    from chain.report import data as report

    console = new_console()
    console.print(report.table(report.write(options.run_dir)))
    console.print(f"report: {options.run_dir / report.HTML}", markup=False, soft_wrap=True)


def _rollout_server(options: argparse.Namespace) -> None:
    from chain.serve import serve

    serve(
        _load(options), options.model, options.runs_dir, options.host, options.port, adapter=options.adapter
    )


def _judge_audit(options: argparse.Namespace) -> None:
    from chain.display import new_console
    from core.strict import ConfigError
    from rewards.judge.judges import CRITERIA, VisionJudge
    from rewards.offline import judge_audit

    console = new_console()
    try:
        judge = VisionJudge(
            options.base_url,
            options.model,
            criteria=tuple(options.criteria or CRITERIA),
            api_key_env=options.api_key_env,
            max_concurrency=options.max_concurrency,
            timeout_s=options.timeout_s,
            budget_s=3600,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None
    with console.status("asking the judge") as status:
        found = judge_audit.run(judge, options.data, options.out, options.rows, status.update)
    console.print(judge_audit.table(found))
    console.print(f"audit: {options.out / judge_audit.MARKDOWN}", markup=False, soft_wrap=True)


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


def _rewards_test(options: argparse.Namespace) -> None:
    from rewards.offline import gold_test as reward_test

    params = dict(_assigned(text) for text in options.param)
    reward_test.run(
        options.reward,
        options.data,
        params,
        rows=options.rows,
        seed=options.seed,
        mode=options.mode,
        split=options.split,
    )


def _score(options: argparse.Namespace) -> None:
    from core.strict import ConfigError
    from rewards.offline import score

    params: dict[str, dict[str, Any]] = {}
    for text in options.param:
        key, value = _assigned(text)
        reward, dot, name = key.rpartition(".")
        if not dot:
            raise ConfigError(f"--param {text}: say whose it is, as in answer.{key}=...")
        params.setdefault(reward, {})[name] = value
    score.run(options.input, options.output, options.rewards, params, options.workers, options.mode)


def _diff(options: argparse.Namespace) -> None:
    from rewards.offline.diff import run

    run(options.before, options.after, options.limit, options.json)


def _assigned(text: str) -> tuple[str, Any]:
    """`key=value`, the value read as YAML."""
    import yaml

    from core.strict import ConfigError

    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"--param {text!r}: write KEY=VALUE")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigError(f"--param {text!r}: {value!r} is no YAML value ({error})") from None


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least 1")
    return int(text)


def _has_words(error: Exception) -> bool:
    """Whether the error is of a class of ours, whose messages say what to do; anything else is a bug."""
    return type(error).__module__.partition(".")[0] in OURS


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
