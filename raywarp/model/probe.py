"""A few sequences on which a fast way is compared with a model's own eager code before it is used.

The longest sequence exceeds every window, chunk, top-k and rope limit of the configuration, up to
LONGEST tokens. Limits above LONGEST are not measured. There a fast way is used only if the
configuration alone shows that it is correct.
"""

import functools
import inspect
import re
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raywarp.config.schema import ConfigError
from raywarp.data.text import Completion
from raywarp.model.batches import Batch, collate
from raywarp.model.lengths import length_limits

_OVERFLOW = (
    "dtype=float16: numbers of model={model} exceed 65,504, float16's largest; set dtype=bfloat16"
    " or dtype=float32"
)
# Tokens of a probe's prompt. One pass of it takes about a second for 1e9 parameters on two cores.
LONGEST = 320
_SHORTEST = 16
_LOCAL = re.compile(r"window|chunk|local|span|block_size|stride|top_?k$|sparse_\w*(size|tokens)")
_NOT_LOCAL = re.compile(r"expert|group|layers|token_id")
# Relative error of a token's state: a hundred times that of rounding, and a few times less than the
# difference between Falcon's two ways of ALiBi.
_FLOAT32 = 1e-3
_HALF_CLOSE, _HALF_CONTRADICTORY = 0.05, 0.25


def local_limits(config: Any) -> set[int]:
    """Return every number of a configuration that can make attention local or sparse, in tokens.

    The numbers are recognised by their names.
    """
    return set(_local(config.get_text_config().to_dict())) - {0}


def is_local(config: Any) -> bool:
    """Return whether some layer may not attend to the whole sequence.

    Such a layer has a window, a chunk or a top k, or a type of its own.
    """
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    return bool(kinds - {"full_attention"}) or bool(local_limits(config))


def probe(model: Any) -> Batch:
    """Return two completions of a long prompt and one of a short one.

    Their tokens are ids of the model's vocabulary. The first completion is as long as the prompt.
    Where it shares a row with the second, the second is therefore far from the prompt.
    """
    config = model.config.get_text_config()
    limits = {*local_limits(config), length_limits(config).lowest or 0}
    long = max([_SHORTEST, *(limit + 8 for limit in limits if limit <= LONGEST)])
    most = getattr(config, "max_position_embeddings", None)
    # A model with a table of positions has no positions beyond it.
    if most and length_limits(config).lowest is None:
        long = max(1, min(long, most // 2 - 8))
    ids = [n * 7919 % config.vocab_size for n in range(1, 2 * long + 15)]
    parts = [
        tuple(ids[long : 2 * long]),
        tuple(ids[2 * long : 2 * long + 6]),
        tuple(ids[2 * long + 6 : 2 * long + 10]),
    ]
    completions = [Completion(part, (0.0,) * len(part), "", False) for part in parts]
    return collate([ids[:long]] * 2 + [ids[-4:]], completions).to(model.device)


def single(batch: Batch, n: int) -> Batch:
    """Return the n-th completion with its prompt, without padding."""
    length = int(batch.mask[n].sum())
    cut = (
        tensor[n : n + 1, :length]
        for tensor in (batch.responses, batch.mask, batch.sampler_logprobs)
    )
    return Batch(batch.prompts[n : n + 1], *cut)


def close(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two ways give the same (n, D) states.

    In float32 every token must agree. In half precision half of them must, since rounding may
    change which experts are chosen.
    """
    errors = _errors(ours, theirs)
    return bool(
        (errors.max() if ours.dtype == torch.float32 else errors.median())
        <= _limit(ours, _HALF_CLOSE)
    )


def contradictory(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether two ways give (n, D) states whose difference rounding does not explain."""
    return bool(_errors(ours, theirs).median() > _limit(ours, _HALF_CONTRADICTORY))


def check_range(model: str, dtype: torch.dtype, values: Tensor) -> None:
    """Check that numbers of a float16 model have not overflown.

    Args:
        model: its name.
        dtype: of the model. Any other than float16 passes.
        values: what the model gave.

    Raises:
        ConfigError: a value is not finite.
    """
    if dtype == torch.float16 and not bool(values.isfinite().all()):
        raise ConfigError(_OVERFLOW.format(model=model))


def source_of(kind: type) -> str:
    """Return the source code of a class and its ancestors, as far as it is available.

    Classes of torch, raywarp and the builtins are left out.
    """
    ancestors = [
        ancestor
        for ancestor in kind.__mro__
        if not ancestor.__module__.startswith(("torch.", "builtins", "raywarp."))
    ]
    return "\n".join(
        _classes_of(ancestor.__module__).get(ancestor.__name__, "") for ancestor in ancestors
    )


@functools.cache
def _classes_of(module: str) -> dict[str, str]:
    """Return class → its code, for those on a module's top level."""
    try:
        parts = re.split(
            r"^(?=class (\w+))", inspect.getsource(sys.modules[module]), flags=re.MULTILINE
        )
    except (OSError, TypeError, KeyError):
        return {}
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _limit(states: Tensor, half: float) -> float:
    return _FLOAT32 if states.dtype == torch.float32 else half


def _errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the (n,) relative errors; NaN counts as infinite."""
    errors: Tensor = (ours.float() - theirs.float()).norm(dim=-1) / theirs.float().norm(dim=-1)
    return errors.nan_to_num(nan=torch.inf)


def _local(tree: Mapping[str, Any]) -> list[int]:
    found = []
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found += _local(value)
        elif (
            isinstance(value, int)
            and not isinstance(value, bool)
            and _LOCAL.search(name)
            and not _NOT_LOCAL.search(name)
        ):
            found.append(value)
    return found
