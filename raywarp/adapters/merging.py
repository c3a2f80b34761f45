"""Merging of adapters from folder to folder, block by block.

It takes the averages of algorithm/averaging.py on files too large for memory. Every method is
θ_init + η·Σ c_m (θ_m − θ_init), with weights c for each group of modules that share an angle.

A block is read (mmap), its Gram matrix computed, its factors weighted and written. Memory therefore
grows with the largest block, not with the model.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from raywarp.adapters.destination import new_adapter
from raywarp.adapters.notes import merge_like
from raywarp.adapters.peft import AdapterFile, AdapterWriter
from raywarp.adapters.peft_config import BASE_QUANTIZE
from raywarp.adapters.recipe import Block, Group, Merge, Recipe
from raywarp.adapters.rounding import balanced, squared_loss
from raywarp.algorithm import averaging, geometry
from raywarp.algorithm.deltas import Granularity, group_of, grouped
from raywarp.algorithm.factors import AdapterError, Factors, Stack
from raywarp.algorithm.fitting import check_finite, union
from raywarp.algorithm.truncation import Shrunk, difference, shrink

# Below this share of its summands' squares, a sum has lost digits to float32's rounding of them.
_CANCELS = 0.05


Progress = Callable[[int, int], None]


def merge(
    recipe: Recipe,
    out: str | Path,
    overwrite: bool = False,
    allow_different_bases: bool = False,
    progress: Progress | None = None,
) -> Merge:
    """Write the merged adapter to `out`, with a model card that says how it was made.

    Args:
        out: a folder, or an object store's prefix (s3://, gs://).
        overwrite: replace the adapter in `out`; other files there stay.
        allow_different_bases: do not compare the names of the adapters' base models.
        progress: called after each block with the number of blocks done and that of all.

    Raises:
        AdapterError: an adapter that cannot be averaged exactly, adapters that do not fit each
            other, vectors without a mean, or an `out` that is in use. Nothing is left half-written.
    """
    from raywarp.adapters.merge_report import merge_card

    with new_adapter(out, overwrite) as folder:
        files = open_adapters(
            [*recipe.adapters, *([recipe.init] if recipe.init else [])], allow_different_bases
        )
        done = _write(recipe, files, folder, progress or (lambda done, count: None))
        card = merge_card(done).encode(errors="replace")
        (folder / "README.md").write_bytes(card)
    return done


def inspect(
    adapters: Sequence[str],
    init: str | None = None,
    granularity: Granularity = "block",
    allow_different_bases: bool = False,
) -> tuple[list[AdapterFile], dict[str, Group]]:
    """Return the adapters' headers, and norms and angles of their task vectors. Write nothing.

    Args:
        adapters: local folders or hub ids.
        init: θ_init, by default the base model itself (zero).
        granularity: what shares an angle.
        allow_different_bases: do not compare the names of the adapters' base models.

    Returns:
        The adapters, with the init last, and group → its norms and angles.

    Raises:
        AdapterError: see merge.
    """
    files = open_adapters([*adapters, *([init] if init else [])], allow_different_bases)
    return files, groups_of(gram_matrices(files, bool(init), granularity))


def groups_of(grams: Mapping[str, Tensor]) -> dict[str, Group]:
    """Return group → its norms and angles, from the Gram matrices of its task vectors."""
    return {group: Group(**geometry.norms_and_angles(own)) for group, own in grams.items()}


def open_adapters(sources: Sequence[str], allow_different_bases: bool = False) -> list[AdapterFile]:
    """Open adapters for reading, each over the modules of all: those that it lacks have rank 0.

    Raises:
        AdapterError: one cannot be read, or they do not change weights of one base model.
    """
    files = [AdapterFile(source) for source in sources]
    sizes = union([file.sizes for file in files], [file.name for file in files])
    if not allow_different_bases:
        _check_bases(files)
    for file in files:
        file.complete(sizes)
    return files


def _check_bases(files: Sequence[AdapterFile]) -> None:
    """Raise AdapterError if two adapters name different bases or revisions of one.

    An adapter without a base fits any. One without a revision is of the branch `main`, as in PEFT.
    """
    likes = {file.name: file.like() for file in files if file.like().base_model}
    bases = {
        name: (like.base_model.rstrip("/"), like.peft.get("revision") or "main")
        for name, like in likes.items()
    }
    first = next(iter(bases), "")
    held = {name: like.peft.get(BASE_QUANTIZE) or "none" for name, like in likes.items()}
    for name, (base, revision) in bases.items():
        known, known_revision = bases[first]
        if base != known:
            raise AdapterError(
                f"{first} is of base model {known} and {name} of {base}: only adapters of one base"
                " can be averaged (--allow-different-bases if both names mean the same weights)"
            )
        if revision != known_revision:
            raise AdapterError(
                f"{first} is of revision {known_revision} of {known} and {name} of {revision}"
                " (none named: main): only adapters of one revision can be averaged"
                " (--allow-different-bases if both have the same weights)"
            )
        if held[name] != held[first]:
            raise AdapterError(
                f"{first} is of {known} with base.quantize={held[first]} and {name} with"
                f" base.quantize={held[name]}, which are other weights: only adapters of one base"
                " can be averaged (--allow-different-bases to do it all the same)"
            )


def _write(recipe: Recipe, files: Sequence[AdapterFile], folder: Path, progress: Progress) -> Merge:
    groups: dict[str, Group] = {}
    blocks: dict[str, Block] = {}
    whole = (
        gram_matrices(files, bool(recipe.init), "global") if recipe.granularity == "global" else {}
    )
    dtype, count = _dtype(recipe, files), len(grouped(files[0].sizes))
    shapes = _largest_shapes(recipe, files)
    with AdapterWriter(folder, merge_like(files), shapes, dtype, recipe.per_module_ranks) as writer:
        for block, stacks, grams in _read_blocks(files):
            for group, own in (
                whole or _group_grams(stacks, grams, bool(recipe.init), recipe.granularity)
            ).items():
                if group not in groups:
                    groups[group] = Group(
                        **geometry.norms_and_angles(own),
                        coefficients=recipe.coefficients(group, own),
                    )
            weights = {
                module: _weights(recipe, groups[group_of(module, recipe.granularity)].coefficients)
                for module in stacks
            }
            blocks[block], merged = _merged_block(recipe, stacks, grams, weights, dtype)
            for module, factors in merged.items():
                writer.write(module, factors)
            progress(len(blocks), count)
    return Merge(recipe, files, groups, blocks, dtype)


def _dtype(recipe: Recipe, files: Sequence[AdapterFile]) -> torch.dtype:
    """Return the dtype to write: the narrowest that holds every input's numbers, for auto."""
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)  # type: ignore[no-any-return]
    return reduce(torch.promote_types, sorted(set().union(*(f.dtypes for f in files)), key=str))


