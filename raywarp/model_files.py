"""A model's files, checked before anything loads them: config and tokenizer readable, weights whole, no pickle, nothing outside the folder.

Code that comes with a model is never run unless `trust_remote_code` asks for it.
"""

import json
from pathlib import Path
from typing import Any

from raywarp.config import ConfigError
from raywarp.tensor_files import TensorFile, TensorFileError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CAUSAL = ("CausalLM", "LMHeadModel", "ConditionalGeneration")
_CLASSIFIER = ("SequenceClassification", "RewardModel")


def read_model_config(name: str, trust_remote_code: bool, what: str) -> Any:
    """transformers' configuration of a folder or hub id.

    Args:
        what: how messages call the model, for example model=runs/sft.

    Raises:
        ConfigError: it cannot be read, or needs code of its own that nobody asked for.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the parts of a wrong config.json raise, in transformers and the model's own class
        raise ConfigError(f"{what} cannot be loaded: {_reason(error)}") from None


def read_tokenizer(name: str, trust_remote_code: bool, what: str) -> Any:
    """The tokenizer of a folder or hub id; raises as read_model_config does."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except Exception as error:  # likewise
        raise ConfigError(f"{what}: its tokenizer cannot be loaded: {_reason(error)}") from None


def check_causal(name: str, config: Any, trust_remote_code: bool, what: str) -> None:
    """Raises ConfigError where a model is not a whole language model that predicts the next token."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    _check_kind(config, _CAUSAL, trust_remote_code, what, "a causal language model")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not _has_code(config, trust_remote_code):
        raise ConfigError(f"{what} is a {config.model_type}, of which there is no causal language model")
    check_weights(name, what)


def check_one_label(name: str, config: Any, trust_remote_code: bool, what: str) -> None:
    """Raises ConfigError where a model is not a whole sequence classifier with one label."""
    if config.num_labels != 1:
        raise ConfigError(
            f"{what} has num_labels={config.num_labels}, a reward needs 1: "
            "a sequence classifier with one score, such as the folder that `raywarp reward` writes"
        )
    _check_kind(config, _CLASSIFIER, trust_remote_code, what, "a sequence classifier")
    check_weights(name, what)


def check_weights(name: str, what: str) -> None:
    """The safetensors files of a folder, by their headers; of a hub id nothing is known yet.

    Raises:
        ConfigError: none, a pickle in their place, one that is cut off, or an index that names what is missing or outside the folder.
    """
    folder = Path(name)
    if not folder.is_dir():
        return
    try:
        for file in weight_files(folder, what):
            TensorFile(file)
    except TensorFileError as error:
        raise ConfigError(f"{what}: {error}") from None


def weight_files(folder: Path, what: str) -> list[Path]:
    """The files that hold a folder's weights: one, or those that its index names; see check_weights for the errors."""
    index = folder / INDEX
    if not (folder / WEIGHTS).is_file() and index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
            files = [inside(folder, shard, what) for shard in sorted(shards)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{what}: {index} is corrupt: it does not map weights to files") from None
    else:
        files = [inside(folder, path.name, what) for path in sorted(folder.glob("*.safetensors"))]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ConfigError(f"{what} lacks {missing[0]}, which {index} names")
    if files:
        return files
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        raise ConfigError(
            f"{what} has no *.safetensors weights, only {pickles[0]}, a pickle, which may run code; save it with save_pretrained"
        )
    raise ConfigError(f"{what} has no weights: there is no {WEIGHTS} in {folder}")


def weight_bytes(folder: Path) -> int:
    """Of a folder's safetensors files; 0 where there are none."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def stored_bytes(name: str) -> int:
    """Of a number in a folder's checkpoint, by its first file; 2 where that is not known."""
    first = next(iter(sorted(Path(name).glob("*.safetensors"))), None)
    kinds = [kind.itemsize for kind in TensorFile(first).dtypes] if first else []
    return max(kinds, default=2)


def inside(folder: Path, name: str, what: str) -> Path:
    """A file of a folder by the name that another file gives it.

    Raises:
        ConfigError: the name, or a link of that name, leads out of the folder. (Into the blobs of the hub's cache it may.)
    """
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise ConfigError(f"{what} names a file outside its folder: {name!r}; refused")
    home, target = folder.resolve(), path.resolve()
    allowed = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(place) for place in allowed):
        raise ConfigError(f"{what}: {name} is a link that leads out of its folder, to {target}; put the file itself there")
    return path


def first_line(error: BaseException) -> str:
    """What a library's long message comes to."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_kind(config: Any, endings: tuple[str, ...], trust_remote_code: bool, what: str, wanted: str) -> None:
    kinds = getattr(config, "architectures", None) or []
    if kinds and not any(ending in kind for kind in kinds for ending in endings) and not _has_code(config, trust_remote_code):
        raise ConfigError(f"{what} holds a {kinds[0]}; it must be {wanted}")


def _has_code(config: Any, trust_remote_code: bool) -> bool:
    return trust_remote_code and bool(getattr(config, "auto_map", None))


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it comes with code of its own, which is not run unless trust_remote_code=true; read that code first"
    if str(error).startswith("Couldn't instantiate the backend tokenizer"):
        return "there are no tokenizer files, such as tokenizer.json"
    return " ".join(str(error).split())[:300] or type(error).__name__
