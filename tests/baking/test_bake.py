"""Tests of `raywarp bake` against PEFT's unmerged adapter, and of what it refuses."""

import json
import math
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import architectures
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_gpt2, save_tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from raywarp.adapters.merging import merge
from raywarp.adapters.recipe import Recipe
from raywarp.adapters.weight_files import INDEX, WEIGHTS
from raywarp.baking.bake import bake
from raywarp.baking.card import summary
from raywarp.cli.commands import main
from raywarp.config.policies import LoraConfig as Lora
from raywarp.model.targets import find_targets

IDS = torch.tensor([[1, 5, 9, 4, 7, 12, 3, 8], [1, 4, 4, 6, 11, 10, 5, 9]])
FAMILIES = (
    *("Llama", "GPT-2", "Qwen2", "Gemma-2", "Gemma-3, wrapper", "Qwen3.5, wrapper"),
    *("Qwen3-MoE", "Mixtral", "GPT-NeoX", "Phi-3"),
)


def load(folder: Path, dtype: Any = torch.float32, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids, use_cache=False).logits.double()


def peft_adapter(base: Path, out: Path, size: float = 0.1, **settings: Any) -> Path:
    """An adapter with random factors, made and saved by PEFT."""
    model = load(base)
    if "target_modules" not in settings:
        settings["target_modules"] = [*find_targets(model, Lora()).names]
    settings = {"r": 3, "lora_alpha": 7, "task_type": "CAUSAL_LM", **settings}
    wrapped = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(2)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, size, generator=generator)
    wrapped.save_pretrained(out, save_embedding_layers=False)
    return out


