"""The command line of raywarp.

commands.py has the parser. A command that is more than a call has a module of its own. There is no
logic here.
"""

from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; see raywarp.cli.commands.main."""
    from raywarp.cli.commands import main

    return main(arguments)
