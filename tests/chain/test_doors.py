"""The listening sockets while a stage trains, from the operating system. Another user gets no data from them.

A chain with two ranks and two rollout servers runs; docs/security.md lists everything that may listen.
"""

import json
import os
import pickle
import re
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests
import yaml

from core.checkpoint.shards import weights_hash
from core.files import read_jsonl
from corpus.records import write_records
from rl.rollout.access import TOKEN

from ..rl.conftest import record, tiny_core  # noqa: F401 - fixture
from .test_several_hosts import STAGE

ROOT = Path(__file__).parents[2]
REWARD = """
import pathlib, time

HERE = pathlib.Path(__file__).parent


def count(completion, example):
    (HERE / "held").touch()
    while (HERE / "hold").exists():
        time.sleep(0.05)
    return min(1.0, sum(letter.isdigit() for letter in completion) / 6)
"""
ROLES = {
    "core/processes.py": "guard",
    "chain.worker": "rank",
    "rl.rollout.hf": "server",
    "api_server": "server",
    "EngineCore": "server",
}
ATTEMPTS = [
    ("GET", "/health", None),
    ("GET", "/weight_info", None),
    ("GET", "/v1/models", None),
    ("OPTIONS", "/update_weights", None),
    ("POST", "/collective_rpc", {"method": "save_sharded_state", "args": ["/tmp"]}),
    ("POST", "/start_weight_update", {}),
    ("POST", "/update_weights", {"update_info": {"paths": [], "aliases": {}}}),
    ("POST", "/finish_weight_update", {"weight_version": "a neighbour's"}),
    ("POST", "/update_weight_version", {"new_version": "a neighbour's"}),
    ("POST", "/sleep?level=2", {}),
    ("POST", "/pause", {}),
    ("POST", "/reset_mm_cache", {}),
    ("POST", "/reset_encoder_cache", {}),
    ("POST", "/reset_prefix_cache", {}),
    ("POST", "/v1/chat/completions", {"model": "policy", "messages": [{"role": "user", "content": "hello"}]}),
]


class Mark:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def start(root, core, name, engine):
    """The chain's process, in a separate session and working directory."""
    (root / "counted_digits.py").write_text(REWARD)
    write_records(root / "rl.parquet", [record(n, image=bool(n % 4)) for n in range(24)])
    recipe = {
        "name": name,
        "data": {"sets": {"rl": str(root / "rl.parquet")}},
        "servers": {"engine": engine, "count": 2, "max_model_tokens": 256, "max_sequences": 64},
        "wandb": {"mode": "disabled"},
        "core": {"path": str(core)},
        "rlvr": {**STAGE, "rewards": [{**STAGE["rewards"][0], "deadline_s": 300}]},
    }
    (root / name).mkdir()
    (root / name / "pipeline.yaml").write_text(yaml.safe_dump(recipe))
    with (root / f"{name}.out").open("wb") as out:
        return subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                "chain.cli.main",
                "run",
                str(root / name),
                "--runs-dir",
                str(root / "runs"),
            ],
            cwd=root,
            env={
                **os.environ,
                "WANDB_MODE": "disabled",
                "PYTHONPATH": os.pathsep.join([str(root), str(ROOT)]),
            },
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def role(process, known={}):  # noqa: B006 - what each process was
    """Name of a process, or its last known name after it has lost its command line at exit."""
    words = " ".join(process.cmdline())
    if words:
        known[process] = next((role for word, role in ROLES.items() if word in words), words[:100])
    return known.get(process, process.name())


