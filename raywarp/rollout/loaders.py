"""Adapter loaders: factors beside an engine's weights, the engine's own LoRA, or merged weights.

Each loader hashes the tensors that the engine took, for the comparison in protocol.join. Hashing is
a separate step, which can run while the engine already samples. The proof by effect (effect.py)
shows that the loaded tensors also act.
"""

import itertools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from raywarp.algorithm.deltas import AdapterDelta, add, zeros_like
from raywarp.algorithm.factors import Factors
from raywarp.rollout.base_weights import BaseWeights
from raywarp.rollout.protocol import Adapter, RolloutError
from raywarp.rollout.transport import digest

Install = Callable[[Iterable[tuple[str, Tensor]]], object]
Versions = tuple[str, ...]


class UnmergedLoader:
    """Factors beside the engine's weights, several adapters at once.

    A swap copies only the factors. An adapter stays in its slot, since the engine may be at work
    with it.

    Args:
        take: gives the engine new adapters by their slots, each with its parts side by side, and
            the slots whose adapters it keeps. It returns what the engine's layers took.
    """

    def __init__(
        self,
        take: Callable[[Mapping[int, AdapterDelta], Collection[int]], Mapping[int, AdapterDelta]],
    ):
        self._take = take
        self._slots: dict[Versions, int] = {}
        # Version → what the engine took of it, or the digest of that.
        self._parts: dict[str, AdapterDelta | str] = {}

    def in_weights(self, adapter: Adapter) -> Hashable:
        """Return a key; adapters with different keys cannot be in the engine at the same time."""
        return None

    def load(self, adapters: Sequence[Adapter]) -> None:
        wanted = {adapter.versions: adapter for adapter in adapters if adapter.parts}
        new = {versions: a for versions, a in wanted.items() if versions not in self._slots}
        if not new:
            return
        # Before anything changes, since a part whose owner died cannot be fetched.
        deltas = {part.version: part.fetch() for a in new.values() for part in a.parts}
        kept = {v: slot for v, slot in self._slots.items() if v in wanted}
        known = {version: self._parts[version] for versions in kept for version in versions}
        self._slots, old = {}, self._parts  # nothing counts as loaded until all is in place
        free = (slot for slot in itertools.count() if slot not in kept.values())
        slots = dict(zip(new, free, strict=False))
        taken = self._take(
            {slots[versions]: add(*(deltas[v] for v in versions)) for versions in new},
            set(kept.values()),
        )
        for versions in new:
            own = split(taken[slots[versions]].factors, [deltas[v] for v in versions])
            for version, part in zip(versions, own, strict=True):
                before = old.get(version)
                known[version] = before if isinstance(before, str) else part
        self._parts, self._slots = known, kept | slots

    def digests(self, adapters: Sequence[Adapter]) -> list[Versions]:
        """Return the digests of what was taken, part by part, for each adapter just loaded."""
        return [
            tuple(self._digest(version) for version in adapter.versions) for adapter in adapters
        ]

    def request(self, adapter: Adapter) -> int | None:
        """Return the adapter's slot; None for the SFT model."""
        return self._slots[adapter.versions] if adapter.parts else None

    def _digest(self, version: str) -> str:
        part = self._parts[version]
        if not isinstance(part, str):
            self._parts[version] = part = digest(part)
        return part


