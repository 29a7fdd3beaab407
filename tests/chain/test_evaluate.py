"""Evaluation of a stage passes on what the recipe says."""

from pathlib import Path
from types import SimpleNamespace

import rl.evaluate
from chain.evaluate import evaluate


def test_rewards_of_evaluation_sets_are_searched_where_the_recipes_modules_are(monkeypatch):
    given = []
    monkeypatch.setattr(rl.evaluate, "evaluate", lambda *arguments: given.extend(arguments) or ({}, []))
    context = SimpleNamespace(
        recipe=SimpleNamespace(eval="config", folders=(Path("recipe"), Path("here"))),
        pool=SimpleNamespace(serve=lambda model: "client"),
        progress=lambda text: None,
        policy=Path("checkpoint"),
        sets={},
    )
    assert evaluate(context, keep_samples=False) == {}
    assert (given[0], given[1], given[-1]) == ("config", "client", (Path("recipe"), Path("here")))
