"""Prompts that stay in arrow files: a sequence that reads each prompt when it is asked for."""

import ctypes
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from mmap import MADV_DONTNEED
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from raywarp.config.datasets import PromptsConfig
from raywarp.data.conversations import conversation, plain_text
from raywarp.data.prompt_set.rendering import as_json, digest, with_system
from raywarp.data.text import Prompt

if TYPE_CHECKING:
    import datasets

READ = 1000  # prompts that are read together
RELEASED = 50_000  # prompts after which their files' pages are given back
Numbers = NDArray[np.int64]
DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])


@dataclass(frozen=True)
class Part:
    """The rows of one split, and the prompts that they became.

    Attributes:
        rows: the dataset.
        column: the one that holds the prompt.
        found: see raywarp.data.prompt_set.rendering; a row each.
        config: how the prompts were made.
        columns: the names of the other columns of all parts; a part has None for what it lacks.
    """

    rows: "datasets.Dataset"
    column: str
    found: "datasets.Dataset"
    config: PromptsConfig
    columns: tuple[str, ...]

    def read(self, numbers: Sequence[int]) -> list[Prompt]:
        rows, found = self.rows[list(numbers)], self.found[list(numbers)]
        known = {name: rows[name] for name in self.columns if name in rows}
        return [
            self._prompt(
                rows[self.column][n],
                {name: known[name][n] if name in known else None for name in self.columns},
                {name: values[n] for name, values in found.items()},
            )
            for n in range(len(numbers))
        ]

    def _prompt(self, value: Any, columns: dict[str, Any], found: dict[str, Any]) -> Prompt:
        undated, text, messages = found["undated"], found["text"], None
        if text is None:
            own = None if isinstance(value, str) else conversation(value)
            text = value if own is None else plain_text(own)
            messages = own and with_system(own, self.config.system)
        return Prompt(
            text,
            tuple(found["token_ids"]),
            columns,
            messages or self._messages(text, found["messages"]),
            None if undated is None else tuple(undated),
        )

    def _messages(self, text: str, own: str | None) -> list[dict[str, Any]] | None:
        if own is not None:
            messages: list[dict[str, Any]] = json.loads(own)
            return messages
        if self.config.template != "chat":
            return None
        system = self.config.system
        before = [] if system is None else [{"role": "system", "content": system}]
        return [*before, {"role": "user", "content": text}]

    def lengths(self) -> Numbers:
        """Return the number of tokens of each row's prompt."""
        lists = self.found.data.column("token_ids").chunks
        return _joined([np.diff(one.offsets.to_numpy()) for one in lists])

    def largest_token(self) -> int:
        import pyarrow.compute

        chunks = self.found.data.column("token_ids").chunks
        values = [pyarrow.compute.max(one.flatten()).as_py() for one in chunks]
        return max((value for value in values if value is not None), default=0)

    def numbers(self, name: str) -> Numbers:
        return _joined([one.to_numpy() for one in self.found.data.column(name).chunks])

    def digests(self, name: str) -> NDArray[Any]:
        """Return a column of digests, as numbers that can be sorted."""
        import pyarrow

        chunks = [one.cast(pyarrow.binary(16)) for one in self.found.data.column(name).chunks]
        return np.concatenate(
            [
                np.frombuffer(one.buffers()[1], DIGEST, len(one), one.offset * DIGEST.itemsize)
                for one in chunks
            ]
        )

    @cached_property
    def origins(self) -> NDArray[Any]:
        """A digest of each row's own text or messages, before any cut, like `digests`."""
        rows, found = self.rows.select_columns([self.column]), []
        for first in range(0, len(rows), READ):
            values = rows[first : first + READ][self.column]
            found += [digest(as_json(value)) for value in values]
        return np.frombuffer(b"".join(found), DIGEST)

    @property
    def files(self) -> set[str]:
        """The files that the prompts are read from."""
        tables = (self.rows, self.found)
        return {file["filename"] for table in tables for file in table.cache_files}


def _joined(chunks: Sequence[Any]) -> Numbers:
    found: Numbers = np.concatenate([np.zeros(0, np.int64), *chunks]).astype(np.int64)
    return found


