"""Tests of the pages for users.

Their links lead somewhere. raywarp accepts the commands, keys and configurations that they show.
"""

import argparse
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from raywarp.cli import commands
from raywarp.cli.words import arranged
from raywarp.config.load import known_keys, parse_config
from raywarp.config.reference import anchor
from raywarp.config.schema import Config
from raywarp.run.config_file import _FREE_KEYS

ROOT = Path(__file__).parents[2]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "cluster" / "README.md",
]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
LOCAL_SH = (ROOT / "cluster" / "local.sh").read_text()
PARSER = commands._parser()
pages = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    return {anchor(heading) for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)}


@pages
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"`[^`\n]*`", "", prose(page))):
        path, _, place = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if place:
            assert place in anchors(target), link


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a code block, pipes and redirections left out; environment
    variables before them, too.
    """
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            ends = [n for n, word in enumerate(words) if re.fullmatch(r"[|&;<>]+", word)] + [
                len(words)
            ]
            for start, end in zip([-1, *ends], ends, strict=False):
                own = words[start + 1 : end]
                while own and re.fullmatch(r"\w+=.*", own[0]):
                    own = own[1:]
                if own:
                    yield own


def check_overrides(words: list[str]) -> None:
    keys = set(known_keys())
    for word in words:
        if "=" in word and not word.startswith("-"):
            key = word.partition("=")[0]
            assert key in keys or key.startswith("tune."), word


def submit_parser() -> argparse.ArgumentParser:
    spec = importlib.util.spec_from_file_location("submit", ROOT / "cluster" / "submit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parser: argparse.ArgumentParser = module.parser()
    return parser


@pages
def test_commands(page: Path) -> None:
    for words in commands(page):
        for place, word in enumerate(words):
            if word == "raywarp" or word.endswith("/bin/raywarp"):
                _parsed(PARSER, arranged(words[place + 1 :]))
                break
            if word.endswith("cluster/local.sh"):
                command, rest = words[place + 1], words[place + 2 :]
                assert (
                    re.search(rf"local\.sh {re.escape(command)}\b", LOCAL_SH) or command == "--help"
                ), words
                if command == "quickstart":
                    _parsed(PARSER, [command, *rest])
                if command == "submit":
                    _parsed(submit_parser(), rest)
                break
            if word.endswith("cluster/submit.py"):
                _parsed(submit_parser(), words[place + 1 :])
                break
            if word.startswith("tests/"):
                assert (ROOT / word).exists(), words
                break


def _parsed(parser: argparse.ArgumentParser, words: list[str]) -> None:
    try:
        options = parser.parse_args(words)
    except SystemExit as stopped:
        if stopped.code:
            raise AssertionError(words) from None
        return
    check_overrides(getattr(options, "overrides", []))


def subparsers(parser: argparse.ArgumentParser) -> dict[str, Any]:
    return next(
        (
            dict(action.choices)
            for action in parser._actions
            if isinstance(action, argparse._SubParsersAction)
        ),
        {},
    )


@pages
def test_commands_in_the_text(page: Path) -> None:
    """They may lack arguments, but the command and its options exist."""
    for text in re.findall(r"`(?:\.venv/bin/)?raywarp ([^`]+)`", prose(page)):
        parser, words = PARSER, text.split()
        while words and words[0] in subparsers(parser):
            parser = subparsers(parser)[words.pop(0)]
        assert not subparsers(parser) or words == ["--help"] or parser.prog.endswith("merge"), text
        known = {option for action in parser._actions for option in action.option_strings}
        assert {word.partition("=")[0] for word in words if word.startswith("--")} <= known, text
        check_overrides([word for word in words if "." in word.partition("=")[0]])


@pages
def test_keys_in_the_text(page: Path) -> None:
    keys, sections = (
        set(known_keys()),
        {name for name, field in Config.model_fields.items() if not field.description}
        | {"tune", "control"},
    )
    for text in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:=[^`]*)?`", prose(page)):
        is_file = text.rpartition(".")[2] in (
            "json",
            "jsonl",
            "png",
            "yaml",
            "html",
            "md",
            "py",
            "sh",
        )
        if text.partition(".")[0] in sections and not is_file:
            assert text in keys, text


@pages
def test_configurations(page: Path) -> None:
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        if isinstance(tree, dict) and tree.keys() <= Config.model_fields.keys():
            parse_config(tree)


def test_code_blocks_say_their_language() -> None:
    """Of those that say none nothing would be checked."""
    for page in PAGES:
        starts = re.findall(r"^```(.*)$", page.read_text(), re.MULTILINE)[::2]
        assert set(starts) <= {"sh", "yaml", "python", "text"}, page


def test_the_readme_is_short() -> None:
    """Research, measurements and details have pages of their own in docs."""
    assert len((ROOT / "README.md").read_text().split()) <= 1200


def test_the_afternoons_path_is_short() -> None:
    """As docs/architecture.md promises: its eight files have under 2,000 lines."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    files = re.findall(r"^\d\. `(raywarp/[\w/]+\.py)`", text, re.MULTILINE)
    assert len(files) == 8
    assert sum(len((ROOT / name).read_text().splitlines()) for name in files) < 2000


def test_keys_that_may_differ_in_one_folder() -> None:
    text = (ROOT / "docs" / "what-to-do-when.md").read_text()
    (sentence,) = re.findall(r"Only `out`.*?may differ,.*?\.\n", text, re.DOTALL)
    assert sorted(re.findall(r"`([\w.]+)`", sentence)) == sorted(_FREE_KEYS)