def unmerged(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(load(base), adapter).eval()


def gap(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture(scope="module")
def adapter(llama: Path) -> Path:
    return peft_adapter(llama, llama.parent / "adapter")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_baked_model_is_base_and_adapter(tmp_path: Path, family: str) -> None:
    base = architectures.save_model(architectures.FAMILIES[family], tmp_path / "base")
    own = peft_adapter(base, tmp_path / "adapter", use_rslora=family == "Llama")
    baked = bake(own, tmp_path / "out")
    expected = logits(unmerged(base, own))
    assert gap(logits(load(base)), expected) > 1e-3
    assert gap(logits(load(tmp_path / "out")), expected) < 1e-5
    assert baked.kept["float32"].share == pytest.approx(1, abs=1e-5)
    stored = load_file(base / WEIGHTS)
    written = load_file(tmp_path / "out" / WEIGHTS)
    assert stored.keys() == written.keys()
    changed = {name for name in stored if not torch.equal(stored[name], written[name])}
    assert len(changed) == len(baked.shares)


@pytest.mark.parametrize("family", ["Llama", "Gemma-2", "GPT-2"])
def test_a_tied_head_with_an_adapter_becomes_a_tensor_of_its_own(
    tmp_path: Path, family: str
) -> None:
    kind = architectures.FAMILIES[family]
    kind = architectures.Family(
        kind.name, kind.config, {**kind.settings, "tie_word_embeddings": True}
    )
    base = architectures.save_model(kind, tmp_path / "base")
    own = peft_adapter(base, tmp_path / "adapter", target_modules=["lm_head"])
    assert bake(own, tmp_path / "out").untied
    model = load(tmp_path / "out")
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    embeddings = (m.get_input_embeddings().weight for m in (model, load(base)))
    assert torch.equal(*embeddings)
    assert gap(logits(model), logits(unmerged(base, own))) < 1e-5


def test_names_of_the_bare_backbone_are_found(tmp_path: Path) -> None:
    """GPT-2's own files lack the prefix `transformer.`, and have no head."""
    base = save_tiny_gpt2(tmp_path / "base")
    own = peft_adapter(base, tmp_path / "adapter")
    expected = logits(unmerged(base, own))
    tensors = load_file(base / WEIGHTS)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    mask = torch.ones(4, 4, dtype=torch.uint8).tril()  # as old files have it
    save_file({**bare, "h.0.attn.bias": mask}, base / WEIGHTS, metadata={"format": "pt"})
    bake(own, tmp_path / "out")
    assert gap(logits(load(tmp_path / "out")), expected) < 1e-5
    assert torch.equal(load_file(tmp_path / "out" / WEIGHTS)["h.0.attn.bias"], mask)


def test_adapters_of_single_experts_are_baked_into_them(tmp_path: Path) -> None:
    """transformers 4 trained these, and transformers 5 fuses the experts when it loads them."""
    base = architectures.save_model(architectures.FAMILIES["Qwen3-MoE"], tmp_path / "base")
    stored = load_file(base / WEIGHTS)
    name = "model.layers.1.mlp.experts.2.down_proj"
    d_out, d_in = stored[f"{name}.weight"].shape
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(2, d_in, generator=generator), torch.randn(d_out, 2, generator=generator)
    own = tmp_path / "adapter"
    own.mkdir()
    keys = {f"base_model.model.{name}.lora_{key}.weight": f for key, f in (("A", A), ("B", B))}
    save_file(keys, own / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "target_modules": ["down_proj"]}
    (own / "adapter_config.json").write_text(json.dumps(settings))
    bake(own, tmp_path / "out", base=str(base))
    written = load_file(tmp_path / "out" / WEIGHTS)
    expected = stored[f"{name}.weight"].double() + 0.5 * B.double() @ A.double()
    torch.testing.assert_close(written[f"{name}.weight"].double(), expected, rtol=1e-6, atol=1e-6)
    fused = load(tmp_path / "out").model.layers[1].mlp.experts.down_proj[2]
    torch.testing.assert_close(fused.double(), expected, rtol=1e-6, atol=1e-6)


def test_half_of_the_way_is_the_model_of_litis_adapter(
    tmp_path: Path, llama: Path, adapter: Path
) -> None:
    merge(Recipe("liti", (str(adapter),), liti_rate=0.5), tmp_path / "half")
    bake(adapter, tmp_path / "direct", liti_rate=0.5)
    bake(tmp_path / "half", tmp_path / "through")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("direct", "through"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    start = load_file(llama / WEIGHTS)
    bake(adapter, tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / WEIGHTS)
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, (start[name] + whole[name]) / 2, rtol=0, atol=1e-6)


def test_eta_zero_is_the_base(tmp_path: Path, llama: Path, adapter: Path) -> None:
    baked = bake(adapter, tmp_path / "out", liti_rate=0)
    assert baked.kept["float32"].share == 1
    assert (tmp_path / "out" / WEIGHTS).read_bytes()[-1000:] == (llama / WEIGHTS).read_bytes()[
        -1000:
    ]
    assert gap(logits(load(tmp_path / "out")), logits(load(llama))) == 0


def as_bfloat16(base: Path, out: Path) -> Path:
    """The same model with weights in bfloat16."""
    load(base, torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def test_the_stated_share_is_the_slope_of_the_logits_change(tmp_path: Path) -> None:
    """The least-squares slope of the baked model's change on the adapter's, both in float32.

    It weighs modules by their effect, and the share by their norms, so the two agree roughly.
    """
    base = as_bfloat16(save_tiny_llama(tmp_path / "wide"), tmp_path / "base")
    own = peft_adapter(base, tmp_path / "adapter", 0.006)
    share = bake(own, tmp_path / "out").kept["bfloat16"].share
    ids = torch.randint(3, 20, (8, 64), generator=torch.Generator().manual_seed(3))
    start = logits(load(base), ids).log_softmax(-1)
    wanted = logits(unmerged(base, own), ids).log_softmax(-1) - start
    arrived = logits(load(tmp_path / "out"), ids).log_softmax(-1) - start
    slope = float((arrived * wanted).sum() / wanted.square().sum())
    assert 0.3 < share < 0.6
    assert slope == pytest.approx(share, abs=0.06)


@torch.no_grad()
def test_each_modules_share_is_the_slope_of_its_layers_outputs(tmp_path: Path) -> None:
    """For all unit inputs, through the layers of the three models as transformers loads them."""
    base = as_bfloat16(save_tiny_llama(tmp_path / "wide"), tmp_path / "base")
    own = peft_adapter(base, tmp_path / "adapter", 0.006)
    baked = bake(own, tmp_path / "out")
    models = load(base), unmerged(base, own).base_model.model, load(tmp_path / "out")
    products = squares = 0.0
    for module, share in baked.shares.items():
        layers = [model.get_submodule(module) for model in models]
        inputs = torch.eye(layers[0].in_features)
        start, wanted, arrived = (layer(inputs).double() for layer in layers)
        product = float(((arrived - start) * (wanted - start)).sum())
        square = float((wanted - start).square().sum())
        assert share == pytest.approx(product / square, abs=1e-4)
        products, squares = products + product, squares + square
    assert baked.kept["bfloat16"].share == pytest.approx(products / squares, abs=1e-4)


def test_a_loss_is_told_with_what_would_avoid_it(tmp_path: Path) -> None:
    base = as_bfloat16(save_tiny_llama(tmp_path / "wide"), tmp_path / "base")
    own = peft_adapter(base, tmp_path / "adapter", 0.004)
    told = summary(bake(own, tmp_path / "out"))
    assert "--dtype float32 keeps 1" in told
    assert "--dtype float16 keeps" in told
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| bfloat16 (this model) | 0." in card
    wide = bake(own, tmp_path / "float32", dtype="float32")
    assert wide.kept["float32"].share == pytest.approx(1, abs=1e-4)
    assert "--dtype" not in summary(wide)
    assert gap(logits(load(tmp_path / "float32", "auto")), logits(unmerged(base, own))) < 1e-5


def test_the_share_of_one_weight_is_that_of_its_numbers(tmp_path: Path) -> None:
    """Worked by hand: at 1 bfloat16 has steps of 1/128, of which 1/1024 is lost and 1/64 kept."""
    base = as_bfloat16(save_tiny_llama(tmp_path / "wide"), tmp_path / "base")
    own = peft_adapter(base, tmp_path / "adapter", r=1, lora_alpha=1, target_modules=["q_proj"])
    tensors, factors = load_file(base / WEIGHTS), load_file(own / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if "q_proj" in name:
            tensor.fill_(1)
    for name, factor in factors.items():
        factor.fill_(0)
        if "lora_A" in name:
            factor[0, 0], factor[0, 1] = 1 / 1024, 1 / 64
        else:
            factor[0, 0] = 1
    save_file(tensors, base / WEIGHTS, metadata={"format": "pt"})
    save_file(factors, own / "adapter_model.safetensors")
    kept = bake(own, tmp_path / "out").kept["bfloat16"]
    square = 1 / 1024**2 + 1 / 64**2
    assert kept.share == pytest.approx(1 / 64**2 / square, abs=1e-12)
    assert kept.error == pytest.approx(math.sqrt(1 / 1024**2 / square), abs=1e-12)


def test_large_models_are_split_as_transformers_splits_them(
    tmp_path: Path, llama: Path, adapter: Path
) -> None:
    baked = bake(adapter, tmp_path / "out", shard_size=1e-4)
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(names) == baked.files > 2
    assert names[0] == f"model-00001-of-{baked.files:05d}.safetensors"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["weight_map"].keys() == load_file(llama / WEIGHTS).keys()
    expected = logits(unmerged(llama, adapter))
    assert gap(logits(load(tmp_path / "out")), expected) < 1e-5
    again = peft_adapter(tmp_path / "out", tmp_path / "second")
    bake(again, tmp_path / "twice")  # a base in several files
    assert gap(logits(load(tmp_path / "twice")), logits(unmerged(tmp_path / "out", again))) < 1e-5


def test_everything_but_weights_comes_along(tmp_path: Path, llama: Path, adapter: Path) -> None:
    base = tmp_path / llama.name
    shutil.copytree(llama, base)
    for name in ("LICENSE", "modeling_own.py", "pytorch_model.bin", "training_args.bin"):
        (base / name).write_text(name)
    settings = json.loads((base / "config.json").read_text())
    settings.pop("dtype", None)
    (base / "config.json").write_text(json.dumps({**settings, "torch_dtype": "float32"}))
    bake(adapter, tmp_path / "out", dtype="bfloat16", base=str(base))
    out = tmp_path / "out"
    assert (out / "LICENSE").read_text() == "LICENSE"
    assert (out / "modeling_own.py").is_file()
    assert not [*out.glob("*.bin")]
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "bfloat16"
    words = AutoTokenizer.from_pretrained(out)
    assert words.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert load(out, "auto").dtype == torch.bfloat16
    assert (out / "generation_config.json").is_file() == (base / "generation_config.json").is_file()


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The message of a bake that must end with exit code 2."""
    code = main(["bake", *map(str, words)])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert "Traceback" not in captured.err
    return captured.err


def test_what_cannot_be_baked_is_refused_and_leaves_nothing(
    tmp_path: Path, llama: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, full = tmp_path / "made" / "out", tmp_path / "full"
    full.mkdir()
    (full / "note").write_text("mine")
    assert "not empty" in refused(capsys, adapter, "--out", full)
    assert "copy it" in refused(capsys, adapter, "--out", "s3://bucket/x")
    assert "at least 0" in refused(capsys, adapter, "--out", out, "--liti", "-1")
    assert "no such folder" in refused(capsys, tmp_path / "none", "--out", out)
    other = save_tiny_gpt2(tmp_path / "gpt2")
    assert "not of" in refused(capsys, adapter, "--out", out, "--base", other)
    said = refused(capsys, adapter, "--out", out, "--base", other, "--allow-different-base")
    assert "has no module model.layers.0" in said
    wide = architectures.Family("wide", "LlamaConfig", {**architectures.DENSE, "hidden_size": 32})
    architectures.save_model(wide, tmp_path / llama.name)
    said = refused(capsys, adapter, "--out", out, "--base", tmp_path / llama.name)
    assert "mlp.down_proj is (64, 96) in the adapter, and the tensor" in said
    assert not out.parent.exists()
    assert sorted(path.name for path in full.iterdir()) == ["note"]


def test_a_quantised_base_is_refused(
    tmp_path: Path, llama: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / llama.name
    shutil.copytree(llama, base)
    settings = json.loads((base / "config.json").read_text())
    for method in ("gptq", "bitsandbytes", "fp8"):
        changed = {**settings, "quantization_config": {"quant_method": method}}
        (base / "config.json").write_text(json.dumps(changed))
        said = refused(capsys, adapter, "--out", tmp_path / "out", "--base", base)
        assert f"is quantised ({method})" in said


def test_layers_that_an_adapter_does_not_reach_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = architectures.save_model(architectures.FAMILIES["Mamba"], tmp_path / "base")
    own = peft_adapter(base, tmp_path / "adapter")
    factors = load_file(own / "adapter_model.safetensors")
    (some,) = {name.rpartition(".lora_")[0].rpartition(".")[0] for name in factors if ".0." in name}
    d = load_file(base / WEIGHTS)["backbone.layers.0.mixer.out_proj.weight"].shape
    said = {
        f"{some}.out_proj.lora_A.weight": torch.ones(3, d[1]),
        f"{some}.out_proj.lora_B.weight": torch.ones(d[0], 3),
    }
    save_file(said, own / "adapter_model.safetensors")
    assert "has no effect" in refused(capsys, own, "--out", tmp_path / "out")


def test_numbers_too_large_for_float16_are_refused(
    tmp_path: Path, llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = peft_adapter(llama, tmp_path / "adapter", 300.0)
    said = refused(capsys, own, "--out", tmp_path / "out", "--dtype", "float16")
    assert "too large for float16" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        assert "cannot write" in refused(capsys, adapter, "--out", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not [*tmp_path.iterdir()]


SLOW = """
import sys, time
from raywarp.baking import shards
write = shards.ShardWriter.write
def slow(own, data):
    write(own, data)
    print("wrote", flush=True)
    time.sleep(1)
shards.ShardWriter.write = slow
from raywarp.cli.commands import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_bake_leaves_no_model(tmp_path: Path, adapter: Path, number: int) -> None:
    out = tmp_path / "out"
    words = [sys.executable, "-c", SLOW, "bake", str(adapter), "--out", str(out)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "wrote\n"
    process.send_signal(number)
    code = process.wait(60)
    assert not out.exists()
    if number == signal.SIGTERM:
        assert code == 143
        assert not [*tmp_path.iterdir()]
    bake(adapter, out)
    assert load(out) is not None
