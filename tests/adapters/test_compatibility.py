"""Tests of files that others write and that others read: names, links, ranks, bases, locales."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import assert_same_change, random_delta
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from raywarp.adapters.merging import merge, open_adapters
from raywarp.adapters.notes import notes, usage
from raywarp.adapters.peft import AdapterFile, load_peft, save_peft
from raywarp.adapters.peft_config import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from raywarp.adapters.recipe import Recipe
from raywarp.algorithm.averaging import lerp
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import AdapterError, Factors, dense
from raywarp.cli.commands import main

Tensors = dict[str, torch.Tensor]
PREFIX = "base_model.model."


def adapter(folder: Path, seed: int = 1, **config: object) -> str:
    save_peft(random_delta(seed), folder, torch.float32)
    edit(folder, **config)
    return str(folder)


def edit(folder: Path, **config: object) -> None:
    path = folder / ADAPTER_CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


def rename(folder: Path, change: Callable[[str], str]) -> None:
    tensors = {change(name): t for name, t in load_file(folder / ADAPTER_FILE).items()}
    save_file(tensors, folder / ADAPTER_FILE)


@pytest.mark.parametrize(
    "change",
    [
        lambda name: f"module.{name}",
        lambda name: f"_orig_mod.{name}",
        lambda name: f"module._orig_mod.{name}",
        lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
        lambda name: name.replace("layers.0.", "layers.0._fsdp_wrapped_module."),
        lambda name: name.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        ),
    ],
)
def test_traces_of_wrappers_in_names_are_taken_off(
    tmp_path: Path, change: Callable[[str], str]
) -> None:
    before = load_peft(adapter(tmp_path / "a"))
    rename(tmp_path / "a", change)
    assert_same_change(load_peft(tmp_path / "a"), before)


def added(**more: torch.Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {k.replace("__", "."): t for k, t in more.items()}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k.replace(old, new): t for k, t in tensors.items()}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (renamed(PREFIX, ""), "lacks PEFT's prefix"),
        (renamed(".lora_A.weight", ".lora_a"), "MLX adapter"),
        (renamed(".lora_A.weight", ".lora_down.weight"), "kohya"),
        (
            lambda t: {k: torch.zeros(0) if "lora_B" in k else v for k, v in t.items()},
            "DeepSpeed ZeRO-3",
        ),
        (
            lambda t: t | {k.replace(".weight", ".ref.weight"): v for k, v in t.items()},
            "more than one adapter",
        ),
        (
            lambda t: t | {k.replace(PREFIX, f"{PREFIX}_orig_mod."): v for k, v in t.items()},
            "more than one adapter",
        ),
        (added(base_model__model__v_head__weight=torch.zeros(1)), "v_head.*not a factor"),
        (added(base_model__model__lm_head__weight=torch.zeros(2, 2)), "is not on this machine"),
    ],
)
def test_tensors_are_refused_for_the_real_reason(
    tmp_path: Path, change: Callable[[Tensors], Tensors], reason: str
) -> None:
    adapter(tmp_path)
    tensors = {k: t.clone() for k, t in change(load_file(tmp_path / ADAPTER_FILE)).items()}
    save_file(tensors, tmp_path / ADAPTER_FILE)
    with pytest.raises(AdapterError, match=reason):
        load_peft(tmp_path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"init_lora_weights": "lora_ga"}, "lora_ga, which changes the base weights"),
        ({"init_lora_weights": "new_start"}, "new_start, which changes the base"),
        ({"init_lora_weights": {"a": 1}}, "must be a name"),
        ({"use_something": True}, "use_something, which raywarp does not know"),
        ({"something_config": {"k": 1}}, "something_config, which raywarp does not know"),
        ({"megatron_config": {"k": 1}}, "Megatron"),
        ({"peft_type": "ADALORA"}, "ADALORA.*singular values"),
        ({"peft_type": "IA3"}, "IA3.*activations"),
        ({"peft_type": None}, "None adapter"),
        ({"target_modules": 3}, "target_modules must be"),
        ({"target_modules": [None]}, "target_modules must be"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path must be a text"),
        ({"revision": 1}, "revision must be a text"),
        ({"use_rslora": "false"}, "use_rslora must be true or false"),
        ({"lora_alpha": 10**400}, "alpha lora_alpha must be a number"),
        ({"rank_pattern": {"(?i)q": 2}}, "not a valid pattern"),
        ({"rank_pattern": {"a{99999999999}": 2}}, "not a valid pattern"),
    ],
)
def test_configs_are_refused_for_the_real_reason(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    adapter(tmp_path, **config)
    with pytest.raises(AdapterError, match=reason):
        load_peft(tmp_path)


def test_a_tensor_that_equals_the_base_is_skipped_and_another_is_refused(tmp_path: Path) -> None:
    weight = torch.arange(12.0).view(4, 3) / 7
    (tmp_path / "base").mkdir()
    save_file({"lm_head.weight": weight}, tmp_path / "base" / "model.safetensors")
    for name in ("lm_head.weight", "model.layers.0.attn.q.base_layer.weight"):
        plain = name.replace(".base_layer", "")
        save_file({plain: weight}, tmp_path / "base" / "model.safetensors")
        for dtype in (torch.float32, torch.bfloat16):
            folder = Path(adapter(tmp_path / "a", base_model_name_or_path=str(tmp_path / "base")))
            tensors = load_file(folder / ADAPTER_FILE)
            save_file(tensors | {PREFIX + name: weight.to(dtype)}, folder / ADAPTER_FILE)
            file = AdapterFile(folder)
            assert file.skipped == [PREFIX + name]
            assert any(name in line for line in notes([file]))
            save_file(tensors | {PREFIX + name: weight.to(dtype) + 1}, folder / ADAPTER_FILE)
            with pytest.raises(AdapterError, match=f"{name} differs from {plain}"):
                AdapterFile(folder)


def test_a_frozen_weight_below_lora_is_skipped_without_the_base(tmp_path: Path) -> None:
    name = f"{PREFIX}model.layers.0.attn.q.base_layer.weight"
    folder = Path(adapter(tmp_path, base_model_name_or_path="no/where"))
    save_file(load_file(folder / ADAPTER_FILE) | {name: torch.zeros(2, 2)}, folder / ADAPTER_FILE)
    assert AdapterFile(folder).skipped == [name]


def test_links_are_followed_and_their_lack_is_named(tmp_path: Path) -> None:
    source = Path(adapter(tmp_path / "a"))
    (tmp_path / "links").mkdir()
    for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE):
        (tmp_path / "links" / name).symlink_to(source / name)
    assert_same_change(load_peft(tmp_path / "links"), load_peft(source))
    (source / ADAPTER_FILE).unlink()
    with pytest.raises(AdapterError, match="is a link to .* which is not here"):
        load_peft(tmp_path / "links")
    (source / ADAPTER_FILE).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid 1\n")
    with pytest.raises(AdapterError, match="Git LFS pointer"):
        load_peft(tmp_path / "links")


def test_shards_are_read_and_may_not_leave_their_folder(tmp_path: Path) -> None:
    folder = Path(adapter(tmp_path / "a"))
    whole, tensors = load_peft(folder), load_file(folder / ADAPTER_FILE)
    names = [f"adapter_model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for n, shard in enumerate(names):
        save_file(dict(list(tensors.items())[n::2]), folder / shard)
    (folder / ADAPTER_FILE).unlink()
    index = folder / f"{ADAPTER_FILE}.index.json"
    index.write_text(json.dumps({"weight_map": {k: names[n % 2] for n, k in enumerate(tensors)}}))
    assert_same_change(load_peft(folder), whole)
    for weight_map in ({"x": "../secret"}, {"x": 3}, {}, []):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(AdapterError, match="does not map tensors to files of its folder"):
            load_peft(folder)
    index.write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(AdapterError, match="lacks gone.safetensors"):
        load_peft(folder)


def test_a_checkpoint_below_the_folder_is_pointed_at(tmp_path: Path) -> None:
    adapter(tmp_path / "run" / "checkpoint-5")
    with pytest.raises(AdapterError, match="its subfolder checkpoint-5 has"):
        load_peft(tmp_path / "run")


def test_a_subfolder_on_the_hub_is_found_in_its_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--someone--many"
    save_peft(random_delta(1), repo / "snapshots" / ("a" * 40) / "one")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    assert_same_change(load_peft("someone/many/one"), random_delta(1))
    with pytest.raises(AdapterError, match="has no folder two"):
        load_peft("someone/many/two")


@pytest.mark.parametrize(
    ("bases", "same"),
    [
        ((("x/y", None), ("x/y", "main")), True),
        ((("x/y", None), ("", "v2")), True),
        ((("x/y", "v1"), ("x/y/", "v1")), True),
        ((("x/y", "v1"), ("x/y", "v2")), False),
        ((("x/y", None), ("x/y", "v2")), False),
        ((("", None), ("x/y", None), ("x/z", None)), False),
    ],
)
def test_adapters_are_of_one_base_at_one_revision(
    tmp_path: Path, bases: tuple[tuple[str, str | None], ...], same: bool
) -> None:
    sources = [
        adapter(tmp_path / f"a{n}", n, base_model_name_or_path=base or None, revision=revision)
        for n, (base, revision) in enumerate(bases)
    ]
    open_adapters(sources, allow_different_bases=True)
    if same:
        open_adapters(sources)
    else:
        with pytest.raises(AdapterError, match="can be averaged"):
            open_adapters(sources)


class Net(nn.Module):
    """A name that ends another, an attention with two parts in PEFT, and plain layers."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_out = nn.Linear(16, 16)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.blocks = nn.ModuleList(
            [nn.ModuleDict({"proj_out": nn.Linear(16, 16)}) for _ in range(2)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.proj_out(self.attn(x, x, x)[0])
        for block in self.blocks:
            x = block["proj_out"](x)
        return x


@pytest.mark.parametrize("energy", [None, 0.7])
@pytest.mark.parametrize("per_module", [False, True])
def test_peft_has_the_change_of_a_merge_of_unequal_ranks(
    tmp_path: Path, per_module: bool, energy: float | None
) -> None:
    for n in range(2):
        torch.manual_seed(n)
        config = LoraConfig(
            r=4,
            rank_pattern={"^proj_out": 6},
            target_modules=["proj_out", "attn"],
            init_lora_weights=False,
        )
        get_peft_model(Net(), config).save_pretrained(str(tmp_path / f"a{n}"))
    sources = (str(tmp_path / "a0"), str(tmp_path / "a1"))
    recipe = Recipe("lerp", sources, energy=energy, per_module_ranks=per_module)
    merge(recipe, tmp_path / "out")
    written = json.loads((tmp_path / "out" / ADAPTER_CONFIG_FILE).read_text())
    assert bool(written["rank_pattern"]) == per_module
    written_factors = load_peft(tmp_path / "out").factors
    loaded = PeftModel.from_pretrained(Net(), str(tmp_path / "out"))
    found = {
        name: layer.get_delta_weight("default").detach().double()
        for name, layer in loaded.base_model.model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert found.keys() == written_factors.keys()
    for module, f in written_factors.items():
        torch.testing.assert_close(found[module], dense(f), rtol=1e-5, atol=1e-5)
    if energy is None:
        averaged = lerp([load_peft(source) for source in sources])
        assert_same_change(load_peft(tmp_path / "out"), averaged, 1e-5)


def test_experts_of_a_layer_keep_one_rank(tmp_path: Path) -> None:
    ranks = {f"layers.0.mlp.experts.{n}.up_proj": n + 1 for n in range(3)} | {"layers.0.q": 2}
    factors = {m: Factors(torch.randn(4, r), torch.randn(r, 4)) for m, r in ranks.items()}
    save_peft(AdapterDelta(factors), tmp_path, per_module_ranks=True)
    written = {m: rank for m, (_, rank, _) in AdapterFile(tmp_path).shapes.items()}
    assert written == {m: 3 if "experts" in m else 2 for m in ranks}
    assert_same_change(load_peft(tmp_path), AdapterDelta(factors))
    save_peft(AdapterDelta(factors), tmp_path)
    assert {rank for _, rank, _ in AdapterFile(tmp_path).shapes.values()} == {3}
    assert {m: f.rank for m, f in load_peft(tmp_path).factors.items()} == ranks
    assert {path.name for path in tmp_path.iterdir()} == {ADAPTER_FILE, ADAPTER_CONFIG_FILE}


def test_only_keys_that_have_a_value_are_written(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a", exclude_modules=None, layers_to_transform=None, use_dora=False)
    merge(Recipe("lerp", (a,)), tmp_path / "out")
    written = json.loads((tmp_path / "out" / ADAPTER_CONFIG_FILE).read_text())
    assert [key for key, value in written.items() if value is None] == ["base_model_name_or_path"]
    assert not {"exclude_modules", "layers_to_transform", "use_dora", "revision"} & written.keys()


def test_unequal_targets_are_merged_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = adapter(tmp_path / "a"), tmp_path / "b"
    save_peft(AdapterDelta({m: f for m, f in random_delta(2).factors.items() if "mlp" not in m}), b)
    assert main(["merge", "lerp", a, str(b), "--out", str(tmp_path / "out")]) == 0
    assert_same_change(load_peft(tmp_path / "out"), lerp([load_peft(a), load_peft(b)]), 1e-5)
    assert main(["merge", "inspect", a, str(b), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out.splitlines()[-1])["adapters"]
    assert [len(own["absent"]) for own in facts] == [0, 2]
    assert [own["modules"] for own in facts] == [4, 2]


@pytest.mark.parametrize(
    ("task", "mapping", "loaded", "tag"),
    [
        ("CAUSAL_LM", None, "AutoModelForCausalLM", "text-generation"),
        ("SEQ_CLS", None, "AutoModelForSequenceClassification", "text-classification"),
        ("SEQ_2_SEQ_LM", None, "AutoModelForSeq2SeqLM", None),
        (None, {"base_model_class": "ViTModel", "parent_library": "transformers.models.vit"},
         "ViTModel", None),
        (None, {"base_model_class": "Net", "parent_library": "__main__"}, "model = ...", None),
        (None, None, "model = ...", None),
    ],
)  # fmt: skip
def test_the_card_loads_the_kind_of_model_that_it_is_of(
    tmp_path: Path, task: str | None, mapping: object, loaded: str, tag: str | None
) -> None:
    a = adapter(tmp_path / "a", task_type=task, auto_mapping=mapping, revision="v1")
    merge(Recipe("lerp", (a,)), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert loaded in card
    assert ("AutoModelForCausalLM" in card) == (task == "CAUSAL_LM")
    assert (f"pipeline_tag: {tag}" in card) if tag else ("pipeline_tag" not in card)
    if task:
        assert any('revision="v1"' in line for line in usage(AdapterFile(a).like()))


def test_a_locale_without_greek_letters_merges(tmp_path: Path) -> None:
    a = adapter(tmp_path / "a")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LC_")}
    environment |= {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for words in (["slerp", a, a, "--out", str(tmp_path / "out")], ["slerp", "--help"]):
        command = [sys.executable, "-m", "raywarp.cli", "merge", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
    assert "ΔW" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
@pytest.mark.parametrize("name", [ADAPTER_CONFIG_FILE, ADAPTER_FILE, "."])
def test_what_may_not_be_read_is_named(tmp_path: Path, name: str) -> None:
    a = Path(adapter(tmp_path / "a"))
    for folder in [tmp_path, *tmp_path.parents][:3]:
        folder.chmod(0o755)
    (a / name).chmod(0)
    script = f"from raywarp.adapters.peft import load_peft; load_peft({str(a)!r})"
    user = ["setpriv", "--reuid=65534", "--clear-groups"] if os.geteuid() == 0 else []
    done = subprocess.run([*user, sys.executable, "-c", script], capture_output=True, text=True)
    (a / name).chmod(0o755)
    assert "AdapterError: cannot read" in done.stderr
    assert "Permission denied" in done.stderr
