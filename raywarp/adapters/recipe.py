"""The options of one merge, checked, and the coefficients that follow from them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

from raywarp.adapters.peft import AdapterFile
from raywarp.algorithm import averaging
from raywarp.algorithm.deltas import Granularity
from raywarp.config.schema import ConfigError

Method = Literal["slerp", "lerp", "karcher", "sum", "ema", "liti"]
_COEFFICIENTS = {
    "slerp": averaging.slerp_coefficients,
    "lerp": averaging.lerp_coefficients,
    "karcher": averaging.karcher_coefficients,
    "liti": averaging.lerp_coefficients,
}
_ELEMENTWISE = (
    "drops or picks single numbers of ΔW, so its result has no low rank and no adapter holds it;"
    " use lerp, slerp or sum, with --rank to truncate, or merge full models with mergekit"
)
_APART = "averages A and B apart, which is not an average of ΔW; use lerp, or sum for other weights"
_DATA = "needs data of each adapter's training; use lerp --weights"
_ELEMENTWISE_METHODS = re.compile(
    r"(ties|dare\w*|magnitude_prune|della\w*|breadcrumbs\w*|ram\w*|sce|emr\w*|consensus\w*"
    r"|arcee_fusion)(_svd)?"
)
_ELSEWHERE = {
    "linear": _APART,
    "model_stock": (
        "is lerp moved towards the base by a ratio that it takes from the angles; use lerp --liti"
        " with that ratio (merge inspect shows the angles)"
    ),
    "cat": "is sum here; use sum --weights",
    "task_arithmetic": "is sum here; use sum --weights",
    "svd": "is lerp or sum with --rank here",
    "nuslerp": "is slerp here",
    "multislerp": "is karcher here",
    "fisher": _DATA,
    "regmean": _DATA,
}


def why_not(method: str) -> str | None:
    """Return why a method of other libraries is not offered and what to use instead, or None."""
    name = method.lower().replace("-", "_")
    elementwise = _ELEMENTWISE_METHODS.fullmatch(name)
    reason = _ELEMENTWISE if elementwise else _ELSEWHERE.get(name)
    return reason and f"{method!r} {reason}"


@dataclass(frozen=True)
class Recipe:
    """What to merge, and how.

    Attributes:
        method: slerp, lerp, karcher, sum, ema or liti.
        adapters: θ_1 … θ_M, local folders or hub ids; for ema the oldest first; for liti one.
        init: θ_init, by default the base model itself (zero).
        liti_rate: η ≥ 0, how far to go from θ_init to the merge; above 1 it extrapolates.
        weights: one per adapter. By default they are equal, and those of a sum are 1. They are
            normalised to a mean, except for a sum, which takes any finite numbers.
        ema_rate: μ, for ema alone.
        rank, energy: truncate each module's ΔW to this rank, or to this share of its squared norm;
            by default nothing is cut off.
        granularity: what shares an angle.
        dtype: of the written factors; auto keeps the inputs', the widest where they differ.
        per_module_ranks: write unequal ranks, with a rank_pattern. By default all modules get the
            largest rank, by columns and rows of zeros.

    Raises:
        ConfigError: a number out of range, a method that is not offered, or two options that
            exclude each other.
    """

    method: Method
    adapters: tuple[str, ...]
    init: str | None = None
    liti_rate: float = 1.0
    weights: tuple[float, ...] | None = None
    ema_rate: float | None = None
    rank: int | None = None
    energy: float | None = None
    granularity: Granularity = "block"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    per_module_ranks: bool = False

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            offered = f"there is no method {self.method}; use {', '.join(get_args(Method))}"
            raise ConfigError(why_not(self.method) or offered)
        if not self.adapters:
            raise ConfigError("there is no adapter to merge")
        check_liti_rate(self.liti_rate)
        try:
            if self.method == "sum":
                _check_summands(self.weights, len(self.adapters))
            else:
                averaging.checked_weights(self.weights, len(self.adapters))
            averaging.check_rate(self.ema_rate or 0, "the EMA rate")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if self.method == "liti" and len(self.adapters) != 1:
            raise ConfigError(
                f"liti moves from an init to one adapter, not to {len(self.adapters)}; merge them"
                " first, or use slerp with a LITI rate"
            )
        if (self.method == "ema") != (self.ema_rate is not None):
            raise ConfigError("ema needs an EMA rate, and no other method takes one")
        if self.method == "ema" and self.weights is not None:
            raise ConfigError("the weights of an EMA follow from its rate")
        if self.rank is not None and self.energy is not None:
            raise ConfigError("give a rank or an energy to truncate to, not both")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"the rank must be at least 1, not {self.rank}")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise ConfigError(
                f"the energy is a share of the squared norm in (0, 1], not {self.energy}"
            )

    def coefficients(self, group: str, own: Tensor) -> list[float]:
        """Return c_1 … c_M of one group, from the Gram matrix of its task vectors."""
        if self.method == "ema":
            return averaging.ema_coefficients(len(own), self.ema_rate or 0).tolist()
        if self.method == "sum":
            return [float(weight) for weight in self.weights or [1.0] * len(own)]
        return averaging.in_group(group, _COEFFICIENTS[self.method], own, self.weights).tolist()


def check_liti_rate(rate: float) -> None:
    """Raise ConfigError unless η is a number of at least 0; above 1 it extrapolates."""
    if not (rate >= 0 and math.isfinite(rate)):
        raise ConfigError(f"the LITI rate must be at least 0, not {rate}")


def _check_summands(weights: Sequence[float] | None, count: int) -> None:
    if weights is None:
        return
    if len(weights) != count or not all(map(math.isfinite, weights)) or not any(weights):
        raise ValueError(f"need {count} finite weights, not all 0, got {list(weights)}")


@dataclass(frozen=True)
class Group:
    """A group of modules that share an angle.

    Attributes:
        norms: of the M task vectors.
        angles: of their pairs (1,2), (1,3), …, in degrees.
        coefficients: c_m.
    """

    norms: list[float]
    angles: list[float]
    coefficients: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Block:
    """One block of what was written.

    Attributes:
        norm: of ΔW before truncation.
        retained: ‖kept‖ / ‖ΔW‖ (1 where nothing was cut off).
        rank: the largest of its modules.
        rounding: ‖written − kept‖ / ‖kept‖, the loss of the dtype (0 where it holds every number).
    """

    norm: float
    retained: float
    rank: int
    rounding: float = 0.0


@dataclass(frozen=True)
class Merge:
    """The result of `merge`.

    Attributes:
        recipe: what was asked for.
        files: the files that were read; θ_init is last, if there is one.
        groups: the figures of every group.
        blocks: the figures of every block.
        dtype: of the written factors.
    """

    recipe: Recipe
    files: Sequence[AdapterFile]
    groups: Mapping[str, Group]
    blocks: Mapping[str, Block]
    dtype: torch.dtype


@dataclass(frozen=True)
class Survey:
    """What adapters are, and which of them do not go together.

    Attributes:
        files: the adapters that can be merged, with the init last, if there is one.
        policies: the number of them besides the init.
        groups: group → norms and angles of their task vectors.
        refusals: source → why merge refuses it.
        undefined: method → why it has no result for those that can be merged.
    """

    files: Sequence[AdapterFile]
    policies: int
    groups: Mapping[str, Group]
    refusals: Mapping[str, str]
    undefined: Mapping[str, str]
