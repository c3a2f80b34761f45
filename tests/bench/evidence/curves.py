"""The points that are measured, as curves: an adapter scaled by η, one merged at different λ, or a
training as it went on.
"""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.evidence import merges
from bench.evidence.settings import ARMS, SFT_COEFS, Settings

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.averaging import lerp, slerp
from raywarp.algorithm.deltas import AdapterDelta, scale, trailing
from raywarp.algorithm.geometry import geometry
from raywarp.algorithm.truncation import compress, truncate
from raywarp.run.folder import Run
from raywarp.storage.sealed import check_sealed

SFT = "sft"


class Trained:
    """The finished arms of one seed. Adapters are changes of the SFT model, task vectors changes of
    the last iteration's init.

    Args:
        runs: an arm's name → its run. kept: the folder of policies that were kept on their way.
    """

    def __init__(self, settings: Settings, runs: Callable[[str], Run], kept: Path):
        self.settings, self.runs, self.kept = settings, runs, kept
        self._made: dict[tuple[str, str], AdapterDelta] = {}

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

    def rank(self, arm: str) -> int:
        """Of each policy of an arm."""
        return self.settings.rank * ARMS[arm].rank

    def policy(self, arm: str, m: int) -> AdapterDelta:
        return load_peft(self.folders(arm)[m - 1])

    def vectors(self, arm: str, iteration: int | None = None) -> list[AdapterDelta]:
        return [
            trailing(load_peft(folder), self.rank(arm)) for folder in self.folders(arm, iteration)
        ]

    def merged(self, arm: str) -> AdapterDelta:
        """θ_slerp of the last iteration, as the run saved it."""
        return load_peft(
            self.runs(arm).folder / "iterations" / str(ARMS[arm].iterations) / "merged"
        )

    def kept_policy(self, arm: str, m: int, part: float) -> AdapterDelta:
        """θ_m of an arm of one iteration after part·T steps."""
        folder = (
            self.kept
            / self.folders(arm, 1)[m - 1].name
            / f"step-{round(part * self.settings.steps)}"
        )
        check_sealed(folder)
        return load_peft(folder)

    def once(self, name: str, arm: str, make: Callable[["Trained"], AdapterDelta]) -> AdapterDelta:
        """make(self), at its true rank, made when it is first wanted."""
        if (name, arm) not in self._made:
            self._made[name, arm] = compress(make(self))
        return self._made[name, arm]

    def facts(self, arm: str) -> dict[str, Any]:
        """Norms and angles of the last iteration's task vectors per block, how far inexact merges
        of them are off; steps of all policies, and the median seconds of one.
        """
        vectors = self.vectors(arm)
        rows = self.runs(arm).metrics()
        own = [
            row["rollout_seconds"] + row["request_seconds"] + row["update_seconds"] for row in rows
        ]
        facts: dict[str, Any] = {
            "steps": len(rows),
            "step_seconds": round(statistics.median(own), 3),
        }
        if len(vectors) == 1:
            return facts
        facts["geometry"] = _rounded(geometry(vectors))
        if ARMS[arm].iterations == 1:
            exact, mean = slerp(vectors), lerp(vectors)
            small, retained = truncate(exact, self.rank(arm))
            found = {
                "slerp of factors": (merges.slerp_of_factors(vectors), exact),
                "PEFT linear": (merges.peft_linear(vectors), mean),
                "SVD": (small, exact),
                "LERP": (mean, exact),
            }
            facts["errors"] = {
                name: {
                    "error": round(merges.relative_error(*pair), 5),
                    "length": round(merges.length_ratio(*pair), 5),
                }
                for name, pair in found.items()
            }
            facts["svd_retained"] = _rounded(retained)
        return facts


@dataclass(frozen=True)
class Curve:
    """Points that belong together: name@value for each value.

    arm: that has to be trained for it. adapter: at a value. also: other curves' points that lie on
    it, too, SFT among them.
    label: in a figure.
    """

    name: str
    label: str
    arm: str
    values: tuple[float, ...]
    adapter: Callable[[Trained, float], AdapterDelta]
    also: tuple[str, ...] = (SFT,)

    def point(self, value: float) -> str:
        return f"{self.name}@{value:g}"

    @property
    def points(self) -> list[str]:
        return [self.point(value) for value in self.values]

    @property
    def front(self) -> list[str]:
        """All points of it, in no particular order."""
        return [*self.also, *self.points]


def scaled(
    name: str,
    label: str,
    arm: str,
    etas: tuple[float, ...],
    make: Callable[[Trained], AdapterDelta],
) -> Curve:
    """η·adapter: a line from SFT."""
    return Curve(
        name, label, arm, etas, lambda trained, eta: scale(trained.once(name, arm, make), eta)
    )


def along(name: str, label: str, arm: str, m: int, also: tuple[str, ...]) -> Curve:
    """A policy on its way, from SFT to its end, which is a point of another curve."""
    return Curve(
        name,
        label,
        arm,
        ARMS[arm].kept,
        lambda trained, part: trained.kept_policy(arm, m, part),
        (SFT, *also),
    )


