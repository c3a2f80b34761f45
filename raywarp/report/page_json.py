"""Values on their way into an HTML page: nothing that JSON has no word for, and no text that could
be taken for markup.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_UNSAFE = re.compile(
    "[<>&\u2028\u2029\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def plain(value: Any) -> Any:
    """The same with None for what JSON has no word for."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any) -> str:
    """JSON that can stand in an HTML script element: nothing in a text ends the element, or hides
    from who reads the source.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
