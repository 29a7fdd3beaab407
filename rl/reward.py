"""A stage's reward terms as the mixture that grades its completions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from rewards.mix import Mixture, Term
from rewards.registry import load_reward
from rl.config import RewardTerm


def mixture_of(terms: Iterable[RewardTerm], folders: Sequence[Path] = ()) -> Mixture:
    """Load every term's reward (an unknown name names its nearest) and weigh them.

    Args:
        terms: from the recipe.
        folders: where users' own reward modules are looked for, after everything installed.
    """
    return Mixture(
        [
            Term(
                name=term.name,
                reward=load_reward(term.use, term.params, folders),
                weight=term.weight,
                modes=frozenset(term.modes),
                graded=frozenset(term.graded),
                gate=term.gate,
                on_error=term.on_error,
            )
            for term in terms
        ]
    )
