"""A judge's audit as text: a table for the terminal, and a Markdown document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table


def table(found: Mapping[str, Any]) -> Table:
    """The measures as a table for the terminal."""
    rows = Table(box=box.SIMPLE, title=f"{found['judge']['model']} on {sum_of_rows(found)} labelled rows")
    rows.add_column("measure")
    rows.add_column("found", justify="right")
    rows.add_column("95%", justify="right")
    for name, value, interval in _table_rows(found):
        rows.add_row(name, value, interval)
    return rows


def markdown(found: Mapping[str, Any]) -> str:
    """The measures as a Markdown document."""
    judge = found["judge"]
    lines = [
        f"# Audit of the judge {judge['model']}",
        "",
        f"{judge['base_url']}, prompt version {judge['prompt_version']}, criteria {', '.join(judge['criteria'])}; "
        f"{found['written']}.",
        "",
        "| measure | found | 95% |",
        "|---|---:|---:|",
        *(f"| {name} | {value} | {interval} |" for name, value, interval in _table_rows(found)),
        "",
        "The start-up check refuses this judge: " + found["canaries"]["refused"]
        if found["canaries"]["refused"]
        else "The start-up check accepts this judge.",
    ]
    return "\n".join(lines) + "\n"


def sum_of_rows(found: Mapping[str, Any]) -> int:
    """Number of rows in the audit."""
    return found["rows"]["good"] + found["rows"]["wrong"]


def _table_rows(found: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, value, interval) as text."""
    rows: list[tuple[str, str, str]] = []

    def add(name: str, share: Mapping[str, Any]) -> None:
        if share["share"] is None:
            rows.append((name, "no such row", ""))
            return
        low, high = share["ci95"]
        rows.append((name, f"{share['share']:.3f} of {share['n']}", f"{low:.3f} to {high:.3f}"))

    add("agreement", found["agreement"])
    rows.append(("Cohen's kappa", "undefined" if found["kappa"] is None else f"{found['kappa']:.3f}", ""))
    add("false positives (wrong rows found good)", found["false_positives"])
    add("false negatives (good rows not found good)", found["false_negatives"])
    for name, shares in found["criteria"].items():
        add(f"{name}: yes on good rows", shares["yes_on_good"])
        add(f"{name}: yes on wrong rows", shares["yes_on_wrong"])
    add("verdict changes with the order of yes and no", found["order"]["changed"])
    add("caught wrong rows turned good by length", found["length"]["turned_good"])
    add("caught wrong rows turned good by injection", found["injection"]["turned_good"])
    for name, share in found["injection"]["by_injection"].items():
        if share["count"]:
            add(f"injection {name}", share)
    rows.append(("rows without a verdict", str(found["rows"]["unscored"]), ""))
    rows.append(("start-up check", "refused" if found["canaries"]["refused"] else "passed", ""))
    rows.append(("requests, tokens", f"{found['cost']['calls']:.0f}, {found['cost']['tokens']:.0f}", ""))
    return rows
