"""PEFT's LoRA adapters on disk, read and written module by module."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raywarp.adapters.peft_config import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    configuration,
    read_adapter_config,
    scaling_of,
    without_factors,
)
from raywarp.adapters.tensor_file import TensorFile, TensorFileError, TensorWriter
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import AdapterError, Factors

_PREFIX = "base_model.model."
_ODD_TENSORS = {
    "lora_magnitude_vector": "DoRA's magnitudes are not linear in B·A",
    "lora_embedding_": "an embedding's adapter looks rows up instead of multiplying",
    ".lora_B.bias": "a trained bias (lora_bias) is not part of B·A",
}


class AdapterFile:
    """One PEFT LoRA adapter, open for reading: its configuration, and its factors on demand.

    Args:
        source: a local folder, or a hub id such as `user/adapter` or `user/adapter@revision`.

    Attributes:
        name: as the user gave it.
        folder: where its files lie.
        config: the content of adapter_config.json.
        shapes: module → (d_out, r, d_in), in the order of the layers.
        scalings: module → alpha/r or, for rsLoRA, alpha/√r.

    Raises:
        AdapterError: missing or corrupt files, a pickle instead of safetensors, or a variant of
            LoRA that is not plain B·A.
    """

    def __init__(self, source: str | Path):
        self.name, self.folder = str(source), local_folder(source)
        self.config = read_adapter_config(self.folder)
        try:
            self._file = TensorFile(self.folder / ADAPTER_FILE)
        except TensorFileError as error:
            raise AdapterError(str(error)) from None
        self.shapes = _pair_shapes(self._file.path, self._file.shapes)
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

    def like(self) -> AdapterDelta:
        """Return everything about the adapter except its factors."""
        return without_factors(self.config)

    def read(self, module: str) -> Factors:
        """Return the factors of one module, with the scaling folded into B.

        They are in float32, or in float64 if they are stored so. They may be views of the file:
        valid until `release`, and read again when used later.
        """
        try:
            A, B = (self._file.tensor(_tensor_name(module, factor)) for factor in "AB")
        except TensorFileError as error:
            raise AdapterError(str(error)) from None
        dtype = torch.float64 if torch.float64 in (A.dtype, B.dtype) else torch.float32
        scaling = self.scalings[module]
        return Factors(B.to(dtype) if scaling == 1 else B.to(dtype) * scaling, A.to(dtype))

    def release(self, module: str) -> None:
        """Give back the memory of what was read of this module."""
        for factor in "AB":
            self._file.release(_tensor_name(module, factor))

    def require_finite(self, modules: Iterable[str]) -> None:
        """Raise AdapterError if one of these modules' tensors holds a NaN or an infinity.

        The message names the first such tensor.
        """
        for module in modules:
            for factor in "AB":
                name = _tensor_name(module, factor)
                if not bool(self._file.tensor(name).isfinite().all()):
                    raise AdapterError(f"{self._file.path}: {name} holds NaN or infinity")


class AdapterWriter:
    """A PEFT adapter that is written module by module, for any rank of each.

    It is a context manager; PEFT and vLLM can read the adapter afterwards. The scaling stays folded
    into B: every module's alpha equals its rank. A module of rank 0 gets one zero column.

    Args:
        folder: made if it does not exist; its adapter_model.safetensors and adapter_config.json are
            replaced.
        like: the adapter whose base, targets and task the new one has.
        largest: module → (d_out, r, d_in) of all that will be written, in this order; r is the
            largest rank that may come.
        dtype: of the written factors.
    """

    def __init__(
        self,
        folder: Path,
        like: AdapterDelta,
        largest: Mapping[str, tuple[int, int, int]],
        dtype: torch.dtype,
    ):
        self.folder, self.like, self._ranks = folder, like, dict[str, int]()
        folder.mkdir(parents=True, exist_ok=True)
        shapes = {}
        for module, (d_out, rank, d_in) in largest.items():
            shapes[_tensor_name(module, "A")] = (max(rank, 1), d_in)
            shapes[_tensor_name(module, "B")] = (d_out, max(rank, 1))
        self._writer = TensorWriter(folder / ADAPTER_FILE, shapes, dtype)

    def __enter__(self) -> "AdapterWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: Any
    ) -> None:
        self._writer.__exit__(kind, error, trace)
        if kind is None:
            text = json.dumps(configuration(self.like, self._ranks), indent=2, sort_keys=True)
            (self.folder / ADAPTER_CONFIG_FILE).write_text(text + "\n")

    def write(self, module: str, factors: Factors) -> None:
        """Write the next module. Raise AdapterError if a number is too large for the dtype."""
        B, A = factors
        if not factors.rank:
            B, A = B.new_zeros(B.shape[0], 1), A.new_zeros(1, A.shape[1])
        self._ranks[module] = A.shape[0]
        try:
            self._writer.write(_tensor_name(module, "A"), A)
            self._writer.write(_tensor_name(module, "B"), B)
        except OverflowError as error:
            raise AdapterError(str(error)) from None


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
        module: Factors(*(tensor.clone() for tensor in file.read(module))) for module in file.shapes
    }
    return replace(file.like(), factors=factors)


def save_peft(delta: AdapterDelta, folder: str | Path, dtype: torch.dtype | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors, which PEFT and vLLM read.

    Args:
        dtype: float32, float16, bfloat16 or float64; by default that of the factors.

    Raises:
        AdapterError: the adapter has no modules, or a number is too large for the dtype.
    """
    if not delta.factors:
        raise AdapterError(f"{folder}: an adapter without modules cannot be written")
    shapes = {module: (f.B.shape[0], f.rank, f.A.shape[1]) for module, f in delta.factors.items()}
    dtype = dtype or next(iter(delta.factors.values())).B.dtype
    with AdapterWriter(Path(folder), delta, shapes, dtype) as writer:
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
    if isinstance(source, Path) or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise AdapterError(f"{source} is not a PEFT adapter: there is no such folder")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    wanted = [ADAPTER_CONFIG_FILE, ADAPTER_FILE, "adapter_model.bin"]
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=wanted))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterError(
            f"{source} is no folder here, and the hub did not give it: {reason}"
        ) from None


