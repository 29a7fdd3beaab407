"""A function: it sees the whole row, and reads its meta."""

from sailvl2_posttrain import Example, Verdict


def names_the_unit(completion: str, example: Example, *, default: str = "") -> Verdict:
    """1 if the completion has the row's unit; unscored if the row has none, as 0 would be unfair."""
    unit = example.meta.get("unit", default)
    if not unit:
        return Verdict.unscored("meta has no unit")
    return Verdict.correct(unit) if unit in completion.split() else Verdict.wrong(reason=f"no {unit}")
