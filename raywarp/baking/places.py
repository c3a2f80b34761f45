"""Where a checkpoint stores the weight of each adapted module.

transformers 5 renames, fuses and splits stored tensors when it loads them. Its own rules say here
what it would make of each, so a name is never guessed. What is stored one to one can be baked, and
everything else is refused by name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from raywarp.adapters.tensor_file import DTYPES
from raywarp.baking.base import Base
from raywarp.config.schema import ConfigError
from raywarp.model.targets import is_bypassed, is_linear

_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Place:
    """The weight of an adapted module in a checkpoint.

    Attributes:
        read: name of the stored tensor.
        write: name under which the new weight is stored. It differs for a head that was stored as
            the embedding.
        transposed: whether it is stored as (d_in, d_out), as GPT-2's Conv1D does.
    """

    read: str
    write: str
    transposed: bool = False


def find_places(
    base: Base, sizes: Mapping[str, tuple[int, int]], what: str
) -> tuple[dict[str, Place], bool]:
    """Return module → its place, and whether the head must be untied from the embedding.

    Args:
        sizes: module → (d_out, d_in) of the adapter.
        what: the adapter, for messages.

    Raises:
        ConfigError: a module has no weight of its own in the checkpoint, another size there, or
            one that the model's code reads in another way than a linear layer.
    """
    layout, missing = _layout_with(base, sizes)
    if layout is None:
        raise ConfigError(
            f"{base.what}: its architecture cannot be built here, so nothing is known"
        )
    if missing:
        raise ConfigError(
            f"{what} is no adapter of {base.what}, which has no module {missing[0]}"
            f" ({len(missing)} of {len(sizes)} are not there)"
        )
    places = {module: layout.place(module) for module in sizes}
    for module, (d_out, d_in) in sizes.items():
        place = places[module]
        file = base.tensors[place.read]
        if (kind := file.stored(place.read)[0]) not in DTYPES:
            raise ConfigError(
                f"{base.what} stores {place.read} as {kind}, to which ΔW cannot be added; name a"
                f" base in {', '.join(DTYPES)} with --base"
            )
        found = file.shapes[place.read]
        if found != ((d_in, d_out) if place.transposed else (d_out, d_in)):
            raise ConfigError(
                f"{what} is no adapter of {base.what}: {module} is {(d_out, d_in)} in the adapter,"
                f" and the tensor {place.read} is {found}"
            )
    written = [place.write for place in places.values()]
    if twice := sorted({name for name in written if written.count(name) > 1}):
        raise ConfigError(f"{what}: two of its modules change one stored tensor, {twice[0]}")
    untied = any(layout.is_tied_head(module) for module in sizes)
    if untied and _is_still_tied(base):
        raise ConfigError(
            f"{what} changes the head of {base.what}, and its architecture always shares the head"
            " with the embedding; serve the adapter beside the base instead"
        )
    return places, untied


def _layout_with(base: Base, modules: Mapping[str, Any]) -> tuple["_Layout | None", Sequence[str]]:
    """Return the layout of the class that has the most of an adapter's modules, and the rest."""
    best: tuple[_Layout | None, Sequence[str]] = (None, [*modules])
    for model in base.skeletons():
        layout = _Layout(base, model)
        missing = [module for module in modules if not layout.has(module)]
        if best[0] is None or len(missing) < len(best[1]):
            best = (layout, missing)
        if not missing:
            break
    return best


def _is_still_tied(base: Base) -> bool:
    """Return whether the head shares the embedding's weight where the configuration unties it."""
    model = next(base.skeletons(tie_word_embeddings=False))
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


