"""Tests of `raywarp merge` against dense float64 averages, PEFT and vLLM, and of what it refuses.

It reads folders and writes a folder.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import random_delta
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from raywarp.adapters.merging import inspect, merge
from raywarp.adapters.peft import load_peft, save_peft
from raywarp.adapters.peft_config import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from raywarp.adapters.recipe import Recipe
from raywarp.algorithm import averaging, geometry
from raywarp.algorithm.deltas import AdapterDelta, add, grouped, scale, zeros_like
from raywarp.algorithm.factors import Factors, dense
from raywarp.cli.commands import main

RANKS = ((3, 2, 4, 1), (1, 4, 2, 3), (2, 2, 2, 2), (4, 1, 3, 2), (2, 3, 1, 4))


def saved(folder: Path, delta: AdapterDelta, dtype: torch.dtype = torch.float32) -> str:
    save_peft(delta, folder, dtype, per_module_ranks=True)
    return str(folder)


def policies(folder: Path, count: int, dtype: torch.dtype = torch.float32) -> list[str]:
    return [saved(folder / f"a{n}", random_delta(n + 1, RANKS[n]), dtype) for n in range(count)]


def truth(
    method: str,
    sources: Sequence[str],
    init: str | None,
    rate: float,
    granularity: averaging.Granularity,
    weights: Sequence[float] | None = None,
) -> dict[str, torch.Tensor]:
    """The average of dense ΔW in float64, written out: recursion of two-vector slerp, or the
    mean.
    """
    changes = [{m: dense(f) for m, f in load_peft(source).factors.items()} for source in sources]
    start = (
        {m: dense(f) for m, f in load_peft(init).factors.items()}
        if init
        else {m: torch.zeros_like(w) for m, w in changes[0].items()}
    )
    shares = list(weights or [1.0] * len(sources))
    result = {}
    for modules in grouped(changes[0], granularity).values():
        vectors = [
            torch.cat([(change[m] - start[m]).flatten() for m in modules]) for change in changes
        ]
        if method == "lerp":
            merged = sum(
                share / sum(shares) * vector for share, vector in zip(shares, vectors, strict=True)
            )
        else:
            merged, total = vectors[0], shares[0]
            for share, vector in zip(shares[1:], vectors[1:], strict=True):
                total += share
                angle = math.acos(float(merged @ vector / (merged.norm() * vector.norm())))
                merged = (
                    math.sin((1 - share / total) * angle) * merged
                    + math.sin(share / total * angle) * vector
                ) / math.sin(angle)
        for m, part in zip(
            modules, torch.as_tensor(merged).split([start[m].numel() for m in modules]), strict=True
        ):
            result[m] = start[m] + rate * part.view_as(start[m])
    return result


def error(folder: Path, expected: dict[str, torch.Tensor]) -> float:
    """Relative, over the whole model."""
    found = load_peft(folder).factors
    assert found.keys() == expected.keys()
    wrong = sum(float((dense(found[m]) - expected[m]).square().sum()) for m in expected)
    return math.sqrt(wrong / sum(float(w.square().sum()) for w in expected.values()))


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main(["merge", *map(str, words)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a merge that must end with exit code 2; argparse's own errors are
    SystemExit(2).
    """
    try:
        code = main(["merge", *map(str, words)])
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else -1
    captured = capsys.readouterr()
    assert code == 2, captured
    assert "Traceback" not in captured.err + captured.out
    return captured.err


