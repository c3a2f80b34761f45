"""Tests that docs/configuration.md is what `raywarp config --docs` prints, and has every key."""

import re
from pathlib import Path
from typing import Any

import pytest

from raywarp.cli.commands import main
from raywarp.cli.config import schema
from raywarp.config.load import known_keys
from raywarp.config.reference import anchor, docs

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--docs"]) == 0
    assert PAGE.read_text() == capsys.readouterr().out, (
        "make it anew: raywarp config --docs > docs/configuration.md"
    )


def test_no_key_advises_from_the_evidence() -> None:
    """Its figures are to be measured again; a description says what a key is."""
    page = docs(schema())
    for word in (
        "README",
        "as measured",
        "embedded task",
        "higher front",
        *(f"H{n}" for n in range(1, 13)),
    ):
        assert not re.search(rf"\b{word}\b", page), word


def test_it_has_every_key_once_with_its_place_in_the_contents() -> None:
    page = docs(schema())
    headings = re.findall(r"^##+ (.*)$", page, re.MULTILINE)
    assert sorted(headings) == sorted([*known_keys(), "The run"])
    assert len({anchor(heading) for heading in headings}) == len(headings)
    for heading in headings:
        assert f"](#{anchor(heading)})" in page, heading


def described(tree: Any) -> list[str]:
    return [
        name for name, field in tree["properties"].items() if len(field.get("description", "")) > 10
    ]


def test_every_key_and_every_section_says_what_it_is() -> None:
    """A section by itself, or by the key that stands for it."""
    top = schema()
    for name, section in top["$defs"].items():
        assert section.get("description"), name
        assert described(section) == list(section["properties"]), name
    sections = {name for name, field in top["properties"].items() if "$ref" in field}
    assert set(described(top)) == top["properties"].keys() - sections


def test_types_are_in_plain_words() -> None:
    page = docs(schema())
    assert "### warp.ema_rate\n\nA number from 0 to 1; none by default.\n" in page
    assert "### warp.kl_coef\n\nA number, at least 0; default `0.1`.\n" in page
    assert "### warp.policies\n\nA whole number, at least 1; default `2`.\n" in page
    assert "### dtype\n\nOne of `auto`, `float32`, `bfloat16`, `float16`; default `auto`.\n" in page
    assert (
        "### lora.target_modules\n\nText, or a list of texts; default `all-linear`.\n\nall-linear,"
        " or names" in page
    )
    assert "### store\n\nText; none by default.\n" in page
