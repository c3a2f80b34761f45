"""Tests of a merge's numbers: narrow dtypes, steep angles, cancelling sums, weights of any sign.

The truth is dense and in float64, from the tensors that the files hold.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from raywarp.adapters.merging import merge
from raywarp.adapters.peft import save_peft
from raywarp.adapters.peft_config import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from raywarp.adapters.recipe import Recipe
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors
from raywarp.cli.commands import main

MODULE = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{MODULE}.lora_"


def write(
    folder: Path, B: Tensor, A: Tensor, alpha: float, dtype: torch.dtype = torch.float32
) -> str:
    """Write one module's adapter by hand."""
    folder.mkdir()
    tensors = {f"{KEY}A.weight": A.to(dtype).contiguous(), f"{KEY}B.weight": B.to(dtype)}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": len(A), "lora_alpha": alpha, "target_modules": ["q_proj"]}
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(config))
    return str(folder)


def change(folder: str | Path) -> Tensor:
    """ΔW = α/r·B·A in float64, from the files alone."""
    tensors = load_file(Path(folder) / ADAPTER_FILE)
    config = json.loads((Path(folder) / ADAPTER_CONFIG_FILE).read_text())
    B, A = (tensors[f"{KEY}{factor}.weight"].double() for factor in "BA")
    return B @ A * (config["lora_alpha"] / config["r"])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def random_adapters(
    folder: Path, count: int, size: float = 1.0, dtype: torch.dtype = torch.float32
) -> list[str]:
    g = torch.Generator().manual_seed(count)
    return [
        write(
            folder / f"a{n}",
            torch.randn(40, 4, generator=g) * size,
            torch.randn(4, 30, generator=g),
            alpha=2.5,
            dtype=dtype,
        )
        for n in range(count)
    ]


@pytest.mark.parametrize(("dtype", "digits"), [("float16", 1e-3), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("size", [1e-7, 1e-4, 1.0, 1e6])
def test_a_narrow_dtype_loses_its_rounding_at_any_scale_and_says_it(
    tmp_path: Path, dtype: str, digits: float, size: float
) -> None:
    sources = random_adapters(tmp_path, 4, size)
    expected = 0.3 * sum((change(source) for source in sources), torch.zeros(())) / 4
    recipe = Recipe("lerp", tuple(sources), liti_rate=0.3, dtype=dtype)  # type: ignore[arg-type]
    done = merge(recipe, tmp_path / "out")
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / ADAPTER_FILE).values()} == {
        f"torch.{dtype}"
    }
    lost = error(change(tmp_path / "out"), expected)
    assert lost < digits
    assert done.blocks["model.layers.0"].rounding == pytest.approx(lost, rel=1e-2)
    assert f"{lost:.0e}"[:1] in (tmp_path / "out" / "README.md").read_text()


