"""Where text goes that a person reads."""

from rich.console import Console


def console() -> Console:
    """rich assumes 80 columns where there is no terminal (a job's log, a file), too few for the
    tables.
    """
    terminal = Console()
    return terminal if terminal.is_terminal else Console(width=120)
