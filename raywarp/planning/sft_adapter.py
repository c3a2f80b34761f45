"""The check of an adapter that a run is given: whether it is one of the model, and exact."""

from typing import Any

from raywarp.adapters.peft import local_folder
from raywarp.adapters.peft_config import BASE_QUANTIZE
from raywarp.adapters.start import Start
from raywarp.algorithm.factors import AdapterError
from raywarp.algorithm.fitting import check_finite
from raywarp.config.policies import LoraConfig
from raywarp.config.schema import Config, ConfigError
from raywarp.data.models import short_name
from raywarp.identity import folder_fingerprint


def check_start(config: Config, model: str, settings: Any) -> Start | None:
    """Return the run's SFT adapter; None without one.

    Args:
        model: folder or hub id of the model.
        settings: transformers' configuration of the model.

    Raises:
        ConfigError: it cannot be read, is no plain LoRA, holds NaN, or is of another model.
    """
    source = config.sft_adapter
    return (
        checked_adapter(f"sft_adapter={source}", source, config, model, settings)
        if source
        else None
    )


def checked_adapter(what: str, source: str, config: Config, model: str, settings: Any) -> Start:
    """Return an adapter of the model, with its numbers in float32.

    Args:
        what: names the adapter in errors.
        source: a folder or hub id.
        model, settings: see check_start.

    Raises:
        ConfigError: see check_start.
    """
    try:
        start = Start.load(source)
        check_finite(start.delta.factors, source)
    except AdapterError as error:
        raise ConfigError(f"{what}: {error}") from None
    _check_name(what, start.delta.base_model, config, model, settings)
    _check_quantised(what, start.delta.peft.get(BASE_QUANTIZE), config)
    _check_shapes(what, start, config, settings)
    return start


def start_fingerprint(source: str) -> str:
    """Return the fingerprint of an adapter's files."""
    return folder_fingerprint(local_folder(source), ["adapter_config.json", "*.safetensors"])


def _check_name(what: str, base: str, config: Config, model: str, settings: Any) -> None:
    """Compare what the adapter calls its base with the names of the model.

    A name is the last part of a hub id or path, since folders of one model differ.
    """
    own = getattr(settings, "_name_or_path", "")
    ours = {short_name(name) for name in (config.model, model, own)}
    if base and short_name(base) not in ours:
        raise ConfigError(
            f"{what} is an adapter of {base}, and model={config.model}; if both are the same"
            " weights, write the model's name into base_model_name_or_path of its"
            " adapter_config.json"
        )


def _check_quantised(what: str, held: str | None, config: Config) -> None:
    """Raise ConfigError if the adapter says that its base is held in another way.

    Adapters from elsewhere do not say it.
    """
    if held and held != config.base.quantize:
        raise ConfigError(
            f"{what} is an adapter of the base in {held}, which has other weights than with"
            f" base.quantize={config.base.quantize}; set base.quantize={held}"
        )


def _check_shapes(what: str, start: Start, config: Config, settings: Any) -> None:
    from raywarp.planning.model_shapes import model_shapes

    wanted = LoraConfig(target_modules=list(start.sizes))
    try:
        shapes = model_shapes(settings, wanted, trust_remote_code=config.trust_remote_code)
    except ConfigError as error:
        raise ConfigError(f"{what} does not fit model={config.model}: {error}") from None
    for module, size in start.sizes.items():
        if size != shapes.adapted[module]:
            raise ConfigError(
                f"{what} does not fit model={config.model}: {module} is {size} in the adapter and"
                f" {shapes.adapted[module]} in the model"
            )