@pytest.mark.parametrize("granularity", ["block", "tensor", "global"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_slerp_of_files_is_dense_slerp(
    tmp_path: Path, count: int, granularity: averaging.Granularity
) -> None:
    sources = policies(tmp_path, count)
    init = saved(tmp_path / "init", random_delta(20, (2, 2, 2, 2)))
    for start, rate, weights in (
        (None, 1.0, None),
        (None, 0.3, range(1, count + 1)),
        (init, 1.0, None),
        (init, 0.3, None),
    ):
        chosen = tuple(map(float, weights)) if weights else None
        merge(
            Recipe("slerp", tuple(sources), start, rate, chosen, granularity=granularity),
            tmp_path / "out",
            overwrite=True,
        )
        assert (
            error(tmp_path / "out", truth("slerp", sources, start, rate, granularity, chosen))
            < 1e-6
        )


@given(
    seed=st.integers(0, 10_000),
    ranks=st.lists(st.tuples(*[st.integers(1, 6)] * 2), min_size=1, max_size=5),
    sizes=st.tuples(*[st.tuples(st.integers(1, 40), st.integers(1, 600))] * 2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
    has_init=st.booleans(),
    rate=st.sampled_from([0.0, 0.3, 1.0]),
    method=st.sampled_from(["slerp", "lerp"]),
)
@settings(max_examples=40, deadline=None)
def test_any_shapes_ranks_and_dtypes(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    ranks: list[tuple[int, int]],
    sizes: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    has_init: bool,
    rate: float,
    method: str,
) -> None:
    """Files of any dtype hold exact numbers, so that the average of what they hold is exact to
    float32 rounding for each.
    """
    folder = tmp_path_factory.mktemp("any")
    adapters = [
        random_delta(seed + n, (*r, *r), (*sizes, *sizes)) for n, r in enumerate([*ranks, (2, 3)])
    ]
    *sources, init = [saved(folder / f"a{n}", delta, dtype) for n, delta in enumerate(adapters)]
    start = init if has_init else None
    try:
        expected = truth(method, sources, start, rate, "block")
    # one number per matrix: parallel or antipodal vectors, which have tests of their own
    except ZeroDivisionError:
        return
    recipe = Recipe(method, tuple(sources), start, rate, dtype="float32")  # type: ignore[arg-type]
    merge(recipe, folder / "out")
    scale_of = sum(float(w.square().sum()) for w in expected.values()) ** 0.5
    if rate > 0 or has_init:
        assert error(folder / "out", expected) < 1e-6
    else:
        assert scale_of == 0
        assert (
            sum(float(dense(f).abs().sum()) for f in load_peft(folder / "out").factors.values())
            == 0
        )


def test_every_method_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b, c = policies(tmp_path, 3)
    init = saved(tmp_path / "init", random_delta(20, (2, 2, 2, 2)))
    deltas, start = [load_peft(source) for source in (a, b, c)], load_peft(init)
    cases: list[tuple[list[object], AdapterDelta]] = [
        (["slerp", a, b, c], averaging.slerp(deltas)),
        (["slerp", a, b, "--weights", "0.8,0.2"], averaging.slerp(deltas[:2], [0.8, 0.2])),
        (
            ["slerp", a, b, "--weights", 0.8, 0.2, "--granularity", "global"],
            averaging.slerp(deltas[:2], [0.8, 0.2], granularity="global"),
        ),
        (["lerp", a, b, c, "--weights", 1, 2, 3], averaging.lerp(deltas, [1, 2, 3])),
        (["karcher", a, b, c, "--init", init], averaging.karcher(deltas, init=start)),
        (["ema", a, b, c, "--ema-rate", 0.25], averaging.ema(deltas, 0.25)),
        (["liti", a, "--liti", 0.3], scale(deltas[0], 0.3)),
        (["liti", a, "--liti", 0.3, "--init", init], averaging.liti(start, deltas[0], 0.3)),
        (["liti", init, a, "--liti", 0.3], averaging.liti(start, deltas[0], 0.3)),
        (
            ["slerp", a, b, "--init", init, "--liti", 0.5],
            averaging.liti(start, averaging.slerp(deltas[:2], init=start), 0.5),
        ),
    ]
    for words, expected in cases:
        shown = run(capsys, *words, "--out", tmp_path / "out", "--overwrite")
        assert "rank of the merge" in shown
        assert error(tmp_path / "out", {m: dense(f) for m, f in expected.factors.items()}) < 1e-6, (
            words
        )


def test_gauge_changes_nothing(tmp_path: Path) -> None:
    """(B, A) → (BG, G⁻¹A) is another file with the same ΔW: the merge, its angles and its norms are
    the same.
    """
    generator = torch.Generator().manual_seed(1)

    def turned(delta: AdapterDelta) -> AdapterDelta:
        def turn(_: str, f: Factors) -> Factors:
            G = torch.randn(
                f.rank, f.rank, generator=generator, dtype=torch.float64
            ) + 3 * torch.eye(f.rank, dtype=torch.float64)
            return Factors(f.B @ G, torch.linalg.solve(G, f.A))

        return delta.map(turn)

    names = [
        saved(tmp_path / f"a{n}", random_delta(n, r), torch.float64)
        for n, r in enumerate(RANKS[:3])
    ]
    others = [
        saved(tmp_path / f"b{n}", turned(random_delta(n, r)), torch.float64)
        for n, r in enumerate(RANKS[:3])
    ]
    ours, theirs = (
        merge(Recipe("slerp", tuple(sources)), tmp_path / f"out{sources is names}")
        for sources in (names, others)
    )
    for group, own in ours.groups.items():
        assert theirs.groups[group].angles == pytest.approx(own.angles, rel=1e-9)
        assert theirs.groups[group].coefficients == pytest.approx(own.coefficients, rel=1e-9)
    assert (
        error(
            tmp_path / "outTrue",
            {m: dense(f) for m, f in load_peft(tmp_path / "outFalse").factors.items()},
        )
        < 1e-6
    )


def test_zero_vectors_small_angles_and_one_adapter(tmp_path: Path) -> None:
    a, b = policies(tmp_path, 2)
    zero = saved(tmp_path / "zero", zeros_like(random_delta(1)))
    near = saved(tmp_path / "near", add(random_delta(1), scale(random_delta(2), 1e-9)))
    nothing = {m: torch.zeros_like(dense(f)) for m, f in load_peft(a).factors.items()}
    for sources, expected in (
        ((a,), truth("lerp", [a], None, 1, "block")),
        ((a, zero, b), truth("slerp", [a, b], None, 1, "block")),
        ((zero, a), truth("lerp", [a], None, 1, "block")),
        ((a, a), truth("lerp", [a], None, 1, "block")),
        ((a, near), truth("lerp", [a, near], None, 1, "block")),
    ):
        merge(Recipe("slerp", sources), tmp_path / "out", overwrite=True)
        assert error(tmp_path / "out", expected) < 1e-6
    merge(Recipe("slerp", (zero, zero)), tmp_path / "out", overwrite=True)
    assert all(
        torch.equal(dense(f), nothing[m]) for m, f in load_peft(tmp_path / "out").factors.items()
    )
    # a policy that did not move from its init is not counted either
    merge(Recipe("slerp", (a, b, a), init=b), tmp_path / "out", overwrite=True)
    assert error(tmp_path / "out", truth("lerp", [a], None, 1, "block")) < 1e-6


def test_truncation_reports_what_it_keeps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = policies(tmp_path, 2)
    whole = truth("slerp", sources, None, 1, "block")
    shown = json.loads(
        run(capsys, "slerp", *sources, "--rank", 2, "--out", tmp_path / "two", "--json")
    )
    for block, modules in grouped(whole).items():
        values = {m: torch.linalg.svdvals(whole[m]) for m in modules}
        kept, total = (
            math.sqrt(sum(float(s[:r].square().sum()) for s in values.values())) for r in (2, None)
        )
        assert shown["blocks"][block]["retained"] == pytest.approx(kept / total, rel=1e-5)
        assert shown["blocks"][block]["norm"] == pytest.approx(total, rel=1e-5)
        assert shown["blocks"][block]["rank"] == 2
    lost = math.sqrt(
        sum(float(torch.linalg.svdvals(w)[2:].square().sum()) for w in whole.values())
        / sum(float(w.square().sum()) for w in whole.values())
    )
    assert error(tmp_path / "two", whole) == pytest.approx(lost, rel=1e-4)
    assert "retained norm" in run(
        capsys, "slerp", *sources, "--energy", 0.9, "--out", tmp_path / "some"
    )
    for module, f in load_peft(tmp_path / "some").factors.items():
        s = torch.linalg.svdvals(whole[module])
        assert s[: f.rank].square().sum() >= 0.9 * s.square().sum() > s[: f.rank - 1].square().sum()
    merge(Recipe("lerp", (sources[0], sources[0]), energy=1.0), tmp_path / "all")
    assert error(tmp_path / "all", truth("lerp", sources[:1], None, 1, "block")) < 1e-6
    ranks = {m: min(f.rank, *dense(f).shape) for m, f in load_peft(sources[0]).factors.items()}
    assert {m: f.rank for m, f in load_peft(tmp_path / "all").factors.items()} == ranks


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3), ("bfloat16", 8e-3)]
)
def test_dtype_of_the_result(tmp_path: Path, dtype: str, tolerance: float) -> None:
    sources = policies(tmp_path, 2, torch.bfloat16)
    merge(Recipe("slerp", tuple(sources), dtype=dtype), tmp_path / "out")  # type: ignore[arg-type]
    assert {str(t.dtype) for t in load_file(tmp_path / "out" / ADAPTER_FILE).values()} == {
        f"torch.{dtype}"
    }
    assert error(tmp_path / "out", truth("slerp", sources, None, 1, "block")) < tolerance


