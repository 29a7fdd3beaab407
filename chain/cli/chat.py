"""`posttrain chat`: ask a checkpoint or a running server."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from chain.cli.options import command, count


def add(commands: Any) -> None:
    """Add the subcommand to the command line."""
    chat = command(commands, "chat", _chat, "ask a checkpoint or a running server, with pictures")
    chat.add_argument("target", metavar="CHECKPOINT", help="checkpoint folder, or URL of a server")
    chat.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="pictures for the first question")
    chat.add_argument("--think", action="store_true", help="ask for a thought before the answer")
    chat.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="default: %(default)s, greedy"
    )
    chat.add_argument(
        "--max-tokens",
        type=count,
        default=4096,
        metavar="N",
        help="most tokens of an answer; default: %(default)s",
    )
    chat.add_argument("--token-file", help="token of servers that `rollout-server` started; default: none")
    chat.add_argument(
        "--api-key-env", metavar="NAME", help="environment variable with the key of another server"
    )


def _chat(options: argparse.Namespace) -> None:
    import sys

    from chain.chat import HELP, Chat, chat, picture, typed
    from chain.voices import voice
    from core.strict import ConfigError

    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature {options.temperature}: write a number of at least 0")
    pictures = [picture(path) for path in options.images]
    asked = voice(
        options.target, options.temperature, options.max_tokens, options.token_file, options.api_key_env
    )
    conversation = Chat(asked, "think" if options.think else "direct", pictures)
    if sys.stdin.isatty():
        print(HELP)
    errors = chat(conversation, typed(lambda: f"{conversation.mode}> "))
    if errors and not sys.stdin.isatty():
        raise ConfigError(f"{errors} of the lines were not answered")