def _merged_block(
    recipe: Recipe,
    stacks: Mapping[str, Stack],
    grams: Mapping[str, Tensor],
    weights: Mapping[str, Sequence[float]],
    dtype: torch.dtype,
) -> tuple[Block, dict[str, Factors]]:
    """Return what is told of a block's merge, and its factors in the stacks' memory."""
    square = kept = lost = 0.0
    factors = {}
    for module, stack in stacks.items():
        own = _merged(recipe, stack, weights[module], grams[module])
        factors[module] = merged = balanced(own.factors, dtype)
        kept, square = kept + own.kept, square + own.total
        lost += squared_loss(merged, dtype)
    told = Block(
        norm=math.sqrt(max(square, 0)),
        retained=math.sqrt(kept / square) if square > 0 else 1.0,
        rank=max(f.rank for f in factors.values()),
        rounding=math.sqrt(lost / kept) if kept > 0 else 0.0,
    )
    return told, factors


def _merged(recipe: Recipe, stack: Stack, weights: Sequence[float], gram: Tensor) -> Shrunk:
    """Return Σ c_m ΔW_m of one module; the stack's memory may be used.

    Where summands cancel, their sum is taken in float64 and brought to its true rank. In factors
    of the summands' size, float32 would round it away.
    """
    rows = gram.tolist()  # so few numbers are summed faster in Python
    square = math.fsum(
        a * b * x
        for a, row in zip(weights, rows, strict=True)
        for b, x in zip(weights, row, strict=True)
    )
    summands = math.fsum(
        a * a * row[m] for m, (a, row) in enumerate(zip(weights, rows, strict=True))
    )
    cancels = square < _CANCELS * summands
    if cancels:
        stack = stack._replace(B=stack.B.double(), A=stack.A.double())
    merged = stack.weigh(weights, in_place=True)
    if max(map(abs, weights)) > 1 and not bool(merged.B.isfinite().all()):
        raise AdapterError("the weighted numbers are too large for float32; use smaller weights")
    if cancels or recipe.rank or recipe.energy:
        return shrink(merged, recipe.rank, recipe.energy)
    return Shrunk(merged, square, square)


def _weights(recipe: Recipe, coefficients: Sequence[float]) -> list[float]:
    """Return the weights of the files in their order: θ_1 … θ_M and, if there is one, θ_init."""
    moved = averaging.towards(coefficients, recipe.liti_rate)
    return moved if recipe.init else moved[:-1]