def listeners(process):
    """(process, interface, protocol) -> address, for all sockets on which descendants of a process listen."""
    found = {}
    listening = {
        line.split()[6]: line.split()[7] if len(line.split()) > 7 else "(no name)"
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
        if int(line.split()[3], 16) & 0x10000
    }
    for one in [process, *process.children(recursive=True)]:
        try:
            who = role(one)
            for connection in one.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM:
                    found[connection.laddr] = (who, connection.laddr.ip, "tcp")
            for descriptor in Path(f"/proc/{one.pid}/fd").iterdir():
                inode = re.match(r"socket:\[(\d+)\]", os.readlink(descriptor))
                if inode and inode[1] in listening:
                    path = listening[inode[1]]
                    found[path] = (who, "private folder" if is_private(path) else path, "unix")
        except (psutil.Error, OSError):
            continue  # the process has just ended
    return found


def is_private(path):
    """Whether only the owner can access a Unix socket's folder."""
    status = Path(path).parent.stat()
    return status.st_uid == os.getuid() and not stat.S_IMODE(status.st_mode) & 0o077


def knock_as_neighbour(address, who, mark):
    """Try everything without the token; returns what was answered with anything but a refusal, and the refusals."""
    answered, refusals = [], 0
    if who == "server" and speaks_http(address):
        url = f"http://{address.ip}:{address.port}"
        for headers in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Content-Type": "text/plain", "Origin": "http://x"},
        ):
            for method, path, body in ATTEMPTS:
                data = None if body is None else json.dumps(body)
                status = requests.request(
                    method, url + path, data=data, headers=headers, timeout=60
                ).status_code
                if status in (401, 501):  # 501: http.server does nothing for a method it does not know
                    refusals += 1
                else:
                    answered.append((path, headers, status))
    for junk in (b"", b"\0" * 8, (1).to_bytes(8, "little"), pickle.dumps(Mark(mark)), b"\xff" * 4096):
        with socket.create_connection((address.ip, address.port), timeout=5) as line:
            line.sendall(junk)
    return answered, refusals


def speaks_http(address):
    """False for the thirteen gloo ports of a vLLM engine, which answer nothing."""
    try:
        return bool(requests.get(f"http://{address.ip}:{address.port}/health", timeout=3).status_code)
    except requests.RequestException:
        return False


STORES = """
import datetime, os, sys, threading, time
import torch.distributed as d

own = d.TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
found = []

def knock(port):
    try:
        store = d.TCPStore("127.0.0.1", port, None, False, datetime.timedelta(seconds=3))
        store.num_keys()
        store.set("torch.rendezvous.stolen", b"")
        found.append(port)
    except Exception:
        pass

for port in (own.port, *map(int, sys.argv[1:])):
    threading.Thread(target=knock, args=(port,), daemon=True).start()
time.sleep(6)
found.remove(own.port)
print("open", *found, flush=True)
os._exit(0)
"""


