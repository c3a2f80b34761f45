"""JSON that is safe in an HTML page.

It holds no value that JSON cannot express, and no text that could be taken for markup.
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
    """Return the value with None in place of all that JSON cannot express."""
    if isinstance(value, Mapping):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def to_json(value: Any) -> str:
    """Return JSON that can stand in an HTML script element.

    No text can end the element, or hide from readers of the source.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
