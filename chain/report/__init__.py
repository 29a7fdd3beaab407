"""The report of a run: reads its figures, draws charts and writes one page."""
