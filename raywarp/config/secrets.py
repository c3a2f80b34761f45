"""Detection of credentials, which a configuration must not hold.

A configuration is saved with the run, and shown in messages and loggers.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_USERINFO = re.compile(r"(?<=://)[^/@\s'\"]+@")  # s3://key:secret@bucket
_PARAMETER = re.compile(
    r"([?&][\w.-]*(?:secret|token|password|passwd|credential|access_key|api_key|signature)[\w.-]*=)[^&\s'\"]+",
    re.IGNORECASE,
)
# of hubs and clouds
_TOKEN = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|(?:AKIA|ASIA)[A-Z0-9]{16}|ghp_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{20,})"
)


def redact(text: str) -> str:
    """Return the text with its credentials replaced by stars."""
    return _TOKEN.sub("***", _PARAMETER.sub(r"\1***", _USERINFO.sub("***@", text)))


def keys_with_secrets(tree: Any, key: str = "") -> Iterator[str]:
    """Yield the dotted keys of a nested mapping whose values, or names, hold credentials."""
    if isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from keys_with_secrets(value, f"{key}.{redact(str(name))}".removeprefix("."))
            if isinstance(name, str) and redact(name) != name:
                yield f"{key}.{redact(name)}".removeprefix(".")
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from keys_with_secrets(value, key)
    elif isinstance(tree, str) and redact(tree) != tree:
        yield key
