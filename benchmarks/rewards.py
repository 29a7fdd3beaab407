r"""Speed and safety of answer verification: our service, math-verify in a process pool, and TRL's reward.

    python -P -m benchmarks.rewards [--quick] [--step-seconds S]

All three systems verify the same pairs in alternating order. Each repetition has new pairs, and the result is the
median. Before timing, our verdicts are compared with the expected verdicts, and one round warms up all systems.
math-verify and TRL use their own timeouts, on the main thread of a process, where their alarms work.
Prints a table and, as the last line, one JSON object.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, wait
from typing import Any

from benchmarks.math_pairs import HOSTILE, Pair, distinct, groups
from rewards.answers.checker import MathChecker
from rewards.answers.outcome import Outcome

WORKERS = 2
CHUNK = 16
"""Pairs in one message to a process pool."""


def math_verify_grade(pairs: list[Pair]) -> list[bool]:
    """Whether each pair is equal, called as in math-verify's README."""
    from math_verify import parse, verify

    return [verify(parse(f"${gold}$"), parse(f"${prediction}$")) for gold, prediction, _ in pairs]


def trl_grade(pairs: list[Pair]) -> list[bool]:
    """Whether each pair is equal by TRL's accuracy_reward."""
    from trl.rewards import accuracy_reward

    completions = [[{"role": "assistant", "content": rf"\boxed{{{pair.prediction}}}"}] for pair in pairs]
    return [score == 1 for score in accuracy_reward(completions, [f"${pair.gold}$" for pair in pairs])]


class Service:
    """Our pool of workers."""

    def __init__(self) -> None:
        self.checker = MathChecker(workers=WORKERS)

    def grade(self, pairs: list[Pair]) -> list[bool]:
        outcomes = self.checker.compare_many([pair[:2] for pair in pairs])
        return [outcome == Outcome.EQUAL for outcome in outcomes]

    def close(self) -> None:
        self.checker.close()


