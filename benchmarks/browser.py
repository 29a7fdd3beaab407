"""A headless browser, for the benchmark of the report and for the tests of pages."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE = "POSTTRAIN_BROWSER"
"""Environment variable with the path of the browser."""
QUIET = (
    *("--disable-gpu", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


def executable() -> str:
    """The browser's path. Raises RuntimeError with the remedy if there is none."""
    found = os.environ.get(VARIABLE) or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        raise RuntimeError(
            f"no browser: install Chromium (`apt-get install chromium`), or name one with {VARIABLE}"
        )
    return found


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium with a fresh profile, which sends no requests of its own."""
    from playwright.sync_api import sync_playwright

    sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=executable(), args=[*QUIET, *sandbox])
        try:
            yield opened
        finally:
            opened.close()
