"""`raywarp bake`: base + η·ΔW as full weights, on the command line."""

import argparse
import json
from dataclasses import asdict
from typing import Any


def add_bake(commands: Any) -> None:
    """Add the command `bake`."""
    text = "write base + adapter as a model of its own, and say what rounding loses"
    parser = commands.add_parser(
        "bake", help=text, description=f"{text[0].upper()}{text[1:]}. Sums are in float32."
    )
    parser.add_argument(
        "adapter",
        metavar="ADAPTER",
        help="folder or hub id (user/name or user/name@revision)",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="new or empty folder that gets the model"
    )
    parser.add_argument(
        "--liti",
        type=float,
        default=1.0,
        metavar="ETA",
        help="how far to go from the base (0) to base + adapter (1); above 1 extrapolates [1]",
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the weights; auto: the base's own [auto]",
    )
    parser.add_argument(
        "--base",
        metavar="MODEL",
        help="folder, hub id or embedded: name; by default the base that the adapter names",
    )
    parser.add_argument(
        "--allow-different-base",
        action="store_true",
        help="do not compare the base's name with what the adapter names",
    )
    parser.add_argument(
        "--shard-size", type=float, default=5.0, metavar="GB", help="of a weight file, at most [5]"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let the base's own code run"
    )
    parser.add_argument(
        "--gguf",
        action="store_true",
        help="write the adapter alone to DIR/adapter.gguf, for llama.cpp's --lora",
    )
    parser.add_argument("--json", action="store_true", help="print all figures as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    parser.set_defaults(command=_bake)


def _bake(options: argparse.Namespace) -> None:
    from raywarp.baking.bake import bake
    from raywarp.baking.card import summary
    from raywarp.baking.gguf_lora import write_gguf
    from raywarp.cluster.runtime import stoppable

    what = (options.adapter, options.out, options.liti, options.dtype, options.base)
    code, other = options.trust_remote_code, options.allow_different_base
    with stoppable():
        if options.gguf:
            file = write_gguf(*what, code, other)
            return print(f"written to {file}; llama-cli -m BASE.gguf --lora {file}")
        baked = bake(*what, options.shard_size, code, other)
    if options.json:
        print(json.dumps({**asdict(baked), "folder": str(baked.folder)}))
    else:
        print(f"{summary(baked)}\nwritten to {options.out}")