class Stock:
    """Another library's verifier in a process pool."""

    def __init__(self, verifier: Callable[[list[Pair]], list[bool]], processes: int) -> None:
        self._verifier = verifier
        self._pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))

    def grade(self, pairs: list[Pair]) -> list[bool]:
        chunks = [pairs[at : at + CHUNK] for at in range(0, len(pairs), CHUNK)]
        return [equal for graded in self._pool.map(self._verifier, chunks) for equal in graded]

    def done_within(self, pairs: list[Pair], seconds: float) -> int:
        """Number of pairs, sent one by one, that are graded in time. Ends the processes afterwards."""
        jobs = [self._pool.submit(self._verifier, [pair]) for pair in pairs]
        done = sum(job.exception() is None for job in wait(jobs, seconds).done)
        for process in list(self._pool._processes.values()):
            process.kill()  # a running job cannot be stopped in another way
        self.close()
        return done

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def hostile_mix(seed: int, each: int) -> list[Pair]:
    """Honest pairs mixed with every hostile prediction."""
    pairs = distinct(seed, each)
    for place, prediction in enumerate(HOSTILE):
        pairs.insert(place * len(pairs) // len(HOSTILE), Pair("3x", prediction, False))
    return pairs


def timed(grade: Callable[[list[Pair]], Any], pairs: list[Pair]) -> float:
    """Pairs per second."""
    start = time.perf_counter()
    grade(pairs)
    return len(pairs) / (time.perf_counter() - start)


def rates(
    systems: dict[str, Service | Stock], draw: Callable[[int, int], list[Pair]], each: int, repetitions: int
) -> dict[str, float]:
    """Median pairs per second of each system."""
    found: dict[str, list[float]] = {name: [] for name in systems}
    for repetition in range(repetitions):
        pairs = draw(100 + repetition, each)
        order = list(systems) if repetition % 2 else list(reversed(systems))
        for name in order:
            found[name].append(timed(systems[name].grade, pairs))
    return {name: round(statistics.median(values), 1) for name, values in found.items()}


def latencies(checker: MathChecker, pairs: list[Pair]) -> list[float]:
    """Seconds of each single call. The checker keeps a spare worker, so that calls do not wait for a fork."""

    def call(pair: Pair) -> float:
        start = time.perf_counter()
        checker.compare(pair.gold, pair.prediction)
        return time.perf_counter() - start

    with ThreadPoolExecutor(WORKERS) as threads:
        return list(threads.map(call, pairs))


STEP_COMPLETIONS = 2048
"""Rollouts of a step (report: RLVR, 2,048 rollouts per episode)."""


def step_share(step_seconds: float) -> dict[str, float]:
    """Seconds to grade the completions of one real step, and the share of these seconds in `step_seconds`."""
    service = Service()
    pairs = groups(7, 2)
    service.grade(pairs[: len(pairs) // 2])  # starts the workers
    seconds = STEP_COMPLETIONS / timed(service.grade, pairs[len(pairs) // 2 :])
    service.close()
    return {"step_s": step_seconds, "grading_s": round(seconds, 2), "share": round(seconds / step_seconds, 4)}


def disagreements(grade: Callable[[list[Pair]], list[bool]], pairs: list[Pair]) -> list[Pair]:
    """Pairs whose verdict differs from the expected verdict."""
    return [pair for pair, equal in zip(pairs, grade(pairs), strict=True) if equal != pair.equal]


def measure(quick: bool, step_seconds: float) -> dict[str, Any]:
    """Run all measurements; return the results to print."""
    each, repetitions = (2, 3) if quick else (8, 5)
    service = Service()
    systems: dict[str, Service | Stock] = {
        "ours": service,
        "math_verify_pool": Stock(math_verify_grade, WORKERS),
        "trl_accuracy_reward": Stock(trl_grade, 1),
    }
    checked = distinct(1, each) + groups(1, 1)
    wrong = disagreements(service.grade, checked)
    if wrong:
        raise SystemExit(f"{len(wrong)} of our verdicts differ from the expected verdicts: {wrong}")
    result: dict[str, Any] = {
        "bench": "rewards",
        "quick": quick,
        "cores": len(os.sched_getaffinity(0)),
        "workers": WORKERS,
        "load": round(os.getloadavg()[0], 1),
        "pairs": len(checked),
        "repetitions": repetitions,
        "unexpected": {name: len(disagreements(system.grade, checked)) for name, system in systems.items()},
        "distinct_per_s": rates(systems, distinct, each, repetitions),
        "groups_of_eight_per_s": rates(systems, groups, 2 * each, repetitions),
    }
    for system in systems.values():
        system.close()

    mix, limit_s = hostile_mix(2, 1 if quick else 4), 4.0 if quick else 30.0
    checker = MathChecker(workers=WORKERS + 1)
    # Starts the processes: only a worker detects that these pairs differ.
    checker.compare_many([(r"\sin^2 x", rf"{n}-\cos^2 x") for n in range(2, 20)])
    calls = sorted(latencies(checker, mix))
    honest = sorted(latencies(checker, distinct(3, each)))
    checker.close()
    result["step"] = step_share(step_seconds)
    result["hostile_mix"] = {
        "pairs": len(mix),
        "hostile": len(HOSTILE),
        "limit_s": limit_s,
        "done": {
            "ours": len(calls),
            "math_verify_pool": Stock(math_verify_grade, WORKERS).done_within(mix, limit_s),
            "trl_accuracy_reward": Stock(trl_grade, 1).done_within(mix, limit_s),
        },
        "worst_call_over_deadline_s": round(calls[-1] - checker.pool.deadline_s, 3),
    }
    result["latency_ms"] = {
        "p50": round(1000 * statistics.median(honest), 2),
        "p99": round(1000 * honest[int(0.99 * len(honest))], 2),
        "max": round(1000 * honest[-1], 2),
    }
    return result


def show(result: dict[str, Any]) -> None:
    """Print the table, then the JSON line."""
    from rich.console import Console
    from rich.table import Table

    latency, mix = result["latency_ms"], result["hostile_mix"]
    table = Table(
        title=f"Verifying answers on {result['cores']} cores (load {result['load']}), "
        f"medians of {result['repetitions']}",
        caption=f"ours, one call: p50 {latency['p50']} ms, p99 {latency['p99']} ms, max {latency['max']} ms; "
        f"worst hostile call {mix['worst_call_over_deadline_s']:+.3f} s over its deadline",
    )
    table.add_column("pairs per second")
    names = {"ours": "ours", "math_verify_pool": "math-verify, pool", "trl_accuracy_reward": "TRL accuracy"}
    for name in names.values():
        table.add_column(name, justify="right")
    rows = {"distinct pairs": "distinct_per_s", "groups of eight": "groups_of_eight_per_s"}
    for label, key in rows.items():
        table.add_row(label, *(f"{result[key][name]:,.0f}" for name in names))
    done = f"hostile mix, done in {mix['limit_s']:g} s"
    table.add_row(done, *(f"{mix['done'][name]} of {mix['pairs']}" for name in names))
    step = result["step"]
    row = f"grading {STEP_COMPLETIONS:,} completions, {step['grading_s']:g} s, of a step of {step['step_s']:g} s"
    table.add_row(row, f"{step['share']:.1%}", "", "")
    table.add_row("unexpected verdicts", *(str(result["unexpected"][name]) for name in names))
    Console().print(table)
    print(json.dumps(result), flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="take one minute instead of several")
    parser.add_argument(
        "--step-seconds",
        type=float,
        default=60.0,
        help="seconds of a whole RL step of 2,048 completions, from metrics.jsonl; the default is a fast step of ours",
    )
    arguments = parser.parse_args()
    show(measure(arguments.quick, arguments.step_seconds))


if __name__ == "__main__":
    main()
