"""The choice of a loaded model's attention: the fastest correct one.

The candidates are the short-row kernel, torch's kernel, and the model's eager code.

transformers passes any option of a model to a kernel, and torch's kernel ignores options that it
does not know. Gemma-2's soft cap is one. Then only eager code is correct. Some models
(DeepSeek-V3.2) inspect the attention's name, and a name of ours must not change what they compute.
"""

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from raywarp.config.schema import ConfigError
from raywarp.model.attention import KNOWN_OPTIONS, NAME, SHARED_ROWS, blocks_train
from raywarp.model.probe import LONGEST, close, contradictory, local_limits, source_of

_REFUSED = (
    "model={model} ({kind}) gives a sequence different log-probs {what}; which of them it was"
    " trained with cannot be known, so it is refused; take another model"
)
_BY_NAME = re.compile(r"_attn_implementation\s*(==|!=|in\b|not in\b)")


@torch.no_grad()
def choose_attention(
    model: Any, name: str, alone: Callable[[], Tensor], together: Callable[[], Tensor]
) -> None:
    """Set a model's attention.

    Args:
        model: a causal language model of transformers.
        name: of the model, for the message.
        alone: returns the states of the probe's tokens, from one pass for each sequence.
        together: returns the same states from one padded pass.

    Raises:
        ConfigError: eager code and torch's kernel disagree, or a sequence alone and beside others
            do. Which of the two the model was trained with cannot be known.
    """
    own = model.config._attn_implementation
    eager = _states(model, "eager", alone)
    if eager is None:  # the model has only its own attention
        return
    dropped: set[str] = set()
    with options_that_sdpa_drops(dropped):
        kernel = _states(model, own, alone)
    if not dropped and kernel is not None and contradictory(kernel, eager):
        raise ConfigError(
            _REFUSED.format(
                model=name,
                kind=model.config.model_type,
                what=f"with eager attention and with {own}",
            )
        )
    for candidate in (
        ["eager"]
        if dropped
        else [NAME, own]
        if own == "sdpa" and may_use_short_rows(model)
        else [own]
    ):
        found = _states(model, candidate, together)
        if found is not None and close(found, eager):
            return set_attention(model, candidate)
    set_attention(model, "eager")
    if contradictory(together(), eager):
        raise ConfigError(
            _REFUSED.format(
                model=name, kind=model.config.model_type, what="alone and in a padded batch"
            )
        )


def may_use_short_rows(model: Any) -> bool:
    """Return whether the short-row kernel may serve a model, which must be on a CPU."""
    return model.device.type in ("cpu", "meta") and _may_have_our_names(model)


def attentions_for_shared_rows(model: Any) -> list[str]:
    """Return the attentions to try where completions share a row; the last is the model's own."""
    own: str = model.config._attn_implementation
    if model.device.type != "cuda" or own != "sdpa" or not _may_have_our_names(model):
        return [own]
    blocks = blocks_train(model.config.get_text_config(), model.dtype, model.device)
    return [SHARED_ROWS, own] if blocks else [own]


def _may_have_our_names(model: Any) -> bool:
    """Return whether a kernel of our own may serve a model.

    The model must take its attention from transformers' registry. A name of ours must also be known
    not to change it. The probe measures this if it is longer than all of the model's limits.
    Otherwise no code of the model may ask for the name.
    """
    if not model._supports_attention_backend:
        return False
    probed = all(limit <= LONGEST for limit in local_limits(model.config))
    return probed or not any(_BY_NAME.search(source_of(type(module))) for module in model.modules())


def set_attention(model: Any, name: str) -> None:
    """Set the attention by transformers' switch.

    Where a model does not support the switch, set the configuration field that its code reads.
    """
    if name == model.config._attn_implementation:
        return
    if model._can_set_attn_implementation():
        model.set_attn_implementation(name)
    else:
        model.config._attn_implementation_internal = name


@contextlib.contextmanager
def options_that_sdpa_drops(found: set[str]) -> Iterator[None]:
    """Collect the options that models pass to torch's kernel and that it does not know.

    Args:
        found: receives their names while the context is open.
    """

    def watch(module: torch.nn.Module, *tensors: Any, **options: Any) -> Any:
        found.update(
            name
            for name, value in options.items()
            if name not in KNOWN_OPTIONS and value is not None and value is not False
        )
        return sdpa_attention_forward(module, *tensors, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = watch
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _states(model: Any, name: str, run: Callable[[], Tensor]) -> Tensor | None:
    """Return what `run` returns with this attention; None where the model cannot have it.

    The model's previous attention is restored.
    """
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        set_attention(model, name)
        return run() if model.config._attn_implementation == name else None
    except Exception:  # the model's own code may raise anything where it lacks this attention
        return None
    finally:
        for config, own in before:
            config._attn_implementation_internal = own
