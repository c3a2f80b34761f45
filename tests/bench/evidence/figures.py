"""The study's pictures: fronts at equal KL with their ceiling, and two rewards at one KL; means
over the seeds.
"""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from bench.evidence import ceilings, fronts
from bench.evidence.claims import Part, Sample
from bench.evidence.curves import CURVES, SFT
from bench.evidence.fronts import Array

from raywarp.storage.sealed import write_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLOURS = ("#3b6fb6", "#c76a2b", "#3f8f5b", "#8a56a3", "#b23a48", "#6b6b6b")
TICKS = (0, 0.25, 1, 2, 3, 4, 5, 6, 8, 10)  # nats
LARGEST = 6.0
JOINT_KL = 3.0  # nats, at which two rewards are drawn
# Title → curves that are averaged, by label.
Panel = Mapping[str, tuple[str, ...]]
PANELS: Mapping[str, Panel] = {
    "what averaging does": {
        "SLERP of two": ("slerp",),
        "SLERP of four": ("slerp-m4",),
        "the policies, scaled": ("policy-1", "policy-2"),
        "the policies, as they trained": ("training-1", "training-2"),
        "SLERP of A and B apart": ("factors",),
        "PEFT linear": ("peft",),
    },
    "at equal compute: WARP, one long run": {
        "WARP, M = I = 2": ("slerp-i2",),
        "one run, EMA anchor": ("ema-4t",),
        "one run, SFT anchor": ("sft-4t",),
    },
    "at equal compute: SFT anchor": {
        CURVES[name].label: (name,)
        for name in ("sft-m2", "sft-m4", "sft-8t", "sft-last", "sft-decay", "sft-batch")
    },
}


def draw(of_seeds: Mapping[int, Sample], path: Path) -> None:
    """A panel for each of PANELS that has any curve."""
    own = list(of_seeds.values())
    wanted = {
        title: {label: curves for label, curves in panel.items() if _with(own, curves)}
        for title, panel in PANELS.items()
    }
    panels = {title: panel for title, panel in wanted.items() if panel}
    if not panels:
        return
    count = len(panels)
    figure, axes = plt.subplots(
        1, count, figsize=(5.2 * count, 4.6), dpi=80, layout="constrained", squeeze=False
    )
    for one, (title, panel) in zip(axes[0], panels.items(), strict=True):
        _ceiling(one, own)
        for colour, (label, curves) in zip(COLOURS, panel.items(), strict=False):
            _front(one, _with(own, curves), curves, label, colour)
        _finish(one, title)
    _save(figure, path)


def draw_joint(of_seeds: Mapping[int, Sample], parts: Sequence[Part], path: Path) -> None:
    """Both rewards of the curves of P7 at one KL, with standard errors over the seeds."""
    sides = dict.fromkeys([part.ours for part in parts] + [part.theirs for part in parts])
    figure, axes = plt.subplots(figsize=(6, 5), dpi=80, layout="constrained")
    for colour, curves in zip(COLOURS, sides, strict=False):
        own = _with(list(of_seeds.values()), curves)
        if not own:
            continue
        points = np.array([[_both(sample, curve) for curve in curves] for sample in own])
        (x, y), errors = points.mean(0).T, np.zeros((2, len(curves)))
        if len(points) > 1:
            errors = points.std(0, ddof=1).T / np.sqrt(len(points))
        label = "all λ of two runs" if curves == parts[0].ours else f"{len(curves)} fixed mixtures"
        style = "o-" if curves == parts[0].ours else "s"
        axes.errorbar(
            x, y, yerr=errors[1], xerr=errors[0], fmt=style, color=colour, capsize=2, label=label
        )
    axes.set(
        title=f"two rewards at {JOINT_KL:g} nats, SFT standard deviations",
        xlabel="reviews, a reward model",
        ylabel="present tense, a function",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, path)


def _both(sample: Sample, curve: str) -> list[float]:
    fronts_of = [sample.front(curve, quantity) for quantity in ("reward", "control")]
    at = np.array([JOINT_KL])
    return [float(fronts.reward_at(kl[0], score[0], at)[0]) for kl, score in fronts_of]


def _save(figure: Any, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", metadata={"Software": None})
    write_bytes(path, image.getvalue())
    plt.close(figure)


def _with(of_seeds: Sequence[Sample], curves: Sequence[str]) -> list[Sample]:
    return [sample for sample in of_seeds if all(map(sample.has, curves))]


def _front(
    axes: Any, of_seeds: Sequence[Sample], curves: Sequence[str], label: str, colour: str
) -> None:
    """The mean over curves and seeds up to where all reach, with a standard error over seeds."""
    both = [[sample.front(curve) for curve in curves] for sample in of_seeds]
    end = min(min(float(kl[0].max()), LARGEST) for own in both for kl, _ in own)
    at = np.linspace(0, 1, 40) ** 2 * end
    rows = np.array(
        [np.mean([fronts.reward_at(kl[0], r[0], at) for kl, r in own], axis=0) for own in both]
    )
    mean = rows.mean(0)
    axes.plot(at, mean, color=colour, linewidth=1.5, label=label)
    if len(rows) > 1:
        error = rows.std(0, ddof=1) / np.sqrt(len(rows))
        axes.fill_between(at, mean - error, mean + error, color=colour, alpha=0.15, linewidth=0)


def _ceiling(axes: Any, of_seeds: Sequence[Sample]) -> None:
    rows, at = list[Array](), np.linspace(0, 1, 40) ** 2 * 3.0
    for sample in of_seeds:
        if (ceiling := ceilings.ceiling_of(sample)) is None or ceiling.end < at[-1]:
            continue
        sft = sample.seed.points[SFT].reward
        rewards = np.interp(at, ceiling.kl, ceiling.reward)
        rows.append((rewards - ceiling.reward[0]) / (sft.std() or 1.0))
    if rows:
        axes.plot(at, np.mean(rows, axis=0), color="black", linestyle="--", label="ceiling")


def _finish(axes: Any, title: str) -> None:
    # in which fronts are straight between points: see reward_at
    axes.set_xscale("function", functions=(_signed_root, np.square))
    axes.set(
        title=title,
        xlabel="KL(policy ‖ SFT), nats per completion, √ scale",
        ylabel="reward, SFT standard deviations",
        xlim=(0, LARGEST * 1.03),
        xticks=[tick for tick in TICKS if tick <= LARGEST],
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")


def _signed_root(x: Any) -> Any:
    return np.sign(x) * np.sqrt(np.abs(x))
