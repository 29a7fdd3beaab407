"""`posttrain eval` and `posttrain rollout-server`: one checkpoint, scored or served."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chain.cli.options import command, count, load, recipe_option


def add(commands: Any) -> None:
    """Add the family to the command line."""
    evaluate = command(commands, "eval", _eval, "score a checkpoint folder on a recipe's held-out set")
    evaluate.add_argument("model", type=Path, help="checkpoint folder")
    evaluate.add_argument("--out", type=Path, help="folder for eval.json and samples; default: MODEL/../eval")
    recipe_option(evaluate)
    server = command(commands, "rollout-server", _rollout_server, "serve a checkpoint until Ctrl-C")
    server.add_argument("model", type=Path, help="checkpoint folder")
    server.add_argument(
        "--adapter", type=Path, help="a LoRA adapter of the checkpoint, served as a second model `adapter`"
    )
    server.add_argument("--host", help="address to bind to; 0.0.0.0 for learners on other machines")
    server.add_argument(
        "--port",
        type=count,
        help="port of the first server; further servers take the next ports; default: free ports",
    )
    recipe_option(server)


def _eval(options: argparse.Namespace) -> None:
    from chain.serve import evaluate_checkpoint
    from core.processes import remove_leftovers

    out = options.out or options.model.resolve().parent / "eval"
    remove_leftovers()
    evaluate_checkpoint(load(options), options.model, out, runs_dir=options.runs_dir)


def _rollout_server(options: argparse.Namespace) -> None:
    from chain.serve import serve
    from core.processes import remove_leftovers

    remove_leftovers()
    serve(load(options), options.model, options.runs_dir, options.host, options.port, adapter=options.adapter)
