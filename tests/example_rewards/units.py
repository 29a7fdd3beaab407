"""A function: the whole row is there, here its meta."""

from rewards import Example, Verdict


def names_the_unit(completion: str, example: Example, *, default: str = "") -> Verdict:
    """1 if the row's unit stands in the completion; unscored if the row has none, as 0 would be unfair."""
    unit = example.meta.get("unit", default)
    if not unit:
        return Verdict.unscored("meta has no unit")
    return Verdict.correct(unit) if unit in completion.split() else Verdict.wrong(reason=f"no {unit}")
