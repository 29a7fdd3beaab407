"""Several hosts: a process finds its place, mismatches are refused, and leader and followers end together."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from io import StringIO

import pytest
from rich.console import Console

from chain import hosts as cluster
from chain import launch, ranks
from chain.display import Display
from chain.hosts import Cluster, HostLost, LeaderEnded, follow
from chain.job import Task
from chain.placement import Placement, placement
from core.strict import ConfigError, Strict
from core.training.job import Job

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURMD_NODENAME": "gpu-b"}
STEP = {**SLURM, "SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
TORCHRUN = {
    **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GROUP_RANK": "1"},
    **{"MASTER_ADDR": "gpu-a", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "x"},
}
FACTS = {"the recipe": "a"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, Placement(2, 1, "gpu-a")),
        ({**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "no"}, Placement(2, 1, "gpu-a")),
        ({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}, None),
        (STEP, Placement(2, 1, "gpu-b")),
        ({**STEP, "SLURM_NNODES": "4", "SLURM_STEP_NUM_NODES": "3"}, Placement(3, 1, "gpu-b")),
        ({**STEP, "SLURM_NNODES": "1", "SLURM_NTASKS": "1", "SLURM_NODEID": "0"}, None),
        # a batch script on one node that asked for eight tasks, and starts posttrain itself
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "1", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "8"}, None),
        # torchrun under srun: torchrun's variables take precedence
        ({**STEP, **TORCHRUN}, Placement(2, 1, "gpu-a")),
    ],
)
def test_the_place_of_a_host_is_read_from_its_launchers_variables(environment, expected):
    assert placement(environment) == expected


def test_the_command_line_wins_over_the_environment():
    assert placement(STEP, nodes=1) is None
    assert placement(TORCHRUN, nodes=3, node=2, master="10.0.0.1:4000") == Placement(3, 2, "10.0.0.1", 4000)
    assert placement({}, nodes=2, node=0, master="10.0.0.1") == Placement(2, 0, "10.0.0.1", None)


@pytest.mark.parametrize(
    ("environment", "remedy"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, "torchrun --nnodes 2 --nproc-per-node 1"),
        ({**TORCHRUN, "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, "On one host: posttrain run"),
        (
            {**TORCHRUN, "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "ACCELERATE_USE_CPU": "1"},
            "accelerate launch --num_machines 2 --num_processes 2",
        ),
        ({**STEP, "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8"}, "srun --nodes=2 --ntasks-per-node=1"),
        ({**STEP, "SLURM_LOCALID": "3"}, "srun --nodes=2 --ntasks-per-node=1"),
        (SLURM, "srun --ntasks-per-node=1 posttrain run"),
    ],
)
def test_a_start_per_gpu_or_on_one_node_of_several_is_refused_with_the_right_command(environment, remedy):
    with pytest.raises(ConfigError, match=remedy):
        placement(environment)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ({"nodes": 2}, "--nnodes 2 needs --node-rank"),
        ({"nodes": 2, "node": 2}, "must be between 0 and 1"),
        ({"node": 1}, "need --nnodes"),
        ({"nodes": 2, "node": 0, "master": "a:b"}, "write HOST or HOST:PORT"),
    ],
)
def test_a_wrong_command_line_is_refused(words, problem):
    with pytest.raises(ConfigError, match=problem):
        placement({}, **words)


def test_a_launchers_variable_that_is_no_number_is_named():
    with pytest.raises(ConfigError, match="RANK='x' is not a whole number"):
        placement({**TORCHRUN, "RANK": "x"})


def test_children_do_not_take_themselves_for_ranks_of_the_launcher(monkeypatch):
    for name, value in {**TORCHRUN, "ACCELERATE_MIXED_PRECISION": "bf16", "KEPT": "1"}.items():
        monkeypatch.setenv(name, value)
    env = ranks.environment(1)
    assert env["KEPT"] == "1"
    assert not [name for name in env if name in TORCHRUN or name.startswith("ACCELERATE_")]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(cluster, "JOIN_S", 20.0)
    monkeypatch.setattr(cluster, "WAKE_S", 0.01)


class Host:
    """A follower in a thread of this process, whose ranks are a shell command."""

    def __init__(self, run_dir, node=1, facts=FACTS, nodes=2):
        self.error, self.console = None, Console(file=StringIO(), width=300)
        place = Placement(nodes, node, "127.0.0.1")

        def work():
            try:
                follow(place, run_dir, facts, Display(self.console))
            except Exception as error:
                self.error = error

        self.thread = threading.Thread(target=work)
        self.thread.start()

    def end(self):
        self.thread.join(30)
        assert not self.thread.is_alive()
        return self.error


@pytest.fixture
def command(monkeypatch):
    """Replaces the ranks' command: `command.append("exit 3")` for the next hosts."""
    words = ["true"]
    monkeypatch.setattr(ranks, "command", lambda *_: ["sh", "-c", words[-1]])
    return words