def _policy_line(arm: str, m: int, name: str, label: str, etas: tuple[float, ...]) -> Curve:
    return scaled(name, label, arm, etas, lambda trained: trained.policy(arm, m))


def _merge_line(
    arm: str, name: str, label: str, etas: tuple[float, ...] = (0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
) -> Curve:
    return scaled(name, label, arm, etas, lambda trained: trained.merged(arm))


def _lambdas(name: str, label: str, average: Callable[..., AdapterDelta]) -> Curve:
    """η = 1 at unequal weights; λ = 0 and 1 are the policies."""
    return Curve(
        name,
        label,
        "warp",
        (0.25, 0.75),
        lambda trained, value: average(trained.vectors("warp"), [1 - value, value]),
        (),
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


OWN = (0.3, 0.5, 0.7, 0.85, 1.0, 1.25)
LONG = (0.3, 0.5, 0.7, 0.85, 1.0)
HALF = (0.15, 0.3, 0.5, 0.7)
ROUGH = (0.3, 0.45, 0.6, 0.8, 1.0)

_LONG_ARMS = {
    "ema-long": ("one run of 4T, EMA anchor", "ema"),
    **{
        f"sft-{coef:g}-long": (f"one run of 4T, SFT anchor, β = {coef:g}", f"sft-{coef:g}")
        for coef in SFT_COEFS
    },
}
CURVES = {
    curve.name: curve
    for curve in (
        *(_policy_line("warp", m, f"policy-{m}", f"policy {m}, scaled", OWN) for m in (1, 2)),
        _merge_line("warp", "slerp", "SLERP (LITI front)"),
        scaled(
            "lerp",
            "LERP, scaled",
            "warp",
            (0.27, 0.4, 0.65, 1.0, 1.4),
            lambda trained: lerp(trained.vectors("warp")),
        ),
        _lambdas("slerp-weights", "SLERP at λ", slerp),
        _lambdas("lerp-weights", "LERP at λ", lerp),
        *(
            along(f"training-{m}", f"training of policy {m}", "warp", m, (f"policy-{m}@1",))
            for m in (1, 2)
        ),
        scaled(
            "factors",
            "SLERP of A and B apart",
            "warp",
            ROUGH,
            lambda trained: merges.slerp_of_factors(trained.vectors("warp")),
        ),
        scaled(
            "peft",
            "PEFT linear",
            "warp",
            (0.35, 0.6, 1.0, 1.4),
            lambda trained: merges.peft_linear(trained.vectors("warp")),
        ),
        scaled(
            "svd",
            "SLERP, SVD back to r",
            "warp",
            ROUGH,
            lambda t: truncate(t.merged("warp"), t.rank("warp"))[0],
        ),
        _merge_line("shared", "shared", "SLERP, A shared at the start"),
        scaled(
            "shared-factors",
            "SLERP of A and B apart, A shared",
            "shared",
            ROUGH,
            lambda t: merges.slerp_of_factors(t.vectors("shared")),
        ),
        _merge_line("frozen", "frozen", "SLERP, A shared and frozen", ROUGH),
        _merge_line("half-lr", "half-lr", "SLERP, half the learning rate", (0.45, 0.7, 1.0)),
        _merge_line("double-lr", "double-lr", "SLERP, twice the learning rate", (0.15, 0.3, 0.5)),
        _merge_line(
            "high-rank", "high-rank", "SLERP, four times the rank", (0.2, 0.3, 0.45, 0.6, 1.0)
        ),
        *(
            _policy_line(
                "high-rank",
                m,
                f"high-rank-{m}",
                f"policy {m}, four times the rank, scaled",
                (0.3, 0.5, 0.7, 1.0),
            )
            for m in (1, 2)
        ),
        *(
            scaled(
                f"slerp-m{m}",
                f"SLERP of {m}",
                "warp-m4",
                ROUGH,
                lambda t, m=m: slerp(t.vectors("warp-m4")[:m]),
            )
            for m in (3, 4)
        ),
        *(_policy_line("warp-m4", m, f"policy-{m}", f"policy {m}, scaled", OWN) for m in (3, 4)),
        *(_merge_line(f"warp-i{i}", f"slerp-i{i}", f"front after {i} iterations") for i in (2, 3)),
        _merge_line(
            "warp-i2-init", "slerp-i2-init", "front after 2 iterations, anchored at each init"
        ),
        *(
            _policy_line(arm, 1, f"{short}-long", f"{label}, scaled", LONG)
            for arm, (label, short) in _LONG_ARMS.items()
        ),
        *(
            along(f"{short}-training", f"{label}, training", arm, 1, (f"{short}-long@1",))
            for arm, (label, short) in _LONG_ARMS.items()
        ),
        replace(
            scaled(
                "ema-half",
                "one run of 2T, EMA anchor, scaled",
                "ema-long",
                HALF,
                lambda trained: trained.kept_policy("ema-long", 1, 2),
            ),
            also=(SFT, "ema-training@2"),
        ),
    )
}
