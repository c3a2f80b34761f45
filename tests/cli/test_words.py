"""Tests of the order of a command's words, and of a terminal that lacks letters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_delta

from raywarp.adapters.peft import load_peft, save_peft
from raywarp.algorithm.averaging import lerp
from raywarp.algorithm.factors import dense
from raywarp.cli.commands import _parser, main
from raywarp.cli.words import arranged, together
from raywarp.config.schema import ConfigError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("lerp --weights 1 2 A B --out C", "lerp --weights=1,2 A B --out C"),
        ("sum --weights 1 -0.5 A B", "sum --weights=1,-0.5 A B"),
        ("sum A B --weights -0.5,1", "sum A B --weights=-0.5,1"),
        ("--out C slerp A B", "slerp --out C A B"),
        ("--out slerp --overwrite lerp A", "lerp --out slerp --overwrite A"),
        ("--weights 1 2 lerp A B", "lerp --weights=1,2 A B"),
        ("--liti=0.5 -v slerp A", "slerp --liti=0.5 -v A"),
        ("lerp A B --weights one,two", "lerp A B --weights one,two"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_the_method_comes_first_and_the_weights_end(words: str, expected: str) -> None:
    assert arranged(["merge", *words.split()]) == ["merge", *expected.split()]
    assert arranged(["train", *words.split()]) == ["train", *words.split()]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("train my.yaml -q warp.steps=3", "train my.yaml warp.steps=3 -q"),
        ("train -v my.yaml warp.steps=3", "train my.yaml warp.steps=3 -v"),
        ("front a --out o b --etas 0,1 seed=2", "front a b seed=2 --out o --etas 0,1"),
        ("front --out=o a", "front a --out=o"),
        ("config --init my.yaml", "config --init my.yaml"),
        ("report a --serve b --port 1", "report a b --serve --port 1"),
        ("push a --points revisions me/b", "push a me/b --points revisions"),
        ("merge slerp a --out o b", "merge slerp a --out o b"),
        ("--help", "--help"),
        ("", ""),
    ],
)
def test_words_without_options_may_stand_anywhere(words: str, expected: str) -> None:
    assert together(_parser(), words.split()) == expected.split()


def test_options_before_the_adapters_merge_the_same(tmp_path: Path) -> None:
    for n in range(2):
        save_peft(random_delta(n + 1), tmp_path / f"a{n}")
    a, b, out = (str(tmp_path / name) for name in ("a0", "a1", "out"))
    expected = lerp([load_peft(a), load_peft(b)], [1, 3]).factors
    for words in (
        ["--out", out, "lerp", "--weights", "1", "3", a, b],
        ["lerp", "--weights", "1,3", "--out", out, "--overwrite", a, b],
        ["--overwrite", "--weights=1,3", "lerp", a, b, "--out", out],
    ):
        assert main(["merge", *words]) == 0
        for module, f in load_peft(out).factors.items():
            assert (dense(f) - dense(expected[module])).norm() < 1e-6


@pytest.mark.parametrize(
    "method",
    ["ties", "dare", "dare_linear", "DARE-TIES", "magnitude_prune", "della", "ram", "ties_svd"],
)
def test_elementwise_methods_are_refused_by_name(method: str) -> None:
    with pytest.raises(ConfigError, match=f"'{method}'.*no low rank.*use lerp"):
        arranged(["merge", method, "a", "b"])


@pytest.mark.parametrize(
    ("method", "instead"),
    [("linear", "lerp"), ("cat", "sum"), ("model_stock", "--liti"), ("task_arithmetic", "sum")],
)
def test_methods_with_another_name_are_named(
    method: str, instead: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", "--out", str(tmp_path / "out"), method, "a", "b"]) == 2
    assert instead in capsys.readouterr().err


def test_a_terminal_without_unicode_gets_question_marks(tmp_path: Path) -> None:
    for n in range(2):
        save_peft(random_delta(n + 1), tmp_path / f"ä{n}")
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONUTF8", "LANG")}
    plain |= {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    program = "import sys; from raywarp.cli import main; sys.exit(main(sys.argv[1:]))"
    for words in (
        ["merge", "slerp", "ä0", "ä1", "--out", "out"],
        ["merge", "lerp", "--help"],
        ["merge", "lerp", "ö", "--out", "out2"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            capture_output=True,
            env=plain,
            cwd=tmp_path,
            timeout=60,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
        assert done.returncode == (2 if "ö" in words else 0)
    assert "ΔW" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
