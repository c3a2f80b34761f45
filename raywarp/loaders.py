"""Two ways to bring an adapter into an engine: as new weights, or as the engine's own LoRA on top of them.

Both hash the tensors that were really taken, for the comparison in rollout.join. Hashing is a step of its own, which can be done
while the engine already samples.
"""

import shutil
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from raywarp.adapters import AdapterDelta, Factors, digest, zeros_like
from raywarp.checkpoint import Checkpoint
from raywarp.peft_config import ADAPTER_FILE
from raywarp.peft_files import save_peft
from raywarp.rollout import Adapter, AdapterPart, RolloutError

Install = Callable[[Iterable[tuple[str, Tensor]]], object]


class MergedLoader:
    """Adapters as new weights W + ΔW, from pristine W each time and summed in float32; on CPUs 5 times the speed of vLLM's LoRA kernels.

    The init is folded into W once, and kept; a swap then reads the policy's factors and writes the adapted blocks.

    Args:
        install: puts weights, by name, in the place of the engine's.
    """

    def __init__(self, checkpoint: Checkpoint, install: Install):
        self.checkpoint, self.install = checkpoint, install
        self.loaded: tuple[str, ...] | None = ()  # what was asked for
        self._taken: list[AdapterDelta | str] = []  # what there was to take, or its digest
        self._folded: tuple[str | None, list[AdapterDelta | str]] = (None, [])  # likewise, of the init
        self._changed: AdapterDelta | None = None  # the modules whose weights may differ from the pristine ones

    def in_weights(self, adapter: Adapter) -> Hashable:
        """Adapters with different answers cannot be in the engine at the same time."""
        return adapter.versions

    def load(self, adapters: Sequence[Adapter]) -> None:
        """Load adapters that agree on `in_weights`."""
        adapter = adapters[0]
        if self.loaded != adapter.versions:
            self.loaded = None  # until all is in place, nobody may take it for loaded
            self._taken = self._load(adapter)
            self.loaded = adapter.versions

    def digests(self, adapters: Sequence[Adapter]) -> list[tuple[str, ...]]:
        """Of what the weights have taken, part by part, for each of the adapters that were just loaded."""
        self._taken = [part if isinstance(part, str) else digest(part) for part in self._taken]
        return [tuple(map(str, self._taken))] * len(adapters)

    def request(self, adapter: Adapter) -> None:
        """What the engine has to be told with every request: nothing."""

    def _load(self, adapter: Adapter) -> list[AdapterDelta | str]:
        fold, change = (adapter.init, adapter.policy) if adapter.policy else (None, adapter.init)
        if self._folded[0] != (fold.version if fold else None):
            delta = fold.fetch() if fold else None
            added = self.checkpoint.fold(delta)
            self._folded = (fold.version, [digest(replace(delta, factors=added))]) if fold and delta else (None, [])
        below = self._folded[1]
        if change is None:
            if self._changed is not None:
                self._install(zeros_like(self._changed))
            return below
        delta = change.fetch()
        if self._changed is not None and self._changed.blocks().keys() - delta.blocks().keys():
            self._install(zeros_like(self._changed))  # an adapter of other modules: the former ones go back
        if not delta.rank and not below and self._changed is None:
            return [delta]  # no change to pristine weights
        return [*below, replace(delta, factors=self._install(delta))]

    def _install(self, delta: AdapterDelta) -> dict[str, Factors]:
        taken: dict[str, Factors] = {}
        self._changed = delta
        self.install(self.checkpoint.weights(delta, taken))
        return taken


class LoraLoader:
    """Policies as vLLM's own LoRA, several at once; the init in the weights below, so a policy comes at its own rank.

    Each version has a new id, name and path, since vLLM 0.32 silently takes an old id or name for the old adapter.

    Args:
        engine: vLLM's LLM.
        weights: for what goes into the weights.
        largest: the rank that the engine has slots for; what is above goes into the weights, too.
        folder: for the files that vLLM reads.
    """

    def __init__(self, engine: Any, weights: MergedLoader, largest: int, folder: Path):
        self.engine, self.weights, self.largest, self.folder, self.version = engine, weights, largest, folder, 0
        self._held: dict[str, tuple[Any, str]] = {}  # version → vLLM's request, digest of what was written for it

    def in_weights(self, adapter: Adapter) -> Hashable:
        return self._below(adapter).versions

    def load(self, adapters: Sequence[Adapter]) -> None:
        below = self._below(adapters[0])
        if self.weights.loaded != below.versions:
            self._keep_only(set())  # new weights void the LoRAs on them
        self.weights.load([below])
        on_top = {part.version: part for part in map(self._on_top, adapters) if part is not None}
        self._keep_only(set(on_top))
        for part in on_top.values():
            if part.version not in self._held:
                self._held[part.version] = self._add(part)

    def digests(self, adapters: Sequence[Adapter]) -> list[tuple[str, ...]]:
        """Of what the weights have taken, and of the files that vLLM read."""
        (below,) = self.weights.digests(adapters[:1])
        return [(*below, self._held[policy.version][1]) if (policy := self._on_top(adapter)) else below for adapter in adapters]

    def request(self, adapter: Adapter) -> Any:
        """The LoRARequest that goes with every prompt of this adapter; None for the weights alone."""
        part = self._on_top(adapter)
        return self._held[part.version][0] if part else None

    def _below(self, adapter: Adapter) -> Adapter:
        return Adapter(adapter.init) if self._on_top(adapter) or adapter.policy is None else adapter

    def _on_top(self, adapter: Adapter) -> AdapterPart | None:
        return adapter.policy if adapter.policy is not None and adapter.policy.rank <= self.largest else None

    def _add(self, part: AdapterPart) -> tuple[Any, str]:
        from safetensors.torch import load_file
        from vllm.lora.request import LoRARequest

        self.version += 1
        path, delta = self.folder / f"v{self.version}", part.fetch()
        save_peft(delta, path)
        written, prefix = load_file(path / ADAPTER_FILE), "base_model.model."
        request = LoRARequest(f"v{self.version}", self.version, str(path))
        if not self.engine.llm_engine.add_lora(request):
            raise RolloutError(f"vLLM did not load adapter version {part.version} (number {self.version})")
        factors = {  # a module of rank 0 is written as one column of zeros
            module: Factors(written[f"{prefix}{module}.lora_B.weight"], written[f"{prefix}{module}.lora_A.weight"]) if f.rank else f
            for module, f in delta.factors.items()
        }
        return request, digest(replace(delta, factors=factors))

    def _keep_only(self, versions: set[str]) -> None:
        for old in self._held.keys() - versions:
            request, _ = self._held.pop(old)
            self.engine.llm_engine.remove_lora(request.lora_int_id)
            shutil.rmtree(request.lora_path, ignore_errors=True)
