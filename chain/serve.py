"""One checkpoint outside a chain: scored on a recipe's held-out sets, or served until interrupted."""

from __future__ import annotations

import contextlib
import socket
import time
from pathlib import Path
from typing import Any

from chain import run as runner
from chain.checks import check_rows
from chain.context import Context
from chain.display import Display
from chain.evaluate import evaluate
from chain.inputs import locate_sets
from chain.pool import TOKEN_FILE, OpenPool, Pool
from chain.recipe import Recipe
from chain.report import data as report
from core.checkpoint.check import check_checkpoint
from core.files import read_json, write_json
from core.strict import ConfigError
from rl.rollout.access import TOKEN
from rl.rollout.config import MODEL_NAME, PoolConfig

ADAPTER_NAME = "adapter"
"""Name of the served model that is the checkpoint with a LoRA adapter applied."""


def evaluate_checkpoint(
    recipe: Recipe,
    model: str | Path,
    out: str | Path,
    *,
    runs_dir: str | Path = "runs",
    open_pool: OpenPool | None = None,
) -> dict[str, dict[str, Any]]:
    """Score the checkpoint folder `model` on the recipe's held-out sets; eval.json and the samples go to `out`.

    The recipe's own sets are generated first if they do not exist. Raises ConfigError if the recipe has no `eval`.
    """
    cfg = recipe.eval
    if cfg is None:
        raise ConfigError(f"recipe {recipe.name} has no eval, which names the held-out sets; add it")
    model, out, runs_dir = Path(model), Path(out), Path(runs_dir)
    require_checkpoint(model)
    display = Display()
    runner.data(recipe, runs_dir=runs_dir, display=display)
    out.mkdir(parents=True, exist_ok=True)
    run_dir = (runs_dir / recipe.name).resolve()
    sets = locate_sets(recipe, run_dir)
    check_rows(recipe, sets, model.resolve(), run_dir, display.line, only="eval")
    with Pool(recipe.servers, out / "logs", open_pool) as pool, display.step("evaluation"):
        context = Context(
            recipe=recipe,
            stage="eval",
            config=cfg,
            model=model.resolve(),
            out=out,
            sets=sets,
            folders={},
            pool=pool,
            progress=display.passing,
        )
        scores = evaluate(context)
    places = {name: sets[one.set] for name, one in cfg.sets.items()}
    write_json(out / "eval.json", {"model": str(model.resolve()), "scores": scores, "sets": places})
    display.line(report.scores_text(scores))
    display.line(f"samples and scores: {out}")
    return scores


def serve(
    recipe: Recipe,
    model: Path,
    runs_dir: Path = Path("runs"),
    host: str | None = None,
    port: int | None = None,
    adapter: Path | None = None,
) -> None:
    """Start the recipe's rollout servers on a checkpoint, print their URLs, and keep them running until interrupted.

    The servers start here even if the recipe names `servers.urls`. `host` and `port` override the recipe's
    `servers.host` and `servers.first_port`. With a LoRA `adapter`, the servers also serve a model named `adapter`: the
    checkpoint with the adapter applied. Raises ServerFailed when the servers have ended too often.
    """
    require_checkpoint(model)
    if recipe.servers is None:
        raise ConfigError(f"recipe {recipe.name} has no servers, which says how servers are started; add it")
    own = {"urls": (), "host": host or recipe.servers.host, "first_port": port or recipe.servers.first_port}
    cfg = recipe.servers.model_copy(update=own)
    display = Display()
    if adapter is not None:
        cfg = with_adapter(cfg, model, adapter)
    here = "-".join([socket.gethostname(), *([str(cfg.first_port)] if cfg.first_port else [])])
    run_dir = runs_dir / recipe.name
    token_file = cfg.token_file or str((run_dir / TOKEN_FILE).resolve())
    with Pool(cfg.model_copy(update={"token_file": token_file}), run_dir / "logs" / here) as pool:
        with display.step("starting"):
            pool.urls(model.resolve())
        urls = [url.replace("//0.0.0.0:", f"//{socket.gethostname()}:") for url in pool.urls(model)]
        for url in urls:
            display.line(url)
        if adapter is not None:
            display.line(
                f"models: {MODEL_NAME} is the checkpoint alone, {ADAPTER_NAME} has {adapter} applied"
            )
        if cfg.host == "0.0.0.0":
            display.line(
                "The token crosses the network unencrypted: let only this cluster reach these ports."
            )
        display.line(
            f"A request needs `Authorization: Bearer TOKEN`: {TOKEN} if that is set, else the content of {token_file}"
        )
        display.line(
            "Ctrl-C stops the servers. A recipe uses them with --set 'servers.urls=["
            + ", ".join(urls)
            + f"]' --set servers.token_file={token_file}"
        )
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(1)
                pool.urls(model)
    display.line("stopped")


def with_adapter(cfg: PoolConfig, model: Path, adapter: Path) -> PoolConfig:
    """The pool's configuration, extended to serve a LoRA adapter of `model` as a second model.

    Raises ConfigError if no vLLM server is started, and AdapterError for an adapter that vLLM cannot serve.
    """
    from core.checkpoint.adapters import MERGE, check_servable, vllm_arguments

    if cfg.urls or cfg.engine != "vllm":
        why = "servers.urls names running servers" if cfg.urls else f"servers.engine={cfg.engine}"
        raise ConfigError(
            f"--adapter: {why}, but only vLLM servers that we start take an adapter; merge it: {MERGE} {adapter} DST"
        )
    arguments = vllm_arguments(check_servable(adapter, model, cfg.device), ADAPTER_NAME)
    return cfg.model_copy(update={"extra_args": (*cfg.extra_args, *arguments)})


def require_checkpoint(model: Path) -> None:
    """Raise ConfigError, or LayoutError of the check, unless the folder holds a native core that may be loaded."""
    if not (model / "config.json").is_file():
        raise ConfigError(f"{model}: this is not a checkpoint folder: config.json is missing")
    kind = read_json(model / "config.json").get("model_type")
    if kind != "sailvl2":
        raise ConfigError(
            f"{model}: this is a stage's folder; name {model / 'checkpoint'}"
            if (model / "checkpoint").is_dir()
            else f"{model}: model_type={kind!r}, but a core has sailvl2; convert it with `posttrain core import`"
        )
    check_checkpoint(model)
