"""The parser and the commands of the command line.

There is no logic here: each command reads a configuration and calls the function of the same name.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from raywarp.cli.bake import add_bake
from raywarp.cli.config import add_config
from raywarp.cli.front import add_front
from raywarp.cli.merge import add_merge
from raywarp.cli.push import add_push
from raywarp.cli.report import add_report
from raywarp.cli.words import arranged, together
from raywarp.cluster.runtime import Stopped
from raywarp.config.load import config_help, load_config
from raywarp.config.schema import Config, ConfigError
from raywarp.config.secrets import redact


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: the words after `raywarp`; by default those of the process.

    Returns:
        0: success.
        1: a run that failed.
        2: wrong input (a configuration, a dataset, an adapter).
        130: Ctrl-C.
        143: SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a locale may lack what a message has: Δ, η, é
            stream.reconfigure(errors="replace")
    try:
        words = arranged(sys.argv[1:] if arguments is None else arguments)
    except ConfigError as error:
        return _fail(error, 2)
    parser = _parser()
    options = parser.parse_args(together(parser, words))
    try:
        return options.command(options) or 0
    except Stopped as stopped:
        return _fail(stopped, stopped.exit_code)
    except KeyboardInterrupt:
        return _fail("stopped; the same command continues where it was", 130)
    except Exception as error:
        code = _exit_code(error)
        if code is None or options.verbose:
            raise
        return _fail(error, code)


def _fail(error: object, code: int) -> int:
    print(f"raywarp: {redact(str(error))}", file=sys.stderr)
    return code


def _exit_code(error: Exception) -> int | None:
    """Return the exit code of an error whose message says all that a user can act on.

    Other errors give None. They are bugs, and keep their traceback.
    """
    if isinstance(error, ConfigError):
        return 2
    from raywarp.algorithm.factors import AdapterError

    if isinstance(error, AdapterError):
        return 2
    from raywarp.algorithm.finite import NotFiniteError
    from raywarp.cluster.faults import FaultError
    from raywarp.rewards.reward import RewardError
    from raywarp.rollout.base_weights import BaseWeightsError
    from raywarp.rollout.protocol import RolloutError
    from raywarp.storage.sealed import DamagedError, StoreError

    return (
        1
        if isinstance(
            error,
            BaseWeightsError
            | DamagedError
            | FaultError
            | NotFiniteError
            | RewardError
            | RolloutError
            | StoreError,
        )
        else None
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="raywarp", description="Align language models with WARP on a Ray cluster."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _command(
        commands,
        "quickstart",
        "the whole pipeline on the embedded model and human ratings, to runs/quickstart",
        _quickstart,
        False,
    )
    _command(commands, "reward", "train a reward model from preferences", _reward)
    _command(
        commands,
        "ceiling",
        "before any training: the most reward that each KL to the SFT model can buy",
        _ceiling,
    )
    _command(
        commands, "train", "run WARP; the same command again continues where it stopped", _train
    )
    _command(
        commands,
        "tune",
        "search any keys with Ray Tune (section `tune`); the same command again continues where it"
        " stopped",
        _tune,
    )
    asked = (
        "what a run asks of the cluster, memory per process, and whether it fits (exit code 2: not)"
    )
    plan = _command(commands, "plan", asked, _plan, quiet=False)
    plan.add_argument(
        "--offline", action="store_true", help="ask neither a cluster nor a hub, and read no data"
    )
    plan.add_argument(
        "--cluster",
        metavar="NODESxGPUSxNAME",
        help="judge by these nodes instead, such as 2x8xH100 or 8xA100,4x16xCPU",
    )
    add_config(commands)
    add_report(commands)
    add_front(commands)
    add_merge(commands)
    add_bake(commands)
    add_push(commands)
    return parser


def _command(
    commands: Any,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int | None],
    config: bool = True,
    quiet: bool = True,
) -> Any:
    parser = commands.add_parser(
        name,
        help=text,
        description=text,
        epilog=config_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if config:
        parser.add_argument(
            "config", type=Path, help="YAML file; keys that it leaves out have the defaults below"
        )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a key, for example warp.steps=20",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    if quiet:
        parser.add_argument(
            "-q",
            "--quiet",
            action="store_true",
            help="say only faults, what was found damaged, and the results",
        )
    parser.set_defaults(command=run)
    return parser


def _config_of(options: argparse.Namespace) -> Config:
    return load_config(options.config, options.overrides)


def _display(options: argparse.Namespace) -> Any:
    from raywarp.run.display import Display

    return Display(quiet=options.quiet)


def _quickstart(options: argparse.Namespace) -> None:
    from raywarp.cli.quickstart import quickstart

    quickstart(options.overrides, _display(options))


def _reward(options: argparse.Namespace) -> None:
    from raywarp.reward_stage import reward

    reward(_config_of(options), _display(options))


def _ceiling(options: argparse.Namespace) -> None:
    from raywarp.ceiling_stage import ceiling

    ceiling(_config_of(options), _display(options))


def _train(options: argparse.Namespace) -> None:
    from raywarp.warp import train

    train(_config_of(options), _display(options))


def _tune(options: argparse.Namespace) -> int:
    from raywarp.sweep.sweep import tune

    return 0 if tune(_config_of(options), _display(options)).best else 1


def _plan(options: argparse.Namespace) -> int:
    from raywarp.planning.plan import plan, print_forecast
    from raywarp.run.terminal import console

    found = plan(_config_of(options), options.offline, options.cluster)
    print_forecast(found, console())
    return 0 if found.fits else 2
