"""`posttrain push` and `posttrain pull`: checkpoints to the hub, cores from it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chain.cli.options import command


def add(commands: Any) -> None:
    """Add the family to the command line."""
    push = command(commands, "push", _push, "push a run's checkpoint to the hub, with a model card")
    push.add_argument("run_dir", type=Path, metavar="RUN", help="the run's folder, runs/<name>")
    push.add_argument("repo", metavar="REPO", help="repository on the hub, owner/name")
    push.add_argument(
        "--license", required=True, metavar="ID", help="the hub's identifier, such as apache-2.0"
    )
    push.add_argument("--stage", help="stage whose checkpoint to push; default: the last finished one")
    push.add_argument("--base-model", metavar="REPO", help="repository that the core came from, for the card")
    push.add_argument("--public", action="store_true", help="make a new repository public; default: private")
    push.add_argument("--dry-run", action="store_true", help="show the card and the files; send nothing")
    pull = command(commands, "pull", _pull, "bring a core from the hub, checked and in the native layout")
    pull.add_argument("repo", metavar="REPO", help="repository on the hub, owner/name")
    pull.add_argument("folder", type=Path, metavar="DIR", help="folder to make; must not exist")
    pull.add_argument("--revision", help="branch, tag or commit; default: main")
    pull.add_argument("--any-resolution", action="store_true", help="a released AnyRes model")


def _push(options: argparse.Namespace) -> None:
    from chain.hub.transfer import push

    push(
        options.run_dir,
        options.repo,
        licence=options.license,
        stage=options.stage,
        base_model=options.base_model,
        public=options.public,
        dry_run=options.dry_run,
    )


def _pull(options: argparse.Namespace) -> None:
    from chain.hub.transfer import pull

    pull(options.repo, options.folder, revision=options.revision, any_resolution=options.any_resolution)
