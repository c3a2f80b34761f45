"""evidence.json, the page with every number, and the figure, from the committed numbers alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from bench.evidence import ceilings, checks, claims, figures
from bench.evidence.checks import Checked, Residuals
from bench.evidence.claims import CEILING, CLAIMS, OF_BOTH, SHARE_KLS, Claim, Judged, Sample
from bench.evidence.results import Results
from bench.evidence.settings import ARMS, BOTH, TASKS, TINY_BOTH, Settings

from raywarp.storage import sealed

SUMMARY, PAGE = "evidence.json", "evidence/README.md"


def report(results: Results, settings: Settings, where: Path) -> None:
    """Write evidence.json into a folder, and page and figures into its folder evidence."""
    of_seeds = claims.samples(settings, results)
    checked, left = checks.arms(results), checks.residuals(results)
    judged = {name: _judged(claim, of_seeds, checked) for name, claim in CLAIMS.items()}
    entries = {
        name: _entry(CLAIMS[name], parts, checked, _command(settings, name, of_seeds))
        for name, parts in judged.items()
        if parts
    }
    if shares := ceilings.shares(of_seeds):
        entries[CEILING] = _shares_entry(
            of_seeds, shares, checked, _command(settings, CEILING, of_seeds)
        )
    cosines = {arm: _cosine(own) for arm, own in checks.cosines(results).items()}
    measurement = {
        "arms": {name: found.as_json() for name, found in checked.items()},
        "kl_cosine": cosines,
        "residual": {
            "points": left.points,
            "correlation": _number(left.correlation),
            "within_arms": _number(left.within),
        },
    }
    sealed.write_json(
        where / SUMMARY,
        {"settings": settings.as_json(), "measurement": measurement, "claims": entries},
    )
    both = settings.task in (BOTH, TINY_BOTH)
    picture = where / "evidence" / ("preferences.png" if both else "fronts.png")
    if both:
        figures.draw_joint(of_seeds, CLAIMS[OF_BOTH].parts, picture)
    else:
        figures.draw(of_seeds, picture)
    sealed.write_text(where / PAGE, page(entries, checked, left, cosines, picture.name))
    for name, entry in entries.items():
        print(f"{name}: {entry['outcome']}: {entry['effect']} {entry['interval']}")


def _judged(
    claim: Claim, of_seeds: Mapping[int, Sample], checked: Mapping[str, Checked]
) -> list[Judged]:
    """The parts that any seed has, of arms that pass the check."""
    if any(arm in checked and checked[arm].fault for arm in claim.arms):
        return []
    found = [claims.judge(part, of_seeds) for part in claim.parts]
    return [one for one in found if one.effect.per_seed]


def _command(settings: Settings, name: str, of_seeds: Mapping[int, Sample]) -> str:
    task = f" --task {settings.task}" if settings.task in TASKS[1:] else ""
    seeds = max(of_seeds, default=1)
    return (
        f".venv/bin/python tests/bench/evidence{task} --claim {name} --seeds {seeds}"
        " --results runs/evidence-again"
    )


def _slopes(arms: Sequence[str], checked: Mapping[str, Checked]) -> dict[str, Any]:
    own = [checked[arm].slope for arm in arms if arm in checked]
    return {"slope_min": round(min(own), 4), "slope_max": round(max(own), 4)}


def _entry(
    claim: Claim, parts: Sequence[Judged], checked: Mapping[str, Checked], command: str
) -> dict[str, Any]:
    rows = {judged.part.name: judged.as_json() for judged in parts}
    first = rows[parts[0].part.name]
    return {
        "claim": claim.text,
        **first,
        **_slopes(claim.arms, checked),
        "command": command,
        "parts": rows,
    }


def _shares_entry(
    of_seeds: Mapping[int, Sample],
    shares: Mapping[str, Any],
    checked: Mapping[str, Checked],
    command: str,
) -> dict[str, Any]:
    arms = tuple(dict.fromkeys(row["arm"] for row in shares.values()))
    return {
        "claim": (
            f"WARP's front lies on the ceiling at {SHARE_KLS[1]:g} nats; the shares of the"
            " ceiling's gain are of every line."
        ),
        **ceilings.effect(of_seeds).as_json(),
        "kl_range": [SHARE_KLS[0], SHARE_KLS[-1]],
        **_slopes(arms, checked),
        "command": command,
        "shares": dict(shares),
    }


def _cosine(own: Sequence[float]) -> dict[str, Any]:
    return {"mean": round(float(np.mean(own)), 4), "per_seed": [round(c, 4) for c in own]}


def _number(value: float) -> float | None:
    return round(value, 4) if np.isfinite(value) else None


def page(
    entries: Mapping[str, Any],
    checked: Mapping[str, Checked],
    left: Residuals,
    cosines: Mapping[str, Any],
    picture: str,
) -> str:
    """All comparisons and checks, in Markdown."""
    lines = [
        "# Every comparison of the study, and the check of its measurement",
        "",
        "Written by `.venv/bin/python tests/bench/evidence --redraw` from the numbers beside it."
        " What it means is in [docs/results.md](../../../docs/results.md).",
        "",
        f"![Fronts]({picture})",
        "",
        "## The measurement",
        "",
        *_check_lines(checked, left, cosines),
    ]
    for name, entry in entries.items():
        lines += ["", f"## {name}: {entry['outcome']}", "", entry["claim"], ""]
        lines += _share_lines(entry) if name == CEILING else _part_lines(entry)
        lines += ["", f"Redo it: `{entry['command']}`."]
    return "\n".join([*lines, ""])


def _check_lines(
    checked: Mapping[str, Checked], left: Residuals, cosines: Mapping[str, Any]
) -> list[str]:
    rows = [
        "The slope is of the sampler's log-ratios on the trainer's. The KL ratio is the mean"
        " log-ratio of the sampled texts, both log-probs by the sampler, over the KL that the"
        " trainer reports for them. Both are pooled over an arm's points, with standard errors."
        f" An arm with a slope outside {checks.SLOPES[0]:g} to {checks.SLOPES[1]:g}, or a KL ratio"
        f" surely outside {checks.KL_RATIOS[0]:g} to {checks.KL_RATIOS[1]:g}, is not reported.",
        "",
        "| arm | points | slope | gap, nats per token | KL ratio | norm of ΔW | KL cosine |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in ARMS:
        if name in checked:
            own = checked[name]
            cosine = f"{cosines[name]['mean']:.2f}" if name in cosines else "–"
            rows.append(
                f"| {name} | {own.points} | {own.slope:.3f} ± {own.slope_error:.3f} |"
                f" {own.gap:.3f} | {own.kl_ratio:.3f} ± {own.kl_ratio_error:.3f} |"
                f" {own.norm[0]:.2f} to {own.norm[1]:.2f} | {cosine} |"
            )
    return [
        *rows,
        "",
        f"Up to {checks.RESIDUAL_KL:g} nats, {left.points} points: what reward is left beside KL"
        f" has a correlation of {left.correlation:+.2f} with log ‖ΔW‖, and of {left.within:+.2f}"
        " among the lines of one arm and seed. (.90 with rounded weights.)",
    ]


def _part_lines(entry: Mapping[str, Any]) -> list[str]:
    rows = [
        "| comparison | outcome | effect | over seeds | over prompts | per seed | control | VADER"
        " | KLs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, part in entry["parts"].items():
        cells = [
            name,
            part["outcome"],
            _short(part["effect"]),
            _range(part["interval"]),
            _range(part["interval_over_prompts"]),
            ", ".join(map(_short, part["per_seed"])),
            f"{_short(part['control']['effect'])} {_range(part['control']['interval'])}",
            f"{_short(part['vader']['effect'])} {_range(part['vader']['interval'])}",
            _range(part["kl_range"], "g"),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def _share_lines(entry: Mapping[str, Any]) -> list[str]:
    head = [f"at {kl:g}" for kl in SHARE_KLS]
    rows = [f"| line | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    for row in entry["shares"].values():
        cells = [_share(row["share"].get(f"{kl:g}")) for kl in SHARE_KLS]
        rows.append(f"| {row['label']} | {' | '.join(cells)} |")
    return rows


def _share(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "–"
    low, high = row["interval"]
    interval = "" if low is None else f" [{low:.0%}, {high:.0%}]"
    return f"{row['share']:.0%}{interval}".replace("%", " %")


def _range(pair: Sequence[float | None], form: str = "+.3f") -> str:
    known = [value for value in pair if value is not None]
    return f"[{', '.join(format(value, form) for value in known)}]" if len(known) == 2 else "–"


def _short(number: float | None) -> str:
    return "–" if number is None else f"{number:+.3f}"
