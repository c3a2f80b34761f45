"""`raywarp report`: the page that shows a run.

The page is a file, or it is served on this machine while the run goes on.
"""

import argparse
from typing import Any

from raywarp.report.page import REPORT_FILE, save_report


def add_report(commands: Any) -> None:
    """Add the command `report`."""
    text = (
        "one self-contained HTML page that shows a run: its front, texts, curves, angles, time line"
        " and faults"
    )
    more = (
        "The run may be finished, under way or broken: the page shows what is there and says what"
        " is missing."
    )
    parser = commands.add_parser("report", help=text, description=f"Write {text}. {more}")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help=(
            "the folder of a run or a sweep, or s3://bucket/prefix; of several runs, or trials, all"
            " fronts are drawn together"
        ),
    )
    parser.add_argument(
        "--out",
        metavar="FILE",
        help=f"the page; default: RUN/{REPORT_FILE}, of several runs ./{REPORT_FILE}",
    )
    parser.add_argument(
        "--serve",
        action="store_true",
        help="serve the page on this machine (127.0.0.1 only) and follow the run; Ctrl-C ends it",
    )
    parser.add_argument(
        "--port", type=int, default=0, help="port of --serve; default: any free one"
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> None:
    from raywarp.run.terminal import console

    if options.serve:
        from raywarp.report.server import serve

        return serve(
            options.runs,
            options.port,
            lambda text: console().print(text, highlight=False, markup=False, soft_wrap=True),
        )
    where, size = save_report(options.runs, options.out)
    console().print(f"{where} ({size / 1e6:.1f} MB)", highlight=False, markup=False, soft_wrap=True)
