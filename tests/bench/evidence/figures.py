"""One picture per claim: its fronts in reward and in the control score, and every comparison with
its interval.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from bench.evidence.claims import Judged
from bench.evidence.comparisons import Sample
from bench.evidence.curves import CURVES, SFT, Curve

from raywarp.storage.sealed import write_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = [
    "#3b6fb6",
    "#c76a2b",
    "#3f8f5b",
    "#8a56a3",
    "#b23a48",
    "#6b6b6b",
    "#b59b1f",
    "#3aa6a6",
    "#d47fa6",
    "#1f3a5f",
    "#8c564b",
]
TICKS = (0, 0.3, 1, 2, 4, 6, 10, 15, 20, 30, 40, 60)  # nats
Panel = Callable[[Any, Sequence[Sample], Sequence[Curve]], None]


def draw(judged: Judged, of_seeds: Mapping[int, Sample], path: Path) -> None:
    """Curves are means over the seeds that have them, bands 95 % over their prompts."""
    own, extra = list(of_seeds.values()), EXTRA.get(judged.claim.name, ())
    widths = (1, 1, *(1 for _ in extra), 1.1)
    rows = [name for name, effect in judged.effects.items() if effect.per_seed]
    size = (5.6 * sum(widths), max(5.2, 0.9 + 0.4 * len(rows)))
    figure, all_axes = plt.subplots(
        1, len(widths), figsize=size, dpi=75, width_ratios=widths, layout="constrained"
    )
    curves = [
        curve for curve in judged.claim.curves if SFT in curve.also and _with(own, curve.front)
    ]
    runs = list(dict.fromkeys(map(_run, curves)))
    for axes, score, label in zip(
        all_axes[:2], ("reward", "control"), ("reward", "control score"), strict=True
    ):
        for curve in curves:
            n = runs.index(_run(curve))
            _front(
                axes,
                curve,
                own,
                score,
                COLOURS[n % len(COLOURS)],
                "-o" if n < len(COLOURS) else "-.^",
            )
        # in which fronts are straight between points: see reward_at
        axes.set_xscale("function", functions=(_signed_root, _signed_square))
        axes.set(
            xlabel="KL(policy ‖ SFT), nats per completion, √ scale",
            ylabel=f"{label}, SFT standard deviations",
        )
        axes.set(xticks=[tick for tick in TICKS if tick <= axes.dataLim.xmax], xlim=(-0.01, None))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
    if curves:
        all_axes[0].legend(fontsize=7.5, loc="lower right")
    for axes, panel in zip(all_axes[2:], extra, strict=False):
        panel(axes, own, curves)
    _forests(figure, all_axes[-1], judged, rows)
    measured = [
        number
        for number, sample in of_seeds.items()
        if judged.claim.parts[0].is_measured(sample.seed)
    ]
    seeds = ", ".join(map(str, measured)) or "none yet"
    figure.suptitle(
        f"{judged.claim.name}: {judged.claim.text}  →  {judged.verdict} (seeds: {seeds})",
        fontsize=12,
    )
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_bytes(path, image.getvalue())
    plt.close(figure)


def _front(
    axes: Any, curve: Curve, of_seeds: Sequence[Sample], score: str, colour: str, style: str
) -> None:
    own = _with(of_seeds, curve.front)
    kl, value = (
        np.mean(both, axis=0)
        for both in zip(*(sample.front(curve, score) for sample in own), strict=True)
    )
    order = np.argsort(kl[0])
    low, high = np.percentile(value[1:], [2.5, 97.5], axis=0)
    trained = "training" in curve.name
    label = curve.label + (
        f" ({len(own)} of {len(of_seeds)} seeds)" if len(own) < len(of_seeds) else ""
    )
    axes.plot(
        kl[0][order],
        value[0][order],
        "--s" if trained else style,
        color=colour,
        markersize=4,
        linewidth=1.3,
        label=label,
    )
    axes.fill_between(kl[0][order], low[order], high[order], color=colour, alpha=0.1, linewidth=0)


def _run(curve: Curve) -> str:
    """What has one colour: a policy's training, and its end scaled by η, which is a point of
    both.
    """
    shared = [point for point in curve.also if point != SFT]
    return shared[0].partition("@")[0] if shared else curve.name


def _signed_root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))


def _signed_square(x: Any) -> Any:
    return np.sign(x) * np.square(x)


def _forests(figure: Any, axes: Any, judged: Judged, names: Sequence[str]) -> None:
    """In the place of the axes a forest per unit, one below the other."""
    units = {part.name: part.unit.partition(" of ")[0] for part in judged.claim.parts}
    groups = {
        unit: [name for name in names if units[name] == unit]
        for unit in dict.fromkeys(units[name] for name in names)
    }
    grid = axes.get_subplotspec().subgridspec(
        len(groups), 1, height_ratios=[len(group) + 1 for group in groups.values()]
    )
    axes.remove()
    for place, (unit, group) in zip(grid, groups.items(), strict=True):
        _forest(figure.add_subplot(place), judged, group, unit)


def _forest(axes: Any, judged: Judged, names: Sequence[str], unit: str) -> None:
    """A row per comparison that is measured, the deciding ones in black; a dot per seed."""
    for row, name in enumerate(reversed(names)):
        effect, decides = judged.effects[name], name in judged.parts
        axes.plot(
            [effect.low, effect.high],
            [row, row],
            color="black" if decides else "#8a8a8a",
            linewidth=2,
        )
        axes.plot(effect.value, row, "D", color="black" if decides else "#8a8a8a", markersize=5)
        axes.plot(
            effect.per_seed, [row + 0.2] * len(effect.per_seed), ".", color="#3b6fb6", markersize=4
        )
        verdict = f"  [{judged.parts[name]}]" if decides else ""
        axes.text(
            0.01,
            row + 0.32,
            name + verdict,
            transform=axes.get_yaxis_transform(),
            fontsize=7,
            va="bottom",
        )
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(yticks=[], ylim=(-0.7, len(names)), xlabel=f"{unit}, 95 % interval, a dot per seed")
    axes.grid(alpha=0.3, axis="x")


def _unequal_weights(axes: Any, of_seeds: Sequence[Sample], _: Sequence[Curve]) -> None:
    """H3: reward over λ at η = 1, from policy 1 to policy 2; not at equal KL."""
    for colour, name, middle in ((COLOURS[0], "slerp", "slerp@1"), (COLOURS[1], "lerp", "lerp@1")):
        points = [
            "policy-1@1",
            f"{name}-weights@0.25",
            middle,
            f"{name}-weights@0.75",
            "policy-2@1",
        ]
        own = _with(of_seeds, points)
        for quantity, style in (("reward", "-o"), ("kl", ":x")):
            if own:
                values = np.mean(
                    [[sample.mean(point, quantity)[0] for point in points] for sample in own],
                    axis=0,
                )
                label = f"{name.upper()}, " + ("reward" if quantity == "reward" else "KL / 10 nats")
                axes.plot(
                    [0, 0.25, 0.5, 0.75, 1],
                    values if quantity == "reward" else values / 10,
                    style,
                    color=colour,
                    label=label,
                )
    axes.set(
        xlabel="λ, from policy 1 to policy 2", title="unequal weights at η = 1 (not at equal KL)"
    )
    _finish(axes)


def _along_eta(axes: Any, of_seeds: Sequence[Sample], _: Sequence[Curve]) -> None:
    """H5: what η does to reward and KL."""
    curve = CURVES["slerp"]
    own, etas = _with(of_seeds, curve.front), [0.0, *curve.values]
    if own:
        kl, reward = (
            np.mean(both, axis=0)[0]
            for both in zip(*(sample.front(curve) for sample in own), strict=True)
        )
        axes.plot(
            etas,
            reward / (reward[-1] or 1.0),
            "-o",
            color=COLOURS[0],
            label="reward gain, share of that at η = 1",
        )
        axes.plot(etas, kl / (kl[-1] or 1.0), "-s", color=COLOURS[1], label="KL, likewise")
        axes.plot(etas, etas, ":", color="black", linewidth=0.8, label="η")
        axes.plot(etas, np.square(etas), "--", color="black", linewidth=0.8, label="η²")
    axes.set(xlabel="η", title="along the LITI line")
    _finish(axes)


def _angles(axes: Any, of_seeds: Sequence[Sample], curves: Sequence[Curve]) -> None:
    """H4: between the task vectors of each block."""
    _per_block(axes, of_seeds, curves, lambda block: np.mean(block["angles"]))
    axes.axhline(90, color="black", linewidth=0.8)
    axes.set(xlabel="block", ylabel="angle between task vectors, degrees", title="angles per block")


def _norm_ratios(axes: Any, of_seeds: Sequence[Sample], curves: Sequence[Curve]) -> None:
    """H4: of the task vectors of each block, the smaller norm over the larger one."""
    _per_block(axes, of_seeds, curves, lambda block: min(block["norms"]) / max(block["norms"]))
    axes.set(xlabel="block", ylabel="norm ratio of task vectors", title="norm ratios per block")


def _per_block(
    axes: Any, of_seeds: Sequence[Sample], curves: Sequence[Curve], measure: Callable[[Any], float]
) -> None:
    """A line per curve's arm, in the curve's colour: the mean over seeds, in a band from the least
    to the largest.
    """
    for n, curve in enumerate(curves):
        facts = [
            sample.seed.facts[curve.arm]["geometry"].values()
            for sample in of_seeds
            if curve.arm in sample.seed.facts
        ]
        if facts:
            values = np.array([[measure(block) for block in blocks] for blocks in facts])
            axes.plot(values.mean(0), color=COLOURS[n], linewidth=1.2, label=curve.label)
            axes.fill_between(
                range(values.shape[1]),
                values.min(0),
                values.max(0),
                color=COLOURS[n],
                alpha=0.15,
                linewidth=0,
            )
    _finish(axes)


def _finish(axes: Any) -> None:
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7.5)


def _with(of_seeds: Sequence[Sample], points: Sequence[str]) -> list[Sample]:
    return [sample for sample in of_seeds if all(point in sample.seed.points for point in points)]


EXTRA: dict[str, tuple[Panel, ...]] = {
    "H3": (_unequal_weights,),
    "H5": (_along_eta,),
    "H4": (_angles, _norm_ratios),
}
