"""The console that commands print to."""

from rich.console import Console


def new_console() -> Console:
    """The terminal; a file or a pipe counts as 100 columns wide, not as the 80 that cut tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)
