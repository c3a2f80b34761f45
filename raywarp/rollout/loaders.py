"""Adapter loaders: factors beside an engine's weights, the engine's own LoRA, or merged weights.

Each loader hashes the tensors that the engine took, for the comparison in protocol.join. Hashing is
a separate step, which can run while the engine already samples. The proof by effect (effect.py)
shows that the loaded tensors also act.
"""

import itertools
import shutil
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from raywarp.adapters.peft import save_peft
from raywarp.adapters.peft_config import ADAPTER_FILE
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
        kept = {v: slot for v, slot in self._slots.items() if v in wanted}
        known = {version: self._parts[version] for versions in kept for version in versions}
        self._slots, old = {}, self._parts  # nothing counts as loaded until all is in place
        free = (slot for slot in itertools.count() if slot not in kept.values())
        slots = dict(zip(new, free, strict=False))
        deltas = {versions: [part.fetch() for part in a.parts] for versions, a in new.items()}
        taken = self._take(
            {slots[versions]: add(*parts) for versions, parts in deltas.items()},
            set(kept.values()),
        )
        for versions, parts in deltas.items():
            own = split(taken[slots[versions]].factors, parts)
            for version, part in zip(versions, own, strict=True):
                hashed = old.get(version)
                known[version] = hashed if isinstance(hashed, str) else part
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
        folder: for the files that vLLM reads.
        zero: whether the SFT model's prompts get an adapter of zeros. On CPUs, vLLM 0.32 runs a
            prompt without an adapter with the adapter of its last slot.
    """

    def __init__(
        self,
        engine: Any,
        names: Callable[[Collection[str]], Mapping[str, str]],
        folder: Path,
        zero: bool = False,
    ):
        self.engine, self.names, self.folder, self.version, self.zero = (
            engine,
            names,
            folder,
            0,
            zero,
        )
        # Versions → vLLM's request, and the digests of the files that were written for it.
        self._held: dict[Versions, tuple[Any, Versions]] = {}
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
            self._held[()] = (self._add((), [zeros_like(self._like)])[0], ())

    def digests(self, adapters: Sequence[Adapter]) -> list[Versions]:
        """Return the digests of the files that vLLM read, part by part."""
        return [self._held[adapter.versions][1] if adapter.parts else () for adapter in adapters]

    def request(self, adapter: Adapter) -> Any:
        """Return the LoRARequest for this adapter's prompts; None if the SFT model has none."""
        return self._held.get(adapter.versions, (None, ()))[0]

    def _add(self, versions: Versions, deltas: Sequence[AdapterDelta]) -> tuple[Any, Versions]:
        from safetensors.torch import load_file
        from vllm.lora.request import LoRARequest

        self.version += 1
        self._like, path = deltas[0], self.folder / f"v{self.version}"
        names = self.names(deltas[0].factors)
        whole = add(*deltas)
        save_peft(
            replace(
                whole,
                factors={names[module]: f for module, f in whole.factors.items()},
                target_modules=(),
            ),
            path,
        )
        written, prefix = load_file(path / ADAPTER_FILE), "base_model.model."
        request = LoRARequest(f"v{self.version}", self.version, str(path))
        if not self.engine.llm_engine.add_lora(request):
            raise RolloutError(
                f"vLLM did not load adapter version {'+'.join(versions)} (number {self.version})"
            )
        factors = {
            module: Factors(
                written[f"{prefix}{name}.lora_B.weight"], written[f"{prefix}{name}.lora_A.weight"]
            )
            for module, name in names.items()
        }
        return request, tuple(digest(part) for part in split(factors, deltas))

    def _keep_only(self, versions: set[Versions]) -> None:
        for old in self._held.keys() - versions:
            request, _ = self._held.pop(old)
            self.engine.llm_engine.remove_lora(request.lora_int_id)
            shutil.rmtree(request.lora_path, ignore_errors=True)


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
        self._taken = [part if isinstance(part, str) else digest(part) for part in self._taken]
        return [tuple(map(str, self._taken))] * len(adapters)

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


def split(factors: Mapping[str, Factors], deltas: Sequence[AdapterDelta]) -> list[AdapterDelta]:
    """Return the parts that were put side by side, as they are in `factors`.

    An adapter file may have a column of zeros for rank 0.
    """
    parts, starts = [], dict.fromkeys(factors, 0)
    for delta in deltas:
        own = {}
        for module, f in delta.factors.items():
            start, end = starts[module], starts[module] + f.rank
            own[module] = Factors(factors[module].B[:, start:end], factors[module].A[start:end])
            starts[module] = end
        parts.append(replace(delta, factors=own))
    return parts
