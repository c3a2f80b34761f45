"""vLLM's loader of a base that the trainer holds in 4 bits.

vLLM 0.32 has no bitsandbytes. It gets the weights W' that the 4 bits stand for. Each of its
processes imports this module before it loads a model.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from raywarp.rollout.quantised_files import LOAD_FORMAT, as_held


class Nf4Worker:
    """What vLLM adds to its workers so that they import this module: no methods."""


@register_model_loader(LOAD_FORMAT)
class Nf4Loader(DefaultModelLoader):  # type: ignore[misc]
    """vLLM's own loader of safetensors files, with W' in place of each quantised weight."""

    def __init__(self, load_config: Any):
        self._quantised = load_config.model_loader_extra_config["quantised"]
        super().__init__(
            replace(load_config, load_format="safetensors", model_loader_extra_config={})
        )

    def get_all_weights(self, *arguments: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield name and weight, as the model takes them."""
        for name, weight in super().get_all_weights(*arguments):
            yield name, as_held(self._quantised, name, weight)