def test_what_no_scale_can_save_is_said_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tiny,) = random_adapters(tmp_path, 1, 1e-15)
    words = ["merge", "lerp", tiny, "--dtype", "float16", "--out", str(tmp_path / "out")]
    assert main([*words, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    lost = error(change(tmp_path / "out"), change(tiny))
    assert lost > 0.01
    assert shown["blocks"]["model.layers.0"]["rounding"] == pytest.approx(lost, rel=0.01)
    assert main([*words, "--overwrite"]) == 0
    assert "float32 keeps it" in " ".join(capsys.readouterr().out.split())
    huge = write(tmp_path / "huge", torch.full((3, 1), 1e6), torch.full((1, 3), 1e6), alpha=1)
    assert main(["merge", "lerp", huge, "--dtype", "float16", "--out", str(tmp_path / "new")]) == 2
    assert "too large for float16" in capsys.readouterr().err
    B = torch.full((3, 1), 1e100, dtype=torch.float64)
    wide = write(tmp_path / "wide", B, torch.ones(1, 3), 1, dtype=torch.float64)
    words = ["merge", "lerp", wide, "--dtype", "float32", "--out", str(tmp_path / "new")]
    assert main(words) == 2
    assert "too large for float32" in capsys.readouterr().err
    top = write(tmp_path / "top", torch.full((3, 1), 3e38), torch.ones(1, 3), alpha=1)
    words = ["merge", "sum", top, "--weights", "2", "--out", str(tmp_path / "new2")]
    assert main(words) == 2
    assert "too large for float32" in capsys.readouterr().err
    assert not (tmp_path / "new2").exists()


def test_factors_saved_in_float16_are_balanced(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    f = Factors(torch.randn(8, 2, generator=g) * 1e-7, torch.randn(2, 8, generator=g) * 100)
    save_peft(AdapterDelta({MODULE: f}), tmp_path / "out", torch.float16)
    assert error(change(tmp_path / "out"), f.B.double() @ f.A.double()) < 1e-3


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.float16, torch.float16), torch.float16),
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.float16, torch.float32), torch.float32),
        ((torch.bfloat16, torch.float16), torch.float32),
        ((torch.float64, torch.float32), torch.float64),
    ],
)
def test_auto_keeps_the_dtype_that_holds_the_inputs(
    tmp_path: Path, dtypes: Sequence[torch.dtype], expected: torch.dtype
) -> None:
    sources = [random_adapters(tmp_path, 1, dtype=dtypes[0])[0]]
    (tmp_path / "other").mkdir()
    sources += random_adapters(tmp_path / "other", 1, dtype=dtypes[1])
    assert merge(Recipe("lerp", tuple(sources)), tmp_path / "out").dtype == expected
    assert {t.dtype for t in load_file(tmp_path / "out" / ADAPTER_FILE).values()} == {expected}
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("which holds the inputs'" in card) == (dtypes[0] != dtypes[1])


def arc(x: Tensor, y: Tensor, step: float) -> Tensor:
    """Two-vector slerp, by the angle's sine where its cosine has lost its digits."""
    u, v = x / x.norm(), y / y.norm()
    angle = 2 * math.atan2(float((u - v).norm()), float((u + v).norm()))
    return (math.sin((1 - step) * angle) * x + math.sin(step * angle) * y) / math.sin(angle)


