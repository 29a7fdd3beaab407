"""The console command `posttrain`. Subcommands import heavy modules only when they run, so that help is fast."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from chain.cli import bench, chain, chat, checkpoint, compare, core, data, hub, init, rewards
from chain.errors import words_of

DESCRIPTION = """\
Post-training for SAIL-VL2, stage by stage, from a recipe: a folder of YAML files.

  posttrain init mine --data rows.parquet            a recipe folder of your own, with a reward and its test
  posttrain plan recipes/demo                       what would run, checked; trains nothing
  posttrain run recipes/demo                        the whole chain; finished stages are skipped
  posttrain run recipes/demo --from rlvr --set rlvr.rollout.group_size=16
  posttrain explain rlvr.rollout                    what a recipe's keys mean
  posttrain eval runs/demo/rlvr/checkpoint          score a checkpoint on the held-out set
  posttrain chat runs/demo/rlvr/checkpoint panel.png --think
  posttrain data import llava.json mine.parquet      foreign files as records, which every stage reads
  posttrain data curate recipes/curation_demo        filter, rewrite and sample rows, with a report
  posttrain data show mine.parquet                   statistics, and rows with pictures
  posttrain push runs/demo me/my-core --license apache-2.0 --dry-run
  posttrain judge-audit rows.jsonl --base-url http://127.0.0.1:8100/v1 --model judge
  posttrain compare runs/demo/longcot_sft runs/demo/rlvr   paired by question; --gate for CI
  posttrain report runs/demo                        write report.json and report.html again
  posttrain rewards test answer data/held.parquet   gold answers must earn 1, corrupted ones 0
  posttrain score --rewards answer,format --input rows.jsonl --output scored.jsonl
  posttrain diff yesterday.jsonl scored.jsonl       which verdicts changed
  posttrain core import SAIL-VL2-2B cores/2b        a released checkpoint as a native core; `core export` back
  posttrain core new --size 2b cores/random-2b      a core of that shape with random weights
  posttrain core merge ADAPTER cores/merged         a LoRA adapter merged into its core
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 done, 1 a stage failed, 2 wrong recipe or command line, 130 interrupted."""
    from core.strict import ConfigError

    options = parser().parse_args(arguments)
    # An editable install is searched only after sys.path. A user's modules are searched last, in the recipe's folders.
    sys.path.append(str(Path(__file__).resolve().parents[2]))
    # A SIGTERM (CI's time limit, `kill`) must stop children and servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, _terminated)
    signal.signal(signal.SIGHUP, _terminated)  # the terminal is gone
    try:
        options.do(options)
    except BrokenPipeError:  # the reader of our output, such as `head`, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("posttrain: interrupted; finished stages are kept, run again to continue", file=sys.stderr)
        return 130
    except Exception as error:
        words = _words(error)
        if words is None or options.debug:
            raise
        # Text from files and checkpoints must not control the terminal.
        from core.checkpoint.shards import printable

        print(f"posttrain: {printable(words)}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def _words(error: Exception) -> str | None:
    """The user's message of an error; None for a bug."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return words_of(error)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(
        prog="posttrain", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = top.add_subparsers(metavar="COMMAND", required=True)
    for family in (init, chain, data, checkpoint, chat, bench, compare, hub, rewards, core):
        family.add(commands)
    return top


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
