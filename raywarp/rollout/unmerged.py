"""An engine's linear layer with several adapters beside its weight.

y = round(x·Wᵀ + b + Σ B·(A·x)), token by token.

An engine stacks q, k and v, and reorders heads. Which rows of the layer belong to an adapted module
is found by comparing the weights themselves.

n is the number of tokens of a pass. d_in and d_out are the layer's sizes in this process. R is the
sum of the stacked ranks.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from raywarp.algorithm.factors import Factors
from raywarp.model.linear import pack, packed_product, product
from raywarp.rollout.row_signatures import ModuleRows, row_signatures

NO_ADAPTER = -1
Multiply = Callable[[Tensor], Tensor]


def by_product(weight: Tensor) -> Multiply:
    """Return x → x·Wᵀ."""
    return lambda x: product(x, weight)


@dataclass
class Pass:
    """The current forward pass.

    Attributes:
        tokens: slot → the tokens that have its adapter.
        only: the slot that all tokens share, or None.
    """

    tokens: Mapping[int, slice | Tensor] = field(default_factory=dict)
    only: int | None = NO_ADAPTER

    def begin(self, slots: Sequence[int], lengths: Tensor) -> None:
        """Note the adapter of each of N sequences, and how many tokens of the pass each has."""
        found, self.tokens = set(slots) or {NO_ADAPTER}, {}
        self.only = found.pop() if len(found) == 1 else None
        if self.only is None:
            owners = torch.tensor(slots).repeat_interleave(lengths)
            self.tokens = {slot: _places(owners == slot) for slot in found - {NO_ADAPTER}}


PASS = Pass()


def _places(chosen: Tensor) -> slice | Tensor:
    """Return where a (n,) mask is true; a slice, which needs no copies, where that is one run."""
    places = chosen.nonzero().squeeze(1)
    first, last = int(places[0]), int(places[-1])
    return slice(first, last + 1) if last - first + 1 == len(places) else places


class SideBySide(NamedTuple):
    """The modules of one adapter that share a layer, side by side.

    Attributes:
        down: the product with A, (n, d_in) → (n, R).
        up: the product with B, (n, R) → (n, d_out).
    """

    down: Multiply
    up: Multiply

    def __call__(self, x: Tensor) -> Tensor:
        """Return (n, d_out) from (n, d_in)."""
        return self.up(self.down(x))


@dataclass(frozen=True)
class Share:
    """A layer's share of an adapted module.

    Attributes:
        own: rows of the layer.
        theirs: the same rows in the module.
        columns: of the module that the layer has.
    """

    own: Tensor
    theirs: Tensor
    columns: slice


class Product:
    """A layer's product, with the adapters that it holds.

    Args:
        weight: (d_out, d_in).
        multiply: returns the engine's fastest product with a small weight that stays the same until
            the next swap.
    """

    def __init__(self, weight: Tensor, multiply: Callable[[Tensor], Multiply] = by_product):
        self.multiply = multiply
        self.d_out, self.d_in = weight.shape
        self.dtype, self.packed = weight.dtype, pack(weight)
        self.signatures = row_signatures(weight)
        self.shares: dict[str, Share] = {}
        self.stacks: dict[int, SideBySide] = {}

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return (…, d_out) from (…, d_in).

        Args:
            x: (…, d_in), the pass's n tokens. vLLM's own models drop all dimensions but one;
                Transformers' keep a batch of 1.
            weight: what the engine kept of its own weight; it is empty.
            bias: (d_out,) or None.
        """
        x = x.contiguous()
        return packed_product(x, self.packed, bias, added=self._added(x))

    def _added(self, x: Tensor) -> Tensor | None:
        """Return what the tokens' adapters add, (…, d_out); None where that is nothing."""
        if PASS.only is not None:
            stack = self.stacks.get(PASS.only)
            return None if stack is None else stack(x)
        if not (mixed := self.stacks.keys() & PASS.tokens.keys()):
            return None
        rows = x.flatten(end_dim=-2)
        added = x.new_zeros(len(rows), self.d_out)
        for slot in mixed:
            tokens = PASS.tokens[slot]
            added[tokens] = self.stacks[slot](rows[tokens])
        return added.view(*x.shape[:-1], self.d_out)

    def find(self, modules: Mapping[str, ModuleRows], part: int) -> None:
        """Find which rows of these modules the layer has.

        Args:
            modules: signatures of each module's rows.
            part: number of this process's share, for a layer whose input is split.
        """
        places: dict[int, deque[tuple[str, int]]] = defaultdict(deque)
        columns = {}
        for module, rows in modules.items():
            if (known := rows.of_width(self.d_in, part)) is not None:
                signatures, columns[module] = known
                for row, signature in enumerate(signatures.tolist()):
                    places[signature].append((module, row))
        found: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for own, signature in enumerate(self.signatures.tolist()):
            if places.get(signature):
                module, row = places[signature].popleft()
                found[module].append((own, row))
        self.shares = {}
        for module, pairs in found.items():
            ours, theirs = torch.tensor(pairs).unbind(1)
            self.shares[module] = Share(ours, theirs, columns[module])

    def take(self, new: Mapping[int, Mapping[str, Factors]], kept: Collection[int] = ()) -> None:
        """Hold new adapters by their slots, besides those in the slots that are kept."""
        stacks = {slot: self.stacks.get(slot) for slot in kept}
        stacks |= {slot: self._stack(factors) for slot, factors in new.items()}
        self.stacks = {slot: stack for slot, stack in stacks.items() if stack is not None}

    def _stack(self, factors: Mapping[str, Factors]) -> SideBySide | None:
        """Return the modules that share this layer as one pair of A and B.

        B is zero outside each module's own rows.
        """
        shares = [
            (share, factors[module])
            for module, share in self.shares.items()
            if module in factors and factors[module].rank
        ]
        if not shares:
            return None
        B, start = torch.zeros(self.d_out, sum(f.rank for _, f in shares), dtype=self.dtype), 0
        for share, f in shares:
            B[share.own, start : start + f.rank] = f.B[share.theirs].to(self.dtype)
            start += f.rank
        A = torch.cat([f.A[:, share.columns] for share, f in shares]).to(self.dtype)
        return SideBySide(self.multiply(A), self.multiply(B))
