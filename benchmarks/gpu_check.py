"""Proves on one GPU, within ten minutes and without a network, what a CPU cannot show: `make gpu-check`.

    PYTHONPATH=. python -P -m benchmarks.gpu_check [--out gpu-check.json] [--only kernels learner ...]

Every check prints lines of claim, measured value, bound and verdict, and writes them to a JSON file. A check runs in a
process of its own, so that a crash or a timeout costs one check. What cannot run is listed as "not run" with the
reason: vLLM is missing, DeepSpeed is missing (plain PyTorch takes its place), a second GPU is missing, the time is up.

`--device cpu` runs the same checks on tiny cores, to test this script; speeds and peaks are then not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import show
from core.files import write_json

TOTAL_S = 600.0
"""Seconds for all checks."""
LIMITS_S = {
    "kernels": 90,
    "rounding": 90,
    "learner": 180,
    "lora": 120,
    "packing": 180,
    "chain": 240,
    "engine": 240,
}
"""Check -> most seconds, in the order in which the checks run."""
NOT_RUN = "not run"
LEAST_TORCH = (2, 11)


@dataclass(frozen=True)
class Line:
    """One claim and its proof."""

    check: str
    claim: str
    measured: float | str
    bound: str
    verdict: str
    """pass, FAIL, or "not run" with the reason."""


class Lines:
    """The lines of one check.

    Args:
        check: the check's name.
        compares: whether bounds apply that only a GPU can meet (speed, peak).
    """

    def __init__(self, check: str, compares: bool) -> None:
        self.check, self.compares, self.lines = check, compares, list[Line]()

    def at_most(self, claim: str, measured: float, bound: float, *, on_gpu: bool = False) -> None:
        """`measured` must not exceed `bound`; `on_gpu`: the bound is for a GPU only."""
        self._add(claim, measured, f"<= {bound:.4g}", measured <= bound, on_gpu)

    def at_least(self, claim: str, measured: float, bound: float, *, on_gpu: bool = False) -> None:
        """`measured` must reach `bound`."""
        self._add(claim, measured, f">= {bound:.4g}", measured >= bound, on_gpu)

    def skip(self, claim: str, why: str) -> None:
        """A claim that this machine cannot prove."""
        self.lines.append(Line(self.check, claim, "", "", f"{NOT_RUN}: {why}"))

    def note(self, claim: str, measured: float | str) -> None:
        """A figure without a bound."""
        self.lines.append(Line(self.check, claim, measured, "", "measured"))

    def _add(self, claim: str, measured: float, bound: str, holds: bool, on_gpu: bool) -> None:
        verdict = "pass" if holds else "FAIL"  # NaN fails
        if on_gpu and not self.compares:
            verdict = f"{NOT_RUN}: the bound is a GPU's"
        self.lines.append(Line(self.check, claim, float(measured), bound, verdict))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; returns 1 if a claim failed or a check crashed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("gpu-check.json"), help="the lines as JSON")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS_S), default=list(LIMITS_S))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--check", choices=list(LIMITS_S), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.check:
        _one(options.check, options.device, options.out)
        return 0
    problem = _machine_problem(options.device)
    if problem:
        print(f"gpu-check: {problem}", file=sys.stderr)
        return 1
    started, lines = time.monotonic(), list[Line]()
    for check in [name for name in LIMITS_S if name in options.only]:
        left = TOTAL_S - (time.monotonic() - started)
        found = _in_child(check, options.device, min(left, LIMITS_S[check]))
        lines += found
        for line in found:
            shown = f"{line.measured:.4g}" if isinstance(line.measured, float) else line.measured
            print(f"{line.check}: {line.claim}: {shown} {line.bound} {line.verdict}", flush=True)
    columns = ("check", "claim", "measured", "bound", "verdict")
    show("gpu-check", columns, [[getattr(line, column) for column in columns] for line in lines])
    seconds = time.monotonic() - started
    write_json(options.out, {**_machine(), "seconds": seconds, "lines": [asdict(line) for line in lines]})
    failed = sum(line.verdict.startswith(("FAIL", "crashed")) for line in lines)
    missing = sum(line.verdict.startswith(NOT_RUN) for line in lines)
    print(
        f"{len(lines)} lines, {failed} failed, {missing} not run, {seconds:.0f} s; written to {options.out}"
    )
    return 1 if failed else 0


def _machine_problem(device: str) -> str | None:
    """The reason why no check can run here; None if checks can run."""
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < LEAST_TORCH:
        return f"torch {torch.__version__}: the checks need 2.11 or later; install a newer torch"
    if device == "cuda" and not torch.cuda.is_available():
        return "no GPU: torch.cuda.is_available() is false; run it where a GPU is, or test the script with --device cpu"
    return None


def _machine() -> dict[str, Any]:
    """The versions and the GPU behind the figures."""
    import torch
    import transformers
    import trl

    from core.manifest import git_commit

    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "gpus": torch.cuda.device_count(),
        "python": platform.python_version(),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "commit": git_commit(),
    }


def _in_child(check: str, device: str, limit_s: float) -> list[Line]:
    """The lines of a check, from a process of its own; one line that says why if it gave none."""
    if limit_s < 5:
        return [Line(check, "the check", "", "", f"{NOT_RUN}: {TOTAL_S:.0f} s are used up")]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "lines.json"
        command = [sys.executable, "-P", "-m", "benchmarks.gpu_check", "--check", check]
        try:
            done = subprocess.run(
                [*command, "--device", device, "--out", str(out)],
                env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1", "WANDB_MODE": "disabled"},
                capture_output=True,
                text=True,
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return [Line(check, "the check", "", "", f"{NOT_RUN}: it took more than {limit_s:.0f} s")]
        if done.returncode:
            return [
                Line(check, "the check", done.stderr[-1500:], "", f"crashed with status {done.returncode}")
            ]
        return [Line(**line) for line in json.loads(out.read_text(encoding="utf-8"))]


def _one(check: str, device: str, out: Path) -> None:
    """In the child: run one check and write its lines."""
    from benchmarks import gpu_claims
    from benchmarks.realsize import quiet

    quiet()
    lines = Lines(check, compares=device == "cuda")
    getattr(gpu_claims, check)(lines, device == "cpu")
    write_json(out, [asdict(line) for line in lines.lines])


if __name__ == "__main__":
    sys.exit(main())
