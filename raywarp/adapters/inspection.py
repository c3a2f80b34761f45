"""A look at adapters before a merge: their figures, and what `raywarp merge` would refuse."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from raywarp.adapters.merging import gram_matrices, groups_of, open_adapters
from raywarp.adapters.recipe import Survey
from raywarp.algorithm import averaging
from raywarp.algorithm.averaging import AntipodalError
from raywarp.algorithm.deltas import Granularity
from raywarp.algorithm.factors import AdapterError


def survey(
    adapters: Sequence[str],
    init: str | None = None,
    granularity: Granularity = "block",
    allow_different_bases: bool = False,
) -> Survey:
    """Measure the adapters that fit the first one that can be read; say why of the others.

    Args:
        adapters: local folders or hub ids.
        init: θ_init, by default the base model itself (zero).
        granularity: what shares an angle.
        allow_different_bases: do not compare the names of the adapters' base models.

    Raises:
        AdapterError: none of the adapters, or not the init, can be merged.
    """
    sources = [*([init] if init else []), *adapters]
    kept, refusals = _that_fit(sources, allow_different_bases)
    try:
        return _measured(kept, init, refusals, granularity)
    except AdapterError:
        refusals |= _unreadable(kept)
        kept = [source for source in kept if source not in refusals]
        return _measured(kept, init, refusals, granularity)


def _that_fit(
    sources: Sequence[str], allow_different_bases: bool
) -> tuple[list[str], dict[str, str]]:
    kept, refusals = list[str](), dict[str, str]()
    for source in sources:
        try:
            open_adapters([*kept[:1], source], allow_different_bases)
            kept.append(source)
        except AdapterError as error:
            refusals[source] = str(error)
    return kept, refusals


def _unreadable(sources: Sequence[str]) -> dict[str, str]:
    """Return source → what its numbers are refused for."""
    found = {}
    for source in sources:
        try:
            gram_matrices(open_adapters([source]), False, "block")
        except AdapterError as error:
            found[source] = str(error)
    return found


def _measured(
    kept: Sequence[str], init: str | None, refusals: dict[str, str], granularity: Granularity
) -> Survey:
    policies = kept[1:] if init else kept
    if not policies or init in refusals:
        raise AdapterError("\n".join(dict.fromkeys(refusals.values())))
    files = open_adapters([*policies, *([init] if init else [])], allow_different_bases=True)
    grams = gram_matrices(files, bool(init), granularity)
    return Survey(files, len(policies), groups_of(grams), refusals, _undefined(grams))


def _undefined(grams: Mapping[str, Tensor]) -> dict[str, str]:
    found = {}
    for method, coefficients in (
        ("slerp", averaging.slerp_coefficients),
        ("karcher", averaging.karcher_coefficients),
    ):
        try:
            for group, own in grams.items():
                averaging.in_group(group, coefficients, own, None)
        except AntipodalError as error:
            found[method] = str(error)
    return found
