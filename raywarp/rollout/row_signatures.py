"""Signatures of weight rows, which match an engine's layers to a model's modules.

An engine may fuse or reorder rows. Rows are recognised by their bits. d_in and d_out are a module's
sizes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_COLUMNS = 256  # of a row, evenly spread, from which its signature is computed


def row_signatures(weight: Tensor) -> Tensor:
    """Return the (d_out,) int64 signatures of a (d_out, d_in) weight's rows.

    Equal rows have equal signatures. Different rows have different ones, except with a chance of
    2⁻⁶⁰.
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

    Attributes:
        d_in: of the whole module.
        whole: (d_out,) signatures of whole rows.
        parts: (P, d_out) signatures of P equal shares of the columns.
    """

    d_in: int
    whole: Tensor
    parts: Tensor

    @classmethod
    def of(cls, weight: Tensor, parts: int) -> "ModuleRows":
        """Return the signatures of a weight, whole and in equal shares of its columns.

        Args:
            weight: (d_out, d_in), in the engine's precision.
            parts: P. If d_in is not divisible by P, there is one share with all columns.
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
        """Return the (d_out,) signatures and the columns of a share that is `width` wide.

        Args:
            width: number of columns in this process.
            part: number of this process's share.

        Returns:
            None where there is no share of that width.
        """
        if width == self.d_in:
            return self.whole, slice(None)
        if width * len(self.parts) == self.d_in:
            return self.parts[part], slice(part * width, (part + 1) * width)
        return None