def lead(run_dir, facts=FACTS, nodes=2):
    return Cluster(Placement(nodes, 0, "127.0.0.1"), run_dir, facts, Display(Console(file=StringIO())))


def run_job(folder, hosts, on_poll=lambda: None):
    folder.mkdir(exist_ok=True)
    task = Task.of("never:run", Strict(), Job(stage="rlvr", out=folder))
    launch.run_job(task, folder, processes=hosts.nodes, cluster=hosts, on_poll=on_poll)


def test_leader_and_followers_run_a_stages_ranks_and_part_in_peace(tmp_path, quick, command):
    hosts = [Host(tmp_path, node, nodes=3) for node in (1, 2)]
    with lead(tmp_path, nodes=3) as leader:
        ticket = tmp_path / cluster.TICKET
        assert ticket.stat().st_mode & 0o777 == 0o600
        command.append("echo here")
        run_job(tmp_path / "stage", leader)
        run_job(tmp_path / "stage", leader)  # a second time
    assert [host.end() for host in hosts] == [None, None]
    assert "the leader has finished" in hosts[0].console.file.getvalue()
    assert (tmp_path / "stage" / "log-rank2.txt").read_text() == "here\nhere\n"
    assert not ticket.exists()


def test_ranks_that_fail_on_another_host_fail_the_stage_with_its_name_and_log(tmp_path, quick, monkeypatch):
    words = 'if [ "$RANK" = 0 ]; then sleep 600; fi; echo the reason; exit 3'
    monkeypatch.setattr(ranks, "command", lambda _: ["sh", "-c", words])
    host = Host(tmp_path)
    with (
        pytest.raises(
            launch.StageFailed,
            match=r"(?s)^rlvr: on node 1 \(.*\): rank 1 ended with exit code 3; .*log-rank1.txt:\nthe reason$",
        ),
        lead(tmp_path) as leader,
    ):
        run_job(tmp_path / "stage", leader)
    assert isinstance(host.end(), LeaderEnded)


