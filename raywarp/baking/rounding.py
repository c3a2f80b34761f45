"""How much of ΔW a dtype keeps when W + ΔW is rounded to it.

An element of ΔW below half a unit in the last place of W is rounded away, or up to a whole unit.
The loss is therefore measured on what arrived, round(W + ΔW) − round(W), beside ΔW.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

ENOUGH = 0.99  # a smaller share is said to be a loss
WRITTEN = "written"  # the name of the dtype in which the model is written


@dataclass
class Sums:
    """Sums over the elements of one weight in float64, for one dtype.

    Attributes:
        change: ‖ΔW‖².
        product: ⟨arrived, ΔW⟩.
        error: ‖arrived − ΔW‖².
        is_finite: whether no number became infinite or NaN.
    """

    change: float = 0.0
    product: float = 0.0
    error: float = 0.0
    is_finite: bool = True

    def add(self, before: Tensor, after: Tensor, change: Tensor) -> None:
        """Add a piece of the weight.

        Args:
            before: round(W).
            after: round(W + ΔW).
            change: ΔW.
        """
        arrived, wanted = after.double() - before.double(), change.double()
        self.change += float(wanted.square().sum())
        self.product += float((arrived * wanted).sum())
        self.error += float((arrived - wanted).square().sum())
        self.is_finite &= bool(after.isfinite().all())

    @property
    def share(self) -> float:
        """See Kept.share."""
        return self.product / self.change if self.change else 1.0


@dataclass(frozen=True)
class Kept:
    """What a dtype keeps of an adapter's change, over all changed weights.

    Attributes:
        share: ⟨round(W + ΔW) − round(W), ΔW⟩ / ‖ΔW‖², the part of ΔW that arrives in its own
            direction. 1 is all of it. It is of weights. The logits can keep more or less of their
            change, since inputs weigh the columns of W unequally.
        error: ‖round(W + ΔW) − round(W) − ΔW‖ / ‖ΔW‖, which also counts noise in other directions.
        worst: the module with the least share.
        worst_share: its share.
    """

    share: float
    error: float
    worst: str
    worst_share: float


@dataclass
class Losses:
    """The losses of all changed weights, for several dtypes.

    Attributes:
        sums: name of a dtype → module → sums.
    """

    sums: dict[str, dict[str, Sums]] = field(default_factory=dict)

    def add(
        self,
        module: str,
        weight: Tensor,
        total: Tensor,
        change: Tensor,
        dtypes: Mapping[str, torch.dtype],
    ) -> None:
        """Add a piece of a module's weight: W, W + ΔW before rounding, and ΔW."""
        for name, dtype in dtypes.items():
            own = self.sums.setdefault(name, {}).setdefault(module, Sums())
            own.add(weight.to(dtype), total.to(dtype), change)

    def kept(self) -> dict[str, Kept]:
        """Return what each dtype keeps; a dtype in which a number became infinite is left out."""
        return {
            name: summarise(modules)
            for name, modules in self.sums.items()
            if all(own.is_finite for own in modules.values())
        }


def summarise(modules: Mapping[str, Sums]) -> Kept:
    """Return what is kept of all modules' changes together."""
    change = sum(own.change for own in modules.values())
    worst = min(modules, key=lambda module: modules[module].share)
    return Kept(
        share=sum(own.product for own in modules.values()) / change if change else 1.0,
        error=math.sqrt(sum(own.error for own in modules.values()) / change) if change else 0.0,
        worst=worst,
        worst_share=modules[worst].share,
    )