@pytest.mark.parametrize("beside", [1e-1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("side", [-1, 1])
def test_slerp_is_exact_where_the_running_merge_is_steep(
    tmp_path: Path, beside: float, side: int
) -> None:
    """The third vector is almost parallel or antiparallel to the mean of the first two."""
    g = torch.Generator().manual_seed(0)
    q, _ = torch.linalg.qr(torch.randn(60, 8, generator=g, dtype=torch.float64))
    u, v = ((torch.randn(50, 4, generator=g, dtype=torch.float64), A) for A in q.T.split(4))
    u, v = ((B / (B @ A).norm(), A) for B, A in (u, v))
    places = [(1.0, 0.0), (-0.5, 0.75**0.5), (side * 0.5, side * 0.75**0.5 * (1 + beside))]
    sources = [
        write(
            tmp_path / f"a{n}",
            torch.cat([x * u[0], y * v[0]], 1).float(),
            torch.cat([u[1], v[1]]).float(),
            alpha=5.6,  # a scaling that float32 rounds
        )
        for n, (x, y) in enumerate(places)
    ]
    a, b, c = map(change, sources)
    for granularity in ("block", "tensor", "global"):
        recipe = Recipe("slerp", tuple(sources), granularity=granularity)  # type: ignore[arg-type]
        merge(recipe, tmp_path / "out", overwrite=True)
        expected = arc(arc(a, b, 1 / 2), c, 1 / 3)
        assert error(change(tmp_path / "out"), expected) < 1e-6


@pytest.mark.parametrize("size", [1e-24, 1e-12, 1e12, 1e24])
def test_angles_are_right_where_float32_cannot_hold_squares(tmp_path: Path, size: float) -> None:
    a, b = random_adapters(tmp_path, 2, size)
    merge(Recipe("slerp", (a, b)), tmp_path / "out")
    assert error(change(tmp_path / "out") / size, arc(change(a), change(b), 0.5) / size) < 1e-6


def test_an_adapter_whose_own_factors_cancel_has_its_own_angle(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(50, 2, generator=g), torch.randn(2, 60, generator=g)
    D = torch.randn(2, 60, generator=g) / 2**12
    one = write(tmp_path / "one", torch.cat([B, -B], 1), torch.cat([A + D, A]), alpha=4)
    two = write(tmp_path / "two", torch.randn(50, 2, generator=g) / 2**12, A, alpha=2)
    merge(Recipe("slerp", (one, two)), tmp_path / "out")
    assert error(change(tmp_path / "out"), arc(change(one), change(two), 0.5)) < 1e-5


def test_a_sum_takes_any_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, init = random_adapters(tmp_path, 3)
    changes = [change(source) for source in (a, b, init)]
    for words, (p, q, r) in (
        (["--weights", "1", "-0.5"], (1, -0.5, 0)),
        (["--weights", "-2e-1,3"], (-0.2, 3, 0)),
        (["--weights=1.5,1.5"], (1.5, 1.5, 0)),
        ([], (1, 1, 0)),
        (["--init", init, "--weights", "2", "-.5"], (2, -0.5, -0.5)),
        (["--init", init, "--liti", "1.5"], (1.5, 1.5, -2)),
    ):
        assert main(["merge", "sum", a, b, *words, "--out", str(tmp_path / "out")]) == 0
        expected = p * changes[0] + q * changes[1] + r * changes[2]
        assert error(change(tmp_path / "out"), expected) < 1e-6, words
        for file in (tmp_path / "out").iterdir():
            file.unlink()
    for weights in (["1"], ["0", "0"], ["nan", "1"], ["inf,1"]):
        words = ["merge", "sum", a, b, "--out", str(tmp_path / "new"), "--weights", *weights]
        assert main(words) == 2
        assert "2 finite weights" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_sum_that_cancels_keeps_what_is_left(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    B, A = torch.randn(50, 2, generator=g), torch.randn(2, 60, generator=g)
    near = B + torch.randn(50, 2, generator=g) / 2**14
    one, two = write(tmp_path / "one", B, A, 1.4), write(tmp_path / "two", near, A, 1.4)
    done = merge(Recipe("sum", (one, two), weights=(1.7, -1.7)), tmp_path / "out")
    expected = 1.7 * (change(one) - change(two))
    assert error(change(tmp_path / "out"), expected) < 1e-6
    (block,) = done.blocks.values()
    assert block.norm == pytest.approx(float(expected.norm()), rel=1e-6)
    assert (block.rank, block.retained) == (2, pytest.approx(1))
    (nothing,) = merge(
        Recipe("sum", (one, one), weights=(1.0, -1.0)), tmp_path / "zero"
    ).blocks.values()
    assert nothing.norm == 0
    assert not change(tmp_path / "zero").any()


def test_liti_above_one_extrapolates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = random_adapters(tmp_path, 2)
    x, y = change(a), change(b)
    for words, expected in (
        (["liti", a, "--liti", "1.5"], 1.5 * x),
        (["liti", a, b, "--liti", "1.5"], 1.5 * y - 0.5 * x),
        (["slerp", a, b, "--liti", "2"], 2 * arc(x, y, 0.5)),
    ):
        assert main(["merge", *words, "--out", str(tmp_path / "out"), "--overwrite"]) == 0
        assert error(change(tmp_path / "out"), expected) < 1e-6
        assert "(extrapolated)" in (tmp_path / "out" / "README.md").read_text()
    for rate in ("-0.1", "nan", "inf"):
        assert main(["merge", "liti", a, f"--liti={rate}", "--out", str(tmp_path / "n")]) == 2
        assert "LITI rate must be at least 0" in capsys.readouterr().err
