"""The report as one HTML file that needs nothing else.

Markup, style, scripts and charting library come from assets/. The data is JSON in the page.
"""

import base64
import contextlib
import gzip
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Any

from raywarp.config.schema import ConfigError
from raywarp.identity import content_key
from raywarp.report.page_json import to_json
from raywarp.storage import sealed
from raywarp.storage.location import Storage, is_uri

SCRIPTS = (
    "dom.js",
    "charts.js",
    "front.js",
    "preferences.js",
    "texts.js",
    "curves.js",
    "geometry.js",
    "timeline.js",
    "page.js",
)
# JSON of fewer characters stands in the page as it is, so that people can read and parse it there.
PLAIN = 1_000_000
LIBRARY = "echarts.min.js"  # Apache ECharts 6.1.0, from npm; see assets/echarts-LICENSE


def page_data(runs: Sequence[Mapping[str, Any]], title: str, live: bool = False) -> dict[str, Any]:
    """Return what page.js reads: the data of one run or of several.

    The fronts of several runs (a sweep) are drawn together.

    Args:
        runs: results of report_data.
        title: title of the page.
        live: whether the page is served and asks for new data from time to time.
    """
    return {
        "title": title,
        "version": version("raywarp"),
        "made": datetime.now(UTC).timestamp(),
        "tag": f'"{content_key(list(runs))}"',
        "live": live,
        "runs": list(runs),
    }


def render(data: Mapping[str, Any]) -> bytes:
    """Return the whole page, in UTF-8.

    Its content security policy lets only the page's own scripts run. A live page may fetch from its
    own server; any other page may fetch nothing.
    """
    style, library, script = asset("page.css"), asset(LIBRARY), "\n".join(map(asset, SCRIPTS))
    policy = (
        f"default-src 'none'; script-src {_source(library)} {_source(script)}; style-src"
        f" {_source(style)}; style-src-attr 'unsafe-inline'; img-src data:; connect-src"
        f" {chr(39)}{'self' if data['live'] else 'none'}{chr(39)}; base-uri 'none'; form-action"
        " 'none'"
    )
    kind, content = _carried(to_json(data))
    parts = {
        "policy": policy,
        "title": html.escape(data["title"]),
        "style": style,
        "kind": kind,
        "data": content,
        "library": library,
        "script": script,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], asset("page.html")).encode(
        errors="replace"
    )


def _carried(text: str) -> tuple[str, str]:
    """Return the type and content of the data in the page.

    The data is plain JSON, or compressed where that saves megabytes.
    """
    if len(text) < PLAIN:
        return "application/json", text
    return "application/gzip", base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def asset(name: str) -> str:
    """Return the text of a file in assets/."""
    return (files("raywarp.report") / "assets" / name).read_text(encoding="utf-8")


def _source(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


REPORT_FILE = "report.html"


def save_report(runs: Sequence[str], out: str | None = None) -> tuple[str, int]:
    """Write the page of one run or of several; return its place, and its size in bytes.

    Args:
        runs: places of runs or sweeps.
        out: the file. By default it is report.html, in the run if there is only one.

    Raises:
        ConfigError: there is no run, or the page cannot be written there.
        StoreError: something cannot be read or written.
    """
    page = build(runs)
    if out is None and len(runs) == 1:
        storage = Storage(runs[0])
        storage.write(REPORT_FILE, page)
        return (
            str(storage.folder / REPORT_FILE)
            if storage.folder
            else f"{storage.uri.partition('?')[0].rstrip('/')}/{REPORT_FILE}"
        ), len(page)
    out = out or REPORT_FILE
    if is_uri(out):
        raise ConfigError(f"--out={out} is no file of this machine")
    path = Path(out).absolute()
    if path.is_dir():
        raise ConfigError(
            f"--out={out} is a folder; name a file in it, for example {path / REPORT_FILE}"
        )
    sealed.write_bytes(path, page)
    return str(path), len(page)


def build(runs: Sequence[str], live: bool = False) -> bytes:
    """Return the page as HTML."""
    from raywarp.report.page import render

    return render(read(runs, live))


def read(runs: Sequence[str], live: bool = False) -> dict[str, Any]:
    """Return the page's data."""
    from raywarp.report.data import report_data
    from raywarp.report.page import page_data

    members = [member for run in runs for member in _members(run)]
    found = []
    for place, name in members:
        # A trial that has only just begun may hold no run yet.
        with contextlib.suppress(ConfigError) if name else contextlib.nullcontext():
            found.append(
                {**report_data(place, 1 / len(members)), **({"name": name} if name else {})}
            )
    if not found:
        raise ConfigError(f"{', '.join(runs)}: none of its trials has begun")
    several = (
        f"{PurePath(runs[0]).name}, {len(found)} trials" if len(runs) == 1 else f"{len(found)} runs"
    )
    title = found[0]["name"] if len(found) == 1 else several
    return page_data(found, f"{title} – raywarp report", live)


def _members(run: str) -> list[tuple[str, str]]:
    """Return (place, name) of each trial of a sweep, whose name is its values.

    A run is its own only member, and its name is empty.
    """
    from raywarp.config.search import describe
    from raywarp.sweep.files import SweepFiles

    files = SweepFiles(run)
    names = files.begun()
    return [
        (files.trial_folder(name), describe(files.record(name, {}).point) or name) for name in names
    ] or [(run, "")]