class _Read(NamedTuple):
    """One block in memory.

    Attributes:
        name: of the block.
        stacks: module → all files' factors side by side.
        grams: module → Gram matrix of its stack.
    """

    name: str
    stacks: dict[str, Stack]
    grams: dict[str, Tensor]


def _read_blocks(files: Sequence[AdapterFile], exact: bool = False) -> Iterator[_Read]:
    """Yield one block after another; in the meantime, another thread reads the next one.

    A block's stacks are valid until the next one is asked for. Each operation stays in one thread:
    operations this small would wait for each other more than they compute.

    Args:
        exact: see Stack.gram.
    """
    counts = {
        module: sum(f.shapes[module][1] for f in files) * (d_out + d_in)
        for module, (d_out, d_in) in files[0].sizes.items()
    }
    blocks = grouped(counts)
    largest = max(sum(counts[module] for module in modules) for modules in blocks.values())
    # They are used in turn, since new memory for every block would have to be paged in first.
    memories = torch.empty(2, largest)

    def read(module: str, memory: Tensor) -> tuple[Stack, Tensor]:
        parts = [file.read(module, scaled=False) for file in files]
        fits = all(tensor.dtype == memory.dtype for f in parts for tensor in f)
        scalings = [file.scalings.get(module, 1.0) for file in files]
        stack = Stack.of(parts, memory if fits else None, scalings)
        gram = stack.gram(exact)
        if not bool(gram.isfinite().all()):  # so is every Gram matrix of what is not finite
            for part, file in zip(parts, files, strict=True):
                check_finite({module: part}, file.name)
        for file in files:
            file.release(module)
        if not bool(gram.isfinite().all()):
            raise AdapterError(f"{module}: the numbers are too large to multiply")
        return stack, gram

    def start(block: str, memory: Tensor) -> dict[str, tuple[Future[tuple[Stack, Tensor]], Tensor]]:
        places = memory[: sum(counts[module] for module in blocks[block])].split(
            [counts[module] for module in blocks[block]]
        )
        return {
            module: (pool.submit(read, module, place), place)
            for module, place in zip(blocks[block], places, strict=True)
        }

    with _single_threaded_operations(), ThreadPoolExecutor(1) as pool:
        under_way = start(next(iter(blocks)), memories[0])
        for number, (block, following) in enumerate(
            zip(blocks, [*list(blocks)[1:], None], strict=True), start=1
        ):
            # What the thread has not begun is read here, last first, so that no core waits.
            results = {
                module: read(module, place) if future.cancel() else future.result()
                for module, (future, place) in reversed(under_way.items())
            }
            if following is not None:
                under_way = start(following, memories[number % 2])
            yield _Read(
                block,
                {module: results[module][0] for module in blocks[block]},
                {module: results[module][1] for module in blocks[block]},
            )


@contextmanager
def _single_threaded_operations() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def gram_matrices(
    files: Sequence[AdapterFile], has_init: bool, granularity: Granularity
) -> dict[str, Tensor]:
    """Return group → Gram matrix of the task vectors, block by block over whole files."""
    totals: dict[str, Tensor] = {}
    # A sum over blocks cannot be refined afterwards, so `global` multiplies in float64 at once.
    for _, stacks, grams in _read_blocks(files, exact=granularity == "global"):
        for group, own in _group_grams(stacks, grams, has_init, granularity).items():
            totals[group] = totals[group] + own if group in totals else own
    return totals


def _group_grams(
    stacks: Mapping[str, Stack],
    grams: Mapping[str, Tensor],
    has_init: bool,
    granularity: Granularity,
) -> dict[str, Tensor]:
    """Return group → (M, M) Gram matrix of the task vectors in one block's modules.

    Args:
        grams: module → Gram matrix of its stack. Without an init it is that of the task vectors.
    """
    if has_init:
        stacks = {module: _task_vectors(stack) for module, stack in stacks.items()}
        grams = {module: stack.gram(exact=True) for module, stack in stacks.items()}
    result = {}
    for group, modules in grouped(stacks, granularity).items():
        quick = torch.stack([grams[module] for module in modules]).sum(0)
        result[group] = geometry.refined(
            quick, partial(geometry.summed_gram, [stacks[module] for module in modules])
        )
    return result


def _task_vectors(stack: Stack) -> Stack:
    *policies, init = stack.parts()
    return Stack.of([difference(policy, init) for policy in policies])


def _largest_shapes(
    recipe: Recipe, files: Sequence[AdapterFile]
) -> dict[str, tuple[int, int, int]]:
    shapes = {}
    for module, (d_out, d_in) in files[0].sizes.items():
        rank = sum(file.shapes[module][1] for file in files)
        if recipe.rank or recipe.energy:
            rank = min(rank, recipe.rank or rank, d_out, d_in)
        shapes[module] = (d_out, rank, d_in)
    return shapes
