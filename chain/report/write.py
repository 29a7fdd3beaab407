"""Writes a run's report: report.json and report.html."""

from pathlib import Path

from chain.report.data import HTML, JSON, Report, build
from chain.report.page import page
from chain.report.pictures import Thumbnails
from core.files import write_json, write_text

_THUMBNAILS = Thumbnails()
"""`run` writes the report after every stage, with the same pictures."""


def write(run_dir: Path) -> Report:
    """Write report.json and report.html of a run; return the report."""
    report = build(run_dir)
    write_json(run_dir / JSON, report)
    write_text(run_dir / HTML, page(report, run_dir, _THUMBNAILS))
    return report
