"""safetensors files, read (mmap) and written one tensor at a time.

Memory therefore does not grow with the file. The header is written first.

The safetensors library reads lazily too. But it writes only what is in memory all at once, and does
not name the first missing tensor of a truncated file. The format is 8 bytes (length of the header),
the header in JSON, and the tensors.
"""

import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# As safetensors names them.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Linux maps up to a huge page around a page that is read, including what lies before it.
_WINDOW = 2 << 20
_LONGEST_HEADER = 100_000_000  # the safetensors library's own limit


class TensorFileError(ValueError):
    """Not a whole safetensors file; the message names the file, the tensor and the reason."""


class TensorFile:
    """A safetensors file, mapped into memory.

    Attributes:
        path: of the file.
        shapes: name → shape of every tensor.

    Raises:
        TensorFileError: the file cannot be read, is truncated, or its header does not describe it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as file:
                self._size = os.fstat(file.fileno()).st_size
                self._entries, self._start = self._read_header(file)
                # The mapping is private, because torch requires a writable buffer.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise TensorFileError(f"cannot read {path}: {error.strerror}") from None
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(entry["shape"]) for name, entry in self._entries.items()
        }
        self._check_extents()

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as a view of the file; copy what must outlive `release`.

        Raises:
            TensorFileError: its numbers are not floating-point numbers of 16 to 64 bits.
        """
        entry = self._entries[name]
        if entry["dtype"] not in DTYPES:
            raise TensorFileError(
                f"{self.path}: {name} is {entry['dtype']}; only {', '.join(DTYPES)} can be averaged"
            )
        dtype, (begin, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
        if begin == end:
            return torch.empty(self.shapes[name], dtype=dtype)
        flat = torch.frombuffer(
            self._map,
            dtype=dtype,
            count=(end - begin) // dtype.itemsize,
            offset=self._start + begin,
        )
        return flat.view(self.shapes[name])

    def stored(self, name: str) -> tuple[str, memoryview]:
        """Return a tensor's dtype, as the header names it, and its bytes as a view of the file."""
        entry = self._entries[name]
        begin, end = (self._start + offset for offset in entry["data_offsets"])
        return entry["dtype"], memoryview(self._map)[begin:end]

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The readable dtypes of the file's tensors."""
        return {
            DTYPES[entry["dtype"]] for entry in self._entries.values() if entry["dtype"] in DTYPES
        }

    def dtype(self, name: str) -> torch.dtype | None:
        """Return a tensor's dtype; None where it cannot be read."""
        return DTYPES.get(self._entries[name]["dtype"])

    def release(self, name: str) -> None:
        """Give the pages of this tensor back to the system.

        Views of it stay valid, and are read again when used.
        """
        if hasattr(mmap, "MADV_DONTNEED"):
            begin, end = (self._start + offset for offset in self._entries[name]["data_offsets"])
            begin = begin // _WINDOW * _WINDOW
            end = min(-(-end // _WINDOW) * _WINDOW, self._size)
            self._map.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def _read_header(self, file: Any) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(file.read(8), "little")
        if self._size < 8 or length > min(self._size - 8, _LONGEST_HEADER):
            raise TensorFileError(
                f"{self.path} is no safetensors file or is cut off in its header ({self._size}"
                " bytes)"
            )
        try:
            header = json.loads(file.read(length))
            entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
            for entry in entries.values():
                begin, end = entry["data_offsets"]
                whole = all(type(n) is int and n >= 0 for n in (begin, end, *entry["shape"]))
                if not whole or begin > end or not isinstance(entry["dtype"], str):
                    raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise TensorFileError(
                f"{self.path} is corrupt: its header is not one of a safetensors file"
            ) from None
        return entries, 8 + length

    def _check_extents(self) -> None:
        """Raise TensorFileError unless the header describes the file exactly.

        Every tensor is as long as its shape says, the tensors follow one another, and together they
        fill the file.
        """
        position = 0
        for name, entry in sorted(
            self._entries.items(), key=lambda item: tuple(item[1]["data_offsets"])
        ):
            begin, end = entry["data_offsets"]
            dtype = DTYPES.get(entry["dtype"])
            if begin != position or (
                dtype and end - begin != torch.Size(entry["shape"]).numel() * dtype.itemsize
            ):
                raise TensorFileError(
                    f"{self.path} is corrupt: the header's place for {name} does not fit its shape"
                    " and neighbours"
                )
            if self._start + end > self._size:
                missing = self._start + end - self._size
                raise TensorFileError(
                    f"{self.path} is truncated: {name} lacks {missing} of its {end - begin} bytes"
                )
            position = end
        if self._start + position != self._size:
            raise TensorFileError(
                f"{self.path} is corrupt: {self._size - self._start - position} bytes after the"
                " last tensor"
            )


class TensorWriter:
    """A safetensors file that is written tensor by tensor.

    It is a context manager; the file is whole only after it.

    Args:
        largest: name → shape of every tensor to come, in this order. A tensor may turn out smaller.
            The header, for which room was kept, is then rewritten at the end.
        dtype: of the stored tensors.
    """

    def __init__(self, path: Path, largest: Mapping[str, tuple[int, ...]], dtype: torch.dtype):
        self.dtype = dtype
        self._expected, self._written = dict(largest), dict[str, tuple[int, ...]]()
        self._order = iter(self._expected)
        self._header = self._describe(self._expected)
        self._file = path.open("wb", buffering=0)
        self._write(self._header)

    def __enter__(self) -> "TensorWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, in the file's dtype.

        Raises:
            OverflowError: a number is too large for the dtype (65,504 is float16's largest).
        """
        if name != (expected := next(self._order, None)):
            raise ValueError(
                f"tensors must come in the order that was announced: {expected}, not {name}"
            )
        stored = tensor.detach().to("cpu", self.dtype).contiguous()
        if stored.dtype != tensor.dtype and not bool(stored.isfinite().all()):
            other = "float32 or bfloat16" if self.dtype == torch.float16 else "smaller numbers"
            dtype = str(self.dtype).removeprefix("torch.")
            raise OverflowError(f"{name} has numbers too large for {dtype}; use {other}")
        self._written[name] = tuple(stored.shape)
        self._write(stored.view(-1).view(torch.uint8).numpy().data)

    def _finish(self) -> None:
        if self._written.keys() != self._expected.keys():
            raise ValueError(
                f"{len(self._expected) - len(self._written)} tensors were announced and not written"
            )
        if self._written != self._expected:
            header = self._describe(self._written)
            self._file.seek(0)
            self._write(
                len(self._header[8:]).to_bytes(8, "little")
                + header[8:].ljust(len(self._header) - 8)
            )

    def _describe(self, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for name, shape in shapes.items():
            end = position + torch.Size(shape).numel() * self.dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[self.dtype],
                "shape": list(shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)  # the library aligns the tensors to 8 bytes
        return len(text).to_bytes(8, "little") + text

    def _write(self, data: Any) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[self._file.write(rest) :]
