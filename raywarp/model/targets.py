"""The modules of a model that get adapters, and those that stay as they are.

Only linear layers of the language model are adapted. Experts fused in one tensor, routers with a
forward method of their own, and the towers of other modalities stay. The caller learns which.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import Linear, Module
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.pytorch_utils import Conv1D

from raywarp.config.policies import LoraConfig
from raywarp.config.schema import ConfigError
from raywarp.model.probe import source_of

ALL_LINEAR = "all-linear"
_TOWER = re.compile(r"(^|[._])(vision|visual|image|img|audio|speech|video)")
# PEFT 0.21 refuses adapters on the out_proj of these.
_MAMBA = {
    "falcon_h1",
    "mamba",
    "mamba2",
    "falcon_mamba",
    "nemotron_h",
}


@dataclass(frozen=True)
class Targets:
    """What gets adapters.

    Attributes:
        modules: full names of the adapted layers.
        names: the names by which PEFT finds exactly these.
        left: under all-linear, the modules with weights of their own that stay as they are.
    """

    modules: tuple[str, ...]
    names: tuple[str, ...]
    left: tuple[str, ...]


def find_targets(base: Any, lora: LoraConfig) -> Targets:
    """Resolve lora.target_modules for a model on any device.

    Raises:
        ConfigError: a name fits nothing, or something that is not adapted. The message says which
            names would fit.
    """
    linear = [name for name, module in base.named_modules() if is_linear(module)]
    language = _LanguageModel(base)
    readable = _Readable(base)
    adaptable = [
        name
        for name in linear
        if name in language and name in readable and not is_bypassed(base, name)
    ]
    if isinstance(lora.target_modules, str) and lora.target_modules.lower() == ALL_LINEAR:
        head = base.get_output_embeddings()
        chosen = [name for name in adaptable if base.get_submodule(name) is not head]
        names, left = _shortest_names(base, chosen), tuple(_left(base, set(chosen), language))
    else:
        (chosen, names), left = _explicit(base, lora, adaptable, language), ()
    if not chosen:
        raise ConfigError(
            f"lora.target_modules={lora.target_modules!r} does not fit the model: it has no linear"
            " layer that can be adapted"
        )
    return Targets(tuple(chosen), names, left)


def quantisable(base: Any) -> list[str]:
    """Return the layers whose weights base.quantize holds in 4 bits.

    They are those that transformers quantises: linear layers, but not a head, and no subclass, such
    as Falcon's. Towers of other modalities stay, and weights that are shared or that the code
    around them multiplies by itself.
    """
    wide = base._keep_in_fp32_modules or ()
    head, language = base.get_output_embeddings(), _LanguageModel(base)
    owners = Counter(id(module.weight) for module in base.modules() if hasattr(module, "weight"))
    return [
        name
        for name, module in base.named_modules()
        if type(module) in (Linear, Conv1D)
        and module is not head
        and owners[id(module.weight)] == 1
        and name in language
        and not is_bypassed(base, name)
        and not any(part in name for part in wide)
    ]


def is_linear(module: Module) -> bool:
    """Return whether a module computes x·Wᵀ + b and nothing else.

    A subclass is judged by its results.
    """
    if "forward" in vars(module) or not isinstance(module, Linear | Conv1D):
        return False
    return type(module).forward in (Linear.forward, Conv1D.forward) or _acts_linearly(type(module))


def _acts_linearly(kind: Callable[..., Linear]) -> bool:
    """Try a small instance of the class.

    Falcon's linear layers are a subclass with the same results; routers are not.
    """
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.device("cpu"), torch.no_grad():
            layer, x = kind(5, 3), torch.randn(2, 5, generator=generator)
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            torch.testing.assert_close(
                layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
            )
    # A third-party class may need other arguments. Any exception means no.
    except Exception:
        return False
    return True


class _LanguageModel:
    """The names that belong to the language model.

    They exclude the towers of other modalities and what connects them.
    """

    def __init__(self, base: Any):
        text = base.config.get_text_config()
        models = [
            (name, module)
            for name, module in base.named_modules()
            if name and isinstance(module, PreTrainedModel)
        ]
        wrapped = text is not base.config
        inside = [
            name for name, module in models if wrapped and isinstance(module.config, type(text))
        ]
        kinds = (type(text), type(base.config))
        self._towers = [name for name, module in models if not isinstance(module.config, kinds)]
        head = base.get_output_embeddings()
        self._inside = (
            [*inside, *(name for name, module in base.named_modules() if module is head)]
            if inside
            else [""]
        )

    def __contains__(self, name: str) -> bool:
        return (
            _is_under(name, self._inside)
            and not _is_under(name, self._towers)
            and not _TOWER.search(name)
        )


class _Readable:
    """The names that PEFT finds again in an adapter's file.

    transformers 5 fused the experts of some models. In these, PEFT 0.21 takes the names of the
    experts' projections for the fused tensors. It does so even where a dense layer or a shared
    expert has them. PEFT takes seconds to import, so only such a model asks it.
    """

    def __init__(self, base: Any):
        self._base = base
        self._is_converted = get_checkpoint_conversion_mapping(base.config.model_type) is not None
        self._known: dict[str, bool] = {}

    def __contains__(self, name: str) -> bool:
        last = name.rpartition(".")[2]
        if last not in self._known:
            self._known[last] = not self._is_converted or self._asks_peft(last)
        return self._known[last]

    def _asks_peft(self, last: str) -> bool:
        from peft import LoraConfig as PeftLoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

        config = PeftLoraConfig(target_modules=[last])
        try:
            convert_peft_config_for_transformers(config, self._base, None)
        except ValueError:  # the name would stand for a part of one tensor
            return False
        return set(config.target_modules or ()) == {last} and not config.target_parameters


def _is_under(name: str, places: Iterable[str]) -> bool:
    return any(not place or name == place or name.startswith(f"{place}.") for place in places)


def is_bypassed(base: Any, name: str) -> bool:
    """Return whether the code around a layer multiplies by its weight itself.

    State-space models do so. An adapter there would have no effect.
    """
    parent, _, last = name.rpartition(".")
    if base.config.get_text_config().model_type in _MAMBA and last == "out_proj":
        return True
    pattern = (  # [ is allowed for Bloom, which indexes a weight in an unused setting
        rf"self\.{re.escape(last)}\.(weight|bias)\b(?!\.(dtype|device|shape)|\[| = )"
    )
    return re.search(pattern, source_of(type(base.get_submodule(parent)))) is not None


def _explicit(
    base: Any, lora: LoraConfig, adaptable: list[str], language: _LanguageModel
) -> tuple[list[str], tuple[str, ...]]:
    """Return the modules that the configuration names, and their names for PEFT."""
    wanted = lora.target_modules
    problem, modules = f"lora.target_modules={wanted!r}", dict(base.named_modules())
    found = {
        entry: _matches(wanted if isinstance(wanted, str) else [entry], modules)
        for entry in _entries(wanted)
    }
    for entry, names in found.items():
        fused = (
            []
            if isinstance(wanted, str)
            else [name for name, _ in base.named_parameters() if name.endswith(f".{entry}")]
        )
        if fused:
            where = fused[0].rpartition(".")[0]
            raise ConfigError(
                f"{problem} names {fused[0]}, one tensor of {type(modules[where]).__name__}; only"
                f" linear layers are adapted: {_would_do(adaptable)}"
            )
        if not names:
            raise ConfigError(
                f"{problem} does not fit the model: it has no module {entry}:"
                f" {_would_do(adaptable)}"
            )
        for name in names:
            if name not in adaptable and (name in language or not is_linear(modules[name])):
                kind = type(modules[name]).__name__
                raise ConfigError(
                    f"{problem} names {name}, a {kind}; only linear layers are adapted:"
                    f" {_would_do(adaptable)}"
                )
    matched = [name for name in modules if any(name in names for names in found.values())]
    chosen = [name for name in matched if name in adaptable]
    whole = len(chosen) == len(matched)
    return chosen, tuple(sorted(found)) if whole else _shortest_names(base, chosen)


def _entries(wanted: str | list[str]) -> list[str]:
    return [wanted] if isinstance(wanted, str) else wanted


def _matches(wanted: str | list[str], modules: Iterable[str]) -> list[str]:
    """Return the matching modules, as PEFT matches them.

    A name in a list is a whole path or its end. A string alone is a pattern for the whole path.
    """
    if isinstance(wanted, str):
        return [name for name in modules if re.fullmatch(wanted, name)]
    ends = tuple(f".{entry}" for entry in wanted)
    return [name for name in modules if name in wanted or name.endswith(ends)]


def _shortest_names(base: Any, chosen: Iterable[str]) -> tuple[str, ...]:
    """Return last parts of paths where they fit only the chosen modules, else whole paths."""
    chosen = set(chosen)
    others = {name.rpartition(".")[2] for name, _ in base.named_modules() if name not in chosen}
    return tuple(
        sorted({name if (last := name.rpartition(".")[2]) in others else last for name in chosen})
    )


def _would_do(adaptable: list[str]) -> str:
    """Return what the configuration can say instead."""
    attention = [name for name in adaptable if "att" in name] or adaptable
    names = dict.fromkeys(name.rpartition(".")[2] for name in attention)
    return (
        f"set lora.target_modules: [{', '.join(names)}], or all-linear, which adapts what can be"
        " adapted"
    )


def _left(base: Any, chosen: set[str], language: _LanguageModel) -> Iterator[str]:
    """Yield what has matrices and stays: whole towers, else modules.

    The modules of all blocks count together.
    """
    above = {name[:end] for name in chosen for end in range(len(name)) if name[end] == "."}
    places: dict[str, set[str]] = {}
    for name, module in base.named_modules():
        if not _has_matrix(module) or name in chosen or module is base.get_output_embeddings():
            continue
        parts = name.split(".")
        paths = [".".join(parts[: n + 1]) for n in range(len(parts))]
        place = name if name in language else next(path for path in paths if path not in above)
        kind = type(base.get_submodule(place)).__name__
        places.setdefault(f"{re.sub(r'[.][0-9]+(?=[.]|$)', '.*', place)} ({kind})", set()).add(
            place
        )
    for text, found in places.items():
        yield text if len(found) == 1 else f"{len(found)} × {text}"


def _has_matrix(module: Module) -> bool:
    """Return whether a module multiplies by a matrix of its own, or by one per expert."""
    if isinstance(module, torch.nn.Embedding | torch.nn.Conv1d):
        return False
    return any(
        (p.ndim == 3 and p.shape[1] > 1) or (p.ndim == 2 and name == "weight")
        for name, p in module.named_parameters(recurse=False)
    )
