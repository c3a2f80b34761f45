"""Adapters on the linear layers of a vLLM model on CPUs; see unmerged.py.

vLLM imports this module in each of its processes, as `worker_extension_cls`, before it makes the
model. `_keep_product` then replaces the step in which vLLM 0.32 packs a layer's weight.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.v1.sample import sampler

from raywarp.algorithm.factors import Factors
from raywarp.rollout.engine import SLOT
from raywarp.rollout.row_signatures import ModuleRows
from raywarp.rollout.unmerged import NO_ADAPTER, PASS, Multiply, Product, by_product
from raywarp.rollout.vllm import nf4  # noqa: F401 (registers a loader)


class AdaptedWorker:
    """Methods that vLLM adds to each of its workers. The engine calls them by name."""

    model_runner: Any
    rank: int

    def find_adapted(self, modules: Mapping[str, ModuleRows]) -> dict[str, Tensor]:
        """Return module → (d_out,) which of its rows this process found among its layers."""
        model = self.model_runner.model
        if "products" not in vars(self):
            self.products = {
                name: layer.cpu_linear
                for name, layer in model.named_modules()
                if _is_adaptable(layer)
            }
            model.register_forward_pre_hook(self._begin_pass)
        found = {
            module: torch.zeros(rows.d_out, dtype=torch.bool) for module, rows in modules.items()
        }
        for name, layer in self.products.items():
            layer.find(
                {
                    module: rows
                    for module, rows in modules.items()
                    if _block_numbers(module) == _block_numbers(name)
                },
                self.rank,
            )
            for module, share in layer.shares.items():
                found[module][share.theirs] = True
        return found

    def take_adapters(
        self, new: Mapping[int, Mapping[str, Factors]], kept: Collection[int]
    ) -> set[str]:
        """Hold new adapters by their slots, besides those in the slots that are kept.

        Returns:
            the modules of which a layer took a share.
        """
        for layer in self.products.values():
            layer.take(new, kept)
        return {module for layer in self.products.values() for module in layer.shares}

    def _begin_pass(self, *_: Any) -> None:
        """Look up which adapter each token of the pass uses, request after request."""
        runner = self.model_runner
        requests = [runner.requests[name] for name in runner.input_batch.req_ids]
        slots = [
            (request.sampling_params.extra_args or {}).get(SLOT, NO_ADAPTER) for request in requests
        ]
        lengths = torch.from_numpy(runner.query_start_loc.np[: len(slots) + 1]).diff()
        PASS.begin(slots, lengths)


def _keep_product(method: UnquantizedLinearMethod, layer: Any) -> None:
    """Pack the weight for a product that can add to its sum.

    It replaces process_weights_after_loading.
    """
    if (
        not isinstance(layer, LinearBase)
        or layer.weight.ndim != 2
        or layer.weight.is_meta
        or getattr(layer, "_cpu_skip_gemm_dispatch", 0)
    ):
        _THEIRS(method, layer)
    else:
        layer.cpu_linear = Product(layer.weight.data, _multiply)
        layer.weight = torch.nn.Parameter(
            torch.empty(0, dtype=layer.weight.dtype), requires_grad=False
        )


def _multiply(weight: Tensor) -> Multiply:
    """Return vLLM's own product, which costs half as much as torch's for a low rank.

    In float16, oneDNN has none on CPUs without float16 arithmetic.
    """
    if not ops._supports_onednn or weight.dtype == torch.float16:
        return by_product(weight)
    handler = ops.create_onednn_mm(weight.T, 32)
    return lambda x: ops.onednn_mm(handler, x, None)


def _is_adaptable(layer: Any) -> bool:
    return isinstance(getattr(layer, "cpu_linear", None), Product)


def _block_numbers(name: str) -> list[str]:
    """Return the numbers in a module's path.

    They contain its block's number above all, which is the same under every name.
    """
    return re.findall(r"(?<=\.)\d+(?=\.)", name)


def _no_ranks(logprobs: Tensor, chosen: Tensor) -> Tensor:
    """Return zeros for the ranks of the chosen tokens, which nobody reads.

    Counting them without a compiler takes 6 % of a pass of 128 rows.

    Args:
        logprobs: (n, vocabulary).
        chosen: (n, 1), those of the chosen tokens.
    """
    return chosen.new_zeros(len(chosen), dtype=torch.int64)


_THEIRS = UnquantizedLinearMethod.process_weights_after_loading
UnquantizedLinearMethod.process_weights_after_loading = _keep_product
sampler.batched_count_greater_than = _no_ranks
