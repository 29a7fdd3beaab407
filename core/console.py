"""The console that commands print to."""

from rich.console import Console


def new_console() -> Console:
    """A console for the terminal. A file or a pipe is 100 columns wide, because the default of 80 cuts tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=100)