def test_json_says_everything_and_inspect_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sources = policies(tmp_path, 3)
    before = sorted(tmp_path.rglob("*"))
    seen = json.loads(run(capsys, "inspect", *sources, "--json"))
    assert sorted(tmp_path.rglob("*")) == before
    made = json.loads(run(capsys, "slerp", *sources, "--out", tmp_path / "out", "--json"))
    assert seen["adapters"] == made["adapters"]
    assert [facts["rank"] for facts in seen["adapters"]] == ["1 to 4", "1 to 4", "2"]
    expected = geometry.geometry([load_peft(source) for source in sources])
    for block, own in expected.items():
        for shown in (seen["groups"][block], made["groups"][block]):
            assert shown["norms"] == pytest.approx(own["norms"], rel=1e-6)
            assert list(shown["angles"]) == ["1-2", "1-3", "2-3"]
            assert list(shown["angles"].values()) == pytest.approx(own["angles"], rel=1e-6)
    table = run(capsys, "inspect", *sources)
    angles = sorted(own["angles"][0] for own in expected.values())
    row = next(line for line in table.splitlines() if line.startswith("angle 1-2"))
    assert f"{angles[0]:.4g}" in row
    assert f"{angles[-1]:.4g}" in row
    zero = saved(tmp_path / "zero", zeros_like(random_delta(1)))
    assert set(
        json.loads(run(capsys, "inspect", sources[0], zero, "--json"))["groups"]["model.layers.0"][
            "angles"
        ].values()
    ) == {None}
    assert inspect(sources, granularity="global")[1]["global"].norms == pytest.approx(
        [math.sqrt(sum(own["norms"][m] ** 2 for own in expected.values())) for m in range(3)]
    )


