"""The base model of an adapter: its files, and its architecture without weights."""

import copy
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from raywarp.adapters.peft import AdapterFile
from raywarp.adapters.tensor_file import TensorFile
from raywarp.adapters.weight_files import stored_tensors
from raywarp.config.schema import ConfigError
from raywarp.data import embedded
from raywarp.data.models import check_weights, first_line, read_model_config, short_name
from raywarp.data.quantised_models import folder_quantisation

# Everything that a model's folder may hold besides weights.
_FILES = ("*.json", "*.jsonl", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.safetensors")


@dataclass(frozen=True)
class Base:
    """A model's files.

    Attributes:
        name: as the user or the adapter gave it.
        folder: where the files lie.
        settings: the content of config.json.
        config: transformers' configuration of it.
        tensors: name → file of every stored tensor.
        trust_remote_code: whether the model's own code may run.
    """

    name: str
    folder: Path
    settings: Mapping[str, Any]
    config: Any
    tensors: Mapping[str, TensorFile]
    trust_remote_code: bool

    @property
    def what(self) -> str:
        """How messages call it."""
        return f"base={self.name}"

    def skeletons(self, **changes: Any) -> Iterator[Any]:
        """Yield the model on torch's meta device, as each class that may load it.

        An adapter may be of the class that config.json names, or of a causal language model.

        Args:
            changes: attributes to change in the configuration.
        """
        import transformers

        config = copy.deepcopy(self.config)
        for name, value in changes.items():
            for part in (config, config.get_text_config()):
                setattr(part, name, value)
        builders = []
        for name in config.architectures or ():
            kind = getattr(transformers, name, None)
            if kind is not None and isinstance(config, kind.config_class):
                builders.append(kind._from_config)
        own = {"trust_remote_code": self.trust_remote_code}
        auto = functools.partial(transformers.AutoModelForCausalLM.from_config, **own)
        for build in [*builders, auto]:
            try:
                with torch.device("meta"):
                    model = build(config)
            except Exception:  # a class that does not take this configuration can raise anything
                continue
            model.tie_weights()
            yield model


def open_base(
    adapter: AdapterFile,
    base: str | None = None,
    trust_remote_code: bool = False,
    allow_different_base: bool = False,
    weights: bool = True,
) -> Base:
    """Open the base model of an adapter, or the one that the user names.

    Args:
        base: folder, hub id (`user/name` or `user/name@revision`) or `embedded:` name; by default
            the adapter's own.
        allow_different_base: do not compare the names.
        weights: False for the configuration alone.

    Raises:
        ConfigError: no base is known, it is another one than the adapter's, it is quantised, or its
            files are not whole.
    """
    own = adapter.like().base_model
    name = base or own
    if not name:
        raise ConfigError(f"{adapter.name} names no base model; name it with --base")
    if base and own and short_name(base) != short_name(own) and not allow_different_base:
        raise ConfigError(
            f"{adapter.name} is an adapter of {own}, not of {base} (--allow-different-base if both"
            " names mean the same weights)"
        )
    files = _FILES if weights else ("*.json", "*.py")
    folder, what = _folder(name, adapter.config.get("revision"), files), f"base={name}"
    _refuse_quantised(folder, what)
    config = read_model_config(str(folder), trust_remote_code, what)
    settings = json.loads((folder / "config.json").read_text())
    tensors: dict[str, TensorFile] = {}
    if weights:
        check_weights(str(folder), what)
        tensors = stored_tensors(folder, what)
    return Base(name, folder, settings, config, tensors, trust_remote_code)


def _folder(name: str, revision: str | None, files: Sequence[str]) -> Path:
    """Return a model's folder on this machine; download a hub id's files unless they are cached."""
    resolved = embedded.resolve(name)
    folder = Path(resolved).expanduser()
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    hub_id, _, own = resolved.partition("@")
    if own and revision and own != revision:
        raise ConfigError(f"base={name} is revision {own}, and the adapter is of {revision}")
    try:
        return Path(
            snapshot_download(
                hub_id,
                revision=own or revision or None,
                allow_patterns=[*files],
                ignore_patterns=["consolidated*"],  # Mistral's copies of the same weights
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"base={name} is no folder here, and the hub did not give it: {first_line(error)}; name"
            " the base's folder with --base"
        ) from None


def _refuse_quantised(folder: Path, what: str) -> None:
    if (method := folder_quantisation(folder)) is not None:
        raise ConfigError(
            f"{what} is quantised ({method}): ΔW cannot be added to its stored numbers; name the"
            " model that it was made from with --base"
        )
