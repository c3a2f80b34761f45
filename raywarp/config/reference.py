"""The page docs/configuration.md: every key, in Markdown, from the configuration's JSON schema.

`raywarp config --docs` prints it.
"""

import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from raywarp.config.field_types import LARGEST
from raywarp.config.load import compact

PARAGRAPH_WIDTH = 140  # columns of a paragraph
RUN = "The run"  # heading of the keys that belong to no section
_PAGE_HEAD = """\
# Configuration

Every key of a configuration file. A file holds those that differ from their defaults; `section.key=value` behind a command overrides
one. This page is what `raywarp config --docs` prints, and `tests/config/test_reference.py` compares the two.

```sh
raywarp config --init my.yaml                        # the same as a commented file
raywarp config --schema > raywarp.schema.json        # for editors
raywarp config --docs > docs/configuration.md
```
"""  # noqa: E501
_Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        name: dotted.
        tree: its JSON schema.
        inner: the schema of the section that the key stands for, or None.
    """

    name: str
    tree: _Tree
    inner: _Tree | None

    @property
    def anchor(self) -> str:
        return anchor(self.name)


def docs(schema: _Tree) -> str:
    """Return the whole page.

    Args:
        schema: of the whole configuration; see cli/config.py.
    """
    top = list(_keys(schema, schema["properties"], ""))
    groups = {RUN: (list[str](), [key for key in top if key.inner is None])}
    for key in top:
        if key.inner is not None:
            groups[key.name] = (
                [key.tree.get("description", ""), key.inner.get("description", "")],
                list(_walk(schema, key)),
            )
    anchors = {key.name: key.anchor for _, keys in groups.values() for key in keys} | {
        name: anchor(name) for name in groups
    }
    pages = [_PAGE_HEAD, "\n".join(_contents(groups)) + "\n"]
    for name, (texts, keys) in groups.items():
        lead = [_paragraph(_linked(_sentence(text), anchors)) for text in texts if text]
        pages.append("\n".join([f"## {name}\n", *lead]))
        pages += [_entry(schema, key, anchors) for key in keys]
    return "\n".join(pages)


def anchor(heading: str) -> str:
    """Return the id that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _keys(schema: _Tree, properties: _Tree, prefix: str) -> Iterator[Key]:
    for name, tree in properties.items():
        options = [tree, *tree.get("anyOf", ())]
        found = next((option["$ref"] for option in options if "$ref" in option), None)
        yield Key(prefix + name, tree, schema["$defs"][found.rpartition("/")[2]] if found else None)


def _walk(schema: _Tree, section: Key) -> Iterator[Key]:
    """Yield all keys of a section; the keys of an inner section follow the key that holds it."""
    for key in _keys(schema, (section.inner or {})["properties"], f"{section.name}."):
        yield key
        if key.inner is not None:
            yield from _walk(schema, key)


def _contents(groups: Mapping[str, tuple[list[str], list[Key]]]) -> Iterator[str]:
    for name, (_, keys) in groups.items():
        links = ", ".join(f"[{key.name.removeprefix(f'{name}.')}](#{key.anchor})" for key in keys)
        yield _paragraph(f"- [{name}](#{anchor(name)}): {links}", "  ").rstrip("\n")


def _entry(schema: _Tree, key: Key, anchors: Mapping[str, str]) -> str:
    """Return a key's heading, type, default and meaning.

    The keys of `control` are those of `reward`, so their entries link there.
    """
    lines = [f"### {key.name}\n"]
    twin = key.name.replace("control.", "reward.", 1)
    if twin != key.name:
        return "\n".join([*lines, f"As [{twin}](#{anchor(twin)}), of the control.\n"])
    kind = (
        f"Keys of its own: {', '.join(key.inner['properties'])}"
        if key.inner
        else _type_in_words(key.tree)
    )
    lines.append(_paragraph(f"{_capital(kind)}; {_default(key.tree)}."))
    lines.append(_paragraph(_linked(_sentence(key.tree["description"]), anchors)))
    if key.tree.get("additionalProperties") == {"$ref": "#/$defs/Domain"}:  # tune.space
        for name, tree in schema["$defs"]["Domain"]["properties"].items():
            lines.append(_paragraph(f"- `{name}`: {tree['description']}", "  ").rstrip("\n"))
        lines[-1] += "\n"
    return "\n".join(lines)


def _type_in_words(tree: _Tree) -> str:
    """Return a type with its bounds, in plain words."""
    if "anyOf" in tree:
        return ", or ".join(
            _type_in_words(option) for option in tree["anyOf"] if option.get("type") != "null"
        )
    if "enum" in tree:
        return f"one of {', '.join(f'`{value}`' for value in tree['enum'])}"
    if "$ref" in tree.get("items", {}):
        return "a list of sections"
    if tree.get("type") == "array":
        return f"a list of {_plural(_type_in_words(tree['items']))}"
    if "$ref" in tree:
        return "sections"
    if tree.get("type") == "object":
        return "keys with their values"
    noun = {
        "integer": "a whole number",
        "number": "a number",
        "boolean": "`true` or `false`",
        "string": "text",
    }[tree["type"]]
    return " ".join([noun, *_bounds(tree)]).replace(" ,", ",")


def _bounds(tree: _Tree) -> Iterator[str]:
    least, most = tree.get("minimum"), tree.get("maximum")
    if least is not None and most is not None and most != LARGEST:
        yield f"from {least:g} to {most:g}"
        return
    if least is not None:
        yield f", at least {least:g}"
    if "exclusiveMinimum" in tree:
        yield f"above {tree['exclusiveMinimum']:g}"
    if most is not None and most != LARGEST:
        yield f"and at most {most:g}"
    if "exclusiveMaximum" in tree:
        yield f"and below {tree['exclusiveMaximum']}"


def _plural(kind: str) -> str:
    return {"text": "texts"}.get(
        kind, kind.replace("a number", "numbers").replace("one of", "any of")
    )


def _default(tree: _Tree) -> str:
    value = tree.get("default")
    plain = (
        {name: own for name, own in value.items() if own is not None}
        if isinstance(value, dict)
        else value
    )
    return "none by default" if value is None else f"default `{compact(plain)}`"


def _sentence(text: str) -> str:
    return _capital(text) if text.endswith(".") else f"{_capital(text)}."


def _capital(text: str) -> str:
    """Capitalise a text, unless it begins with a symbol or with a value that it explains."""
    first = text.partition(" ")[0]
    return (
        text
        if ":" in first or first in ("mu,", "eta,", "beta,", "all-linear,")
        else text[:1].upper() + text[1:]
    )


def _linked(text: str, anchors: Mapping[str, str]) -> str:
    """Return the text with a link on each dotted key."""
    keys = sorted((name for name in anchors if "." in name), key=len, reverse=True)
    return re.sub(
        rf"(?<![\w.])({'|'.join(map(re.escape, keys))})(?![\w.]*\w)",
        lambda m: f"[{m[1]}](#{anchors[m[1]]})",
        text,
    )


def _paragraph(text: str, indent: str = "") -> str:
    return (
        textwrap.fill(
            text,
            PARAGRAPH_WIDTH,
            break_long_words=False,
            break_on_hyphens=False,
            subsequent_indent=indent,
        )
        + "\n"
    )
