"""`posttrain core ...`: converts, creates and merges checkpoints of the core. The logic is in core/."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chain.cli.options import above_0, command


def add(commands: Any) -> None:
    """Add the group `core` to the command line."""
    group = command(commands, "core", None, "import, export, create and merge checkpoints")
    core = group.add_subparsers(metavar="COMMAND", required=True, help="what to do with a checkpoint")
    _add_import(core)
    _add_export(core)
    _add_new(core)
    _add_merge(core)


def _add_import(core: Any) -> None:
    into = command(core, "import", _import, "turn a released SAIL-VL2 checkpoint into a native core")
    into.add_argument(
        "src", type=Path, metavar="SRC", help="folder with a release: config.json, *.safetensors"
    )
    into.add_argument("dst", type=Path, metavar="DST", help="folder to write; must not exist")
    into.add_argument(
        "--any-resolution",
        action="store_true",
        help="an AnyRes model: images keep their size (up to 1792 px per side) and are not cut into tiles",
    )
    into.add_argument(
        "--allow-nonfinite",
        action="store_true",
        help="import tensors with NaN or infinity unchanged; stages and servers refuse such a core",
    )
    _shard_option(into)


def _add_export(core: Any) -> None:
    back = command(core, "export", _export, "turn a native core into the released layout")
    back.add_argument("src", type=Path, metavar="SRC", help="native checkpoint folder")
    back.add_argument("dst", type=Path, metavar="DST", help="folder to write; must not exist")
    back.add_argument(
        "--like",
        type=Path,
        metavar="FOLDER",
        help="the release (or its import) from which the export takes code, tokenizer and other files; "
        "default: the files that SRC carries",
    )
    _shard_option(back)


def _add_new(core: Any) -> None:
    from core.model.sizes import SIZES

    new = command(core, "new", _new, "make a core of a given size with random weights")
    new.add_argument("dst", type=Path, metavar="DST", help="folder to write; must not exist")
    new.add_argument(
        "--size",
        required=True,
        choices=SIZES,
        help="tiny and mid are for CPUs; the others are SAIL-VL2's sizes",
    )
    new.add_argument("--seed", type=int, default=0, help="seed of the weights; default: %(default)s")
    new.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32 for tiny and mid, else bfloat16"
    )
    new.add_argument(
        "--layout", choices=("native", "released"), default="native", help="default: %(default)s"
    )
    new.add_argument(
        "--words", metavar="A,B,...", help="vocabulary of its word-level tokenizer; default: a dozen words"
    )
    new.add_argument("--plan-only", action="store_true", help="show parameters and disk; write nothing")
    _shard_option(new)


def _add_merge(core: Any) -> None:
    merge = command(core, "merge", _merge, "merge a LoRA adapter into its core")
    merge.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder with adapter_config.json")
    merge.add_argument("dst", type=Path, metavar="DST", help="folder to write; must not exist")
    merge.add_argument(
        "--core",
        type=Path,
        help="the core that the adapter was trained on; default: the core that the adapter names",
    )
    _shard_option(merge)


def _shard_option(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "--shard-gb",
        type=above_0,
        default=2.0,
        metavar="GB",
        help="largest size of a weight file; it bounds the memory needed; default: %(default)s",
    )


def _import(options: argparse.Namespace) -> None:
    from core.checkpoint.released import import_released
    from core.console import new_console

    console = new_console()
    with _progress(console) as progress:
        report = import_released(
            options.src,
            options.dst,
            any_resolution=options.any_resolution,
            allow_nonfinite=options.allow_nonfinite,
            max_shard_bytes=int(options.shard_gb * 1e9),
            progress=progress,
        )
    console.print(report.text(), markup=False, soft_wrap=True)


def _export(options: argparse.Namespace) -> None:
    from core.checkpoint.released import export_released
    from core.console import new_console

    console = new_console()
    with _progress(console) as progress:
        report = export_released(
            options.src,
            options.dst,
            like=options.like,
            max_shard_bytes=int(options.shard_gb * 1e9),
            progress=progress,
        )
    console.print(report.text(), markup=False, soft_wrap=True)


def _new(options: argparse.Namespace) -> None:
    from chain.cli.core_tables import disk_text, parameter_table, tokenizer_text
    from core.checkpoint.new import new_core, plan_core
    from core.console import new_console
    from core.model.sizes import WORDS

    console = new_console()
    words = options.words.split(",") if options.words else WORDS
    plan = plan_core(options.size, options.dst, words=words, dtype=options.dtype, layout=options.layout)
    console.print(parameter_table(plan))
    for line in (disk_text(plan), tokenizer_text(plan)):
        console.print(line, markup=False, soft_wrap=True)
    if options.plan_only:
        return
    with _progress(console) as progress:
        new_core(
            plan,
            options.dst,
            seed=options.seed,
            max_shard_bytes=int(options.shard_gb * 1e9),
            progress=progress,
        )
    console.print(f"core: {options.dst} ({options.layout} layout)", markup=False, soft_wrap=True)


def _merge(options: argparse.Namespace) -> None:
    from core.checkpoint.merge import merge_adapter
    from core.console import new_console

    console = new_console()
    with _progress(console) as progress:
        merged = merge_adapter(
            options.adapter,
            options.dst,
            core=options.core,
            max_shard_bytes=int(options.shard_gb * 1e9),
            progress=progress,
        )
    console.print(merged.text(), markup=False, soft_wrap=True)
    console.print(f"core: {options.dst}", markup=False, soft_wrap=True)


@contextmanager
def _progress(console: Any) -> Iterator[Callable[[str, int, int], None]]:
    """Yields `show(work, done, total)`, which draws one progress bar per piece of work; sizes in bytes."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(work: str, done: int, total: int) -> None:
            if work not in tasks:
                tasks[work] = bars.add_task(work, total=total)
            bars.update(tasks[work], completed=done)

        yield show
