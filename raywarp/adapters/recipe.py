"""The options of one merge, checked, and the coefficients that follow from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from raywarp.adapters.peft import AdapterFile
from raywarp.algorithm import averaging
from raywarp.algorithm.deltas import Granularity
from raywarp.config.schema import ConfigError

Method = Literal["slerp", "lerp", "karcher", "ema", "liti"]
_COEFFICIENTS = {
    "slerp": averaging.slerp_coefficients,
    "lerp": averaging.lerp_coefficients,
    "karcher": averaging.karcher_coefficients,
    "liti": averaging.lerp_coefficients,
}


@dataclass(frozen=True)
class Recipe:
    """What to merge, and how.

    Attributes:
        method: slerp, lerp, karcher, ema or liti.
        adapters: θ_1 … θ_M, local folders or hub ids; for ema the oldest first; for liti one.
        init: θ_init, by default the base model itself (zero).
        liti_rate: η, how far to go from θ_init to the merge.
        weights: one per adapter; equal by default.
        ema_rate: μ, for ema alone.
        rank, energy: truncate each module's ΔW to this rank, or to this share of its squared norm;
            by default nothing is cut off.
        granularity: what shares an angle.
        dtype: of the written factors.
        per_module_ranks: write unequal ranks, with a rank_pattern. By default all modules get the
            largest rank, by columns and rows of zeros.

    Raises:
        ConfigError: a number out of range, or two options that exclude each other.
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
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    per_module_ranks: bool = False

    def __post_init__(self) -> None:
        try:
            averaging.check_rate(self.liti_rate, "the LITI rate")
            averaging.checked_weights(self.weights, len(self.adapters))
            averaging.check_rate(self.ema_rate or 0, "the EMA rate")
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if not self.adapters:
            raise ConfigError("there is no adapter to merge")
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
        return averaging.in_group(group, _COEFFICIENTS[self.method], own, self.weights).tolist()


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
    """

    norm: float
    retained: float
    rank: int


@dataclass(frozen=True)
class Merge:
    """The result of `merge`.

    Attributes:
        recipe: what was asked for.
        files: the files that were read; θ_init is last, if there is one.
        groups: the figures of every group.
        blocks: the figures of every block.
    """

    recipe: Recipe
    files: Sequence[AdapterFile]
    groups: Mapping[str, Group]
    blocks: Mapping[str, Block]