def test_an_interrupted_leader_ends_the_ranks_everywhere(tmp_path, quick, command):
    command.append(f"echo $$ >> {tmp_path}/pids; exec sleep 600")

    def interrupt():
        if (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2:
            raise KeyboardInterrupt

    host = Host(tmp_path)
    with pytest.raises(KeyboardInterrupt), lead(tmp_path) as leader:
        run_job(tmp_path / "stage", leader, interrupt)
    assert str(host.end()) == "the leader has ended: it was interrupted"
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


FOLLOWER = """
import sys
from pathlib import Path
from chain import ranks
from chain.hosts import follow
from chain.placement import Placement
from chain.display import Display

ranks.command = lambda *_: ["sleep", "600"]
follow(Placement(2, 1, "127.0.0.1"), Path(sys.argv[1]), {"the recipe": "a"}, Display())
"""


def test_a_host_that_is_killed_ends_the_stage_and_is_named(tmp_path, quick, command):
    command.append("sleep 600")
    host = subprocess.Popen([sys.executable, "-P", "-c", FOLLOWER, str(tmp_path)], stdout=subprocess.DEVNULL)

    def kill():
        if (tmp_path / "stage" / "log-rank1.txt").exists():
            host.kill()

    with (
        pytest.raises(HostLost, match=r"node 1 \(.*\) is lost: its connection ended"),
        lead(tmp_path) as leader,
    ):
        run_job(tmp_path / "stage", leader, kill)
    host.wait(30)


def test_a_host_with_another_recipe_is_refused_on_both_sides(tmp_path, quick):
    host = Host(tmp_path, facts={"the recipe": "b"})
    with (
        pytest.raises(ConfigError, match=r"node 1 .*the recipe: 'b' there, 'a' on the leader"),
        lead(tmp_path),
    ):
        pass
    assert "the recipe: 'b' there" in str(host.end())


def test_two_hosts_of_one_number_are_refused(tmp_path, quick):
    hosts = [Host(tmp_path, 1, nodes=3), Host(tmp_path, 1, nodes=3)]
    with pytest.raises(ConfigError, match="number the hosts 0 to 2, each once"), lead(tmp_path, nodes=3):
        pass
    assert [type(host.end()) for host in hosts] == [LeaderEnded, LeaderEnded]


def test_a_host_that_does_not_see_the_leaders_folder_is_told_what_it_needs(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(cluster, "JOIN_S", 0.05)
    host = Host(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="must be on a file system that all hosts share"), lead(tmp_path):
        pass
    error = host.end()
    assert isinstance(error, ConfigError)
    assert "does not exist" in str(error)
    assert "on a file system that all hosts share" in str(error)


def test_a_host_on_which_the_leaders_job_does_not_appear_says_so(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(cluster, "SHOWS_S", 0.05)
    host = Host(tmp_path)
    with pytest.raises(HostLost, match="did not appear here"), lead(tmp_path) as leader:  # noqa: PT012
        leader.start(tmp_path / "stage" / "job.json", 1, 1)
        leader.wait(None)
        leader.check()
    assert isinstance(host.end(), ConfigError)


def test_a_host_waits_over_an_earlier_runs_secret_for_its_leader(tmp_path, quick):
    old = {"address": "127.0.0.1", "port": 9, "token": "0"}
    (tmp_path / cluster.TICKET).write_text(json.dumps(old))
    host = Host(tmp_path)
    with lead(tmp_path):
        pass
    assert host.end() is None


def test_whoever_connects_and_says_nothing_keeps_no_host_out(tmp_path, quick):
    joined = []

    def connect_then_join():
        while not (tmp_path / cluster.TICKET).exists():
            time.sleep(0.01)
        port = json.loads((tmp_path / cluster.TICKET).read_text())["port"]
        joined.append(socket.create_connection(("127.0.0.1", port)))
        joined.append(Host(tmp_path))

    late = threading.Thread(target=connect_then_join)
    late.start()
    with lead(tmp_path):
        late.join()
    silent, host = joined
    assert host.end() is None
    silent.close()


def test_a_host_leaves_a_program_that_took_an_earlier_leaders_port_and_says_nothing(
    tmp_path, quick, monkeypatch
):
    monkeypatch.setattr(cluster, "PROVES_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        old = {"address": "127.0.0.1", "port": other.getsockname()[1], "token": "0"}
        (tmp_path / cluster.TICKET).write_text(json.dumps(old))
        host = Host(tmp_path)
        with other.accept()[0], lead(tmp_path):
            pass
        assert host.end() is None


def test_ranks_that_cannot_be_shared_out_are_refused_before_anything_runs(toy):
    place = Placement(2, 0, "127.0.0.1")
    with pytest.raises(ConfigError, match=r"rlvr: learner.processes=3 is not a multiple of the 2 hosts"):
        toy.run(
            "rlvr.learner.processes=3", "rlvr.rollout.prompts_per_batch=3", "rlvr.mini_batch=6", place=place
        )
    with pytest.raises(ConfigError, match="2 hosts, but every stage has one rank"):
        toy.run(place=place)
    assert toy.calls() == []
