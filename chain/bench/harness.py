"""lmms-eval in its own virtual environment: one process per benchmark and mode, configured by files."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from chain.bench.relay import REPLIES, Relay
from chain.bench.suite import MEAN, Benchmark
from core import processes
from core.files import read_json, read_jsonl, write_text
from core.processes import inherited_environment
from core.strict import ConfigError
from rl.rollout import access

VERSION = "0.7.3"
DEFAULT = Path(".venv-bench/bin/python")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_LOCATE = (
    "import importlib.metadata as m, importlib.util as u; "
    "print(m.version('lmms-eval')); print(u.find_spec('lmms_eval').origin)"
)


VIDEO = '''\
"""Messages of a video task: the video's file by name, for the relay; posttrain has written this file."""

import os

from lmms_eval.utils import load_yaml_config

BASE = load_yaml_config(yaml_path={base!r})


def messages(doc, lmms_eval_specific_kwargs=None):
    videos = [os.environ["POSTTRAIN_VIDEO"] + file for file in BASE["doc_to_visual"](doc)]
    text = BASE["doc_to_text"](doc, lmms_eval_specific_kwargs)
    content = [{{"type": "text", "text": part}} for part in (*videos, text)]
    return [{{"role": "user", "content": content}}]
'''


class HarnessFailed(RuntimeError):
    """The harness ended without a score; the message has the last line of its error."""


@dataclass(frozen=True)
class Harness:
    """An installed lmms-eval."""

    python: Path
    version: str
    tasks: Path
    """The package's folder of tasks."""

    @classmethod
    def at(cls, python: Path) -> Harness:
        """The harness of a virtual environment. Raises ConfigError if it is missing."""
        remedy = "build it with `make bench-setup`, or name its Python with --harness"
        if not python.exists():
            raise ConfigError(f"{python}: there is no lmms-eval; {remedy}")
        done = subprocess.run([str(python), "-P", "-c", _LOCATE], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"{python}: no lmms-eval in this environment; {remedy}")
        version, origin = done.stdout.split("\n")[:2]
        if version != VERSION:
            raise ConfigError(
                f"{python}: lmms-eval {version}, but the suites are written for {VERSION}; {remedy}"
            )
        return cls(python, version, Path(origin).parent / "tasks")

    def write_task(self, benchmark: Benchmark, name: str, data: str | None, folder: Path) -> None:
        """Write the task `posttrain_<name>` to `folder`: the harness's own file with our changes."""
        assert benchmark.yaml
        base = self.tasks / benchmark.yaml
        if not base.is_file():
            raise ConfigError(f"{benchmark.yaml}: lmms-eval {self.version} has no such task file")
        changes = {"task": f"posttrain_{name}", **benchmark.changes}
        if data:
            changes |= {"dataset_path": data, "dataset_name": None, "dataset_kwargs": None}
        lines = ""
        if benchmark.frames:
            if data:  # a folder of tables and videos: `datasets` would load the videos
                tables = sorted(map(str, Path(data).rglob("*.parquet")))
                changes |= {"dataset_path": "parquet", "dataset_kwargs": {"data_files": {"test": tables}}}
                changes["test_split"] = "test"
            write_text(folder / "video.py", VIDEO.format(base=str(base)))
            lines = "doc_to_messages: !function video.messages\n"
        text = yaml.safe_dump({"include": str(base), **changes}, sort_keys=False)
        write_text(folder / f"posttrain_{name}.yaml", text + lines)

    def run(
        self,
        task: str,
        folder: Path,
        relay: Relay,
        include: Sequence[Path],
        limit: int | None,
        concurrency: int,
        videos: Path | None = None,
    ) -> dict[str, Any]:
        """Run one task; return the harness's results. Raises HarnessFailed.

        `videos` is a local copy of a data set of videos, in the place of the harness's cache.
        """
        out = folder / "harness"
        shutil.rmtree(out, ignore_errors=True)
        model = (
            f"model=policy,base_url={relay.url('policy')},num_cpus={concurrency},max_retries=3,timeout=3600"
        )
        command = [
            str(self.python),
            "-P",
            "-m",
            "lmms_eval",
            "--model",
            "async_openai",
            "--model_args",
            model,
        ]
        command += ["--tasks", task, "--batch_size", "1", "--output_path", str(out), "--log_samples"]
        for place in include:
            command += ["--include_path", str(place)]
        if limit:
            command += ["--limit", str(limit)]
        command += ["--seed", str(relay.seed)]
        environment = _environment(relay, folder, videos)
        log = folder / "log.txt"
        log.unlink(missing_ok=True)
        process = processes.start(command, log=log, environment=environment, folder=folder)
        try:
            code = process.wait()
        finally:
            processes.stop(process)
        # A task may write a submission file of its own, which has the same ending.
        found = [read_json(file) for file in sorted(out.rglob("*_results.json"))]
        results = [one for one in found if isinstance(one, dict) and "results" in one]
        if code or not results:
            raise HarnessFailed(f"lmms-eval ended with code {code}: {_last_words(folder / 'log.txt')}")
        return results[-1]


def _environment(relay: Relay, folder: Path, videos: Path | None) -> dict[str, str]:
    """The harness's environment: the relay in place of OpenAI, without the servers' token and the judge's key."""
    secret = {relay.judge.key} - {""} if relay.judge else set()
    inherited = {
        name: value
        for name, value in inherited_environment().items()
        # Our packages are not for the harness: an installed project's folder holds clashing versions of its libraries.
        if name not in ("PYTHONPATH", access.TOKEN) and value not in secret
    }
    own = {
        "OPENAI_API_KEY": relay.token,
        "OPENAI_API_URL": relay.url("judge"),
        "API_TYPE": "openai",
        "MODEL_VERSION": relay.judge.model if relay.judge else "none",
        "LMMS_IMAGE_ENCODE_FORMAT": "PNG",
        "POSTTRAIN_VIDEO": relay.video,
        "WANDB_MODE": "disabled",
        "NO_PROXY": "127.0.0.1",
    }
    if videos:
        own |= {"HF_HOME": str(videos), "HF_DATASETS_CACHE": str(folder / "datasets")}
    return {"HF_HOME": str(Path("~/.cache/huggingface").expanduser()), **inherited, **own}


def outcome(
    benchmark: Benchmark, task: str, folder: Path, results: Mapping[str, Any], relay: Relay
) -> dict[str, Any]:
    """The entry of bench.json of a finished task. Raises HarnessFailed if a request had no answer."""
    for role, failed in relay.failures.items():
        if failed:
            raise HarnessFailed(
                f"{len(failed)} requests to the {role} failed, the first: {next(iter(failed.values()))}"
            )
    own = results["results"][task]
    (file,) = (folder / "harness").rglob(f"*_samples_{task}.jsonl")
    samples = _samples(benchmark, read_jsonl(file), folder)
    if benchmark.metric == MEAN:
        value = sum(sample["score"] for sample in samples) / len(samples)
    else:
        value = next((own[key] for key in own if key.partition(",")[0] == benchmark.metric), None)
    if value is None or value == "":  # MathVista's aggregation returns None for 0 right answers
        value = 0.0 if not any(sample["score"] for sample in samples) else None
    if not isinstance(value, int | float):
        raise HarnessFailed(f"metric {benchmark.metric!r} has no number: {own!r:.200}")
    prompts = hashlib.sha256(json.dumps([sample["prompt"] for sample in samples]).encode()).hexdigest()
    return {
        "score": value * benchmark.scale,
        "metric": benchmark.metric,
        "n": len(samples),
        "task_version": results.get("versions", {}).get(task),
        "prompts_sha256": prompts,
        "source": benchmark.source,
        "samples": samples,
    }


def _samples(benchmark: Benchmark, logged: Sequence[Mapping[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """The harness's samples with the relay's record of each: completion, tokens, pictures.

    The relay puts the number of its record in a reply's `usage.prompt_tokens`, which the harness logs.
    """
    replies = {line["number"]: line for line in read_jsonl(folder / REPLIES)}
    found = []
    for sample in sorted(logged, key=lambda one: one["doc_id"]):
        counts = (sample.get("token_counts") or [None])[0]
        if counts is None or counts["input_tokens"] not in replies:
            raise HarnessFailed(f"sample {sample['doc_id']}: the harness's log names no reply of the relay")
        reply = replies[counts["input_tokens"]]
        found.append(
            {
                "id": sample["doc_id"],
                "prompt": reply["text"],
                "completion": reply["completion"],
                "extracted": _first(sample["filtered_resps"]),
                "gold": sample["target"],
                "score": _score(sample, benchmark.score),
                "tokens": reply["tokens"],
                "truncated": reply["truncated"],
                "pictures": [f"{folder.name}/{name}" for name in reply["pictures"]],
            }
        )
    return found


def _first(value: Any) -> str:
    while isinstance(value, list) and value:
        value = value[0]
    return str(value)


def _score(sample: Mapping[str, Any], path: str) -> float:
    left, equals, right = path.partition(" = ")
    value = _at(sample, left)
    if not equals:
        return float(value)
    given, gold = value if isinstance(value, list) else [value], _at(sample, right)
    return float(any(_plain_value(one) == _plain_value(gold) for one in given))


def _plain_value(value: Any) -> Any:
    """A value for comparison: a number, else text without case."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value).strip().casefold()


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value[int(part)] if part.isdigit() and isinstance(value, list) else value[part]
    return value


def _last_words(log: Path) -> str:
    lines = [
        line.strip() for line in _COLOUR.sub("", log.read_text(errors="replace")).splitlines() if line.strip()
    ]
    errors = [line for line in lines if "Error" in line or "error" in line]
    return f"{(errors or lines or ['no output'])[-1]:.400} (log: {log})"
