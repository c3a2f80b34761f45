"""A model's safetensors files, written piece by piece, so that memory does not grow with them."""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from raywarp.adapters.weight_files import INDEX, WEIGHTS


class Entry(NamedTuple):
    """A tensor to come.

    Attributes:
        name: of the tensor.
        kind: its dtype, as safetensors names it.
        shape: of the tensor.
        size: in bytes.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    size: int


def split(entries: Sequence[Entry], limit: int) -> list[list[Entry]]:
    """Return the entries in files of at most `limit` bytes; a larger tensor has its own file."""
    files, room = list[list[Entry]](), 0
    for entry in entries:
        if not files or entry.size > room:
            files.append([])
            room = limit
        files[-1].append(entry)
        room -= entry.size
    return files


class ShardWriter:
    """A model's weight files and their index. It is a context manager.

    Args:
        folder: of the model.
        files: the entries of each file. Tensors must come in this order.
    """

    def __init__(self, folder: Path, files: Sequence[Sequence[Entry]]):
        self._stack = ExitStack()
        count = len(files)
        names = [WEIGHTS] if count == 1 else [shard_name(n, count) for n in range(1, count + 1)]
        self._pending = iter([*zip(names, files, strict=True)])
        self._folder, self._files = folder, dict(zip(names, files, strict=True))
        self._left = 0  # bytes that the present file still lacks
        self._file: IO[bytes] | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stack.close()
        if kind is None:
            if self._left or next(self._pending, None):
                raise ValueError("tensors were announced and not written")
            if len(self._files) > 1:
                self._write_index()

    def write(self, data: Tensor | memoryview) -> None:
        """Write the next piece of the present tensor, or the first one of the next."""
        if isinstance(data, Tensor):
            data = data.contiguous().view(-1).view(torch.uint8).numpy().data
        while len(data):
            if not self._left:
                self._open_next()
            assert self._file is not None
            written = self._file.write(data[: self._left])
            self._left -= written
            data = data[written:]

    def _open_next(self) -> None:
        self._stack.close()
        name, entries = next(self._pending)
        self._file = self._stack.enter_context((self._folder / name).open("wb", buffering=0))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        position = 0
        for entry in entries:
            offsets = [position, position + entry.size]
            header[entry.name] = {
                "dtype": entry.kind,
                "shape": [*entry.shape],
                "data_offsets": offsets,
            }
            position += entry.size
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._left = position

    def _write_index(self) -> None:
        places = {entry.name: name for name, file in self._files.items() for entry in file}
        total = sum(entry.size for file in self._files.values() for entry in file)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def shard_name(number: int, count: int) -> str:
    """Return the name that transformers gives the file."""
    return f"{Path(WEIGHTS).stem}-{number:05d}-of-{count:05d}.safetensors"


def pieces(length: int, width: int, numbers: int = 1 << 22) -> Iterator[slice]:
    """Yield slices of rows, each of at most `numbers` numbers but at least one row.

    Args:
        length: number of rows.
        width: numbers in a row.
    """
    rows = max(1, numbers // max(width, 1))
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))
