"""A stage's reward terms as the mixture that grades its completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rewards.isolation import load_limited
from rewards.mix import Mixture, Term
from rl.config import RewardTerm


def mixture_of(terms: Iterable[RewardTerm], folders: Sequence[Path] = ()) -> Mixture:
    """Load every term's reward and weigh it. An unknown name or parameter is refused with the nearest known one.

    Args:
        terms: the recipe's reward terms.
        folders: folders that are searched for users' reward modules, after the installed packages.
    """
    return Mixture(
        [
            Term(
                name=term.name,
                reward=load_limited(
                    term.use,
                    term.params,
                    folders,
                    name=term.name,
                    isolate=term.isolate,
                    deadline_s=term.deadline_s,
                    memory_gib=term.memory_gib,
                ),
                weight=term.weight,
                modes=frozenset(term.modes),
                graded=frozenset(term.graded),
                gate=term.gate,
                on_error=term.on_error,
            )
            for term in terms
        ]
    )
