"""`raywarp report`: the page that shows a run, as a file or served on this machine while the run goes on."""

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from raywarp.config.schema import ConfigError
from raywarp.storage import sealed
from raywarp.storage.location import Storage, is_uri

REPORT_FILE = "report.html"


def add_report(commands: Any) -> None:
    """The command `report`."""
    text = "one self-contained HTML page that shows a run: its front, texts, curves, angles, time line and faults"
    more = "The run may be finished, under way or broken: the page shows what is there and says what is missing."
    parser = commands.add_parser("report", help=text, description=f"Write {text}. {more}")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the folder of a run or a sweep, or s3://bucket/prefix; of several runs, or trials, all fronts are drawn together",
    )
    parser.add_argument("--out", metavar="FILE", help=f"the page; default: RUN/{REPORT_FILE}, of several runs ./{REPORT_FILE}")
    parser.add_argument(
        "--serve", action="store_true", help="serve the page on this machine (127.0.0.1 only) and follow the run; Ctrl-C ends it"
    )
    parser.add_argument("--port", type=int, default=0, help="port of --serve; default: any free one")
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    parser.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> None:
    from raywarp.run.terminal import console

    if options.serve:
        from raywarp.report.server import serve

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
    sealed.write_bytes(path, page)
    return str(path), len(page)


def build(runs: Sequence[str], live: bool = False) -> bytes:
    """The page in HTML."""
    from raywarp.report.page import render

    return render(read(runs, live))


def read(runs: Sequence[str], live: bool = False) -> dict[str, Any]:
    """The page's data."""
    from raywarp.report.data import report_data
    from raywarp.report.page import page_data

    members = [member for run in runs for member in _members(run)]
    found = []
    for place, name in members:
        with contextlib.suppress(ConfigError) if name else contextlib.nullcontext():  # a trial that has only just begun
            found.append({**report_data(place, 1 / len(members)), **({"name": name} if name else {})})
    if not found:
        raise ConfigError(f"{', '.join(runs)}: none of its trials has begun")
    several = f"{PurePath(runs[0]).name}, {len(found)} trials" if len(runs) == 1 else f"{len(found)} runs"
    title = found[0]["name"] if len(found) == 1 else several
    return page_data(found, f"{title} – raywarp report", live)


def _members(run: str) -> list[tuple[str, str]]:
    """The places of a sweep's trials, each with its values; of a run itself, and no name but its own."""
    from raywarp.config.search import describe
    from raywarp.sweep.files import SweepFiles

    files = SweepFiles(run)
    names = files.begun()
    return [(files.trial_folder(name), describe(files.record(name, {}).point) or name) for name in names] or [(run, "")]
