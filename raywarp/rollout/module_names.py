"""One module under several names: a trainer's model, a checkpoint's files and an engine may each
call it differently.

A wrapper of a language model and a vision tower has `language_model.model.layers.0.mlp.up_proj` in
its files, say, and `model.language_model.layers.0.mlp.up_proj` in transformers; a file of the bare
backbone lacks the model's own prefix.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

_OTHER_TOWERS = re.compile(r"vision|visual|audio|image|speech|mtp|nextn")


def match_names(modules: Iterable[str], names: Iterable[str]) -> dict[str, str]:
    """Module → the name that means it: its own, or the one that agrees in the most parts from the
    end. Others are left out.

    Two names that fit equally well mean neither; neither does a name that two modules would share.
    """
    alike: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for name in names:
        alike[_shape_of_name(name)].append(name)
    best = {module: _best(module, alike[_shape_of_name(module)]) for module in modules}
    found = {module: name for module, name in best.items() if name is not None}
    owners: dict[str, list[str]] = defaultdict(list)
    for module, name in found.items():
        owners[name].append(module)
    return {module: name for module, name in found.items() if len(owners[name]) == 1}


def _best(module: str, names: list[str]) -> str | None:
    if module in names:
        return module
    fitting = sorted(
        ((_agreement(module, name), name) for name in names if _is_same_tower(module, name)),
        reverse=True,
    )
    if not fitting or (len(fitting) > 1 and fitting[0][0] == fitting[1][0]):
        return None
    return fitting[0][1]


def _shape_of_name(name: str) -> tuple[str, ...]:
    """What all names of a module have in common: its last part, and its numbers."""
    parts = name.split(".")
    return (parts[-1], *(part for part in parts if part.isdigit()))


def _agreement(module: str, name: str) -> tuple[int, int]:
    """Parts in common from the end, and parts in common at all."""
    ours, theirs = module.split("."), name.split(".")
    same = [a == b for a, b in zip(reversed(ours), reversed(theirs), strict=False)]
    return next((n for n, equal in enumerate(same) if not equal), len(same)), len(
        set(ours) & set(theirs)
    )


def _is_same_tower(module: str, name: str) -> bool:
    return bool(_OTHER_TOWERS.search(module)) or not _OTHER_TOWERS.search(name)