def _tensor_name(module: str, factor: str) -> str:
    return f"{_PREFIX}{module}.lora_{factor}.weight"


def _pair_shapes(
    path: Path, shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int, int, int]]:
    paired = {}
    for module in sorted(_module_names(path, shapes), key=_by_layer):
        A, B = (shapes.get(_tensor_name(module, factor)) for factor in "AB")
        if A is None or B is None:
            raise AdapterError(
                f"{path}: {module} has no matching pair of lora_A and lora_B:"
                f" lora_{'A' if A is None else 'B'} is missing"
            )
        if len(A) != 2 or len(B) != 2:
            raise AdapterError(
                f"{path}: the factors of {module} have {max(len(A), len(B))} dimensions: only"
                " linear layers are covered"
            )
        if B[1] != A[0] or 0 in (*A, *B):
            raise AdapterError(
                f"{path}: {module} has no matching pair of lora_A {tuple(A)} and lora_B {tuple(B)}"
            )
        paired[module] = (B[0], A[0], A[1])
    if not paired:
        raise AdapterError(f"{path} holds no LoRA factors")
    return paired


def _module_names(path: Path, tensors: Iterable[str]) -> list[str]:
    names: dict[str, None] = {}
    for key in tensors:
        match = re.fullmatch(re.escape(_PREFIX) + r"(.+)\.lora_[AB]\.weight", key)
        if match is None:
            reason = next(
                (why for part, why in _ODD_TENSORS.items() if part in key),
                "it is not a factor of a linear layer",
            )
            raise AdapterError(f"{path}: tensor {key} cannot be averaged: {reason}")
        names[match.group(1)] = None
    return list(names)


def _by_layer(module: str) -> list[tuple[int, int | str]]:
    """Return a sort key that puts layers in the order of their numbers."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in module.split(".")]
