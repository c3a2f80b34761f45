"""Rows of weights, recognised by their bits: how an engine's fused or reordered layers are matched
with a model's modules.

d_in and d_out are a module's sizes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_COLUMNS = 256  # of a row that its signature is made of, spread evenly


def row_signatures(weight: Tensor) -> Tensor:
    """(d_out,) int64 of (d_out, d_in): equal rows have equal signatures, and others differ but for
    one chance in 2⁶⁰.
    """
    step = max(1, weight.shape[1] // _COLUMNS)
    bits = (
        weight[:, ::step]
        .contiguous()
        .view({2: torch.int16, 4: torch.int32}[weight.element_size()])
        .long()
    )
    factors = (
        torch.randint(1 << 62, (bits.shape[1],), generator=torch.Generator().manual_seed(0)) * 2 + 1
    )
    return (bits * factors).sum(1)


@dataclass(frozen=True)
class ModuleRows:
    """Signatures of a module's rows, as an engine may hold them.

    d_in: of the whole module. whole: (d_out,). parts: (P, d_out), of P equal shares of the columns.
    """

    d_in: int
    whole: Tensor
    parts: Tensor

    @classmethod
    def of(cls, weight: Tensor, parts: int) -> "ModuleRows":
        """
        Args:
            weight: (d_out, d_in), in the engine's precision.
        """
        shares = weight.chunk(parts, dim=1) if weight.shape[1] % parts == 0 else [weight]
        return cls(
            weight.shape[1],
            row_signatures(weight),
            torch.stack([row_signatures(share) for share in shares]),
        )

    @property
    def d_out(self) -> int:
        return len(self.whole)

    def of_width(self, width: int, part: int) -> tuple[Tensor, slice] | None:
        """(d_out,) signatures and the columns of a share with so many of them; None where there is
        none.
        """
        if width == self.d_in:
            return self.whole, slice(None)
        if width * len(self.parts) == self.d_in:
            return self.parts[part], slice(part * width, (part + 1) * width)
        return None
