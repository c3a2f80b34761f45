"""An adapter between processes, packed in one array, and the hash that both ends compare."""

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors


@dataclass(frozen=True)
class PackedAdapter:
    """All factors in one array, which is copied and mapped as a whole.

    A pickle of 420 tensors takes 5 times as long.

    Attributes:
        numbers: B and A of each module, one module after another, in the order of their names.
            Those of 16 bits are seen as integers, since numpy has no bfloat16.
        shapes: module → (d_out, rank, d_in).
        dtype: of the numbers, by torch's name.
        rest: the adapter without its factors.
    """

    numbers: "np.ndarray[Any, np.dtype[Any]]"
    shapes: dict[str, tuple[int, int, int]]
    dtype: str
    rest: AdapterDelta

    @classmethod
    def pack(cls, delta: AdapterDelta, dtype: torch.dtype | None = None) -> "PackedAdapter":
        """Return an adapter packed in one array, which leaves a GPU as a whole.

        Args:
            dtype: of the numbers, by default that of the factors.
        """
        factors = sorted(delta.factors.items())
        tensors = [tensor.detach().reshape(-1) for _, f in factors for tensor in f]
        numbers = torch.cat(tensors or [torch.zeros(0)])
        numbers = numbers.to(dtype or numbers.dtype).cpu()
        return cls(
            (numbers.view(torch.int16) if numbers.itemsize == 2 else numbers).numpy(),
            {module: (f.B.shape[0], f.rank, f.A.shape[1]) for module, f in factors},
            str(numbers.dtype).removeprefix("torch."),
            replace(delta, factors={}),
        )

    def unpack(self) -> AdapterDelta:
        """Return the adapter. Its tensors are views of the array, which may be read-only."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about read-only arrays
            numbers = torch.from_numpy(self.numbers).view(getattr(torch, self.dtype))
        factors, start = {}, 0
        for module, (d_out, rank, d_in) in self.shapes.items():
            middle, end = start + d_out * rank, start + (d_out + d_in) * rank
            factors[module] = Factors(
                numbers[start:middle].view(d_out, rank), numbers[middle:end].view(rank, d_in)
            )
            start = end
        return replace(self.rest, factors=factors)

    def digest(self) -> str:
        """Return the adapter's digest, as `digest` in this module does, in one pass."""
        total = begin_digest(
            (module, rank, self.dtype) for module, (_, rank, _) in self.shapes.items()
        )
        total.update(self.numbers.data)
        return total.hexdigest()


def digest(delta: AdapterDelta) -> str:
    """Return the SHA-256 of every module's name and factors.

    Two adapters with the same digest are the same adapter.
    """
    factors = sorted(delta.factors.items())
    total = begin_digest(
        (module, f.rank, str(f.B.dtype).removeprefix("torch.")) for module, f in factors
    )
    for _, f in factors:
        for tensor in f:
            total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def begin_digest(modules: Iterable[tuple[str, int, str]]) -> "hashlib._Hash":
    """Return a hash that has taken names, ranks and dtypes.

    The numbers follow, in the same order.
    """
    return hashlib.sha256(
        "\n".join(f"{name} {rank} {dtype}" for name, rank, dtype in modules).encode()
    )
