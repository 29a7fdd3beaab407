"""The child process of one stage: `python -P -m chain.worker job.json`.

A job is what a stage needs and nothing else:

    stage, kind     its name, and what runs it: core, data, sft, soup, rl, or `package.module:function(job)`
    config          its resolved configuration
    model           checkpoint folder it starts from, or null
    out             folder to fill (checkpoint/, metrics.jsonl, ...)
    seed            the chain's seed
    sets            data set name -> Parquet file, folder or hub id
    urls, pool      rollout servers, and their configuration (RL; the soup scores its ingredients there)
    weights         folder for weights on their way to these servers (RL)
    folders         where users' own reward modules are looked for, after all that is installed (RL)
    recipe, stages  the whole resolved recipe, and the folder of every stage before this one (soup)
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from core.files import read_json
from core.strict import ConfigError, parse

Job = Mapping[str, Any]


def main(arguments: list[str]) -> int:
    """Run the job in the file that the only argument names; returns 0."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)  # chain.launch asks a hung rank where it is
    job = read_json(Path(arguments[0]))
    work = KINDS.get(job["kind"]) or load(job["kind"])
    work(job)
    return 0


def load(import_string: str) -> Callable[..., Any]:
    """The object a `package.module:name` names. Raises ConfigError naming what is missing, and the remedy."""
    module_name, _, attribute = import_string.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{import_string}: {error}. The working directory is not searched: install the package "
            "(pip install -e .) or put its folder on PYTHONPATH"
        ) from error
    if not hasattr(module, attribute):
        raise ConfigError(f"{import_string}: module {module_name} has no {attribute!r}")
    return getattr(module, attribute)


def _data(job: Job) -> None:
    config = job["config"]
    load(config["by"])(Path(job["out"]), seed=job["seed"], **config["params"])


def _core(job: Job) -> None:
    config, checkpoint = job["config"], Path(job["out"]) / "checkpoint"
    if config["path"] is not None:
        # A link, not a copy: a released core is gigabytes, and no stage writes to the one it starts from.
        checkpoint.symlink_to(Path(config["path"]).resolve())
        return
    load(config["build"])(checkpoint, seed=job["seed"], **config["params"])


def keep_engine_out() -> None:
    """Make `import vllm` fail in this process.

    TRL imports it wherever it is installed: three CPU-seconds, and vLLM changes classes of transformers that we are
    about to train with.
    """
    sys.modules.setdefault("vllm", None)  # type: ignore[arg-type]


def _sft(job: Job) -> None:
    keep_engine_out()
    from chain.recipe import SFTStage
    from sft.train import train

    config = parse(SFTStage, job["config"], job["stage"])
    train(config, model=Path(job["model"]), out=Path(job["out"]), seed=job["seed"], sets=_sets(job))


def _soup(job: Job) -> None:
    keep_engine_out()
    from chain.soup import cook

    cook(job)


def _rl(job: Job) -> None:
    from rl.config import RLConfig
    from rl.rollout.config import PoolConfig

    pool = parse(PoolConfig, job["pool"], "rollout")
    if pool.weights != "nccl":  # vLLM's own communicator sends those
        keep_engine_out()
    # One cache of the judges' replies for the whole run: a stage that starts again pays for nothing twice.
    os.environ.setdefault("POSTTRAIN_JUDGE_CACHE", str(Path(job["out"]).parent / "judge.sqlite3"))
    from rl.train import train

    train(
        parse(RLConfig, job["config"], job["stage"]),
        model=Path(job["model"]),
        out=Path(job["out"]),
        seed=job["seed"],
        sets=_sets(job),
        pool=pool,
        urls=job["urls"],
        weights=Path(job["weights"]),
        folders=[Path(folder) for folder in job["folders"]],
    )


KINDS: dict[str, Callable[[Job], None]] = {
    "data": _data,
    "core": _core,
    "sft": _sft,
    "soup": _soup,
    "rl": _rl,
}


def _sets(job: Job) -> dict[str, Path]:
    return {name: Path(place) for name, place in job["sets"].items()}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
