"""A model's safetensors files, and which tensors they hold by their headers.

Only the files that the index names are read.
"""

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path

from raywarp.adapters.tensor_file import TensorFile, TensorFileError
from raywarp.config.schema import ConfigError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_EXPERT = re.compile(r"(.*\.experts\.)(\d+)(\..*)")


def weight_files(folder: Path, what: str) -> list[Path]:
    """Return the files that hold a folder's weights.

    They are model.safetensors, or the files that its index names. Other safetensors files are not
    read. See data.models.check_weights for the errors.
    """
    weight_map = _weight_map(folder, what)
    names = sorted(set(weight_map.values())) or [WEIGHTS] * (folder / WEIGHTS).is_file()
    files = [inside(folder, name, what) for name in names]
    if missing := [path.name for path in files if not path.is_file()]:
        raise ConfigError(f"{what} lacks {missing[0]}, which {folder / INDEX} names")
    if (folder / WEIGHTS).is_file() and names != [WEIGHTS]:
        tensor = next(name for name, file in weight_map.items() if file != WEIGHTS)
        raise ConfigError(
            f"{what} holds two models: {INDEX} says that {tensor} is in {weight_map[tensor]}, and"
            f" {WEIGHTS} is there, too; transformers reads one and vLLM the other; remove what is"
            " not meant"
        )
    if not files:
        raise ConfigError(f"{what} has no weights: {_what_instead(folder, what)}")
    return files


def stored_tensors(folder: Path, what: str) -> dict[str, TensorFile]:
    """Return name → file of every tensor of a folder's model, by the files' headers.

    See data.models.check_weights for the errors.
    """
    tensors: dict[str, TensorFile] = {}
    for path in weight_files(folder, what):
        file = _open(path, what)
        for name in file.shapes:
            if name in tensors:
                raise ConfigError(
                    f"{what} holds the tensor {name} twice, in {tensors[name].path.name} and in"
                    f" {path.name}; one must go"
                )
            tensors[name] = file
    weight_map = _weight_map(folder, what)
    for name, place in weight_map.items():
        if name not in tensors or tensors[name].path.name != place:
            raise ConfigError(
                f"{what} lacks the tensor {name}: {INDEX} says that it is in {place}, which does"
                " not hold it"
            )
    if not weight_map:
        _refuse_copies(tensors, folder, what)
    return tensors


def own_files_only(folder: Path, place: Path) -> Path:
    """Return a folder in which the model's are the only safetensors files.

    It is the folder itself, unless it holds others. Then it is a new folder of links to everything
    else. vLLM 0.32 needs this: without an index it reads every safetensors file, and of Mistral's
    folders only the consolidated ones.

    Args:
        place: of the new folder.
    """
    own = {path.name for path in weight_files(folder, f"model={folder}")}
    others = {path.name for path in folder.glob("*.safetensors")} - own
    if not others:
        return folder
    place.mkdir()
    for path in folder.iterdir():
        if path.name not in others:
            (place / path.name).symlink_to(path.resolve())
    return place


