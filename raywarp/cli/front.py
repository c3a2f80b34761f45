"""`raywarp front`: the KL–reward front of adapters that were trained anywhere."""

import argparse
import re
from pathlib import Path
from typing import Any

import yaml

from raywarp.config.load import load_config
from raywarp.config.schema import Config, ConfigError

_OVERRIDE = re.compile(r"[a-z][a-z0-9_]*(\.[a-z0-9_]+)*=.*", re.DOTALL)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")  # module:function
_MORE = """\
Each adapter is measured, with the SFT model, their LERP and Karcher mean, and the LITI line from
the SFT model through their SLERP, under the ceiling of the prompts and the reward. Of a run whose
policies are trained on different rewards, merges with other shares are measured, too. Nothing is
trained. A folder with config.yaml is a run: its last policies are measured anew, with its own
configuration. The same command again continues. DIR gets front.json, front.png, samples.json, the
page report.html, and the chosen point with its card in adapter/."""


def add_front(commands: Any) -> None:
    """Add the command `front`."""
    text = "measure the KL–reward front of LoRA adapters from anywhere, or of a finished run anew"
    parser = commands.add_parser(
        "front",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.\n\n{_MORE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="ADAPTER|RUN|key=value",
        help="folders or hub ids of PEFT LoRA adapters, or one run; and keys of the configuration",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder, or s3://…")
    parser.add_argument("--model", metavar="BASE", help="default: what the adapters name")
    parser.add_argument("--prompts", metavar="DATASET", help="prompts.dataset")
    for name in ("reward", "control"):
        parser.add_argument(
            f"--{name}", metavar="MODEL|module:function", help=f"{name}.model or {name}.function"
        )
    parser.add_argument("--init", metavar="INIT", help="adapter that the others were trained from")
    parser.add_argument(
        "--etas", type=_numbers, metavar="η,η,…", help="points of the LITI line, front.etas"
    )
    parser.add_argument(
        "--lambdas", type=_numbers, default=[], metavar="λ,λ,…", help="of two: SLERP at each λ"
    )
    parser.add_argument(
        "--weights",
        type=_weights,
        action="append",
        default=[],
        metavar="NAME=λ,…",
        help="a merge with these shares, by reward, policy or adapter, or a number for each, at the"
        " η of front.choose; may be repeated; a single one is chosen",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file, as for `train`")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    parser.add_argument("-q", "--quiet", action="store_true", help="say only faults and results")
    parser.set_defaults(command=_front)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of numbers, such as 0,.5,1"
        ) from None


def _weights(text: str) -> dict[str, float] | list[float]:
    try:
        if "=" not in text:
            return _numbers(text)
        pairs = [part.rpartition("=") for part in text.split(",")]
        shares = [(name.strip(), float(value)) for name, _, value in pairs]
    except (ValueError, argparse.ArgumentTypeError):
        raise argparse.ArgumentTypeError(
            f"{text!r} are no shares, such as helpful=.7,brief=.3 or .7,.3"
        ) from None
    names = [name for name, _ in shares]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise argparse.ArgumentTypeError(f"{text!r} names {twice} twice")
    return dict(shares)


def _front(options: argparse.Namespace) -> None:
    from raywarp.front_stage import front
    from raywarp.report.page import save_report
    from raywarp.run.display import Display

    overrides = [word for word in options.words if _OVERRIDE.fullmatch(word)]
    adapters = [word for word in options.words if word not in overrides]
    config = _config_of(options, adapters, overrides)
    display = Display(quiet=options.quiet)
    front(adapters, config, options.init, options.lambdas, display, options.weights)
    page, _ = save_report([config.out])
    display.say(f"the page: {page}")


def _config_of(options: argparse.Namespace, adapters: list[str], overrides: list[str]) -> Config:
    """Return the configuration: a file's or the run's, then the options, then key=value."""
    from raywarp.planning.front_sources import base_of, saved_run

    if not adapters:
        raise ConfigError("name at least one adapter, or the folder of a run")
    run = saved_run(adapters[0])
    if run is not None and options.config:
        raise ConfigError(f"{adapters[0]} is a run, which has its own configuration; drop --config")
    given = [*_options(options), *overrides]
    source = run if run is not None else options.config
    if source is None:
        base = base_of([*adapters, *([options.init] if options.init else [])])
        given = [*(_override(key, value) for key, value in base.items()), *given]
        if not any(word.startswith("model=") for word in given):
            raise ConfigError("the adapters do not name their base model; give --model")
    return load_config(source, given)


def _options(options: argparse.Namespace) -> list[str]:
    """Return what the options set, as key=value."""
    found = {"out": options.out, "model": options.model, "prompts.dataset": options.prompts}
    for name in ("reward", "control"):
        if value := getattr(options, name):
            found[f"{name}.{_kind(value)}"] = value
    found["front.etas"] = options.etas
    return [_override(key, value) for key, value in found.items() if value is not None]


def _kind(value: str) -> str:
    """Return whether a reward's name is that of a function or a model."""
    is_function = _FUNCTION.fullmatch(value) and not value.startswith("embedded:")
    return "function" if is_function else "model"


def _override(key: str, value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=1 << 20)
    return f"{key}={text.partition(chr(10))[0]}"