def test_the_card_says_what_was_merged_and_how(tmp_path: Path) -> None:
    sources = policies(tmp_path, 2)
    merge(Recipe("slerp", tuple(sources), sources[0], 0.3, (1.0, 3.0), rank=2), tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert all(
        part in text
        for part in (
            *sources,
            "eq. 26",
            "one angle per transformer block",
            "η: 0.3",
            "| 3 |",
            "θ_init",
            "rank 2",
            "library_name: peft",
        )
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_of_the_merge_are_the_dense_models(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    """Two adapters made by PEFT, merged by the command, loaded by PEFT; against W + ΔW in the
    weights. GPT-2's are transposed (Conv1D).
    """
    model = request.getfixturevalue(f"tiny_{kind}")
    for n, config in enumerate(
        ({"r": 4, "lora_alpha": 8}, {"r": 2, "lora_alpha": 4, "use_rslora": True})
    ):
        torch.manual_seed(n)
        lora = LoraConfig(
            target_modules="all-linear",
            init_lora_weights=False,
            fan_in_fan_out=kind == "gpt2",
            task_type="CAUSAL_LM",
            **config,
        )  # type: ignore[arg-type]
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(
            str(tmp_path / f"a{n}")
        )
    sources = [str(tmp_path / "a0"), str(tmp_path / "a1")]
    merge(Recipe("slerp", tuple(sources), liti_rate=0.5), tmp_path / "out")
    ids = torch.arange(3, 13)[None]
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "out")
    ).eval()
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    base = plain(ids).logits
    for module, change in truth("slerp", sources, None, 0.5, "block").items():
        plain.get_submodule(module).weight.data += (change.T if kind == "gpt2" else change).float()
    torch.testing.assert_close(loaded(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(base, plain(ids).logits, atol=1e-2)


VLLM_SCRIPT = """
import json, sys
import torch
from vllm import LLM, ModelRegistry, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest
from raywarp.rollout.base_weights import BaseWeights, checkpoint_files, read_files
from raywarp.adapters.peft import load_peft

model, adapter, mode, ids = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
name = json.load(open(model + "/config.json"))["architectures"][0]
ModelRegistry.register_model(name, ModelRegistry.models[name].load_model_cls())  # or a process looks
lora = {"enable_lora": True, "max_lora_rank": 8} if mode == "lora" else {}
engine = LLM(model, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=2**26, max_model_len=64, enable_prefix_caching=False, **lora)
if mode == "merged":
    weights = BaseWeights(lambda: read_files(checkpoint_files(model)), torch.float32).weights(load_peft(adapter), {})
    engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
request = LoRARequest("merged", 1, adapter) if mode == "lora" else None
sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
out = engine.generate([TokensPrompt(prompt_token_ids=ids)], sampling, lora_request=request, use_tqdm=False)
rows = out[0].prompt_logprobs[1:]
print("RESULT", json.dumps([row[token].logprob for row, token in zip(rows, ids[1:])]))
"""  # noqa: E501


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode"), [("llama", "lora"), ("gpt2", "merged")])
def test_vllm_reads_the_merge(
    tmp_path: Path, kind: str, mode: str, request: pytest.FixtureRequest
) -> None:
    """Llama through vLLM's LoRA; vLLM 0.32 has none for GPT-2, which gets W + ΔW in its weights.
    Ranks differ from module to module.
    """
    from raywarp.training.actors import VLLM_CPU_ENV, VLLM_ENV

    model = request.getfixturevalue(f"tiny_{kind}")
    for n, pattern in enumerate(
        ({"c_fc": 2}, {"c_attn": 1}) if kind == "gpt2" else ({"up_proj": 2}, {"q_proj": 1})
    ):
        torch.manual_seed(n)
        lora = LoraConfig(
            r=3,
            lora_alpha=6,
            rank_pattern=pattern,
            target_modules="all-linear",
            init_lora_weights=False,
            fan_in_fan_out=kind == "gpt2",
            task_type="CAUSAL_LM",
        )
        get_peft_model(AutoModelForCausalLM.from_pretrained(model), lora).save_pretrained(
            str(tmp_path / f"a{n}")
        )
    merge(Recipe("slerp", (str(tmp_path / "a0"), str(tmp_path / "a1"))), tmp_path / "out")
    ids = list(range(3, 13))
    loaded = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "out")
    ).eval()
    expected = (
        loaded(torch.tensor([ids]))
        .logits[0, :-1]
        .log_softmax(-1)
        .gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    )
    plain = (
        AutoModelForCausalLM.from_pretrained(model)
        .eval()(torch.tensor([ids]))
        .logits[0, :-1]
        .log_softmax(-1)
    )
    assert (plain.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] - expected).abs().max() > 0.1
    words = [
        sys.executable,
        "-c",
        VLLM_SCRIPT,
        str(model),
        str(tmp_path / "out"),
        mode,
        json.dumps(ids),
    ]
    environment = (
        os.environ | VLLM_ENV | VLLM_CPU_ENV | {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    )
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith("RESULT")).removeprefix(
            "RESULT "
        )
    )
    assert found == pytest.approx(expected.tolist(), abs=2e-3)


