"""Strict YAML: plain values, no duplicate keys, no value within itself."""

from typing import Any

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

# The most values of a file with its aliases expanded: a few lines of aliases can stand for
# billions.
MOST_VALUES = 10_000
DEEPEST = 50


class StrictYamlError(ValueError):
    """The text is not strict YAML; the message says what is wrong and where."""


def load_yaml(text: str) -> Any:
    """Return the value that a text holds; None if the text is empty.

    Raises:
        StrictYamlError: not YAML, a duplicate key, a value that contains itself, or a value that
            Python cannot hold.
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
        # an impossible date or number
        ValueError,
        OverflowError,
    ) as error:
        raise StrictYamlError(f"not valid YAML: {error}") from None


def _check(node: Node, above: tuple[Node, ...], count: int = 0) -> int:
    """Return `count` plus the number of values in the node.

    Args:
        above: the nodes that contain this one.

    Raises:
        StrictYamlError: a duplicate key, a value that contains itself, or too many values or
            levels.
    """
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
