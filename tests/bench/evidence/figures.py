"""One picture per claim: its fronts in reward and in the control score, and every comparison with its interval."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from bench.evidence.claims import Judged, Sample
from bench.evidence.curves import SFT, Curve

from raywarp.store import write_bytes

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
    "#a0c55f",
]


def draw(judged: Judged, of_seeds: Mapping[int, Sample], path: Path) -> None:
    """Curves are means over the seeds that have them, bands 95 % over prompts and seeds."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5.2), dpi=80, width_ratios=(1, 1, 1.1), layout="constrained")
    curves = [curve for curve in judged.claim.curves if SFT in curve.also]
    for axes, score, label in ((left, "reward", "reward"), (middle, "control", "control reward model")):
        for colour, curve in zip(COLOURS * 2, curves, strict=False):
            _front(axes, curve, list(of_seeds.values()), score, colour)
        axes.set(xlabel="KL(policy ‖ SFT), nats per completion", ylabel=f"{label}, SFT standard deviations")
        axes.grid(alpha=0.3)
    left.legend(fontsize=7.5, loc="lower right")
    _forest(right, judged)
    seeds = ", ".join(map(str, of_seeds)) or "none yet"
    figure.suptitle(f"{judged.claim.name}: {judged.claim.text}  →  {judged.verdict} (seeds: {seeds})", fontsize=12)
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_bytes(path, image.getvalue())
    plt.close(figure)


def _front(axes: Any, curve: Curve, of_seeds: list[Sample], score: str, colour: str) -> None:
    own = [sample for sample in of_seeds if all(point in sample.seed.points for point in curve.front)]
    if not own:
        return
    kl, value = (np.mean(both, axis=0) for both in zip(*(sample.front(curve, score) for sample in own), strict=True))
    order = np.argsort(kl[0])
    low, high = np.percentile(value[1:], [2.5, 97.5], axis=0)
    trained = "training" in curve.name
    axes.plot(kl[0][order], value[0][order], "--s" if trained else "-o", color=colour, markersize=4, linewidth=1.3, label=curve.label)
    axes.fill_between(kl[0][order], low[order], high[order], color=colour, alpha=0.1, linewidth=0)


def _forest(axes: Any, judged: Judged) -> None:
    """A row per comparison, the deciding ones in black; a dot per seed."""
    names = list(judged.effects)
    for row, (name, effect) in enumerate(reversed(judged.effects.items())):
        decides = name in judged.parts
        if effect.per_seed:
            axes.plot([effect.low, effect.high], [row, row], color="black" if decides else "#8a8a8a", linewidth=2)
            axes.plot(effect.value, row, "D", color="black" if decides else "#8a8a8a", markersize=5)
            axes.plot(effect.per_seed, [row + 0.25] * len(effect.per_seed), ".", color="#3b6fb6", markersize=4)
        verdict = f"  [{judged.parts[name]}]" if decides else ""
        axes.text(0.01, row + 0.42, name + verdict, transform=axes.get_yaxis_transform(), fontsize=7, va="bottom")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(yticks=[], ylim=(-0.7, len(names)), xlabel="effect (see evidence.json for units), 95 % interval")
    axes.grid(alpha=0.3, axis="x")
