"""The console for text that people read."""

from rich.console import Console


def console() -> Console:
    """Return a console, 120 columns wide where there is no terminal (a job's log, a file).

    rich assumes 80 columns there, which are too few for the tables. It also makes pictures of words
    such as :key:, which may be part of a path.
    """
    terminal = Console(emoji=False)
    return terminal if terminal.is_terminal else Console(width=120, emoji=False)
