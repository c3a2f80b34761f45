"""Tests of which files are a model's own.

A good model of any family is accepted with all its tensors. A faulty one is refused.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import trained_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from raywarp.adapters.weight_files import own_files_only, stored_bytes, weight_bytes, weight_files
from raywarp.config.rewards import MINILM
from raywarp.config.schema import SMOLLM2, ConfigError
from raywarp.data import embedded
from raywarp.data.models import check_tensors, check_weights, load_model
from raywarp.planning.inputs import model_fingerprint
from raywarp.rollout.base_weights import BaseWeights, checkpoint_files, read_files

SHAPE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
EYES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **changes}))


def gpt2(kind: str) -> Any:
    return getattr(transformers, kind)(transformers.GPT2Config(**GPT2))


def qwen3_moe() -> Any:
    sizes = {
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    }
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SHAPE, **sizes))


def gemma3_with_eyes() -> Any:
    text = transformers.Gemma3TextConfig(**SHAPE, head_dim=16).to_dict()
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(text_config=text, vision_config=EYES)
    )


FAMILIES: dict[
    str, tuple[Callable[[], Any], str]
] = {  # a model, and one of the names that its file has
    "llama": (llama, "model.layers.1.mlp.up_proj.weight"),
    "llama, tied": (partial(llama, tie_word_embeddings=True), "model.embed_tokens.weight"),
    "gpt2": (partial(gpt2, "GPT2LMHeadModel"), "transformer.wte.weight"),
    "gpt2, the bare backbone": (partial(gpt2, "GPT2Model"), "h.0.attn.c_attn.weight"),
    "qwen3-moe, an expert's": (qwen3_moe, "model.layers.0.mlp.experts.1.up_proj.weight"),
    "qwen3-moe, the last expert's": (
        qwen3_moe,
        "model.layers.1.mlp.experts.3.down_proj.weight",
    ),
    "gemma3, a wrapper": (gemma3_with_eyes, "language_model.model.norm.weight"),
}


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    held = load_file(folder / "model.safetensors")
    change(held)
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def check(folder: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> None:
    check_weights(str(folder), "model")
    check_tensors(auto, str(folder), AutoConfig.from_pretrained(folder), "model", **options)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_accepted_whole_and_refused_with_the_name_of_what_is_missing(
    tmp_path: Path, name: str
) -> None:
    build, tensor = FAMILIES[name]
    torch.manual_seed(0)
    build().save_pretrained(tmp_path)
    check(tmp_path)
    assert all(
        p.device.type == "cpu"
        for p in load_model(AutoModelForCausalLM, str(tmp_path), "model").parameters()
    )
    whole = (tmp_path / "model.safetensors").read_bytes()
    changed(tmp_path, lambda held: held.pop(tensor))
    last = tensor.rpartition("model.")[2]
    for work in (check, lambda folder: load_model(AutoModelForCausalLM, str(folder), "model")):
        # the loader knows the fused tensor only, and does not name it
        if ".experts." in tensor and work is not check:
            last = "experts, do not fit together|experts.down_proj has the shape"
        with pytest.raises(ConfigError, match=last):
            work(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(whole)
    changed(tmp_path, lambda held: held.update({tensor: held[tensor][:-1].clone()}))
    with pytest.raises(ConfigError, match="has the shape"):
        check(tmp_path)


def test_a_whole_expert_that_is_missing_is_named(tmp_path: Path) -> None:
    for expert, said in (
        (1, r"lacks the tensor model\.layers\.0\.mlp\.experts\.1\."),
        (3, r"experts\.\w+ has the shape \(3, 32"),
    ):
        qwen3_moe().save_pretrained(tmp_path)
        part = f"layers.0.mlp.experts.{expert}."
        changed(
            tmp_path,
            lambda held, part=part: [held.pop(name) for name in list(held) if part in name],
        )
        with pytest.raises(ConfigError, match=said):
            check(tmp_path)


def test_two_embeddings_that_are_one_must_be_equal(tmp_path: Path) -> None:
    llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    changed(
        tmp_path,
        lambda held: held.update({"lm_head.weight": held["model.embed_tokens.weight"].clone()}),
    )
    check(tmp_path)
    load_model(AutoModelForCausalLM, str(tmp_path), "model")
    changed(tmp_path, lambda held: held["lm_head.weight"].neg_())
    for work in (check, lambda folder: load_model(AutoModelForCausalLM, str(folder), "model")):
        with pytest.raises(
            ConfigError,
            match=r"differ, and tie_word_embeddings in config\.json says that they are one",
        ):
            work(tmp_path)


def test_the_embedded_models_are_whole() -> None:
    check(Path(embedded.resolve(SMOLLM2)))
    check(
        Path(embedded.resolve(MINILM)),
        AutoModelForSequenceClassification,
        new_head=True,
        num_labels=1,
    )


def test_a_backbone_gets_a_new_head_and_nothing_else(tmp_path: Path) -> None:
    new = {"new_head": True, "num_labels": 1}
    for build in (llama, partial(gpt2, "GPT2Model"), qwen3_moe):
        build().save_pretrained(tmp_path)
        check(tmp_path, AutoModelForSequenceClassification, **new)
        assert (
            load_model(
                AutoModelForSequenceClassification, str(tmp_path), "model", **new
            ).config.num_labels
            == 1
        )
        with pytest.raises(ConfigError, match=r"lacks the tensor score\.weight"):
            check(tmp_path, AutoModelForSequenceClassification, num_labels=1)
    five = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SHAPE, num_labels=5, pad_token_id=2)
    )
    five.save_pretrained(tmp_path)  # a head of another shape gives way to a new one
    check(tmp_path, AutoModelForSequenceClassification, **new)
    changed(tmp_path, lambda held: held.pop("model.norm.weight"))
    for work in (check, load_model_of):
        with pytest.raises(ConfigError, match=r"lacks the tensor model\.norm\.weight"):
            work(tmp_path, AutoModelForSequenceClassification, **new)


def load_model_of(folder: Path, auto: Any, **options: Any) -> None:
    load_model(auto, str(folder), "model", **options)


def sharded(source: Path, folder: Path) -> Path:
    """The same model in two files with an index."""
    shutil.copytree(source, folder)
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {
        name: f"model-0000{1 + n % 2}-of-00002.safetensors" for n, name in enumerate(sorted(held))
    }
    for file in set(places.values()):
        save_file(
            {name: held[name] for name in held if places[name] == file},
            folder / file,
            metadata={"format": "pt"},
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": places})
    )
    return folder


BESIDE = ("consolidated.safetensors", "optimizer.safetensors", "adapter_model.safetensors")


def test_what_the_index_names_is_read_and_nothing_beside_it(
    tiny_llama: Path, tmp_path: Path
) -> None:
    single = Path(shutil.copytree(tiny_llama, tmp_path / "single"))
    plain = load_file(single / "model.safetensors")
    for folder in (single, sharded(tiny_llama, tmp_path / "sharded")):
        assert own_files_only(folder, tmp_path / "none") == folder
        size, width, files = (
            weight_bytes(folder),
            stored_bytes(str(folder)),
            [path.name for path in weight_files(folder, "model")],
        )
        for name in BESIDE:
            save_file(
                {f"theirs.{key}": weight.double() for key, weight in plain.items()},
                folder / name,
                metadata={"format": "pt"},
            )
        check(folder)
        assert [path.name for path in checkpoint_files(str(folder))] == files
        assert (weight_bytes(folder), stored_bytes(str(folder))) == (size, width)
        read = dict(read_files(checkpoint_files(str(folder))))
        assert read.keys() == plain.keys()
        assert all(torch.equal(read[name], plain[name]) for name in plain)
        only = own_files_only(folder, tmp_path / f"own-{folder.name}")
        assert sorted(path.name for path in only.glob("*.safetensors")) == files
        assert {path.name for path in only.iterdir()} == {
            path.name for path in folder.iterdir()
        } - set(BESIDE)
        delta, checkpoint = (
            trained_model(folder, ("one",)).delta("one"),
            BaseWeights(read.items, torch.float32),
        )
        assert {name for name, _ in checkpoint.weights(delta, {})} <= plain.keys()


def test_an_index_of_the_single_file_is_fine_and_one_of_lost_files_is_not(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    index, names = (
        folder / "model.safetensors.index.json",
        list(load_file(folder / "model.safetensors")),
    )
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    check(folder)
    index.write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")})
    )
    with pytest.raises(
        ConfigError, match=r"lacks model-00001-of-00001\.safetensors, which .* names"
    ):
        checkpoint_files(str(folder))


def test_the_fingerprint_of_a_model_is_what_it_was(tmp_path: Path) -> None:
    """Policies lie under keys that hold it: it takes in every file, as before."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert model_fingerprint(str(tmp_path)) == "10a6548026483d1b"


