"""posttrain chat: the prompt contract, commands, a checkpoint, and servers that stream."""

import io
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from chain.chat import Chat, chat, typed
from chain.cli.main import main
from chain.voices import Server, deltas, voice
from core.model.prompts import THINK_CONTRACT
from core.model.tiny import build_tiny
from core.strict import ConfigError
from rl.rollout import access
from rl.rollout.http import RolloutError


class Echo:
    """A voice that remembers what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, messages, say):
        self.asked.append(messages)
        say("<think>why</think>")
        say("4")
        return "<think>why</think>4"


def texts(messages):
    return ["".join(part.get("text", "[image]") for part in one["content"]) for one in messages]


def test_only_the_last_question_carries_the_contract_and_earlier_answers_lose_their_thoughts(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    conversation, said = Chat(Echo(), "think", [tmp_path / "red.png"]), []
    conversation.ask("2 + 2?", said.append)
    conversation.ask("Sure?", said.append)
    assert texts(conversation.voice.asked[0]) == [f"[image]2 + 2?\n{THINK_CONTRACT}"]
    assert texts(conversation.voice.asked[1]) == ["[image]2 + 2?", "4", f"Sure?\n{THINK_CONTRACT}"]
    assert said == ["<think>why</think>", "4"] * 2


def test_commands_change_mode_and_pictures_and_save_what_was_said(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    conversation = Chat(Echo())
    assert conversation.command("/think") == "mode: think"
    assert conversation.command(f"/image {tmp_path / 'red.png'}") == "1 picture with the next question"
    conversation.ask("2 + 2?", lambda piece: None)
    assert conversation.pictures == []
    conversation.command(f"/save {tmp_path / 'chat.jsonl'}")
    (line,) = (tmp_path / "chat.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        **{"question": "2 + 2?", "mode": "think", "images": [str(tmp_path / "red.png")]},
        "completion": "<think>why</think>4",
    }
    assert conversation.command("/new") == "forgotten"
    assert conversation.turns == []
    assert conversation.command("/quit") is None


@pytest.mark.parametrize(
    ("line", "words"),
    [("/thnik", "did you mean think"), ("/image no.png", "no.png: No such file"), ("/save", "give one file")],
)
def test_a_wrong_command_is_refused_with_its_remedy(line, words):
    with pytest.raises(ConfigError, match=words):
        Chat(Echo()).command(line)


def test_piped_lines_are_answered_and_errors_do_not_end_the_conversation(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/nothing\n2 + 2?\n/quit\nnot asked\n"))
    conversation = Chat(Echo())
    assert chat(conversation, typed(lambda: "> ")) == 1
    assert [turn["question"] for turn in conversation.turns] == ["2 + 2?"]
    shown = capsys.readouterr()
    assert shown.out == "<think>why</think>4\n"
    assert "/nothing" in shown.err


def test_a_checkpoint_answers_in_this_process(tmp_path, monkeypatch, capsys):
    build_tiny(tmp_path / "core", words=["how", "many"], seed=0)
    capsys.readouterr()
    monkeypatch.setattr(sys, "stdin", io.StringIO("how many?\n"))
    assert main(["chat", str(tmp_path / "core"), "--max-tokens", "4"]) == 0
    streamed = capsys.readouterr().out
    pieces = []
    asked = voice(str(tmp_path / "core"), 0.0, 4)
    whole = asked([{"role": "user", "content": [{"type": "text", "text": "how many?"}]}], pieces.append)
    assert streamed == whole + "\n" == "".join(pieces) + "\n"
    assert whole
    with pytest.raises(ConfigError, match="the core's context 2048; /new starts over"):
        asked([{"role": "user", "content": [{"type": "text", "text": "how " * 2100}]}], pieces.append)


def test_no_checkpoint_is_an_error_with_code_2(tmp_path, capsys):
    assert main(["chat", str(tmp_path)]) == 2
    assert "this is not a checkpoint folder" in capsys.readouterr().err


class Streaming(BaseHTTPRequestHandler):
    """A server of the OpenAI API that streams two pieces; `token` set: one of ours."""

    protocol_version = "HTTP/1.1"
    token = key = None
    asked: dict = {}  # noqa: RUF012

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if self.token and (
            refused := access.verdict(
                path, query, self.headers.get("Authorization"), self.server.server_port, self.token
            )
        ):
            return self.reply(json.dumps(refused[1]).encode(), refused[0])
        if self.key and self.headers.get("Authorization") != f"Bearer {self.key}":
            return self.reply(b"no key", 401)
        return self.reply(json.dumps({"data": [{"id": "policy"}]}).encode())

    def do_POST(self):
        Streaming.asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        chunks = [{"choices": [{"delta": {"content": text}}]} for text in ("3 ", "äpfel")]
        lines = [f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n" for chunk in chunks]
        self.reply("".join([*lines, "data: [DONE]\n\n"]).encode())

    def reply(self, body, status=200):
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(Streaming, "token", None)
    monkeypatch.setattr(Streaming, "key", None)
    monkeypatch.delenv(access.TOKEN, raising=False)
    with ThreadingHTTPServer(("127.0.0.1", 0), Streaming) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()


QUESTION = [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}]


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_a_server_streams_its_answer(server, suffix):
    pieces = []
    assert Server(server + suffix, 0.0, 16, None, None)(QUESTION, pieces.append) == "3 äpfel"
    assert pieces == ["3 ", "äpfel"]
    assert Streaming.asked["model"] == "policy"
    assert Streaming.asked["stream"] is True


def test_a_server_of_ours_gets_the_token_from_the_file_after_it_has_proved_itself(
    server, tmp_path, monkeypatch
):
    monkeypatch.setattr(Streaming, "token", "secret")
    file = tmp_path / "token"
    file.write_text("secret")
    file.chmod(0o600)
    assert Server(server, 0.0, 16, str(file), None)(QUESTION, str) == "3 äpfel"
    with pytest.raises(RolloutError, match="401"):
        Server(server, 0.0, 16, None, None)


def test_another_server_gets_the_key_of_an_environment_variable(server, monkeypatch):
    monkeypatch.setattr(Streaming, "key", "mine")
    monkeypatch.setitem(os.environ, "MY_KEY", "mine")
    assert Server(server, 0.0, 16, None, "MY_KEY")(QUESTION, str) == "3 äpfel"
    with pytest.raises(ConfigError, match="--api-key-env NONE: this variable is not set"):
        Server(server, 0.0, 16, None, "NONE")


def test_lines_without_text_are_skipped():
    lines = [": ping", "", 'data: {"choices": [{"delta": {}}]}', 'data: {"usage": 1}', "data: [DONE]"]
    assert "".join(deltas(iter(lines))) == ""
