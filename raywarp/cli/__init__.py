"""The command line: the parser in commands.py, and a module for each command that has more to it
than a call. No logic.
"""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; see raywarp.cli.commands.main."""
    from raywarp.cli.commands import main

    return main(arguments)