class Hub(ThreadingHTTPServer):
    """Answers what huggingface_hub asks to fetch some files of a repository."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.sent = folder, list[str]()
        super().__init__(("127.0.0.1", 0), Answers)


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        head = {"X-Repo-Commit": "c" * 40}
        folder, name = self.server.folder, self.path.partition("?")[0].rpartition("/")[2]
        if "/tree/" in self.path:
            data = json.dumps(
                [
                    {"type": "file", "path": path.name, "size": 1, "oid": "0"}
                    for path in folder.iterdir()
                ]
            ).encode()
        elif self.path.startswith("/api/models/me/model"):
            data = json.dumps({"id": "me/model", "sha": "c" * 40}).encode()
        elif not (folder / name).is_file():
            self.send_error(404)
            return
        else:
            data = (folder / name).read_bytes()
            head["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            self.server.sent += [name] if self.command == "GET" else []
        self.send_response(200)
        for key, value in {**head, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, tiny_llama: Path) -> Iterator[Hub]:
    folder = sharded(tiny_llama, tmp_path / "repository")
    for name in BESIDE:
        shutil.copy(folder / "model-00001-of-00002.safetensors", folder / name)
    server = Hub(folder)
    (thread := threading.Thread(target=server.serve_forever)).start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_of_a_hub_id_only_what_the_index_names_is_fetched(hub: Hub, tmp_path: Path) -> None:
    code = (
        "from raywarp.rollout.base_weights import checkpoint_files; print(*[path.name for path in"
        " checkpoint_files('me/model')])"
    )
    endpoint = f"http://127.0.0.1:{hub.server_address[1]}"
    environment = {
        **os.environ,
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert done.stdout.split() == shards, done.stderr
    assert sorted(name for name in hub.sent if name.endswith(".safetensors")) == shards
