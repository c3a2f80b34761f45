"""The weights of a base that an adapter was trained on in 4 bits (base.quantize)."""

from raywarp.adapters.peft import AdapterFile
from raywarp.adapters.peft_config import BASE_QUANTIZE
from raywarp.baking.base import Base
from raywarp.baking.places import find_places
from raywarp.config.schema import ConfigError
from raywarp.model.linear import layer_sizes
from raywarp.model.quantised import NF4, require_bitsandbytes
from raywarp.model.targets import quantisable


def quantised_tensors(adapter: AdapterFile, base: Base) -> dict[str, bool]:
    """Return stored tensor → whether it is stored as (d_in, d_out), of those in 4 bits.

    There are none unless the adapter says that its base is quantised.

    Raises:
        ConfigError: the base's architecture or bitsandbytes is not here, a layer's weight is not
            stored one to one, or the adapter names another quantisation.
    """
    if (held := adapter.config.get(BASE_QUANTIZE)) in (None, "none"):
        return {}
    if held != NF4:
        raise ConfigError(f"{adapter.name} is of a base in {held}, which is not known here")
    require_bitsandbytes()
    if (model := next(base.skeletons(), None)) is None:
        raise ConfigError(f"{base.what}: its architecture cannot be built here")
    sizes = layer_sizes(model, quantisable(model))
    places, _ = find_places(base, sizes, f"the base of {adapter.name} in {held}")
    return {place.read: place.transposed for place in places.values()}
