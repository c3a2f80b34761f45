"""Checks and loading of a model's files: nothing is loaded before the files are checked.

Config and tokenizer must be readable and the weights whole. No pickle and nothing outside the
folder is read. A model's own code never runs unless `trust_remote_code` allows it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from raywarp.adapters.weight_files import check_experts, stored_tensors
from raywarp.config.schema import ConfigError
from raywarp.data.rows import HUB_ID

ADAPTER = "adapter_config.json"
_CAUSAL = ("CausalLM", "LMHeadModel", "ConditionalGeneration")
_CLASSIFIER = ("SequenceClassification", "RewardModel")


def read_model_config(name: str, trust_remote_code: bool, what: str) -> Any:
    """Return transformers' configuration of a folder or hub id.

    Args:
        what: how messages call the model, for example model=runs/sft.

    Raises:
        ConfigError: it cannot be read, or needs code of its own that trust_remote_code does not
            allow.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    # A wrong config.json can raise anything, in transformers and in the model's own class.
    except Exception as error:
        raise ConfigError(f"{what} cannot be loaded: {_reason(error)}") from None


def read_tokenizer(name: str, trust_remote_code: bool, what: str) -> Any:
    """Return the tokenizer of a folder or hub id; see read_model_config for errors."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # a wrong tokenizer file can raise anything, too
        raise ConfigError(f"{what}: its tokenizer cannot be loaded: {_reason(error)}") from None


def is_causal(config: Any) -> bool:
    """Return whether config.json names a causal language model, by its class."""
    kinds = getattr(config, "architectures", None) or []
    return any(ending in kind for kind in kinds for ending in _CAUSAL)


def check_causal(name: str, config: Any, trust_remote_code: bool, what: str) -> None:
    """Raise ConfigError unless a model is a whole causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    _check_kind(config, _CAUSAL, trust_remote_code, what, "a causal language model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not _has_code(config, trust_remote_code):
        raise ConfigError(
            f"{what} is a {config.model_type}, of which there is no causal language model"
        )
    check_weights(name, what)


def check_one_label(name: str, config: Any, trust_remote_code: bool, what: str) -> None:
    """Raise ConfigError unless a model is a whole sequence classifier with one label."""
    if config.num_labels != 1:
        raise ConfigError(
            f"{what} has num_labels={config.num_labels}, a reward needs 1: "
            "a sequence classifier with one score, such as the folder that `raywarp reward` writes"
        )
    _check_kind(config, _CLASSIFIER, trust_remote_code, what, "a sequence classifier")
    check_weights(name, what)


def check_weights(name: str, what: str) -> None:
    """Check the safetensors files of a folder by their headers; skip a hub id.

    Raises:
        ConfigError: no weights, a pickle in their place, or a file that is cut off; an index that
            names a missing file or one outside the folder; a tensor that is there twice; or an
            adapter in the folder.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    if (folder / ADAPTER).is_file():
        raise ConfigError(_adapter_inside(what))
    stored_tensors(folder, what)


def load_model(auto: Any, name: str, what: str, *, new_head: bool = False, **options: Any) -> Any:
    """Return a model whose every tensor comes from its files.

    Args:
        auto: a class of transformers, such as AutoModelForCausalLM.
        new_head: tensors outside the backbone may be new, since they will be trained.
        options: of from_pretrained.

    Raises:
        ConfigError: the model cannot be loaded; a tensor is missing or has another shape
            (transformers would make it up at random); or its two embeddings differ where its
            configuration says that they are one.
    """
    model = _load(auto, name, what, new_head, options)
    head, tied = (
        model.get_output_embeddings(),
        getattr(model.config.get_text_config(), "tie_word_embeddings", False),
    )
    # transformers 5.19 does not tie weights that differ
    if head is not None and tied and head.weight is not model.get_input_embeddings().weight:
        raise ConfigError(_untied(what, "the embedding and the head"))
    return model


def check_tensors(
    auto: Any, name: str, config: Any, what: str, *, new_head: bool = False, **options: Any
) -> None:
    """Check that load_model will find every tensor in a folder, without reading a weight.

    transformers' own loader is asked, on torch's meta device. A quantised model is left to
    load_model, since its loader may need numbers. So is a hub id, whose files are not known yet.

    Args:
        config: transformers' configuration.
        new_head, options: of load_model.

    Raises:
        ConfigError: as load_model does, and for a tensor that is there under two names.
    """
    folder = Path(name)
    if not folder.is_dir() or getattr(config, "quantization_config", None):
        return
    tensors = stored_tensors(folder, what)
    check_experts({tensor: file.shapes[tensor] for tensor, file in tensors.items()}, what)
    try:
        model = _load(auto, name, what, new_head, {**options, "device_map": "meta"})
    except ConfigError:
        raise
    # A model's own code may need numbers, which are missing here; load_model then reports what is
    # wrong.
    except Exception:
        return
    prefix = f"{model.base_model_prefix}."
    for tensor, file in tensors.items():
        if (other := tensors.get(prefix + tensor)) is not None:
            places = f"{tensor} in {file.path.name} and {prefix}{tensor} in {other.path.name}"
            raise ConfigError(f"{what} holds one tensor under two names: {places}; one must go")
    for pair in getattr(model, "all_tied_weights_keys", {}).items():
        stored = list(
            dict.fromkeys(
                key for name in pair for key in (name, name.removeprefix(prefix)) if key in tensors
            )
        )
        if len(stored) == 2 and not torch.equal(*(tensors[key].tensor(key) for key in stored)):
            raise ConfigError(_untied(what, " and ".join(stored)))


def local_folder(model: str) -> Path | None:
    """Return the folder on this machine that has a model's config.json; None without one.

    Args:
        model: folder or hub id, whose files may be in the hub's cache.
    """
    from huggingface_hub import try_to_load_from_cache

    if (Path(model).expanduser() / "config.json").is_file():
        return Path(model).expanduser()
    cached = try_to_load_from_cache(model, "config.json") if HUB_ID.fullmatch(model) else None
    return Path(cached).parent if isinstance(cached, str) else None


def short_name(name: str) -> str:
    """Return the last part of a hub id or path, in lower case: folders of one model differ."""
    parts = Path(name.partition("@")[0]).parts
    cached = [part for part in parts if part.startswith("models--")]
    last = cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else ""
    return last.rpartition(":")[2].lower()


def first_line(error: BaseException) -> str:
    """Return the first line of a library's message, or the error's type."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _load(auto: Any, name: str, what: str, new_head: bool, options: dict[str, Any]) -> Any:
    options = {
        "use_safetensors": True,
        "ignore_mismatched_sizes": True,
        "output_loading_info": True,
        **options,
    }
    try:
        with _silence():
            model, report = auto.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{what} cannot be loaded: {first_line(error)}") from None
    except RuntimeError as error:
        # transformers 5.19 does not say which part of a fused tensor is wrong
        if "conversion of the weights" not in str(error):
            raise
        raise ConfigError(
            f"{what} cannot be loaded: tensors that belong together, such as a layer's experts, do"
            " not fit together"
        ) from None
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ConfigError(_adapter_inside(what))
    ours = f"{model.base_model_prefix}." if new_head and model.base_model_prefix else ""
    for tensor, found, wanted in sorted(report["mismatched_keys"]):
        if tensor.startswith(ours):
            raise ConfigError(
                f"{what}: the tensor {tensor} has the shape {tuple(found)}, and by its config.json"
                f" {tuple(wanted)}"
            )
    # Name → the other name of the same tensor, under which the files hold it.
    tied = getattr(model, "all_tied_weights_keys", {})
    if missing := sorted(
        {tied.get(tensor, tensor) for tensor in report["missing_keys"] if tensor.startswith(ours)}
    ):
        others = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise ConfigError(
            f"{what} lacks the tensor {missing[0]}{others}; it would be made up at random"
        )
    return model


@contextmanager
def _silence() -> Iterator[None]:
    """Silence transformers while a model loads: _load reports what is wrong with its files."""
    from transformers.utils import logging

    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()


def _adapter_inside(what: str) -> str:
    return (
        f"{what} has an adapter beside the model ({ADAPTER}), which transformers would put on it"
        " and vLLM would not; move the adapter to a folder of its own, or merge it into the model"
    )


def _untied(what: str, names: str) -> str:
    return (
        f"{what}: {names} differ, and tie_word_embeddings in config.json says that they are one;"
        " transformers would use both and vLLM one; set tie_word_embeddings to false, or save the"
        " model again"
    )


def _check_kind(
    config: Any, endings: tuple[str, ...], trust_remote_code: bool, what: str, wanted: str
) -> None:
    kinds = getattr(config, "architectures", None) or []
    if (
        kinds
        and not any(ending in kind for kind in kinds for ending in endings)
        and not _has_code(config, trust_remote_code)
    ):
        raise ConfigError(f"{what} holds a {kinds[0]}; it must be {wanted}")


def _has_code(config: Any, trust_remote_code: bool) -> bool:
    return trust_remote_code and bool(getattr(config, "auto_map", None))


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            "it comes with code of its own, which is not run unless trust_remote_code=true; read"
            " that code first"
        )
    if str(error).startswith("Couldn't instantiate the backend tokenizer"):
        return "there are no tokenizer files, such as tokenizer.json"
    return " ".join(str(error).split())[:300] or type(error).__name__
