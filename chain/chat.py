"""`posttrain chat`: a conversation with a policy in the terminal, by the prompt contract of training and evaluation."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from chain.voices import Voice
from core.checkpoint.shards import printable
from core.files import append_jsonl
from core.model.pictures import Picture
from core.model.prompts import IMAGE, user_text, user_turns
from core.strict import ConfigError, nearest

HELP = """\
/image FILE...   show pictures with the next question
/think, /direct  ask for a thought before the answer, or for the answer alone
/save FILE       append the conversation to a JSONL file
/new             forget the conversation
/quit            end (also Ctrl-D)"""
COMMANDS = ("image", "think", "direct", "save", "new", "quit", "help")


@dataclass
class Chat:
    """One conversation. A question is asked with the pictures given before it, in the current mode.

    As in training, only the last question carries the thinking prompt. Earlier answers stand without their thoughts.
    """

    voice: Voice
    mode: str = "direct"
    pictures: list[Path] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)
    """The exchanges so far: question, mode, pictures (paths) and completion."""

    def ask(self, question: str, say: Callable[[str], None]) -> str:
        """Ask a question; `say` takes the pieces of the answer. Raises as the voice does, and forgets the question."""
        turn = {"question": question, "mode": self.mode, "images": [str(path) for path in self.pictures]}
        completion = self.voice(self._messages(turn), say)
        self.turns.append({**turn, "completion": completion})
        self.pictures = []
        return completion

    def command(self, line: str) -> str | None:
        """Carry out a line that starts with `/`; return a line for the user, or None to end.

        Raises ConfigError for an unknown command, or a picture that does not decode.
        """
        word, *rest = line[1:].split()
        if word in ("quit", "exit"):
            return None
        if word == "image":
            self.pictures = [picture(Path(name)) for name in rest]
            return f"{len(rest)} picture{'s' * (len(rest) != 1)} with the next question"
        if word in ("think", "direct"):
            self.mode = word
            return f"mode: {word}"
        if word == "save":
            return self._save(rest)
        if word == "new":
            self.turns, self.pictures = [], []
            return "forgotten"
        if word == "help":
            return HELP
        raise ConfigError(f"/{word}: {nearest(word, COMMANDS)}")

    def _save(self, rest: list[str]) -> str:
        if len(rest) != 1:
            raise ConfigError("/save: give one file, such as /save chat.jsonl")
        for turn in self.turns:
            append_jsonl(Path(rest[0]), turn)
        return f"{len(self.turns)} exchanges added to {rest[0]}"

    def _messages(self, last: dict[str, Any]) -> list[dict[str, Any]]:
        turns = [*self.turns, last]
        modes = ["direct"] * len(self.turns) + [last["mode"]]
        texts = [_marked(turn, mode) for turn, mode in zip(turns, modes, strict=True)]
        images = [Picture(Path(name).read_bytes()).rgb() for turn in turns for name in turn["images"]]
        out: list[dict[str, Any]] = []
        for turn, parts in zip(turns, user_turns(texts, images), strict=True):
            out.append({"role": "user", "content": parts})
            if turn is not last:
                answer = turn["completion"].rpartition("</think>")[2]
                out.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        return out


def _marked(turn: dict[str, Any], mode: str) -> str:
    """The text of a turn; its pictures stand at its own marks, or before it."""
    text = user_text(turn["question"], mode)
    return text if IMAGE in text else IMAGE * len(turn["images"]) + text


def picture(path: Path) -> Path:
    """The path of a picture that the model can see. Raises ConfigError if it is missing or does not decode."""
    try:
        Picture(path.expanduser().read_bytes()).rgb()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    return path.expanduser()


def chat(conversation: Chat, lines: Iterable[str]) -> int:
    """Answer lines until they end or `/quit`. Errors are printed and counted; returns their number."""
    errors = 0
    for line in map(str.strip, lines):
        try:
            if line.startswith("/"):
                reply = conversation.command(line)
                if reply is None:
                    break
                print(reply)
            elif line:
                conversation.ask(line, _say)
                print(flush=True)
        except (ConfigError, ValueError, OSError, RuntimeError) as error:
            errors += 1
            print(
                f"\n{printable(str(error))}" if sys.stdout.isatty() else printable(str(error)),
                file=sys.stderr,
            )
    return errors


def typed(prompt: Callable[[], str]) -> Iterable[str]:
    """Lines from the keyboard, with editing and history, or from a pipe, without a prompt."""
    if not sys.stdin.isatty():
        yield from iter(sys.stdin.readline, "")  # `yield from sys.stdin` would close it
        return
    import readline  # noqa: F401  # input() then edits lines

    while True:
        try:
            yield input(prompt())
        except EOFError:
            print()
            return


def _say(piece: str) -> None:
    print(printable(piece), end="", flush=True)
