"""`raywarp merge`: exact averages of PEFT LoRA adapters, on the command line."""

import argparse
import json
from typing import Any

_HELP = {
    "slerp": (
        "spherical mean of task vectors, one angle per transformer block (WARP, stage 2); with"
        " --liti also stage 3"
    ),
    "lerp": "plain mean",
    "karcher": "spherical mean that does not depend on the adapters' order",
    "ema": "exponential moving average over checkpoints, the oldest first",
    "liti": "interpolation from an init (or the base model) to one adapter (WARP, stage 3)",
}
_EXACTNESS = (
    "Averages are taken of the change ΔW = s·B·A, never of A and B apart. The result is an ordinary"
    " PEFT adapter, of the sum of the ranks; --rank and --energy truncate it, and say what that"
    " loses."
)


def add_merge(commands: Any) -> None:
    """Add the command `merge` with one subcommand per method, and `merge inspect`."""
    parser = commands.add_parser(
        "merge", help="average PEFT LoRA adapters, exactly", description=_EXACTNESS
    )
    methods = parser.add_subparsers(required=True, metavar="method")
    for method, text in _HELP.items():
        _add_method(methods, method, text)
    inspect = methods.add_parser(
        "inspect",
        help="ranks, targets, norms and angles; writes nothing",
        description="Look at adapters. Nothing is written.",
    )
    inspect.add_argument("adapters", nargs="+", metavar="ADAPTER", help="local folder or hub id")
    _add_common(inspect)
    inspect.set_defaults(command=_inspect)


def _add_method(methods: Any, method: str, text: str) -> None:
    parser = methods.add_parser(
        method, help=text, description=f"{text[0].upper()}{text[1:]}. {_EXACTNESS}"
    )
    if method == "liti":
        parser.add_argument(
            "adapters",
            nargs="+",
            metavar="[INIT] ADAPTER",
            help="local folders or hub ids; without an init, the base model is it",
        )
    else:
        parser.add_argument(
            "adapters",
            nargs="+",
            metavar="ADAPTER",
            help="local folder or hub id (user/name or user/name@revision)",
        )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder that gets the merged adapter"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an adapter in DIR; other files there stay"
    )
    _add_common(parser)
    parser.add_argument(
        "--liti",
        type=float,
        required=method == "liti",
        default=1.0,
        metavar="ETA",
        help="how far to go from the init to the merge, 0 to 1",
    )
    if method == "ema":
        parser.add_argument(
            "--ema-rate",
            type=float,
            required=True,
            metavar="MU",
            help="share that each next checkpoint gets, 0 to 1",
        )
    elif method != "liti":
        parser.add_argument(
            "--weights",
            nargs="+",
            metavar="W",
            help="one per adapter, with spaces or commas between; equal by default",
        )
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--rank", type=int, metavar="R", help="truncate every module to this rank, by SVD"
    )
    size.add_argument(
        "--energy",
        type=float,
        metavar="E",
        help="truncate to this share of each module's squared norm; 1 drops only what is zero",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the written factors [float32]",
    )
    parser.add_argument(
        "--per-module-ranks",
        action="store_true",
        help="keep unequal ranks; by default all modules get the largest, padded with zeros",
    )
    parser.set_defaults(command=_merge, method=method)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--init",
        metavar="INIT",
        help="adapter that the task vectors start from; by default the base model",
    )
    parser.add_argument(
        "--granularity",
        choices=("block", "tensor", "global"),
        default="block",
        help="what shares an angle: a transformer block, a weight, or all [block]",
    )
    parser.add_argument(
        "--allow-different-bases",
        action="store_true",
        help="do not compare the names of the base models",
    )
    parser.add_argument("--json", action="store_true", help="print every block's figures as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")


def _merge(options: argparse.Namespace) -> None:
    from raywarp.adapters.merge_report import merge_json, merge_table
    from raywarp.adapters.merging import merge
    from raywarp.run.terminal import console

    done = merge(_recipe(options), options.out, options.overwrite, options.allow_different_bases)
    if options.json:
        print(json.dumps(merge_json(done)))
    else:
        console().print(merge_table(done), highlight=False)
        console().print(f"written to {options.out}", highlight=False, markup=False)


def _recipe(options: argparse.Namespace) -> Any:
    from raywarp.adapters.recipe import Recipe
    from raywarp.config.schema import ConfigError

    adapters, init = tuple(options.adapters), options.init
    if options.method == "liti" and len(adapters) == 2:
        if init:
            raise ConfigError(
                "the init is given twice: as the first of two adapters, and with --init"
            )
        init, adapters = adapters[0], adapters[1:]
    return Recipe(
        method=options.method,
        adapters=adapters,
        init=init,
        liti_rate=options.liti,
        weights=_floats(getattr(options, "weights", None)),
        ema_rate=getattr(options, "ema_rate", None),
        rank=options.rank,
        energy=options.energy,
        granularity=options.granularity,
        dtype=options.dtype,
        per_module_ranks=options.per_module_ranks,
    )


def _floats(words: list[str] | None) -> tuple[float, ...] | None:
    from raywarp.config.schema import ConfigError

    if words is None:
        return None
    try:
        return tuple(float(word) for word in " ".join(words).replace(",", " ").split())
    except ValueError:
        raise ConfigError(
            f"--weights takes numbers, for example 0.7,0.3; not {' '.join(words)}"
        ) from None


def _inspect(options: argparse.Namespace) -> None:
    from raywarp.adapters.merge_report import adapter_facts, groups_json, inspect_table
    from raywarp.adapters.merging import inspect
    from raywarp.run.terminal import console

    count = len(options.adapters)
    files, groups = inspect(
        options.adapters, options.init, options.granularity, options.allow_different_bases
    )
    if options.json:
        facts = [adapter_facts(file) for file in files]
        print(
            json.dumps(
                {
                    "adapters": facts[:count],
                    "init": facts[count] if options.init else None,
                    "groups": groups_json(groups, count),
                }
            )
        )
    else:
        console().print(inspect_table(files, groups, count), highlight=False)