class LoraLoader:
    """vLLM's own LoRA, several adapters at once.

    Init and policy form one adapter, since an init in bfloat16 weights would be rounded. Each
    version has a new id, name and path: vLLM 0.32 silently takes a known id or name for the old
    adapter.

    Args:
        engine: vLLM's LLM.
        names: maps modules to the names by which the engine finds them.
        hold: gives the engine an adapter by these names under a LoRARequest. Runs in its processes.
        zero: whether the SFT model's prompts get an adapter of zeros. On CPUs, vLLM 0.32 runs a
            prompt without an adapter with the adapter of its last slot.
    """

    def __init__(
        self,
        engine: Any,
        names: Callable[[Collection[str]], Mapping[str, str]],
        hold: Callable[[Any, Any, Mapping[str, Factors]], bool],
        zero: bool = False,
    ):
        self.engine, self.names, self.hold, self.zero = engine, names, hold, zero
        self.version = 0
        # Versions → vLLM's request, and the parts that it was given, or their digests.
        self._held: dict[Versions, tuple[Any, list[AdapterDelta | str]]] = {}
        # Any loaded adapter, as a template of zeros. Before the first one, all slots are zero.
        self._like: AdapterDelta | None = None

    def in_weights(self, adapter: Adapter) -> Hashable:
        return None

    def load(self, adapters: Sequence[Adapter]) -> None:
        wanted = {adapter.versions: adapter for adapter in adapters}
        self._keep_only(set(wanted))
        for versions, adapter in wanted.items():
            if adapter.parts and versions not in self._held:
                self._held[versions] = self._add(versions, [part.fetch() for part in adapter.parts])
        if () in wanted and () not in self._held and self.zero and self._like:
            self._held[()] = (self._add((), [zeros_like(self._like)])[0], [])

    def digests(self, adapters: Sequence[Adapter]) -> list[Versions]:
        """Return the digests of what vLLM was given, part by part."""
        return [hashed(self._held[a.versions][1]) if a.parts else () for a in adapters]

    def request(self, adapter: Adapter) -> Any:
        """Return the LoRARequest for this adapter's prompts; None if the SFT model has none."""
        return self._held.get(adapter.versions, (None, []))[0]

    def _add(
        self, versions: Versions, deltas: Sequence[AdapterDelta]
    ) -> tuple[Any, list[AdapterDelta | str]]:
        from vllm.lora.request import LoRARequest

        self.version += 1
        self._like, name = deltas[0], f"v{self.version}"
        factors = add(*deltas).factors
        names = self.names(factors)
        request = LoRARequest(name, self.version, name)
        named = {names[module]: f for module, f in factors.items()}
        if not all(self.engine.collective_rpc(self.hold, args=(request, named))):
            raise RolloutError(
                f"vLLM did not load adapter version {'+'.join(versions)} (number {self.version})"
            )
        return request, [*split(factors, deltas)]

    def _keep_only(self, versions: set[Versions]) -> None:
        for old in self._held.keys() - versions:
            request, _ = self._held.pop(old)
            self.engine.llm_engine.remove_lora(request.lora_int_id)


class MergedLoader:
    """Adapters merged into float32 weights W + ΔW, computed from pristine W each time.

    In bfloat16, most of a small ΔW would be rounded away.

    Args:
        checkpoint: the pristine weights.
        install: replaces the engine's weights of these names.
    """

    def __init__(self, checkpoint: BaseWeights, install: Install):
        self.checkpoint, self.install = checkpoint, install
        self.loaded: Versions | None = ()  # the adapter that was requested
        self._taken: list[AdapterDelta | str] = []  # its parts as taken, or their digests
        # The modules whose weights may differ from the pristine ones.
        self._changed: AdapterDelta | None = None

    def in_weights(self, adapter: Adapter) -> Hashable:
        return adapter.versions

    def load(self, adapters: Sequence[Adapter]) -> None:
        """Load adapters that agree on `in_weights`."""
        adapter = adapters[0]
        if self.loaded != adapter.versions:
            self.loaded = None  # nothing counts as loaded until all is in place
            self._taken = self._load(adapter)
            self.loaded = adapter.versions

    def digests(self, adapters: Sequence[Adapter]) -> list[Versions]:
        """Return the digests of what the weights took, part by part, for each loaded adapter."""
        return [hashed(self._taken)] * len(adapters)

    def request(self, adapter: Adapter) -> None:
        """No per-request argument is needed."""

    def _load(self, adapter: Adapter) -> list[AdapterDelta | str]:
        deltas = [part.fetch() for part in adapter.parts]
        modules = {module for delta in deltas for module in delta.factors}
        if self._changed is not None and self._changed.factors.keys() - modules:
            # The modules of the previous adapter go back to their pristine weights.
            self._install(zeros_like(self._changed))
            self._changed = None
        if not deltas or (self._changed is None and not any(delta.rank for delta in deltas)):
            return [*deltas]  # no change to pristine weights
        whole = add(*deltas)
        return [*split(self._install(whole), deltas)]

    def _install(self, delta: AdapterDelta) -> dict[str, Factors]:
        taken: dict[str, Factors] = {}
        self._changed = delta
        self.install(self.checkpoint.weights(delta, taken))
        return taken


def hashed(parts: list[AdapterDelta | str]) -> Versions:
    """Return the parts' digests, which take the parts' places."""
    for n, part in enumerate(parts):
        if not isinstance(part, str):
            parts[n] = digest(part)
    return tuple(map(str, parts))


def split(factors: Mapping[str, Factors], deltas: Sequence[AdapterDelta]) -> list[AdapterDelta]:
    """Return the parts that were put side by side, as they are in `factors`.

    Each has its own precision again, which the whole has at least.
    """
    parts, starts = [], dict.fromkeys(factors, 0)
    for delta in deltas:
        own = {}
        for module, f in delta.factors.items():
            start, end = starts[module], starts[module] + f.rank
            B, A = factors[module].B[:, start:end], factors[module].A[start:end]
            own[module] = Factors(B.to(f.B.dtype), A.to(f.A.dtype))
            starts[module] = end
        parts.append(replace(delta, factors=own))
    return parts
