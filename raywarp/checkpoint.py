"""The pristine weights of a model as its checkpoint has them, and the same weights with adapters' changes added.

Weights are always made from the pristine ones, in float32, and rounded once to the engine's own dtype: nothing drifts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from raywarp.adapters import AdapterDelta, Factors, block_of
from raywarp.config import ConfigError


class CheckpointError(RuntimeError):
    """An adapter does not fit the checkpoint; the message names the module."""


class Checkpoint:
    """Weights of one model; those of the blocks that adapters change are kept in memory after their first use.

    Args:
        read: hands out every pristine weight under its name.
        dtype: of the weights that `weights` hands out.
    """

    def __init__(self, read: Callable[[], Iterable[tuple[str, Tensor]]], dtype: torch.dtype):
        self.read, self.dtype = read, dtype
        self._pristine: dict[str, Tensor] = {}
        self._blocks: set[str] = set()
        self._folded: dict[str, Tensor] = {}

    def fold(self, delta: AdapterDelta | None) -> dict[str, Factors]:
        """From now on W + ΔW, in float32, takes the place of W in `weights`; None goes back to the pristine weights.

        Costs the adapted weights once more, in float32. Returns the factors that were added; raises as `weights` does.
        """
        self._folded = {}
        taken: dict[str, Factors] = {}
        if delta is not None:
            folded = {name: weight for name, weight, module in self._changed(delta, taken) if module and delta.factors[module].rank}
            self._folded = folded
        return taken

    def weights(self, delta: AdapterDelta, taken: dict[str, Factors]) -> Iterator[tuple[str, Tensor]]:
        """The weights of all blocks that the adapter changes, under their names, with W + ΔW for W where it does.

        Whole blocks, since an engine may fuse weights of a block (q, k and v) and then wants all of them anew.

        Args:
            taken: gets each module's factors as its weight is handed out, so that what is there at the end was taken by the caller.

        Raises:
            CheckpointError: a module of the adapter has no weight in the checkpoint (nothing may be dropped in silence).
        """
        for name, weight, _ in self._changed(delta, taken):
            yield name, weight.to(self.dtype)

    def _changed(self, delta: AdapterDelta, taken: dict[str, Factors]) -> Iterator[tuple[str, Tensor, str | None]]:
        left = dict(delta.factors)
        self._keep({block_of(module) for module in left})
        for name, pristine in self._pristine.items():
            weight, module = self._folded.get(name, pristine), _module_of(name, left)
            if module is not None:
                taken[module] = left.pop(module)
                weight = _add_change(weight, taken[module], delta.fan_in_fan_out)
            yield name, weight, module
        if left:
            raise CheckpointError(f"the checkpoint has no weight for the adapted module {next(iter(left))}")

    def _keep(self, blocks: set[str]) -> None:
        """Read the pristine weights of blocks that are new. (Nobody has changed those yet, should `read` look at a live model.)"""
        if blocks <= self._blocks:
            return
        self._blocks |= blocks
        wanted = self._blocks | {block.partition(".")[2] for block in self._blocks}  # bare backbones lack the model's own prefix
        for name, weight in self.read():
            if name not in self._pristine and (block_of(name) in wanted or name.rpartition(".")[0] in wanted):
                self._pristine[name] = weight.detach().clone()


def read_files(files: Sequence[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a checkpoint's safetensors files."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, framework="pt") as checkpoint:
            for name in checkpoint.keys():  # noqa: SIM118 (not a dict)
                yield name, checkpoint.get_tensor(name)


def checkpoint_files(model: str) -> list[Path]:
    """The safetensors files of a folder or hub id.

    Raises:
        ConfigError: there are none.
    """
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(model, allow_patterns=["*.safetensors", "*.json"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"{model} has no *.safetensors weights; save it with save_pretrained, or use rollout.engine=transformers")
    return files


def _module_of(name: str, modules: dict[str, Factors]) -> str | None:
    """The adapted module that a checkpoint's tensor belongs to; checkpoints of bare backbones lack the model's own prefix."""
    if not name.endswith(".weight"):
        return None
    module = name.removesuffix(".weight")
    if module in modules:
        return module
    return next((m for m in modules if m.partition(".")[2] == module), None)


def _add_change(weight: Tensor, factors: Factors, transposed: bool) -> Tensor:
    """W + ΔW in float32: a bfloat16 checkpoint may well run in a float32 engine."""
    if not factors.rank:
        return weight
    B, A = (factor.to(weight.device, torch.float32) for factor in factors)
    return torch.addmm(weight.float(), A.T, B.T) if transposed else torch.addmm(weight.float(), B, A)
