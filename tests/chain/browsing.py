"""A page in a headless browser, and what it did: requests, dialogs, errors, violations of its policy."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Seen:
    """Everything that a page must not do."""

    requests: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """Uncaught exceptions and lines on the console; the browser reports violations of the policy there."""
    windows: list[str] = field(default_factory=list)


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
