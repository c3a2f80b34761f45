"""Recompute evidence.json from the committed numbers, by another way, and compare.

    .venv/bin/python tests/bench/evidence/recheck.py [FOLDER]

Nothing is shared with the study but the numbers. A front at a KL is a weighted mean of its points,
so a comparison is one weight for each point, and its effect in a seed is the mean over prompts of
the weighted rewards. Its error over prompts then needs no bootstrap, and the interval over seeds
takes Student's quantiles from a table. The ceiling comes from splitting the completions in two
halves, where the study leaves out one after another. Exits with 1 where a claim differs.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # 97.5 %, from 1 degree of freedom
FOUR = ["policy-1", "policy-2", "policy-3", "policy-4"]
# Claim → (ours, theirs): fronts whose mean is compared.
COMPARED = {
    "P1": (["slerp"], ["policy-1", "policy-2"]),
    "P2": (["slerp"], ["training-1", "training-2"]),
    "P3": (["slerp-m4"], FOUR),
    "P4": (["slerp"], ["factors", "peft"]),
    "P5.ema": (["slerp-i2"], ["ema-4t"]),
    "P5.sft": (["slerp-i2"], ["sft-4t"]),
    "P6": (["sft-m2"], ["sft-decay"]),
}
# Likewise, of which the hypervolumes in two rewards are compared.
JOINT = {
    "P7": (["soup-1", "soup-0.75", "soup-0.5", "soup-0.25", "soup-0"], ["mix-2-1", "mix-2-2"]),
}
ENDS = {"training-1": "policy-1@end", "training-2": "policy-2@end"}
BEFORE, BEYOND = 1.3, 1.05  # how far outside its points, in KL, a front is told
TOLERANCE = 0.002  # of effects and intervals, in SFT standard deviations
SHARE_TOLERANCE = 0.04


def load(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]], Any]:
    """Return what a seed's file says of itself, reward and KL of each point, and the ceiling."""
    with np.load(path) as file:
        about = json.loads(bytes(file["about"]))
        rows = {
            name: {key: file[key][n] / 1000 for key in ("reward", "control", "kl")}
            for n, name in enumerate(about["points"])
        }
        return about, rows, file["ceiling"] / 1000 if "ceiling" in file.files else None


def points_of(curve: str, rows: Any) -> list[tuple[float, str]]:
    names = [name for name in rows if name.split("@")[0] == curve] + ["sft"]
    names += [ENDS[curve]] if curve in ENDS else []
    return sorted((math.sqrt(max(rows[name]["kl"].mean(), 0.0)), name) for name in names)


def weights(curve: str, rows: Any, kl: float) -> dict[str, float]:
    """The share of each point in the front's reward at a KL."""
    line = points_of(curve, rows)
    x = math.sqrt(kl)
    place = next((n for n in range(1, len(line)) if line[n][0] >= x), len(line) - 1)
    (a, first), (b, second) = line[place - 1], line[place]
    way = (x - a) / (b - a)
    return {first: 1 - way, second: way}


def reach(curve: str, rows: Any) -> tuple[float, float]:
    kls = [x * x for x, _ in points_of(curve, rows)]
    return min(kl for kl in kls if kl > 0), max(kls)


def compared(rows: Any, curves: list[str], kls: list[float]) -> list[float]:
    ends = [reach(curve, rows) for curve in curves]
    first, last = max(first for first, _ in ends), min(last for _, last in ends)
    return [kl for kl in kls if first / BEFORE <= kl <= last * BEYOND]


def effect(rows: Any, ours: list[str], theirs: list[str], kls: list[float]) -> tuple[float, float]:
    """Return (mean, standard error over prompts), in SFT standard deviations."""
    at = compared(rows, [*ours, *theirs], kls)
    total = np.zeros_like(rows["sft"]["reward"])
    for side, sign in ((ours, 1.0), (theirs, -1.0)):
        for curve in side:
            for kl in at:
                for name, weight in weights(curve, rows, kl).items():
                    total += sign * weight * rows[name]["reward"] / len(side) / len(at)
    total /= rows["sft"]["reward"].std() or 1.0
    return float(total.mean()), float(total.std() / math.sqrt(len(total)))


def joint(rows: Any, ours: list[str], theirs: list[str], kls: list[float]) -> float:
    """Return the mean difference of the sides of squares as large as the areas of two rewards."""
    at = compared(rows, [*ours, *theirs], kls)

    def gain(curve: str, kl: float, key: str) -> float:
        sft = rows["sft"][key]
        own = sum(w * rows[name][key].mean() for name, w in weights(curve, rows, kl).items())
        return float((own - sft.mean()) / (sft.std() or 1.0))

    def side(curves: list[str], kl: float) -> float:
        area, height = 0.0, 0.0
        both = [(gain(curve, kl, "reward"), gain(curve, kl, "control")) for curve in curves]
        for right, up in sorted(both, reverse=True):
            if right > 0 and up > height:
                area, height = area + right * (up - height), up
        return math.sqrt(area)

    return sum(side(ours, kl) - side(theirs, kl) for kl in at) / len(at)


def interval(values: list[float]) -> tuple[float, float]:
    mean = sum(values) / len(values)
    square = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    half = STUDENT[len(values) - 2] * math.sqrt(square / len(values))
    return mean - half, mean + half


def outcome(mean: float, low: float, high: float, seeds: int) -> str:
    if seeds < 3:
        return "undecided"
    if mean >= 0.02 and low > 0:
        return "better"
    if mean <= -0.02 and high < 0:
        return "worse"
    return "equal" if max(abs(low), abs(high)) <= 0.05 else "undecided"


def tilted(rewards: Any, kl: float) -> float:
    """The highest mean reward at a mean KL, from n completions of each prompt (P, n)."""
    low, high = 1e-3, 1e3
    for _ in range(80):
        beta = math.sqrt(low * high)
        logits = rewards / beta
        share = np.exp(logits - logits.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        cost = (share * np.log(np.maximum(share * rewards.shape[1], 1e-300))).sum(1).mean()
        low, high = (beta, high) if cost > kl else (low, beta)
    return float((share * rewards).sum(1).mean())


def ceiling(rewards: Any, kl: float) -> float:
    """Take off the error that falls as 1/n: twice the whole minus the mean of the halves."""
    halves = (rewards[:, ::2], rewards[:, 1::2])
    return 2 * tilted(rewards, kl) - sum(tilted(half, kl) for half in halves) / 2


def share(rows: Any, rewards: Any, curve: str, kl: float) -> float:
    own = {
        name: {key: values[: len(rewards)] for key, values in row.items()}
        for name, row in rows.items()
    }
    reward = sum(w * own[name]["reward"].mean() for name, w in weights(curve, own, kl).items())
    return float((reward - rewards.mean()) / (ceiling(rewards, kl) - rewards.mean()))


def recheck_shares(told: Any, seeds: list[Any]) -> list[str]:
    wrong = []
    for curve, row in told["shares"].items():
        for kl, there in row["share"].items():
            found = [
                share(rows, rewards, curve, float(kl))
                for about, rows, rewards in seeds
                if rewards is not None
                and curve in about["facts"].get(row["arm"], {}).get("curves", [])
                and compared(rows, [curve], [float(kl)])
            ]
            here = sum(found) / len(found) if found else math.nan
            print(f"P8 {curve} at {kl}: {here:.3f}, there {there['share']:.3f}")
            if not abs(here - there["share"]) <= SHARE_TOLERANCE:
                wrong.append(f"P8 {curve} at {kl}")
    return wrong


def recheck(folder: Path, told: Any) -> list[str]:
    """Return the claims that differ."""
    seeds = [load(path) for path in sorted(folder.glob("seed-*.npz"))]
    wrong = []
    for name, (ours, theirs) in {**COMPARED, **JOINT}.items():
        if name not in told["claims"]:
            continue
        there = told["claims"][name]
        kls = told["settings"]["kls"]
        own = [
            (joint(rows, ours, theirs, kls), math.nan)
            if name in JOINT
            else effect(rows, ours, theirs, kls)
            for about, rows, _ in seeds
            if {*ours, *theirs}
            <= {c for arm in about["facts"].values() for c in arm.get("curves", [])}
        ]
        values = [value for value, _ in own]
        mean, error = sum(values) / len(values), math.hypot(*(e for _, e in own)) / len(own)
        low, high = interval(values) if len(values) > 1 else (-math.inf, math.inf)
        here = outcome(mean, low, high, len(values))
        print(f"{name}: {here}, {mean:+.4f} [{low:+.4f}, {high:+.4f}], over prompts ± {error:.4f}")
        differs = [abs(mean - there["effect"]), abs(len(values) - there["seeds"])]
        if len(values) > 1:
            differs += [abs(low - there["interval"][0]), abs(high - there["interval"][1])]
        if here != there["outcome"] or not max(differs) <= TOLERANCE:
            wrong.append(name)
    shares = recheck_shares(told["claims"]["P8"], seeds) if "P8" in told["claims"] else []
    return [*wrong, *shares]


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "numbers"
    summary = HERE.parent if folder.resolve() == (HERE / "numbers").resolve() else folder
    wrong = recheck(folder, json.loads((summary / "evidence.json").read_text()))
    print(f"differs: {', '.join(wrong)}" if wrong else "all agree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
