"""The pristine weights of a model as its checkpoint has them, and the same weights with adapters'
changes added.

Weights are always made from the pristine ones, in float32, and rounded once to the engine's own
dtype: nothing drifts.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raywarp.adapters.weight_files import download_weights, weight_files
from raywarp.algorithm.deltas import AdapterDelta, Factors

_OTHER_TOWERS = re.compile(r"vision|visual|audio|image|speech|mtp|nextn")


class BaseWeightsError(RuntimeError):
    """An adapter does not fit the checkpoint; the message names the module."""


Read = Callable[[], Iterable[tuple[str, Tensor]]]


class BaseWeights:
    """Weights of one model; those that adapters change are kept in memory after their first use.

    Args:
        read: hands out every pristine weight under its name.
        dtype: of the weights that `weights` hands out.
    """

    def __init__(self, read: Read, dtype: torch.dtype):
        self.read, self.dtype = read, dtype
        self._pristine: dict[str, Tensor] = {}
        self._names: dict[str, str] = {}

    def weights(
        self, delta: AdapterDelta, taken: dict[str, Factors]
    ) -> Iterator[tuple[str, Tensor]]:
        """The weights that the adapter changes, under their names, as W + ΔW; and those beside
        them, as they are.

        An engine may fuse a module with those of the same parent (q, k and v), and then needs all
        of them. No others are handed out: vLLM 0.32 packs experts on CPUs when it loads them, and a
        second time would spoil them.

        Args:
            taken: gets each module's factors as its weight is handed out, so that what is there at
                the end was taken by the caller.

        Raises:
            CheckpointError: a module of the adapter has no weight in the checkpoint (nothing may be
                dropped in silence).
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
        """Read the pristine weights of modules that are new. (Nobody has changed those yet, should
        `read` look at a live model.)
        """
        if new := [module for module in modules if module not in self._names]:
            self._names |= weight_names(new, [name for name, _ in self.read()])
            parents = {_parent(self._names[module]) for module in new}
            for name, weight in self.read():
                if name not in self._pristine and _parent(name) in parents:
                    self._pristine[name] = weight.detach().clone()


def weight_names(modules: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Module → the name of its weight in the checkpoint; see match_names.

    Raises:
        CheckpointError: it has none.
    """
    found = match_names(
        modules, [name.removesuffix(".weight") for name in names if name.endswith(".weight")]
    )
    if lacking := [module for module in modules if module not in found]:
        raise BaseWeightsError(f"the checkpoint has no weight for the adapted module {lacking[0]}")
    return {module: f"{name}.weight" for module, name in found.items()}


def match_names(modules: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Module → the name that means it: its own, or the one that agrees in the most parts from the
    end. Others are left out.

    Two names that fit equally well mean neither; neither does a name that two modules would share.
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
    """What all names of a module have in common: its last part, and its numbers."""
    parts = name.split(".")
    return (parts[-1], *(part for part in parts if part.isdigit()))


def _agreement(module: str, name: str) -> tuple[int, int]:
    """Parts in common from the end, and parts in common at all."""
    ours, theirs = module.split("."), name.split(".")
    same = [a == b for a, b in zip(reversed(ours), reversed(theirs), strict=False)]
    return next((n for n, equal in enumerate(same) if not equal), len(same)), len(
        set(ours) & set(theirs)
    )


def _is_same_tower(module: str, name: str) -> bool:
    return bool(_OTHER_TOWERS.search(module)) or not _OTHER_TOWERS.search(name)


def read_files(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a checkpoint's safetensors files."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 (not a dict)
                yield name, checkpoint.get_tensor(name)


def checkpoint_files(model: str) -> list[Path]:
    """The files that hold a model's weights, of a folder or hub id: model.safetensors, or those
    that its index names.

    Raises:
        ConfigError: there are none, or not all of them.
    """
    folder = Path(model)
    return weight_files(folder if folder.is_dir() else download_weights(model), f"model={model}")


def _parent(name: str) -> str | None:
    """`model.layers.0.mlp.up_proj.weight` → `model.layers.0.mlp`; None for what is no module's
    weight or bias.
    """
    module, _, kind = name.rpartition(".")
    return module.rpartition(".")[0] if kind in ("weight", "bias") else None


def _add_change(weight: Tensor, factors: Factors, transposed: bool) -> Tensor:
    """W + ΔW in float32: a bfloat16 checkpoint may well run in a float32 engine."""
    if not factors.rank:
        return weight
    B, A = (factor.to(weight.device, torch.float32) for factor in factors)
    return (
        torch.addmm(weight.float(), A.T, B.T) if transposed else torch.addmm(weight.float(), B, A)
    )