def test_wrong_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = policies(tmp_path, 2)
    out = ["--out", tmp_path / "out"]
    for words, parts in (
        (["slerp", a, b, *out, "--weights", 1], ["need 2 weights"]),
        (["slerp", a, b, *out, "--weights", "1,-1"], ["at least 0"]),
        (["slerp", a, b, *out, "--weights", "one,two"], ["--weights takes numbers", "one,two"]),
        (["slerp", a, b, *out, "--liti", -0.5], ["LITI rate", "at least 0", "-0.5"]),
        (["slerp", a, b, *out, "--liti", "nan"], ["LITI rate"]),
        (["slerp", a, b, *out, "--rank", 0], ["rank must be at least 1"]),
        (["slerp", a, b, *out, "--energy", 0], ["energy", "(0, 1]"]),
        (["slerp", a, b, *out, "--rank", 2, "--energy", 0.5], ["not allowed with"]),
        (["slerp", a, b], ["--out"]),
        (["slerp", a, b, *out, "--granularity", "layer"], ["'layer'", "block"]),
        (["slerp", a, b, *out, "--dtype", "int8"], ["'int8'", "bfloat16"]),
        (["liti", a, *out], ["--liti"]),
        (["liti", a, b, a, "--liti", 0.5, *out], ["one adapter, not to 3"]),
        (["liti", a, b, "--init", a, "--liti", 0.5, *out], ["given twice"]),
        (["ema", a, b, *out], ["--ema-rate"]),
        (["ema", a, b, *out, "--ema-rate", 2], ["EMA rate"]),
        (["dare", a, b, *out], ["'dare'", "slerp"]),
        (["slerp", *out], ["ADAPTER"]),
    ):
        message = refused(capsys, *words)
        assert all(part in message for part in parts), message
    assert not (tmp_path / "out").exists()


