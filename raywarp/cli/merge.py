"""`raywarp merge`: exact averages of PEFT LoRA adapters, on the command line."""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from raywarp.cluster.runtime import Stopped, stoppable
from raywarp.config.schema import ConfigError

_HELP = {
    "slerp": (
        "spherical mean of task vectors, one angle per transformer block (WARP, stage 2); with"
        " --liti also stage 3"
    ),
    "lerp": "plain mean",
    "karcher": "spherical mean that does not depend on the adapters' order",
    "sum": "task arithmetic: weighted sum of task vectors; weights may be negative or above 1",
    "ema": "exponential moving average over checkpoints, the oldest first",
    "liti": "interpolation from an init (or the base model) to one adapter (WARP, stage 3)",
}
_PROGRESS_SECONDS = 10.0
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
        help="ranks, targets, norms, angles, and what merge would refuse; writes nothing",
        description="Look at adapters, and say what merge would refuse. Nothing is written.",
    )
    inspect.add_argument("adapters", nargs="+", metavar="ADAPTER", help="local folder or hub id")
    inspect.add_argument(
        "--base",
        metavar="MODEL",
        help="folder or hub id; measures the adapters' KL cosine on texts (loads the model)",
    )
    inspect.add_argument(
        "--texts", metavar="FILE", help="one text per line, for --base; default: eight built in"
    )
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
        "--out",
        required=True,
        metavar="DIR",
        help="folder that gets the merged adapter, or s3://bucket/prefix, gs://bucket/prefix",
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
        help="how far to go from the init to the merge; above 1 extrapolates [1]",
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
            metavar="W",
            help="one per adapter, with spaces or commas between; equal by default"
            + (" (1)" if method == "sum" else ""),
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
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="of the written factors; auto: the inputs', the widest where they differ [auto]",
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


def _merge(options: argparse.Namespace) -> int:
    try:
        with stoppable():
            _merge_and_report(options)
    except Stopped as stopped:
        print(f"raywarp: {str(stopped).split(';')[0]}; nothing was written", file=sys.stderr)
        return stopped.exit_code
    return 0


def _merge_and_report(options: argparse.Namespace) -> None:
    from raywarp.adapters.merge_report import merge_json, merge_table
    from raywarp.adapters.merging import merge
    from raywarp.run.terminal import console

    done = merge(
        _recipe(options),
        options.out,
        options.overwrite,
        options.allow_different_bases,
        _Progress().say,
    )
    if options.json:
        print(json.dumps(merge_json(done)))
    else:
        console().print(merge_table(done), highlight=False)
        console().print(f"written to {options.out}", highlight=False, markup=False)


class _Progress:
    """Lines on stderr about a long merge: none in the first seconds, then one now and then."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._next = self._start + _PROGRESS_SECONDS

    def say(self, done: int, count: int) -> None:
        now = time.monotonic()
        if now >= self._next and done < count:
            self._next = now + _PROGRESS_SECONDS
            print(f"{done} of {count} blocks, {now - self._start:.0f} s", file=sys.stderr)


def _recipe(options: argparse.Namespace) -> Any:
    from raywarp.adapters.recipe import Recipe

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


def _floats(text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(word) for word in text.replace(",", " ").split())
    except ValueError:
        raise ConfigError(f"--weights takes numbers, for example 0.7,0.3; not {text}") from None


def _inspect(options: argparse.Namespace) -> None:
    from raywarp.adapters.inspection import survey
    from raywarp.adapters.merge_report import inspect_table, survey_json
    from raywarp.run.terminal import console

    texts = _texts(options.base, options.texts)
    found = survey(
        options.adapters, options.init, options.granularity, options.allow_different_bases
    )
    kl = _kl_summary(options.base, found, texts) if options.base else {}
    if options.json:
        print(json.dumps(survey_json(found) | ({"kl": kl} if kl else {})))
    else:
        console().print(inspect_table(found), highlight=False)
        if kl:
            console().print(_kl_line(kl), highlight=False)


def _texts(base: str | None, file: str | None) -> list[str]:
    """Return the texts of a file, one per line; none where the built-in ones are meant.

    Raises:
        ConfigError: the file cannot be read or is empty, or there is no base to ask.
    """
    if file is None:
        return []
    if base is None:
        raise ConfigError("--texts goes with --base, the model that reads them")
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--texts {file} cannot be read: {error}") from None
    if not (texts := [line for line in lines if line.strip()]):
        raise ConfigError(f"--texts {file} holds no text; write one per line")
    return texts


def _kl_summary(base: str, found: Any, texts: list[str]) -> dict[str, Any]:
    from raywarp.adapters.peft import load_peft
    from raywarp.algorithm.averaging import lerp
    from raywarp.algorithm.geometry import kl_summary
    from raywarp.baking.adapter_kls import TEXTS, text_kls

    deltas = [load_peft(file.name) for file in found.files]
    policies, init = deltas[: found.policies], next(iter(deltas[found.policies :]), None)
    if len(policies) < 2:
        raise ConfigError("a KL cosine is of two adapters or more that can be merged")
    *own, mean = text_kls(base, [*policies, lerp(policies)], texts or TEXTS, init)
    return kl_summary(own, mean)


def _kl_line(kl: dict[str, Any]) -> str:
    shown = ", ".join(f"{value:.3g}" for value in [*kl["kl_policies"], kl["kl_lerp"]])
    line = f"KL of each and of their mean: {shown} nats per text ({kl['prompts']} texts)"
    if kl["kl_cosine"] is None:
        return f"{line}; too small for a KL cosine"
    half = f" ± {kl['kl_cosine_ci']:.2f}" if kl["kl_cosine_ci"] is not None else ""
    return (
        f"KL cosine {kl['kl_cosine']:.2f}{half}: averaging saves at most"
        f" {kl['kl_gain']:.0%} of √KL\n{line}"
    )
