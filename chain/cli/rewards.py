"""`posttrain rewards test`, `score`, `diff` and `judge-audit`: rewards and judges on stored data, without a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chain.cli.options import assigned, command, count


def add(commands: Any) -> None:
    """Add the family to the command line."""
    _add_test(commands)
    _add_score(commands)
    _add_diff(commands)
    _add_judge_audit(commands)


def _add_test(commands: Any) -> None:
    rewards = command(commands, "rewards", None, "try rewards on data")
    tests = rewards.add_subparsers(metavar="COMMAND", required=True, help="what to do with a reward")
    test = command(
        tests, "test", _rewards_test, "check that a data set's gold answers earn 1, corrupted ones 0"
    )
    test.add_argument("reward", help="a built-in name, package.module:Name or file.py:Name")
    test.add_argument(
        "data", help="records (Parquet file, folder, hub address), or JSONL rows as `score` reads them"
    )
    test.add_argument(
        "--param", metavar="KEY=VALUE", action="append", default=[], help="a reward's parameter"
    )
    test.add_argument("--rows", type=count, help="number of rows to sample; default: every row")
    test.add_argument("--seed", type=int, default=0, help="seed of the sample; default: %(default)s")
    test.add_argument(
        "--mode", choices=("think", "direct"), help="grade every row under this mode's contract"
    )
    test.add_argument("--split", default="train", help="split of a data set; default: %(default)s")


def _add_score(commands: Any) -> None:
    score = command(
        commands, "score", _score, "score stored completions (one JSONL row each) without a model"
    )
    score.add_argument(
        "--rewards", required=True, help="names separated by commas; label=name sets the label in the output"
    )
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
    score.add_argument(
        "--workers", type=count, default=8, help="completions graded at once; default: %(default)s"
    )
    score.add_argument("--mode", choices=("think", "direct"), help="mode of rows that do not have a mode")
    score.add_argument(
        "--allow-unscorable", action="store_true", help="succeed even if no row could be scored"
    )


def _add_diff(commands: Any) -> None:
    diff = command(commands, "diff", _diff, "show the verdicts that changed between two scored files")
    diff.add_argument("before", type=Path, help="output of `posttrain score`")
    diff.add_argument("after", type=Path, help="output of `posttrain score` for the same rows")
    diff.add_argument("--limit", type=int, default=20, help="changes to show; default: %(default)s")
    diff.add_argument("--json", action="store_true", help="print totals and every change as JSON")


def _add_judge_audit(commands: Any) -> None:
    judged = command(commands, "judge-audit", _judge_audit, "measure a judge against labelled thoughts")
    judged.add_argument(
        "data", type=Path, help='records with meta["label"], or JSONL with label, good or wrong'
    )
    judged.add_argument("--base-url", required=True, help="the judge's API root, ending in /v1 for vLLM")
    judged.add_argument("--model", required=True, help="name of the judge model on that server")
    judged.add_argument("--criteria", nargs="+", metavar="NAME", help="criteria to audit; default: all three")
    judged.add_argument("--out", type=Path, default=Path("judge-audit"), help="default: %(default)s")
    judged.add_argument("--rows", type=int, help="number of rows to audit, from the first row; default: all")
    judged.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the API key")
    judged.add_argument("--max-concurrency", type=int, default=16, help="default: %(default)s")
    judged.add_argument(
        "--timeout-s", type=float, default=60, help="time limit of one request, seconds; default: %(default)s"
    )


def _rewards_test(options: argparse.Namespace) -> None:
    from rewards.offline import gold_test as reward_test

    params = dict(assigned(text) for text in options.param)
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
        key, value = assigned(text)
        reward, dot, name = key.rpartition(".")
        if not dot:
            raise ConfigError(f"--param {text}: name the reward, as in answer.{key}=...")
        params.setdefault(reward, {})[name] = value
    score.run(
        options.input,
        options.output,
        options.rewards,
        params,
        options.workers,
        options.mode,
        options.allow_unscorable,
    )


def _diff(options: argparse.Namespace) -> None:
    from rewards.offline.diff import run

    run(options.before, options.after, options.limit, options.json)


def _judge_audit(options: argparse.Namespace) -> None:
    from core.console import new_console
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
