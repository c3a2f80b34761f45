"""YAML as a person writes a configuration: plain values, each key once, nothing within itself."""

from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

MOST_VALUES = 10_000  # with aliases written out: a few lines of them can stand for billions
DEEPEST = 50


class StrictYamlError(ValueError):
    """Not such YAML; the message says what and where."""


def load_yaml(text: str) -> Any:
    """The value that a text holds; None if it holds nothing.

    Raises:
        StrictYamlError: not YAML, a key that is there twice, a value that contains itself, or a
            value that Python cannot hold.
    """
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _check(node, ())
        return yaml.safe_load(text)
    except StrictYamlError:
        raise
    except RecursionError:
        raise StrictYamlError("not valid YAML: it is nested too deeply") from None
    except (
        yaml.YAMLError,
        ValueError,
        OverflowError,
    ) as error:  # the latter: a date or a number that cannot be
        raise StrictYamlError(f"not valid YAML: {error}") from None


def _check(node: Node, above: tuple[Node, ...], count: int = 0) -> int:
    """The number of values in the node, counted on from `count`."""
    if any(node is other for other in above):
        raise StrictYamlError(
            f"{_place(node)}: a value contains itself (an alias within its own anchor)"
        )
    if count > MOST_VALUES or len(above) > DEEPEST:
        raise StrictYamlError(
            f"{_place(node)}: more than {MOST_VALUES} values, or {DEEPEST} levels, once its aliases"
            " are written out"
        )
    if isinstance(node, MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if isinstance(key, ScalarNode) and key.value in seen:
                raise StrictYamlError(
                    f"{_place(key)}: the key '{key.value}' is there twice; keep one"
                )
            seen.add(key.value if isinstance(key, ScalarNode) else "")
            count = _check(value, (*above, node), count + 1)
    elif isinstance(node, SequenceNode):
        for value in node.value:
            count = _check(value, (*above, node), count + 1)
    return count


def _place(node: Node) -> str:
    return f"line {node.start_mark.line + 1}, column {node.start_mark.column + 1}"
