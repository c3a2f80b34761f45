"""`raywarp report`: the page that shows a run, as a file or served on this machine while the run goes on."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from raywarp import store
from raywarp.config import ConfigError
from raywarp.storage import Storage, is_uri

REPORT_FILE = "report.html"


def add_report(commands: Any) -> None:
    """The command `report`."""
    text = "one self-contained HTML page that shows a run: its front, texts, curves, angles, time line and faults"
    more = "The run may be finished, under way or broken: the page shows what is there and says what is missing."
    parser = commands.add_parser("report", help=text, description=f"Write {text}. {more}")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, or s3://bucket/prefix; of several, all fronts are drawn together"
    )
    parser.add_argument("--out", metavar="FILE", help=f"the page; default: RUN/{REPORT_FILE}, of several runs ./{REPORT_FILE}")
    parser.add_argument(
        "--serve", action="store_true", help="serve the page on this machine (127.0.0.1 only) and follow the run; Ctrl-C ends it"
    )
    parser.add_argument("--port", type=int, default=0, help="port of --serve; default: any free one")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> None:
    from raywarp.terminal import console

    if options.serve:
        from raywarp.report_server import serve

        return serve(options.runs, options.port, lambda text: console().print(text, highlight=False, markup=False, soft_wrap=True))
    where, size = save_report(options.runs, options.out)
    console().print(f"{where} ({size / 1e6:.1f} MB)", highlight=False, markup=False, soft_wrap=True)


def save_report(runs: Sequence[str], out: str | None = None) -> tuple[str, int]:
    """Write the page of one run, or of several; returns where it is, and its size in bytes.

    Raises:
        ConfigError: there is no run, or the page cannot lie there.
        StoreError: something cannot be read or written.
    """
    page = build(runs)
    if out is None and len(runs) == 1:
        storage = Storage(runs[0])
        storage.write(REPORT_FILE, page)
        return str(storage.folder / REPORT_FILE) if storage.folder else f"{storage.uri.partition('?')[0].rstrip('/')}/{REPORT_FILE}", len(
            page
        )
    out = out or REPORT_FILE
    if is_uri(out):
        raise ConfigError(f"--out={out} is no file of this machine")
    path = Path(out).absolute()
    if path.is_dir():
        raise ConfigError(f"--out={out} is a folder; name a file in it, for example {path / REPORT_FILE}")
    store.write_bytes(path, page)
    return str(path), len(page)


def build(runs: Sequence[str], live: bool = False) -> bytes:
    """The page in HTML."""
    from raywarp.report_page import render

    return render(read(runs, live))


def read(runs: Sequence[str], live: bool = False) -> dict[str, Any]:
    """The page's data."""
    from raywarp.report_data import report_data
    from raywarp.report_page import page_data

    found = [report_data(run, 1 / len(runs)) for run in runs]
    title = found[0]["name"] if len(found) == 1 else f"{len(found)} runs"
    return page_data(found, f"{title} – raywarp report", live)
