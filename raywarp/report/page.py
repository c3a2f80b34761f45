"""The report as one HTML file that needs nothing else: markup, style, scripts and charting library from assets/, and the data as JSON."""

import base64
import gzip
import hashlib
import html
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from raywarp.report.page_json import to_json
from raywarp.storage.sealed import content_key

SCRIPTS = ("dom.js", "charts.js", "front.js", "texts.js", "curves.js", "geometry.js", "timeline.js", "page.js")
PLAIN = 1_000_000  # characters of JSON that stand in the page as they are, for whoever wants to read or parse them there
LIBRARY = "echarts.min.js"  # Apache ECharts 6.1.0, as npm has it; see assets/echarts-LICENSE


def page_data(runs: Sequence[Mapping[str, Any]], title: str, live: bool = False) -> dict[str, Any]:
    """What page.js reads: one run, or several, whose fronts are drawn together (a sweep).

    Args:
        runs: as report_data makes them.
        live: the page is served, and asks for new data now and then.
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
    """The whole page, in UTF-8. Its content security policy lets nothing run but these very scripts, and nothing be fetched."""
    style, library, script = asset("page.css"), asset(LIBRARY), "\n".join(map(asset, SCRIPTS))
    policy = (
        f"default-src 'none'; script-src {_source(library)} {_source(script)}; style-src {_source(style)}; "
        f"style-src-attr 'unsafe-inline'; img-src data:; connect-src {chr(39)}{'self' if data['live'] else 'none'}{chr(39)}; "
        "base-uri 'none'; form-action 'none'"
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
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], asset("page.html")).encode(errors="replace")


def _carried(text: str) -> tuple[str, str]:
    """How the data travels in the page, its type and content: as it is, or packed where that saves megabytes."""
    if len(text) < PLAIN:
        return "application/json", text
    return "application/gzip", base64.b64encode(gzip.compress(text.encode(), 6, mtime=0)).decode()


def asset(name: str) -> str:
    """A file of assets/."""
    return (files("raywarp.report") / "assets" / name).read_text(encoding="utf-8")


def _source(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
