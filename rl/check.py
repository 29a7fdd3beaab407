"""Tests a stage's rewards on the stage's own rows before training."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from rewards.adapters import check_columns
from rewards.judge.judges import Judge
from rewards.mix import Mixture
from rewards.selftest import self_test, thought_problem
from rl.data import Record, example_of

log = logging.getLogger(__name__)


class RewardsFail(RuntimeError):
    """The stage's rewards fail their self-test on its own rows."""


def check_rewards(
    mixture: Mixture, records: Sequence[Record], rows: int, seed: int, thought_open: bool = False
) -> None:
    """Refuse rewards that cannot be trained on.

    Every row needs a reward. Rewards of thinking rows must know whether the chat template opens the thought. A judge
    must resist its canaries. On a sample of `rows` rows, gold answers must score high and corrupted ones low
    (rewards.selftest). Raises ValueError, rewards.judge.canaries.JudgeRefused or RewardsFail.
    """
    examples = [example_of(record) for record in records]
    for example in examples:
        mixture.terms_of(example)
    for term in mixture.terms:
        if "think" in term.modes and (problem := thought_problem(term.reward, thought_open)):
            raise ValueError(f"reward {term.name}: {problem}")
        check_columns(term.reward, term.name, examples)
        if isinstance(term.reward, Judge) and term.reward.canaries:
            report = term.reward.check_canaries()
            if not report.complete:
                log.warning(
                    "reward %s: the judge could not be checked yet (%s); its rows stay unscored until it can be",
                    term.name,
                    report.unanswered,
                )
    failures = self_test(mixture, examples, rows=rows, seed=seed) if rows else []
    if failures:
        shown = "\n".join(f"  {failure}" for failure in failures[:5])
        raise RewardsFail(
            f"{len(failures)} failures in the rewards' self-test on {min(rows, len(examples))} of the stage's rows:\n"
            f"{shown}\ncorrect the rows or the rewards (`posttrain rewards test` shows all), or set self_test_rows=0"
        )