class Prompts(Sequence[Prompt]):
    """A sequence of prompts that lie in arrow files.

    Attributes:
        parts: what the prompts are in.
        order: the prompts by their position in all parts, one after another. A prompt may occur
            several times.
    """

    def __init__(self, parts: Sequence[Part], order: Numbers):
        self.parts, self.order = tuple(parts), order
        self._ends = np.cumsum([len(part.found) for part in self.parts])

    def __len__(self) -> int:
        return len(self.order)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return self._read(self.order[index])
        return self._read(self.order[[index]])[0]

    def __iter__(self) -> Iterator[Prompt]:
        for first in range(0, len(self), READ):
            yield from self[first : first + READ]
            if not (first + READ) % RELEASED:
                self.release()

    def __add__(self, other: Sequence[Prompt]) -> list[Prompt]:
        return [*self, *other]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    def __reduce__(self) -> Any:
        """Be sent elsewhere as a list: other machines lack the files."""
        return list, (list(self),)

    __hash__ = None  # type: ignore[assignment]

    def release(self) -> None:
        """Give the memory back that holds pages of the prompts' files; they are read again."""
        release_pages({file for part in self.parts for file in part.files})

    def chosen(self, numbers: Sequence[int]) -> dict[int, Prompt]:
        """Return the prompts at these positions."""
        found: dict[int, Prompt] = {}
        for first in range(0, len(numbers), READ):
            some = list(numbers[first : first + READ])
            found |= dict(zip(some, self._read(self.order[some]), strict=True))
        return found

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt."""
        lengths = np.concatenate([part.lengths() for part in self.parts])
        return int(lengths[self.order].max())

    @property
    def largest_token(self) -> int:
        return max(part.largest_token() for part in self.parts)

    def without(self, others: "Prompts") -> "Prompts":
        """Return these prompts without those that others have, cut alike or in another way."""
        left = np.ones(len(self), bool)
        for name in ("group", "origin"):
            left &= ~np.isin(self._digests(name), others._digests(name))
        return Prompts(self.parts, self.order[left])

    def _digests(self, name: str) -> NDArray[Any]:
        found = [p.origins if name == "origin" else p.digests(name) for p in self.parts]
        chosen: NDArray[Any] = np.concatenate(found)[self.order]
        return chosen

    def _read(self, positions: Numbers) -> list[Prompt]:
        where = np.searchsorted(self._ends, positions, side="right")
        found: dict[int, Prompt] = {}
        for index in np.unique(where).tolist():
            own = np.flatnonzero(where == index)
            start = int(self._ends[index]) - len(self.parts[index].found)
            read = self.parts[index].read((positions[own] - start).tolist())
            found |= dict(zip(own.tolist(), read, strict=True))
        return [found[n] for n in range(len(positions))]


def release_pages(files: set[str]) -> None:
    """Tell the kernel that the pages of mapped files need not stay in memory.

    Only mappings of these files are touched, whose pages are read again when they are used.
    """
    maps, real = Path("/proc/self/maps"), {os.path.realpath(file) for file in files}
    if not maps.exists() or not real:
        return
    libc = ctypes.CDLL(None, use_errno=True)
    for line in maps.read_text().splitlines():
        place, _, _, _, _, *path = line.split(maxsplit=5)
        if path and path[0] in real:
            start, end = (int(address, 16) for address in place.split("-"))
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)


@dataclass(frozen=True)
class PromptSplits:
    """The prompts of a run.

    Attributes:
        train: what policies are trained on.
        held_out: what they are measured on, in a random order.
        sampled: training prompts in a random order, of which the first are a sample.
        rendered_at: when the template took the date; None where it does not ask for it.
        notes: what the user should know, a line each.
    """

    train: Prompts
    held_out: Prompts
    sampled: Prompts
    rendered_at: str | None = None
    notes: tuple[str, ...] = ()

    def tracked(self, count: int) -> list[Prompt]:
        """Return the held-out prompts that policies are measured on while they train.

        They are the last ones. The front is measured on the first.
        """
        return self.held_out[-count:]

    def without(self, evaluated: Prompts) -> "PromptSplits":
        """Return the splits without training prompts that are evaluated elsewhere."""
        train, sampled = (own.without(evaluated) for own in (self.train, self.sampled))
        return replace(self, train=train, sampled=sampled)

    @property
    def longest(self) -> int:
        """Length of the longest prompt, in tokens."""
        return max(self.train.longest, self.held_out.longest)

    @property
    def largest_token(self) -> int:
        return max(self.train.largest_token, self.held_out.largest_token)
