"""A headless browser for tests of pages, and what a page did: requests, dialogs, errors, violations of its policy."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
VARIABLE = "POSTTRAIN_BROWSER"
"""Environment variable with the path of the browser."""
QUIET = ("--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update")


@dataclass
class Seen:
    """Everything that a page must not do."""

    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Uncaught exceptions and lines on the console; the browser reports violations of the policy there."""
    windows: list[str] = field(default_factory=list)


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
    """A headless Chromium with a profile of its own, which makes no requests of its own."""
    from playwright.sync_api import sync_playwright

    sandbox = ("--no-sandbox",) if os.geteuid() == 0 else ()
    with sync_playwright() as play:
        opened = play.chromium.launch(executable_path=executable(), args=[*QUIET, "--disable-sync", *sandbox])
        try:
            yield opened
        finally:
            opened.close()


def until(page: Any, expression: str) -> None:
    """Wait until the expression is true. Playwright's own wait_for_function needs eval, which our policy forbids."""
    for _ in range(200):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"not true within 10 s: {expression}")


def watched(opened: Any, **options: Any) -> tuple[Any, Seen]:
    """A new page in a context of its own, and what it does from now on."""
    seen = Seen()
    page = opened.new_context(**options).new_page()
    page.on("request", lambda request: seen.requests.append(request.url))
    page.on("pageerror", lambda error: seen.errors.append(str(error)))
    page.on("console", lambda line: seen.errors.append(line.text))
    page.on("popup", lambda window: seen.windows.append(window.url))

    def dialog(one: Any) -> None:
        seen.dialogs.append(one.message)
        one.dismiss()

    page.on("dialog", dialog)
    return page, seen
