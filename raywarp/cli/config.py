"""`raywarp config`: a commented configuration, its JSON schema, and a page about every key.

The configuration is one to begin with. The schema is for editors.
"""

import argparse
import json
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from raywarp.config.load import compact, section_types
from raywarp.config.recipes import RECIPES, with_recipe
from raywarp.config.schema import Config, ConfigError
from raywarp.storage import sealed

SCHEMA_FILE = "raywarp.schema.json"
COMMENT_WIDTH = 110  # columns of a comment
_FILE_HEAD = f"""\
# A configuration of raywarp with every key at its default. Keys may be left out; those that begin with # have no value by default.
#   raywarp reward FILE out=runs/reward        trains a reward model from preferences
#   raywarp train FILE reward.model=runs/reward
# Editors check and complete it by a schema: raywarp config --schema > {SCHEMA_FILE}
# yaml-language-server: $schema={SCHEMA_FILE}
"""  # noqa: E501


def add_config(commands: Any) -> None:
    """Add the command `config`."""
    text = (
        "write a commented configuration, the schema by which editors check one, or a page about"
        " every key"
    )
    parser = commands.add_parser("config", help=text, description=f"{text[0].upper()}{text[1:]}.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--init",
        nargs="?",
        const="-",
        metavar="FILE",
        help="all keys with defaults and descriptions, as YAML; default: print",
    )
    what.add_argument("--schema", action="store_true", help="print the JSON schema")
    what.add_argument(
        "--docs", action="store_true", help="print a page about every key, in Markdown"
    )
    what.add_argument(
        "--recipe",
        choices=list(RECIPES),
        help="print the settings of a recipe, with the figures that speak for them",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show tracebacks of errors")
    parser.set_defaults(command=_write_config)


def _write_config(options: argparse.Namespace) -> None:
    if options.recipe:
        return print(recipe_text(options.recipe), end="")
    if options.schema:
        return print(json.dumps(schema(), indent=2, ensure_ascii=False))
    if options.docs:
        from raywarp.config.reference import docs

        return print(docs(schema()), end="")
    if options.init == "-":
        return print(commented(), end="")
    path = Path(options.init)
    if path.exists():
        raise ConfigError(f"{path} is there already, and is not written over")
    sealed.write_text(path, commented())
    print(f"{path}; next: raywarp plan {path}", file=sys.stderr)


def recipe_text(name: str) -> str:
    """Return a recipe as YAML, below comments on what it does and what was measured."""
    recipe = RECIPES[name]
    tree = with_recipe({"recipe": name})
    lines = [f"# {line}" for line in (*recipe.about, *recipe.figures)]
    lines += [f"{key}: {compact(value)}" for key, value in tree.items()]
    return "\n".join(lines) + "\n"


def commented() -> str:
    """Return the defaults as YAML, each key below its description."""
    return _FILE_HEAD + "\n".join(_lines(Config, Config(), "", set())) + "\n"


def _lines(
    kind: type[BaseModel], values: BaseModel | None, indent: str, outer: set[type[BaseModel]]
) -> Iterator[str]:
    """Yield the lines of a section.

    Args:
        kind: the section's type.
        values: its defaults. If None, the section has none, and all its lines are commented out.
        indent: spaces before each line.
        outer: types of the sections around it, which are not entered again.
    """
    off, section = "# " if values is None else "", False
    for name, field in kind.model_fields.items():
        value = getattr(values, name) if values is not None else field.default
        inner = [one for one in section_types(field.annotation) if one not in outer]
        if (inner or section) and not indent:
            yield ""
        section = bool(inner)
        if field.description:
            lines = textwrap.wrap(
                field.description,
                COMMENT_WIDTH - len(indent),
                break_long_words=False,
                break_on_hyphens=False,
            )
            yield from (f"{indent}# {line}" for line in lines)
        if inner and (value is None or not value.model_dump(exclude_none=True)):
            yield f"{indent}# {name}:"
            yield from _lines(inner[0], None, f"{indent}  ", outer | {*inner})
        elif inner and not field.description:
            yield f"{indent}{off}{name}:"
            yield from _lines(inner[0], value, f"{indent}  ", outer | {*inner})
        else:
            yield f"{indent}{off or ('# ' if value is None else '')}{name}: {compact(value)}"


def schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of what load_config takes."""
    tree: dict[str, Any] = _standard(Config.model_json_schema())
    tune = tree["$defs"]["TuneConfig"]
    # The section takes any key, with the values to search.
    tune["additionalProperties"] = tune["properties"]["space"]["additionalProperties"]
    tree["$defs"]["Domain"] |= {"minProperties": 1, "maxProperties": 1}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **tree,
        "title": "raywarp",
        "description": "Configuration of raywarp",
    }


def _standard(tree: Any) -> Any:
    """Return the tree with the standard's names of bounds.

    pydantic 2.13 leaves its own names where a bound stands behind a validator.
    """
    names = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
    if isinstance(tree, list):
        return [_standard(one) for one in tree]
    return (
        {names.get(key, key): _standard(value) for key, value in tree.items()}
        if isinstance(tree, dict)
        else tree
    )
