"""PEFT's LoRA adapters on disk, read and written module by module."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raywarp.adapters.base_copies import check_copies
from raywarp.adapters.peft_config import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    INDEX_FILE,
    common_ranks,
    configuration,
    read_adapter_config,
    scaling_of,
    weight_paths,
    without_factors,
)
from raywarp.adapters.rounding import balanced
from raywarp.adapters.tensor_file import TensorFile, TensorFileError, TensorWriter
from raywarp.adapters.tensor_names import factor_shape, read_names, tensor_name
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import AdapterError, Factors
from raywarp.algorithm.fitting import check_finite


class AdapterFile:
    """One PEFT LoRA adapter, open for reading: its configuration, and its factors on demand.

    Args:
        source: a local folder, or a hub id such as `user/adapter`, `user/adapter/subfolder` or
            `user/adapter@revision`.

    Attributes:
        name: as the user gave it.
        folder: where its files lie.
        config: the content of adapter_config.json.
        shapes: module → (d_out, r, d_in), in the order of the layers.
        scalings: module → alpha/r or, for rsLoRA, alpha/√r.
        skipped: tensors that change nothing: copies of the base's weights, and buffers.

    Raises:
        AdapterError: missing or corrupt files, a pickle instead of safetensors, or a variant of
            LoRA that is not plain B·A.
    """

    def __init__(self, source: str | Path):
        self.name = str(source)
        try:
            self.folder = local_folder(source)
            paths = weight_paths(self.folder)
            self.config = read_adapter_config(self.folder)
            self._open(paths)
        except OSError as error:
            place = error.filename or source
            raise AdapterError(f"cannot read {place}: {error.strerror or error}") from None
        except TensorFileError as error:
            raise AdapterError(str(error)) from None

    def _open(self, paths: list[Path]) -> None:
        self._files: dict[str, TensorFile] = {}
        for path in paths:
            file = TensorFile(path)
            if twice := next((name for name in file.shapes if name in self._files), None):
                raise AdapterError(f"{self.folder} holds the tensor {twice} twice")
            self._files |= dict.fromkeys(file.shapes, file)
        shapes = {name: file.shapes[name] for name, file in self._files.items()}
        self._names, copies, skipped = read_names(paths[0], shapes)
        like = self.like()
        self.skipped = [
            *skipped,
            *check_copies(self._files, copies, like.base_model, like.peft.get("revision")),
        ]
        self.shapes = {
            module: factor_shape(self._files[A].path, module, shapes[A], shapes[B])
            for module, (A, B) in self._names.items()
        }
        try:
            self.scalings = {
                module: scaling_of(self.config, module, rank)
                for module, (_, rank, _) in self.shapes.items()
            }
        except AdapterError as error:
            raise AdapterError(f"{self.folder}: {error}") from None

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Module → (d_out, d_in)."""
        return {module: (d_out, d_in) for module, (d_out, _, d_in) in self.shapes.items()}

    @property
    def own(self) -> list[str]:
        """The modules that the file has factors of."""
        return list(self._names)

    @property
    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of the factors."""
        names = [name for pair in self._names.values() for name in pair]
        found = {self._files[name].dtype(name) for name in names}
        return {dtype for dtype in found if dtype}

    def complete(self, sizes: Mapping[str, tuple[int, int]]) -> None:
        """Add the modules that other adapters change; this one changes them by zero, at rank 0.

        Args:
            sizes: module → (d_out, d_in) of all modules, in the order that `shapes` shall have.
        """
        self.shapes = {
            module: self.shapes.get(module, (d_out, 0, d_in))
            for module, (d_out, d_in) in sizes.items()
        }

    def like(self) -> AdapterDelta:
        """Return everything about the adapter except its factors."""
        return without_factors(self.config)

    def read(self, module: str, scaled: bool = True) -> Factors:
        """Return the factors of one module.

        They are in float32, or in float64 if they are stored so. They may be views of the file:
        valid until `release`, and read again when used later.

        Args:
            scaled: fold the scaling into B.
        """
        if module not in self._names:
            d_out, rank, d_in = self.shapes[module]
            return Factors(torch.empty(d_out, rank), torch.empty(rank, d_in))
        A, B = (self._tensor(name) for name in self._names[module])
        dtype = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
        scaling = self.scalings[module] if scaled else 1
        return Factors(B.to(dtype) if scaling == 1 else B.to(dtype) * scaling, A.to(dtype))

    def require_finite(self) -> None:
        """Raise AdapterError if a number is NaN or infinite; the message names its module."""
        for module in self.own:
            check_finite({module: self.read(module)}, self.name)
            self.release(module)

    def _tensor(self, name: str) -> Tensor:
        try:
            return self._files[name].tensor(name)
        except TensorFileError as error:
            raise AdapterError(str(error)) from None

    def release(self, module: str) -> None:
        """Give back the memory of what was read of this module."""
        for name in self._names.get(module, ()):
            self._files[name].release(name)


class AdapterWriter:
    """A PEFT adapter that is written module by module, for any rank of each.

    It is a context manager; PEFT and vLLM can read the adapter afterwards. The scaling stays folded
    into B: every module's alpha equals its rank. All modules get the largest of their ranks, by
    columns and rows of zeros, since old PEFT, llama.cpp and MLX know one rank and scale by it.

    Args:
        folder: made if it does not exist; its adapter_model.safetensors and adapter_config.json are
            replaced.
        like: the adapter whose base, targets and task the new one has.
        largest: module → (d_out, r, d_in) of all that will be written, in this order; r is the
            largest rank that may come.
        dtype: of the written factors.
        per_module_ranks: keep unequal ranks, and write rank_pattern; see common_ranks.
    """

    def __init__(
        self,
        folder: Path,
        like: AdapterDelta,
        largest: Mapping[str, tuple[int, int, int]],
        dtype: torch.dtype,
        per_module_ranks: bool = False,
    ):
        self.folder, self.like, self._ranks = folder, like, dict[str, int]()
        self._largest, self._per_module = largest, per_module_ranks
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {}
        for module, (d_out, rank, d_in) in largest.items():
            shapes[tensor_name(module, "A")] = (max(rank, 1), d_in)
            shapes[tensor_name(module, "B")] = (d_out, max(rank, 1))
        self._writer = TensorWriter(folder / ADAPTER_FILE, shapes, dtype)

    def __enter__(self) -> "AdapterWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if kind is None:
            self._pad()
            text = json.dumps(configuration(self.like, self._ranks), indent=2, sort_keys=True)
            (self.folder / ADAPTER_CONFIG_FILE).write_text(text + "\n", encoding="utf-8")

    def write(self, module: str, factors: Factors) -> None:
        """Write the next module. Raise AdapterError if a number is too large for the dtype."""
        B, A = balanced(factors, self._writer.dtype)
        if not factors.rank:
            B, A = B.new_zeros(B.shape[0], 1), A.new_zeros(1, A.shape[1])
        self._ranks[module] = A.shape[0]
        try:
            self._writer.write(tensor_name(module, "A"), A)
            self._writer.write(tensor_name(module, "B"), B)
        except OverflowError as error:
            raise AdapterError(str(error)) from None

    def _pad(self) -> None:
        """Write the file again with smaller factors padded, tensor by tensor.

        The ranks are known only now where factors were truncated.
        """
        ranks = common_ranks(self._ranks, self._per_module)
        if ranks == self._ranks:
            return
        shapes = {}
        for module, rank in ranks.items():
            d_out, _, d_in = self._largest[module]
            shapes[tensor_name(module, "A")] = (rank, d_in)
            shapes[tensor_name(module, "B")] = (d_out, rank)
        source = TensorFile(path := self.folder / ADAPTER_FILE)
        padded = path.with_name(f"{path.name}.padded")
        try:
            with TensorWriter(padded, shapes, self._writer.dtype) as writer:
                for name, shape in shapes.items():
                    small = source.tensor(name)
                    whole = small.new_zeros(shape)
                    whole[: small.shape[0], : small.shape[1]] = small
                    writer.write(name, whole)
                    source.release(name)
            os.replace(padded, path)
        finally:
            padded.unlink(missing_ok=True)
        self._ranks = ranks


def load_peft(source: str | Path) -> AdapterDelta:
    """Read a PEFT LoRA adapter, with its scaling folded into B.

    The scaling is alpha/r or, for rsLoRA, alpha/√r; rank_pattern and alpha_pattern are applied.

    Args:
        source: a local folder or a hub id.

    Raises:
        AdapterError: see AdapterFile.
    """
    file = AdapterFile(source)
    factors = {
        module: _without_padding(Factors(*(tensor.clone() for tensor in file.read(module))))
        for module in file.shapes
    }
    return replace(file.like(), factors=factors)


def _without_padding(f: Factors) -> Factors:
    """Return the factors without the zeros that `save_peft` puts behind smaller ranks."""
    rank = f.rank
    while rank and not bool(f.A[rank - 1].any()) and not bool(f.B[:, rank - 1].any()):
        rank -= 1
    return f if rank == f.rank else Factors(f.B[:, :rank].contiguous(), f.A[:rank].clone())


def save_peft(
    delta: AdapterDelta,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    per_module_ranks: bool = False,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT and vLLM read.

    Args:
        dtype: float32, float16, bfloat16 or float64; by default that of the factors.
        per_module_ranks: keep unequal ranks. By default all modules get the largest one, by
            columns and rows of zeros, so that every reader scales them alike.

    Raises:
        AdapterError: the adapter has no modules, a number is NaN or infinite, or a number is too
            large for the dtype.
    """
    if not delta.factors:
        raise AdapterError(f"{folder}: an adapter without modules cannot be written")
    check_finite(delta.factors, f"the adapter for {folder}")
    shapes = {module: (f.B.shape[0], f.rank, f.A.shape[1]) for module, f in delta.factors.items()}
    dtype = dtype or next(iter(delta.factors.values())).B.dtype
    with AdapterWriter(Path(folder), delta, shapes, dtype, per_module_ranks) as writer:
        for module, f in delta.factors.items():
            writer.write(module, f)


def local_folder(source: str | Path) -> Path:
    """Return a folder as it is; download a hub id's files unless they are cached.

    Raises:
        AdapterError: there is no such folder, or the hub does not provide it.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise AdapterError(
            f"{source} is a file; name the folder that holds {ADAPTER_CONFIG_FILE} and"
            f" {ADAPTER_FILE}"
        )
    name, _, revision = str(source).partition("@")
    parts = name.split("/")
    on_hub = len(parts) > 1 and all(re.fullmatch(r"[\w-][\w.-]*", part) for part in parts)
    if isinstance(source, Path) or not on_hub:
        raise AdapterError(f"{source} is not a PEFT adapter: there is no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, below = "/".join(parts[:2]), "/".join(parts[2:])
    wanted = [ADAPTER_CONFIG_FILE, ADAPTER_FILE, INDEX_FILE, "adapter_model-*.safetensors"]
    patterns = [f"{below}/{file}" if below else file for file in wanted]
    try:
        found = snapshot_download(repo, revision=revision or None, allow_patterns=patterns)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"{source} is no folder here, and the hub did not give it: {reason}"
        ) from None
    if not (folder := Path(found, below)).is_dir():
        raise AdapterError(f"{repo} on the hub has no folder {below} with an adapter")
    return folder