class _Layout:
    """How one class loads a checkpoint.

    Attributes:
        base: the checkpoint.
        model: the class's model, on the meta device.
    """

    def __init__(self, base: Base, model: Any):
        self.base, self.model = base, model
        self._modules = dict(model.named_modules())
        self._state = model.state_dict()
        mapping = get_model_conversion_mapping(model)
        self._renamings = [rule for rule in mapping if isinstance(rule, WeightRenaming)]
        self._converters = [rule for rule in mapping if isinstance(rule, WeightConverter)]
        # The order matters: some rules apply only after another one has.
        stored = sorted(base.tensors, key=dot_natural_key)
        self._targets = {name: self._target(name) for name in stored}
        self._sources: dict[str, list[str]] = {}
        for name, (target, _) in self._targets.items():
            self._sources.setdefault(target, []).append(name)

    def _target(self, stored: str) -> tuple[str, WeightConverter | None]:
        """Return the model's tensor that a stored one becomes, and what converts it, if any."""
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(
            stored, self._renamings, self._converters, prefix, self._state
        )
        if target not in self._state and stored in self._state:
            target, pattern = rename_source_key(stored, [], [], prefix, self._state)
        using = [rule for rule in self._converters if pattern in rule.source_patterns]
        return target, using[0] if using else None

    def has(self, module: str) -> bool:
        """Return whether the module is one of the model, or a checkpoint's name of one."""
        return module in self._modules or f"{module}.weight" in self._targets

    def place(self, module: str) -> Place:
        """Return the place of a module's weight.

        Raises:
            ConfigError: it is not stored one to one, or not used as a linear layer's.
        """
        if module in self._modules:
            return self._loaded_place(module)
        stored = f"{module}.weight"
        target, converter = self._targets[stored]
        if converter is None:
            owner = target.removesuffix(".weight")
            return Place(stored, stored, self._is_transposed(module, owner))
        stacks = any(isinstance(op, MergeModulelist) for op in converter.operations)
        if stacks and _EXPERT.search(stored) and target in self._state:
            return Place(stored, stored)  # an expert, which is a linear layer of its own
        raise self._refusal(module, f"transformers converts {stored} to {target} when it loads it")

    def _loaded_place(self, module: str) -> Place:
        weight, transposed = f"{module}.weight", self._is_transposed(module, module)
        if self.is_tied_head(module):
            return self._head_place(module, transposed)
        if shared := self._sharing(module):
            raise self._refusal(module, f"it shares its weight with {shared[0]}")
        sources = self._sources.get(weight, [])
        if not sources:
            raise self._refusal(module, f"the checkpoint has no tensor of it ({weight})")
        if len(sources) > 1 or self._targets[sources[0]][1] is not None:
            raise self._refusal(module, f"transformers makes its weight of {', '.join(sources)}")
        return Place(sources[0], sources[0], transposed)

    def _head_place(self, module: str, transposed: bool) -> Place:
        """Return the place of a head that is the embedding until it is changed."""
        weight = f"{module}.weight"
        own = self._sources.get(weight, [])
        others = [f"{other}.weight" for other in self._sharing(module)]
        embedding = [name for other in others for name in self._sources.get(other, [])]
        if not embedding:
            raise self._refusal(module, "the checkpoint stores the embedding only as the head")
        if self._target(weight) != (weight, None):
            raise self._refusal(module, f"a tensor {weight} would be loaded as another one")
        # Where the two differ, transformers 5.19 does not tie them.
        return Place((own or embedding)[0], (own or [weight])[0], transposed)

    def is_tied_head(self, module: str) -> bool:
        """Return whether a module is the head, and shares the embedding's weight."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        ours = self._modules.get(module)
        return ours is not None and ours is head and head.weight is embedding.weight

    def _sharing(self, module: str) -> list[str]:
        """Return the other modules that have this module's weight."""
        weight = self._modules[module].weight
        return [
            name
            for name, other in self._modules.items()
            if name != module and getattr(other, "weight", None) is weight
        ]

    def _is_transposed(self, module: str, owner: str) -> bool:
        """Return whether a linear layer's weight is stored as (d_in, d_out).

        Raises:
            ConfigError: it is no linear layer, or an adapter on it has no effect.
        """
        layer = self._modules.get(owner)
        if layer is None or not is_linear(layer):
            kind = "none here" if layer is None else f"a {type(layer).__name__}"
            raise self._refusal(module, f"it is {kind}, not a linear layer")
        if is_bypassed(self.model, owner):
            raise self._refusal(
                module,
                "the model's code multiplies by its weight itself, so its adapter has no effect,"
                " and a changed weight would have one",
            )
        return isinstance(layer, Conv1D)

    def _refusal(self, module: str, why: str) -> ConfigError:
        return ConfigError(f"{module} cannot be baked into {self.base.what}: {why}")
