"""The weights of base + η·ΔW, tensor after tensor in bounded memory.

Sums are in float32 and rounded once. What an adapter does not change is copied byte for byte, where
its dtype stays.
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from raywarp.adapters.peft import AdapterFile
from raywarp.adapters.tensor_file import DTYPE_NAMES, DTYPES
from raywarp.baking.base import Base
from raywarp.baking.places import Place
from raywarp.baking.rounding import WRITTEN, Losses
from raywarp.baking.shards import Entry, ShardWriter, pieces, split
from raywarp.config.schema import ConfigError
from raywarp.model.quantised import rounded

_BYTES = 1 << 24  # copied at once
# Measured besides the dtype that is written, so that a loss is told with what would avoid it.
_OFFERED = {"float32": torch.float32, "float16": torch.float16}


class BakedWeights:
    """The tensors of a model to write.

    Args:
        base: the model's files.
        adapter: the change.
        places: module of the adapter → where its weight is stored.
        rate: η.
        dtype: of all weights; None for each tensor's own.
        quantised: stored tensors that are in 4 bits in the base of the adapter, and whether they
            are stored as (d_in, d_out). W is then what the 4 bits stand for.

    Attributes:
        dtype: in which most numbers are written.
        losses: of the rounding, after `write`.
    """

    def __init__(
        self,
        base: Base,
        adapter: AdapterFile,
        places: Mapping[str, Place],
        rate: float,
        dtype: torch.dtype | None,
        quantised: Mapping[str, bool] | None = None,
    ):
        self._quantised = quantised or {}
        self.base, self.adapter, self.rate, self.losses = base, adapter, rate, Losses()
        self._stored_dtype = _main_dtype(base)
        self.dtype = dtype or self._stored_dtype
        self._asked = dtype
        self._changes = {place.write: (module, place) for module, place in places.items()}
        names = [*base.tensors, *(name for name in self._changes if name not in base.tensors)]
        self.entries = [self._entry(name) for name in names]

    @property
    def size(self) -> int:
        """The bytes of all tensors."""
        return sum(entry.size for entry in self.entries)

    def write(self, folder: Path, limit: int) -> int:
        """Write the files, of at most `limit` bytes each, and return how many there are.

        Raises:
            ConfigError: a number is too large for the dtype.
        """
        files = split(self.entries, limit)
        with ShardWriter(folder, files) as writer:
            for entry in self.entries:
                self._write(entry, writer)
        return len(files)

    def _entry(self, name: str) -> Entry:
        read = self._read_name(name)
        file = self.base.tensors[read]
        stored, data = file.stored(read)
        kind, shape = self._kind(stored), file.shapes[read]
        size = len(data)
        if kind != stored:
            size = torch.Size(shape).numel() * DTYPES[kind].itemsize
        return Entry(name, kind, shape, size)

    def _kind(self, stored: str) -> str:
        """Return the dtype in which a tensor is written.

        What a 16-bit model holds in more bits (a router's bias) was kept so on purpose.
        """
        own = DTYPES.get(stored)
        if self._asked is None or own is None:
            return stored
        is_wide_on_purpose = own.itemsize > self._stored_dtype.itemsize
        narrows = own.itemsize > self._asked.itemsize
        return stored if is_wide_on_purpose and narrows else DTYPE_NAMES[self._asked]

    def _read_name(self, name: str) -> str:
        return self._changes[name][1].read if name in self._changes else name

    def _write(self, entry: Entry, writer: ShardWriter) -> None:
        read = self._read_name(entry.name)
        file = self.base.tensors[read]
        stored, data = file.stored(read)
        if entry.name in self._changes:
            self._write_changed(entry, self._weight(read), writer)
        elif entry.kind == stored and read not in self._quantised:
            for start in range(0, len(data), _BYTES):
                writer.write(data[start : start + _BYTES])
        else:
            flat = self._weight(read).view(-1)
            for piece in pieces(len(flat), 1):
                writer.write(self._rounded(entry, flat[piece]))
        file.release(read)

    def _weight(self, name: str) -> Tensor:
        weight = self.base.tensors[name].tensor(name)
        transposed = self._quantised.get(name)
        return weight if transposed is None else rounded(weight, transposed).to(weight.dtype)

    def _write_changed(self, entry: Entry, weight: Tensor, writer: ShardWriter) -> None:
        module, place = self._changes[entry.name]
        B, A = self.adapter.read(module)
        left, right = (A.T, B.T) if place.transposed else (B, A)
        dtypes = {WRITTEN: DTYPES[entry.kind], **_OFFERED}
        for rows in pieces(*weight.shape):
            change = _wide(left[rows] * self.rate) @ _wide(right)
            total = _wide(weight[rows]) + change
            if not bool(total.isfinite().all()):
                raise ConfigError(f"{entry.name} of {self.base.what} + ΔW holds NaN or infinity")
            self.losses.add(module, weight[rows], total, change, dtypes)
            writer.write(self._rounded(entry, total))
        self.adapter.release(module)

    def _rounded(self, entry: Entry, numbers: Tensor) -> Tensor:
        rounded = numbers.to(DTYPES[entry.kind])
        if not bool(rounded.isfinite().all()) and bool(numbers.isfinite().all()):
            raise ConfigError(
                f"{entry.name} has numbers too large for float16; use float32 or bfloat16"
            )
        return rounded


def _wide(numbers: Tensor) -> Tensor:
    return numbers if numbers.dtype == torch.float64 else numbers.float()


def _main_dtype(base: Base) -> torch.dtype:
    """Return the dtype in which most of a model's bytes are stored."""
    sizes: Counter[str] = Counter()
    for name, file in base.tensors.items():
        kind, data = file.stored(name)
        sizes[kind] += len(data) if kind in DTYPES else 0
    return DTYPES[sizes.most_common(1)[0][0]]