def check_experts(shapes: Mapping[str, tuple[int, ...]], what: str) -> None:
    """Raise ConfigError where separately stored experts do not fit together.

    One of them lacks a tensor that the others have, or has it in another shape. transformers puts
    the experts into one tensor per layer, and does not say which of them it could not use.
    """
    layers: dict[tuple[str, str], dict[int, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if found := _EXPERT.fullmatch(name):
            layers.setdefault((found[1], found[3]), {})[int(found[2])] = shape
    everyone = {layer: set[int]() for layer, _ in layers}
    for (layer, _), experts in layers.items():
        everyone[layer] |= experts.keys()
    for (layer, part), experts in layers.items():
        for expert in sorted(everyone[layer] | set(range(max(everyone[layer])))):
            name, usual = f"{layer}{expert}{part}", statistics.mode(experts.values())
            if expert not in experts:
                raise ConfigError(f"{what} lacks the tensor {name}")
            if experts[expert] != usual:
                raise ConfigError(
                    f"{what}: the tensor {name} has the shape {experts[expert]}, and the other"
                    f" experts' {usual}"
                )


def weight_bytes(folder: Path) -> int:
    """Return the size of a model's files in bytes; 0 where there are none."""
    return sum(path.stat().st_size for path in _present(folder))


def stored_bytes(name: str) -> int:
    """Return the bytes per number in a folder's checkpoint, by its first file; 2 if unknown."""
    first = next(iter(_present(Path(name))), None)
    kinds = [kind.itemsize for kind in TensorFile(first).dtypes] if first else []
    return max(kinds, default=2)


def download_weights(name: str) -> Path:
    """Return the folder in the hub's cache with a hub id's config and weights.

    Only the files that transformers reads are downloaded.
    """
    from huggingface_hub import snapshot_download

    folder = Path(snapshot_download(name, allow_patterns=[WEIGHTS, "*.json"]))
    if shards := sorted(set(_weight_map(folder, name).values())):
        folder = Path(snapshot_download(name, allow_patterns=shards))
    return folder


def inside(folder: Path, name: str, what: str) -> Path:
    """Return a folder's file by the name that another file gives it.

    Raises:
        ConfigError: the name, or a link of that name, leads out of the folder. A link into the
            blobs of the hub's cache is allowed.
    """
    path = folder / name
    if Path(name).name != name or name in ("", ".", ".."):
        raise ConfigError(f"{what} names a file outside its folder: {name!r}; refused")
    home, target = folder.resolve(), path.resolve()
    allowed = [home] + ([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])
    if not any(target.is_relative_to(place) for place in allowed):
        raise ConfigError(
            f"{what}: {name} is a link that leads out of its folder, to {target}; put the file"
            " itself there"
        )
    return path


def _weight_map(folder: Path, what: str) -> dict[str, str]:
    """Return tensor → file, as a folder's index has it; empty where there is no index."""
    index = folder / INDEX
    if not index.is_file():
        return {}
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if all(isinstance(file, str) for file in weight_map.values()):
            return dict(weight_map)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(f"{what}: {index} is corrupt: it does not map weights to files")


def _present(folder: Path) -> list[Path]:
    """Return the model's files that exist."""
    names = sorted({WEIGHTS, *_weight_map(folder, str(folder)).values()})
    return [folder / name for name in names if (folder / name).is_file()]


def _open(path: Path, what: str) -> TensorFile:
    try:
        return TensorFile(path)
    except TensorFileError as error:
        raise ConfigError(f"{what}: {error}") from None


def _refuse_copies(tensors: Mapping[str, TensorFile], folder: Path, what: str) -> None:
    """Raise ConfigError if another file than the model's holds one of its tensors, too.

    It applies where no index says which file counts.
    """
    for path in sorted(
        set(folder.glob("*.safetensors")) - {file.path for file in tensors.values()}
    ):
        try:
            names = TensorFile(path).shapes
        except TensorFileError:
            continue
        if name := next((name for name in names if name in tensors), None):
            raise ConfigError(
                f"{what} holds the tensor {name} twice, in {tensors[name].path.name} and in"
                f" {path.name}, and no {INDEX} says which counts"
            )


def _what_instead(folder: Path, what: str) -> str:
    """Return what a folder without weights holds in their place.

    Raises:
        ConfigError: files that repeat a tensor.
    """
    others = sorted(folder.glob("*.safetensors"))
    seen: dict[str, str] = {}
    for path in others:
        for name in _open(path, what).shapes:
            if name in seen:
                raise ConfigError(
                    f"{what} holds the tensor {name} twice, in {seen[name]} and in {path.name}, and"
                    f" no {INDEX} says which counts"
                )
            seen[name] = path.name
    if others:
        return (
            f"{others[0].name} is not read, since there is neither {WEIGHTS} nor a {INDEX} that"
            " names it; save it with save_pretrained"
        )
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        return (
            f"no *.safetensors, only {pickles[0]}, a pickle, which may run code; save it with"
            " save_pretrained"
        )
    return f"there is no *.safetensors in {folder}, neither {WEIGHTS} nor what {INDEX} names"