def test_wrong_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each names what and where, and leaves nothing behind."""
    (a,) = policies(tmp_path, 1)
    wide = saved(tmp_path / "wide", random_delta(3, sizes=((6, 5), (4, 6), (5, 9), (7, 4))))
    opposite = saved(tmp_path / "opposite", scale(random_delta(1, RANKS[0]), -2))
    other = saved(tmp_path / "other", AdapterDelta(random_delta(2).factors, base_model="meta/two"))
    one = saved(tmp_path / "one", AdapterDelta(random_delta(1).factors, base_model="meta/one/"))
    same = saved(tmp_path / "same", AdapterDelta(random_delta(3).factors, base_model="meta/one"))
    poisoned = saved(tmp_path / "poisoned", random_delta(4))
    tensors = load_file(tmp_path / "poisoned" / ADAPTER_FILE)
    name = "base_model.model.model.layers.1.mlp.up.lora_A.weight"
    save_file(tensors | {name: tensors[name] * torch.nan}, tmp_path / "poisoned" / ADAPTER_FILE)
    huge = saved(tmp_path / "huge", scale(random_delta(5), 1e12))
    before = sorted(tmp_path.rglob("*"))
    for words, parts in (
        (["slerp", a, wide], ["model.layers.1.attn.q", "(5, 5)", "(5, 9)", wide]),
        (["slerp", a, opposite], ["model.layers.0", "opposite"]),
        (["karcher", a, opposite], ["model.layers.0"]),
        (["slerp", one, other], ["meta/one", "meta/two", one, other, "--allow-different-bases"]),
        (["slerp", a, one, other], ["meta/one", "meta/two"]),
        (["slerp", a, poisoned], [poisoned, "lora_A of model.layers.1.mlp.up", "NaN"]),
        (["lerp", a, tmp_path / "missing"], ["missing", "no such folder"]),
        (["slerp", huge, a, "--dtype", "float16"], ["too large for float16"]),
    ):
        message = refused(capsys, *words, "--out", tmp_path / "new" / "out")
        assert all(str(part) in message for part in parts), message
        assert sorted(tmp_path.rglob("*")) == before
    run(capsys, "slerp", one, other, "--out", tmp_path / "out", "--allow-different-bases")
    run(capsys, "slerp", one, same, "--out", tmp_path / "out2")
    shown = json.loads(run(capsys, "inspect", a, poisoned, opposite, "--json"))
    assert [facts["name"] for facts in shown["adapters"]] == [a, opposite]
    assert list(shown["refused"]) == [poisoned]
    assert "NaN" in shown["refused"][poisoned]
    assert sorted(shown["undefined"]) == ["karcher", "slerp"]
    said = " ".join(run(capsys, "inspect", a, opposite, poisoned).split())
    assert f"merge refuses {poisoned}:" in said
    assert "NaN" in refused(capsys, "inspect", poisoned)


def test_the_output_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = policies(tmp_path, 2)
    (tmp_path / "empty").mkdir()
    run(capsys, "slerp", a, b, "--out", tmp_path / "empty")
    assert sorted(p.name for p in (tmp_path / "empty").iterdir()) == [
        "README.md",
        ADAPTER_CONFIG_FILE,
        ADAPTER_FILE,
    ]
    made = (tmp_path / "empty" / ADAPTER_FILE).read_bytes()
    assert "is not empty; choose another folder, or give --overwrite" in refused(
        capsys, "lerp", a, b, "--out", tmp_path / "empty"
    )
    opposite = saved(tmp_path / "opposite", scale(random_delta(1, RANKS[0]), -1))
    refused(capsys, "slerp", a, opposite, "--out", tmp_path / "empty", "--overwrite")
    assert (
        tmp_path / "empty" / ADAPTER_FILE
    ).read_bytes() == made  # a failed merge leaves the old adapter
    run(capsys, "slerp", a, a, "--out", a, "--overwrite")  # onto one of its inputs
    assert load_peft(a).rank == 8
    (tmp_path / "mine" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    assert "is not empty" in refused(capsys, "lerp", a, b, "--out", tmp_path / "mine")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["checkpoint-5", "thesis.txt"]
    # whatever else lies there stays
    run(capsys, "lerp", a, b, "--out", tmp_path / "mine", "--overwrite")
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        "README.md",
        ADAPTER_CONFIG_FILE,
        ADAPTER_FILE,
        "checkpoint-5",
        "thesis.txt",
    ]
    assert "is a file; name a folder" in refused(
        capsys, "lerp", a, b, "--out", tmp_path / "mine" / "thesis.txt"
    )
    assert "cannot write" in refused(
        capsys, "lerp", a, b, "--out", tmp_path / "mine" / "thesis.txt" / "out"
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_merging_imports_neither_ray_nor_peft(tmp_path: Path) -> None:
    """So that it starts in a second, and its memory is that of torch and a block."""
    a, b = policies(tmp_path, 2)
    script = (
        "import sys; from raywarp.cli.commands import main; "
        f"assert main(['merge', 'slerp', {a!r}, {b!r}, '--out', {str(tmp_path / 'out')!r}]) == 0; "
        "print({'ray', 'peft', 'transformers', 'vllm', 'huggingface_hub'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr
