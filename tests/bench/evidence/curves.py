"""The points that are measured, as curves: an adapter scaled by η, or a training as it went on."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evidence import merges
from bench.evidence.settings import ARMS, LAST, Settings

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.averaging import lerp, slerp
from raywarp.algorithm.deltas import AdapterDelta, trailing
from raywarp.algorithm.factors import norm
from raywarp.algorithm.geometry import geometry
from raywarp.algorithm.truncation import compress
from raywarp.run.folder import Run
from raywarp.storage.sealed import check_sealed

SFT = "sft"
END = "end"
SHARES = (1.0, 0.75, 0.5, 0.25, 0.0)  # of the first policy in a merge of the soup


class Trained:
    """The finished arms of one seed. Adapters are changes of the SFT model, task vectors changes of
    the last iteration's init.

    Args:
        runs: an arm's name → its run. kept: the folder of policies that were kept on their way.
    """

    def __init__(self, settings: Settings, runs: Callable[[str], Run], kept: Path):
        self.settings, self.runs, self.kept = settings, runs, kept
        self._made: dict[str, AdapterDelta] = {}

    def folders(self, arm: str, iteration: int | None = None) -> list[Path]:
        """Of the policies of an iteration, the last by default, in the order in which they were
        merged.
        """
        run = self.runs(arm)
        names = json.loads(
            (
                run.folder / "iterations" / str(iteration or ARMS[arm].iterations) / "policies.json"
            ).read_text()
        )
        return [run.folder / name for name in names]

    def policy(self, arm: str, m: int = 1) -> AdapterDelta:
        return load_peft(self.folders(arm)[m - 1])

    def vectors(self, arm: str) -> list[AdapterDelta]:
        return [trailing(load_peft(folder), self.settings.rank) for folder in self.folders(arm)]

    def merged(self, arm: str) -> AdapterDelta:
        """θ_slerp of the last iteration, as the run saved it."""
        return load_peft(
            self.runs(arm).folder / "iterations" / str(ARMS[arm].iterations) / "merged"
        )

    def kept_policy(self, arm: str, part: float, m: int = 1) -> AdapterDelta:
        """θ_m of an arm of one iteration after part·T steps."""
        folder = (
            self.kept
            / self.folders(arm, 1)[m - 1].name
            / f"step-{round(part * self.settings.steps)}"
        )
        check_sealed(folder)
        return load_peft(folder)

    def end(self, curve: "Curve") -> AdapterDelta:
        """The end of a line, at its true rank, made when it is first wanted."""
        if curve.name not in self._made:
            self._made[curve.name] = compress(curve.make(self, 1.0))
        return self._made[curve.name]

    def facts(self, arm: str) -> dict[str, Any]:
        """Steps of all policies and the median seconds of one; of several policies the norms and
        angles of their task vectors per block, and how far inexact merges of them are off.
        """
        vectors, rows = self.vectors(arm), self.runs(arm).metrics()
        own = [
            row["rollout_seconds"] + row["request_seconds"] + row["update_seconds"] for row in rows
        ]
        facts: dict[str, Any] = {
            "steps": len(rows),
            "step_seconds": round(statistics.median(own), 3),
        }
        if len(vectors) == 1:
            return facts
        exact, mean = slerp(vectors), lerp(vectors)
        found = {
            "slerp of factors": (merges.slerp_of_factors(vectors), exact),
            "PEFT linear": (merges.peft_linear(vectors), mean),
        }
        errors = {
            name: {
                "error": round(merges.relative_error(*pair), 5),
                "length": round(merges.length_ratio(*pair), 5),
            }
            for name, pair in found.items()
        }
        return {**facts, "geometry": _rounded(geometry(vectors)), "errors": errors}


@dataclass(frozen=True)
class Curve:
    """Points that belong together.

    A line is an adapter scaled by η from SFT to its end, where η = 1. Its points are placed at the
    study's KLs, as far as the end reaches. A training's points are where its policies were kept.

    Attributes:
        name: point p is named name@p.
        label: in a figure.
        arm: the arm that has to be trained for it.
        make: (trained, part) → adapter; the part has a meaning for a training only.
        parts: points of a training.
        end: point of another curve with which a training ends.
        alone: its end is all that is measured of a line.
    """

    name: str
    label: str
    arm: str
    make: Callable[[Trained, float], AdapterDelta]
    parts: tuple[float, ...] = ()
    end: str = ""
    alone: bool = False

    def point(self, at: float | str) -> str:
        return f"{self.name}@{at if isinstance(at, str) else format(at, 'g')}"

    @property
    def is_line(self) -> bool:
        return not self.parts

    def front(self, measured: Any) -> list[str]:
        """Its points among those that were measured, SFT among them."""
        own = [name for name in measured if name.startswith(f"{self.name}@")]
        return [SFT, *own, *([self.end] if self.end else [])]


def size(delta: AdapterDelta) -> float:
    """‖ΔW‖ over all weights."""
    return float(sum(norm(f) ** 2 for f in delta.factors.values()) ** 0.5)


def _policy(arm: str, m: int, name: str, label: str, alone: bool = False) -> Curve:
    return Curve(name, label, arm, lambda trained, _: trained.policy(arm, m), alone=alone)


def _merge(arm: str, name: str, label: str) -> Curve:
    return Curve(name, label, arm, lambda trained, _: trained.merged(arm))


def _mean(arm: str, name: str) -> Curve:
    """LERP, of which the KL at the end gives the KL cosine."""
    return Curve(name, "LERP", arm, lambda trained, _: lerp(trained.vectors(arm)), alone=True)


def _ends(arm: str) -> list[Curve]:
    """The policies of an arm, of which the KLs at the end give the KL cosine."""
    return [
        _policy(arm, m, f"{arm}-policy-{m}", f"policy {m}", alone=True)
        for m in range(1, ARMS[arm].policies + 1)
    ]


def _kept(arm: str, part: float, name: str, label: str) -> Curve:
    return Curve(name, label, arm, lambda trained, _: trained.kept_policy(arm, part))


def _share(share: float) -> Curve:
    return Curve(
        f"soup-{share:g}",
        f"soup, λ = {share:g}",
        "soup",
        lambda trained, _: slerp(trained.vectors("soup"), [share, 1 - share]),
    )


def _training(m: int) -> Curve:
    return Curve(
        f"training-{m}",
        f"training of policy {m}",
        "warp",
        lambda trained, part: trained.kept_policy("warp", part, m),
        ARMS["warp"].kept,
        f"policy-{m}@{END}",
    )


def _last_five(trained: Trained) -> AdapterDelta:
    kept = [trained.kept_policy("sft-8t", part) for part in LAST]
    return lerp([*kept, trained.policy("sft-8t")])


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


CURVES = {
    curve.name: curve
    for curve in (
        _merge("warp", "slerp", "SLERP of two"),
        *(_policy("warp", m, f"policy-{m}", f"policy {m}") for m in (1, 2)),
        *(_training(m) for m in (1, 2)),
        _mean("warp", "lerp"),
        Curve(
            "factors",
            "SLERP of A and B apart",
            "warp",
            lambda trained, _: merges.slerp_of_factors(trained.vectors("warp")),
        ),
        Curve(
            "peft",
            "PEFT linear",
            "warp",
            lambda trained, _: merges.peft_linear(trained.vectors("warp")),
        ),
        _merge("warp-m4", "slerp-m4", "SLERP of four"),
        *(_policy("warp-m4", m, f"policy-{m}", f"policy {m}") for m in (3, 4)),
        _mean("warp-m4", "lerp-m4"),
        _merge("warp-i2", "slerp-i2", "WARP, M = I = 2"),
        _policy("ema-4t", 1, "ema-4t", "one run of 4T, EMA anchor"),
        _kept("ema-4t", 2, "ema-2t", "one run of 2T, EMA anchor"),
        _policy("sft-4t", 1, "sft-4t", "one run of 4T, SFT anchor"),
        _kept("sft-4t", 2, "sft-2t", "one run of 2T, SFT anchor"),
        _policy("sft-8t", 1, "sft-8t", "one run of 8T"),
        Curve("sft-last", "… its last five checkpoints", "sft-8t", lambda t, _: _last_five(t)),
        _merge("sft-m2", "sft-m2", "SLERP of two of 4T"),
        _mean("sft-m2", "sft-m2-lerp"),
        *_ends("sft-m2"),
        _merge("sft-m4", "sft-m4", "SLERP of four of 2T"),
        _mean("sft-m4", "sft-m4-lerp"),
        *_ends("sft-m4"),
        _policy("sft-decay", 1, "sft-decay", "one run of 8T, rate decay"),
        _policy("sft-batch", 1, "sft-batch", "one run of 2T, batch × 4"),
        *(_share(share) for share in SHARES),
        _mean("soup", "soup-lerp"),
        *(
            _policy(arm, m, f"{arm}-{m}", f"fixed mixture {m} of {ARMS[arm].policies}")
            for arm in ("mix-2", "mix-4")
            for m in range(1, ARMS[arm].policies + 1)
        ),
    )
}
