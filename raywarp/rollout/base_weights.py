"""A checkpoint's weights, with adapters added where asked, and how modules are named in it.

Adapted weights are always computed from the checkpoint's own, in float32. They are rounded once,
to the engine's dtype. So errors do not accumulate over swaps.

A trainer's model, a checkpoint's files and an engine may each name the same module differently.
For example, take a wrapper of a language model and a vision tower. Its files have
`language_model.model.layers.0.mlp.up_proj`, and transformers has
`model.language_model.layers.0.mlp.up_proj`. A file of the bare backbone lacks the model's own
prefix.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raywarp.adapters.weight_files import download_weights, weight_files
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors

_OTHER_TOWERS = re.compile(r"vision|visual|audio|image|speech|mtp|nextn")


class BaseWeightsError(RuntimeError):
    """An adapter does not fit the checkpoint; the message names the module."""


Read = Callable[[], Iterable[tuple[str, Tensor]]]


def as_stored(name: str, weight: Tensor) -> Tensor:
    """Return a tensor as it is."""
    return weight


class BaseWeights:
    """The weights of one model. Those that adapters change stay in memory after their first use.

    Args:
        read: yields every pristine weight with its name.
        dtype: of the weights that `weights` yields.
        held: gives what the base holds in place of a tensor that is read.
    """

    def __init__(
        self,
        read: Read,
        dtype: torch.dtype,
        held: Callable[[str, Tensor], Tensor] = as_stored,
    ):
        self.read, self.dtype, self.held = read, dtype, held
        self._pristine: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}

    def weights(
        self, delta: AdapterDelta, taken: dict[str, Factors]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights that the adapter changes as W + ΔW, and their unchanged siblings.

        An engine may fuse a module with others of the same parent (q, k and v) and then needs all
        of them. No other weights are yielded: vLLM 0.32 packs experts on CPUs when it loads them,
        and packing them twice would corrupt them.

        Args:
            delta: the adapter.
            taken: receives each module's factors when its weight is yielded. What it holds at the
                end is therefore what the caller took.

        Yields:
            name and weight.

        Raises:
            BaseWeightsError: a module of the adapter has no weight in the checkpoint. Nothing may
                be dropped silently.
        """
        self._keep(delta.factors)
        modules = {self._names[module]: module for module in delta.factors}
        parents = {_parent(name) for name in modules}
        for name, weight in self._pristine.items():
            if name in modules:
                taken[modules[name]] = delta.factors[modules[name]]
                weight = _add_change(weight, taken[modules[name]], delta.fan_in_fan_out)
            if _parent(name) in parents:
                yield name, weight.to(self.dtype)

    def _keep(self, modules: Iterable[str]) -> None:
        """Read the pristine weights of new modules.

        They are still unchanged, also where `read` reads a live model.
        """
        if new := [module for module in modules if module not in self._names]:
            self._names |= weight_names(new, [name for name, _ in self.read()])
            parents = {_parent(self._names[module]) for module in new}
            for name, weight in self.read():
                if name not in self._pristine and _parent(name) in parents:
                    self._pristine[name] = self.held(name, weight).detach().clone()


def weight_names(modules: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return module → the name of its weight in the checkpoint; see match_names.

    Raises:
        BaseWeightsError: a module has no weight there.
    """
    found = match_names(
        modules, [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    )
    if lacking := [module for module in modules if module not in found]:
        raise BaseWeightsError(f"the checkpoint has no weight for the adapted module {lacking[0]}")
    return {module: f"{name}.weight" for module, name in found.items()}


def match_names(modules: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Return module → the name that means it; modules without one are left out.

    A module's own name comes first. Otherwise it is the name that agrees in the most parts from the
    end. A tie between two names gives no match, and neither does a name that two modules would
    share.
    """
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        alike[_shape_of_name(name)].append(name)
    best = {module: _best_match(module, alike[_shape_of_name(module)]) for module in modules}
    found = {module: name for module, name in best.items() if name is not None}
    owners: dict[str, list[str]] = defaultdict(list)
    for module, name in found.items():
        owners[name].append(module)
    return {module: name for module, name in found.items() if len(owners[name]) == 1}


def _best_match(module: str, names: list[str]) -> str | None:
    if module in names:
        return module
    fitting = sorted(
        ((_agreement(module, name), name) for name in names if _is_same_tower(module, name)),
        reverse=True,
    )
    if not fitting or (len(fitting) > 1 and fitting[0][0] == fitting[1][0]):
        return None
    return fitting[0][1]


def _shape_of_name(name: str) -> tuple[str, ...]:
    """Return what all names of a module have in common: its last part and its numbers."""
    parts = name.split(".")
    return (parts[-1], *(part for part in parts if part.isdigit()))


def _agreement(module: str, name: str) -> tuple[int, int]:
    """Return the number of common parts from the end, and of common parts overall."""
    ours, theirs = module.split("."), name.split(".")
    same = [a == b for a, b in zip(reversed(ours), reversed(theirs), strict=False)]
    return next((n for n, equal in enumerate(same) if not equal), len(same)), len(
        set(ours) & set(theirs)
    )


def _is_same_tower(module: str, name: str) -> bool:
    return bool(_OTHER_TOWERS.search(module)) or not _OTHER_TOWERS.search(name)


def read_files(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight of a checkpoint's safetensors files, with its name."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 (not a dict)
                yield name, checkpoint.get_tensor(name)


def checkpoint_files(model: str) -> list[Path]:
    """Return the weight files of a model: model.safetensors, or those that its index names.

    Args:
        model: folder or hub id.

    Raises:
        ConfigError: the files are missing, or some of them are.
    """
    folder = Path(model)
    return weight_files(folder if folder.is_dir() else download_weights(model), f"model={model}")


def _parent(name: str) -> str | None:
    """Return the parent module's name; None if the name is no module's weight or bias.

    `model.layers.0.mlp.up_proj.weight` → `model.layers.0.mlp`.
    """
    module, _, kind = name.rpartition(".")
    return module.rpartition(".")[0] if kind in ("weight", "bias") else None


def _add_change(weight: Tensor, factors: Factors, transposed: bool) -> Tensor:
    """Return W + ΔW in float32, since a bfloat16 checkpoint may run in a float32 engine."""
    if not factors.rank:
        return weight
    B, A = (factor.to(weight.device, torch.float32) for factor in factors)
    return (
        torch.addmm(weight.float(), A.T, B.T) if transposed else torch.addmm(weight.float(), B, A)
    )