def stores_that_open(addresses):
    """What a client of PyTorch's TCP store finds at the ports, after it has found its own store: `open PORT...`."""
    command = [sys.executable, "-P", "-c", STORES, *(str(address.port) for address in addresses)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip()


NEIGHBOUR = """
import http.client, json, socket, sys

ports, sockets, pids, attempts = json.load(sys.stdin)
got = []
for port in ports:
    for method, path, body in attempts:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        line.request(method, path, None if body is None else json.dumps(body))
        if line.getresponse().status not in (401, 501):
            got.append([port, path])
for path in sockets:
    try:
        socket.socket(socket.AF_UNIX).connect(path)
        got.append(path)
    except OSError:
        pass
for pid in pids:
    for name in ("environ", "maps", "mem"):
        try:
            open(f"/proc/{pid}/{name}", "rb").read(1)
            got.append([pid, name])
        except OSError:
            pass
print(json.dumps(got))
"""


def gained_by_another_account(found, below):
    """What the account `nobody` gets from servers, sockets and processes; None if this account cannot start it."""
    python = Path("/usr/bin/python3")
    if os.getuid() or not python.exists():
        return None
    ports = [
        at.port
        for at, (who, _, kind) in found.items()
        if kind == "tcp" and who == "server" and speaks_http(at)
    ]
    sockets = [at for at, (_, _, kind) in found.items() if kind == "unix" and str(at).startswith("/")]
    given = json.dumps([ports, sockets, [one.pid for one in below], ATTEMPTS])
    command = [python, "-I", "-c", NEIGHBOUR]
    done = subprocess.run(
        command, input=given, user="nobody", cwd="/", capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def documented():
    """(process, interface, protocol) of the rows for one host in docs/security.md."""
    text = (ROOT / "docs" / "security.md").read_text()
    table = text[text.index("| Who |") :].split("\n\n")[0].splitlines()[2:]
    return {tuple(cell.strip().strip("`") for cell in line.split("|")[1:4]) for line in table}


def finish(process, output):
    assert process.wait(600) == 0, output.read_text()[-4000:]


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=pytest.mark.slow)])
def test_listeners_are_documented_on_loopback_and_refuse_other_accounts(tiny_core, tmp_path, engine):  # noqa: F811
    (tmp_path / "hold").touch()  # the learner waits for its first rewards, and everything listens
    process = start(tmp_path, tiny_core, "visited", engine)
    seen, visited, answered, refusals, tokens, stores, gained = set(), set(), [], 0, set(), "", None
    try:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            found = listeners(watched)
            seen |= set(found.values())
            held = (tmp_path / "held").exists() and (tmp_path / "hold").exists()
            for address, (who, _, kind) in found.items() if held else ():
                if kind == "tcp":
                    more, refused = knock_as_neighbour(address, who, tmp_path / "unpickled")
                    answered, refusals = answered + more, refusals + refused
                    visited.add(address)
            if held:
                below = watched.children(recursive=True)
                servers = [one for one in below if role(one) == "server"]
                tokens = {one.environ().get(TOKEN) for one in servers} - {
                    None
                }  # vLLM's engine overwrites its own
                assert not [one for one in below for token in tokens if token in " ".join(one.cmdline())]
                stores = stores_that_open(visited)
                gained = gained_by_another_account(found, below)
                (tmp_path / "hold").unlink()
            time.sleep(0.1)
    finally:
        (tmp_path / "hold").unlink(missing_ok=True)
        process.terminate()
        finish(process, tmp_path / "visited.out")
    assert {who for who, _, _ in seen} >= {"rank", "server"}
    assert len(visited) >= 4
    assert seen <= documented()
    assert not answered
    assert not gained
    assert refusals >= 2 * 3 * len(ATTEMPTS), (
        "both servers refused every attempt, under each of three headers"
    )
    assert stores == "open"
    assert not (tmp_path / "unpickled").exists()
    (token,) = tokens
    files = [file for file in (tmp_path / "runs").rglob("*") if file.is_file()]
    assert not [file for file in files if token.encode() in file.read_bytes()]
    if engine == "hf":
        return
    # The same without a second user.
    finish(start(tmp_path, tiny_core, "alone", engine), tmp_path / "alone.out")
    runs = [tmp_path / "runs" / name / "rlvr" for name in ("visited", "alone")]
    one, two = (
        [(line["loss"], line["reward"]) for line in read_jsonl(run / "metrics.jsonl")] for run in runs
    )
    assert len(one) == 3
    assert one == two
    assert weights_hash(runs[0] / "checkpoint") == weights_hash(runs[1] / "checkpoint")
    assert {line["rollout/servers"] for line in read_jsonl(runs[0] / "metrics.jsonl")} == {2}


def test_a_hangup_of_the_terminal_leaves_no_process(tiny_core, tmp_path):  # noqa: F811
    (tmp_path / "hold").touch()
    process = start(tmp_path, tiny_core, "hung", "hf")
    while not (tmp_path / "held").exists():
        assert process.poll() is None, (tmp_path / "hung.out").read_text()[-4000:]
        time.sleep(0.1)
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGHUP)
    assert process.wait(120) == 130
    assert len(below) > 4
    assert not psutil.wait_procs(below, timeout=60)[1]
