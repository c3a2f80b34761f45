"""Figures of a run: the front as a picture and as a table, and texts side by side."""

import io
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from raywarp.run.ceiling import Ceiling
from raywarp.run.points import Point
from raywarp.storage import sealed

FRONT_HEADINGS = (
    *("point", "reward", "KL, nats", "control", "distinct-2", "tokens", "EOS", "retention"),
)
SHARE_HEADING = "of ceiling"  # after the KL, where there is a ceiling
CEILING_COLOUR = "#8a5a9e"


def plot_front(
    points: Sequence[Point],
    chosen: Point,
    path: Path,
    title: str,
    ceiling: Ceiling | None = None,
) -> None:
    """Write front.png: reward over KL to the SFT model, with 95 % intervals.

    The LITI front is a line, dashed and hollow beyond SLERP. The ceiling is another one, which has
    best of n beside it. Every point has its name. Merges with other shares of the policies are not
    drawn; plot_preferences draws them.
    """
    plt = _pyplot()
    figure, axes = plt.subplots(figsize=(8, 5.5), dpi=150, layout="constrained")
    points = [point for point in points if not point.weights]
    line = sorted((p for p in points if p.eta is not None), key=lambda p: p.eta or 0)
    inside = [p for p in line if not p.extrapolated]
    parts = [(inside, "-", "LITI front (SFT to SLERP)")]
    if len(inside) < len(line):
        parts.append((line[len(inside) - 1 :], "--", "extrapolated, η above 1"))
    for part, style, label in parts:
        axes.plot(
            [p.kl for p in part],
            [p.reward for p in part],
            style,
            color="#3b6fb6",
            linewidth=1.5,
            label=label,
        )
    for point in points:
        colour = (
            "#3b6fb6"
            if point.eta is not None
            else ("#c76a2b" if point.name == "lerp" else "#7a7a7a")
        )
        marker = "o" if point.eta is not None else ("D" if point.name == "lerp" else "s")
        axes.errorbar(
            point.kl,
            point.reward,
            yerr=point.reward_ci,
            xerr=point.kl_ci,
            fmt=marker,
            color=colour,
            markerfacecolor="white" if point.extrapolated else colour,
            capsize=3,
            markersize=6,
        )
    _name_points(axes, points)
    if ceiling:
        draw_ceiling(axes, ceiling)
    axes.plot(
        chosen.kl,
        chosen.reward,
        "o",
        markersize=14,
        fillstyle="none",
        color="black",
        label=f"chosen: {chosen.name}",
    )
    axes.set_xlabel("KL(policy ‖ SFT), nats per completion")
    axes.set_ylabel("reward (standardised, 95 % intervals)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    axes.margins(x=0.12, y=0.12)
    _save(figure, path)


def _pyplot() -> Any:
    """Return matplotlib's pyplot, which draws without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def _save(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png")
    sealed.write_bytes(path, image.getvalue())
    _pyplot().close(figure)


def plot_preferences(
    points: Sequence[Point], front: Sequence[str], chosen: Point, path: Path
) -> None:
    """Write preferences.png: each pair of up to three rewards, with the merges' KL as the colour.

    A point without one of a pair's rewards is not drawn.

    Args:
        points: of the whole front, of which the first is SFT.
        front: names of the points of the preference front.
    """
    plt = _pyplot()
    pairs = list(combinations(list(points[0].rewards)[:3], 2))
    figure, panels = plt.subplots(
        *(1, len(pairs)), figsize=(1 + 6 * len(pairs), 5), dpi=150, layout="constrained"
    )
    by_name = {point.name: point for point in points}
    merges = [by_name[name] for name in front]
    policies = [p for p in points if p.name.startswith("policy ") and not p.weights]
    others = [points[0], *policies]
    colours = {"vmin": 0.0, "vmax": max(point.kl for point in (*merges, *others))}
    for axes, (x, y) in zip([panels] if len(pairs) == 1 else panels, pairs, strict=True):
        mixed, single, ring = (
            [p for p in some if {x, y} <= p.rewards.keys()] for some in (merges, others, [chosen])
        )
        if len(points[0].rewards) == 2:
            axes.plot(*_axes_of(mixed, x, y), color="#3b6fb6", linewidth=1.2, zorder=1)
        for point in mixed:
            errors = {"xerr": point.rewards_ci[x], "yerr": point.rewards_ci[y]}
            at = (point.rewards[x], point.rewards[y])
            axes.errorbar(*at, **errors, color="#b8b8b8", linewidth=0.8, zorder=1)
            _name(axes, "/".join(f"{share:.2g}" for share in point.weights.values()), at)
        for some, marker in ((mixed, "o"), (single, "s")):
            drawn = axes.scatter(
                *_axes_of(some, x, y), c=[p.kl for p in some], marker=marker, zorder=2, **colours
            )
        for point in single:
            _name(axes, point.name, (point.rewards[x], point.rewards[y]), -12)
        axes.plot(
            *_axes_of(ring, x, y),
            "o",
            markersize=13,
            fillstyle="none",
            color="black",
            label=f"chosen: {chosen.name}",
        )
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        axes.margins(0.12)
    axes.legend(loc="lower left")
    figure.colorbar(drawn, label="KL(policy ‖ SFT), nats per completion")
    figure.suptitle("rewards of merges with other shares of the policies, 95 % intervals")
    _save(figure, path)


def _axes_of(points: Sequence[Point], x: str, y: str) -> tuple[list[float], list[float]]:
    return [point.rewards[x] for point in points], [point.rewards[y] for point in points]


def _name(axes: Any, text: str, at: tuple[float, float], below: int = 6) -> None:
    axes.annotate(text, at, textcoords="offset points", xytext=(6, below), fontsize=8)


def draw_ceiling(axes: Any, ceiling: Ceiling) -> None:
    """Draw a ceiling as a line with its band, and best of n as small points with their names."""
    if ceiling.prompts > 1:  # else it has no interval
        low, high = (
            [r + sign * half for r, half in zip(ceiling.reward, ceiling.reward_ci, strict=True)]
            for sign in (-1, 1)
        )
        axes.fill_between(ceiling.kl, low, high, color=CEILING_COLOUR, alpha=0.12, linewidth=0)
    axes.plot(
        ceiling.kl,
        ceiling.reward,
        color=CEILING_COLOUR,
        linewidth=1.3,
        linestyle="--",
        label="ceiling: what KL can buy",
    )
    for best in ceiling.best_of:
        axes.errorbar(
            best.kl,
            best.reward,
            yerr=best.reward_ci if ceiling.prompts > 1 else None,
            fmt="^",
            color=CEILING_COLOUR,
            markersize=3.5,
            linewidth=0.8,
        )
        axes.annotate(
            f"best of {best.n}",
            (best.kl, best.reward),
            textcoords="offset points",
            # the last one may stand at the picture's edge
            xytext=(5, -9) if best != ceiling.best_of[-1] else (-5, 5),
            ha="left" if best != ceiling.best_of[-1] else "right",
            fontsize=7,
            color=CEILING_COLOUR,
        )


def _name_points(axes: object, points: Sequence[Point]) -> None:
    """Write the names of front points above them, and the names of other points below.

    Neighbours of different kinds then do not cover each other.
    """
    for place, point in enumerate(sorted(points, key=lambda p: p.kl)):
        above = point.eta is not None
        offset = (-6, 9) if above else (6, -15 - 10 * (place % 2))
        axes.annotate(  # type: ignore[attr-defined]
            point.name,
            (point.kl, point.reward),
            textcoords="offset points",
            xytext=offset,
            ha="right" if above else "left",
            fontsize=9,
        )


def front_rows(points: Sequence[Point], ceiling: Ceiling | None = None) -> list[list[str]]:
    """Return a front as a table: the headings, then one row for each point.

    Columns that are empty below their heading are left out.
    """
    names = list(points[0].rewards)
    headings = [*FRONT_HEADINGS[:2], *names, *FRONT_HEADINGS[2:3]]
    headings += [*([SHARE_HEADING] if ceiling else []), *FRONT_HEADINGS[3:]]
    rows = [headings, *(_cells(point, names, ceiling) for point in points)]
    kept = [n for n in range(len(headings)) if any(row[n] for row in rows[1:])]
    return [[row[n] for n in kept] for row in rows]


def _cells(point: Point, names: Sequence[str], ceiling: Ceiling | None) -> list[str]:
    return [
        point.title,
        _interval(point.reward, point.reward_ci),
        *(_interval(point.rewards.get(name), point.rewards_ci.get(name, 0.0)) for name in names),
        _interval(point.kl, point.kl_ci),
        *([share_cell(point, ceiling)] if ceiling else []),
        _interval(point.control, point.control_ci),
        f"{point.distinct_2:.2f}",
        f"{point.length:.1f}",
        f"{point.eos_rate:.0%}",
        "" if point.retention is None else f"{point.retention:+.2f} ± {point.retention_ci:.2f}",
    ]


def _interval(mean: float | None, half: float | None) -> str:
    return "" if mean is None else f"{mean:.2f} ± {half:.2f}"


def share_cell(point: Point, ceiling: Ceiling) -> str:
    """Return a point's share of the ceiling at its own KL, as text.

    It is empty where the ceiling gains no more than its error, as at the SFT model.
    """
    if point.kl > ceiling.end:
        return "not measured"
    share = ceiling.share(point.kl, point.reward)
    return "" if share is None else f"{100 * share:.0f} %"


def ceiling_table(ceiling: Ceiling) -> Table:
    """Return the ceiling and best of n as a table for the terminal, by rising KL."""
    title = (
        f"what KL can buy, from {ceiling.completions} SFT completions of each of"
        f" {ceiling.prompts} prompts; ± is half of a 95 % interval"
    )
    table = Table(box=SIMPLE_HEAD, title=title, title_justify="left")
    for heading in ("KL, nats", "ceiling", "best of n", "n"):
        table.add_column(heading, justify="right", no_wrap=True)
    best = {one.kl: one for one in ceiling.best_of}
    whole = {step / 2 for step in range(1, 40) if step / 2 <= ceiling.end}
    for kl in sorted({0.0, ceiling.end, *whole, *best}):
        limit, one = ceiling.at(kl), best.get(kl)
        table.add_row(
            f"{kl:.2f}",
            f"{limit[0]:.2f} ± {limit[1]:.2f}" if limit else "not measured",
            f"{one.reward:.2f} ± {one.reward_ci:.2f}" if one else "",
            str(one.n) if one else "",
        )
    return table


def steps_in_words(steps: Iterable[int]) -> str:
    """Return how many steps policies take: "40", or "8 to 12" where they differ."""
    counts = sorted(steps)
    return " to ".join(f"{count}" for count in dict.fromkeys((counts[0], counts[-1])))


def footnote(points: Sequence[Point]) -> str:
    """Return what a † means, if there is one among the points."""
    extrapolated = any(point.extrapolated for point in points)
    return ", † is extrapolated beyond SLERP (η above 1)" if extrapolated else ""


def front_table(points: Sequence[Point], chosen: Point, ceiling: Ceiling | None = None) -> Table:
    """Return the front as a table for the terminal, in the order of front.json."""
    title = (
        "KL–reward front on held-out prompts; KL to SFT, ± is half of a 95 % interval, * is chosen"
    )
    table = Table(box=SIMPLE_HEAD, title=title + footnote(points), title_justify="left")
    headings, *rows = front_rows(points, ceiling)
    for n, heading in enumerate(headings):
        # A narrow terminal breaks intervals into two lines, and cuts nothing.
        justify: Literal["left", "right"] = "right" if n else "left"
        table.add_column(heading, justify=justify, no_wrap=not n, overflow="fold")
    for point, (name, *values) in zip(points, rows, strict=True):
        table.add_row(name + (" *" if point == chosen else ""), *values)
    return table


def print_samples(console: Console, rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print prompts with their completions side by side.

    Args:
        rows: each has "prompt" and one entry per column.
        columns: names of the points whose completions are shown.
    """
    table = Table(
        box=SIMPLE_HEAD,
        title="the same prompts, before and after",
        title_justify="left",
        show_lines=True,
    )
    table.add_column("prompt")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*(_one_line(row[key]) for key in ("prompt", *columns)))
    console.print(table)


def _one_line(text: str) -> str:
    """Return the text in one line, without what a terminal or rich would interpret."""
    printable = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    return printable.replace("[", "\\[")
