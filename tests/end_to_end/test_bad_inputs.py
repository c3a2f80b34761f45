"""Tests that malformed configurations, datasets, models, rewards and adapters are refused.

Each ends with exit code 2 and one readable message, before any work starts. The tables below have
what is wrong, what makes it so, and what the message must say. Ray must not be started for any of
them.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import random_delta
from safetensors.torch import load_file, save_file
from tiny_models import WORDS
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from raywarp.adapters.peft import save_peft
from raywarp.cli.commands import main
from raywarp.storage.locks import exclusive, lock

Case = tuple[Callable[[Path], list[str] | None], str]
TEXTS = [f"the film {a} {b}" for a in WORDS[:6] for b in WORDS[6:11]]
NOT_WHOLE = "truncated"
LAYER = "model.layers.1.mlp"
HEADLESS = "lacks the tensor score.weight; it would be made up at random"


def write(folder: Path, name: str, content: str | bytes) -> None:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def jsonl(folder: Path, name: str, rows: list[dict[str, Any]]) -> None:
    write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def config(text: str | bytes) -> Callable[[Path], list[str]]:
    """A config with this text."""

    def build(folder: Path) -> list[str]:
        write(folder, "bad.yaml", text)
        return ["train", "bad.yaml"]

    return build


def override(*values: str, command: str = "train") -> Callable[[Path], list[str]]:
    """The sound config with these overrides."""
    return lambda folder: [command, "config.yaml", *values]


BOMB = "a: &a [1,1,1,1,1,1,1,1,1,1]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 10)}]\n"
    for old, new in zip("abcde", "bcdef", strict=True)
)


def broken_link(folder: Path) -> list[str]:
    (folder / "link").symlink_to(folder / "nothing")
    return ["train", "config.yaml", "out=link"]


CONFIGS: dict[str, Case] = {
    "missing file": (
        lambda folder: ["train", "nowhere.yaml"],
        "cannot read the config nowhere.yaml",
    ),
    "a folder": (lambda folder: ["train", "."], "cannot read the config"),
    "empty": (config(""), "bad.yaml is empty"),
    "only a comment": (config("# later\n"), "bad.yaml is empty"),
    "not YAML": (config("model: [unclosed"), "not valid YAML"),
    "a tab": (config("\tseed: 1"), "not valid YAML"),
    "binary": (config(bytes(range(256))), "cannot read the config bad.yaml"),
    "NUL": (config("seed: 1\x00"), "not valid YAML"),
    "two documents": (config("---\nseed: 1\n---\nseed: 2\n"), "single document"),
    "a list": (config("- 1\n- 2\n"), "must hold keys and values, not a list"),
    "a duplicate key": (
        config("seed: 1\nwarp: {steps: 2}\nwarp: {steps: 3}\n"),
        "line 3, column 1: the key 'warp' is there twice",
    ),
    "a duplicate key inside": (
        config("warp: {steps: 2, steps: 3}\n"),
        "the key 'steps' is there twice",
    ),
    "itself": (config("warp: &w {steps: *w}\n"), "a value contains itself"),
    "a bomb of aliases": (config(BOMB), "once its aliases are written out"),
    "deep nesting": (config("[" * 1000), "nested too deeply"),
    "a Python object": (
        config('!!python/object/apply:os.system ["true"]'),
        "could not determine a constructor",
    ),
    "an impossible date": (config("out: 2024-13-45"), "month must be in 1..12"),
    "a number as key": (config("1: 2"), "1: keys should be strings"),
    "a section that is a list": (config("warp: [1]"), "warp: input should be a valid dictionary"),
    "a section that is nothing": (config("warp:"), "warp: input should be a valid dictionary"),
    "an unknown key": (override("warp.ema_rat=0.1"), "did you mean 'warp.ema_rate'?"),
    "a word for a number": (
        override("warp.policies=two"),
        "warp.policies: input should be a valid integer",
    ),
    "true for a number": (override("warp.steps=true"), "warp.steps: must be a number"),
    "nothing for a number": (
        override("warp.steps="),
        "warp.steps: input should be a valid integer",
    ),
    "a fraction for a count": (
        override("warp.steps=2.5"),
        "warp.steps: input should be a valid integer",
    ),
    "below the range": (override("warp.policies=0"), "greater than or equal to 1"),
    "above the range": (override("warp.ema_rate=1.5"), "less than or equal to 1"),
    "NaN": (override("optim.lr=.nan"), "optim.lr: input should be a finite number"),
    "infinity": (
        override("rollout.temperature=.inf"),
        "rollout.temperature: input should be a finite number",
    ),
    "a huge integer": (
        override(f"warp.steps={'9' * 400}"),
        "warp.steps: input should be less than or equal to 2147483647",
    ),
    "an integer of 5000 digits": (override(f"seed={'9' * 5000}"), "not valid YAML"),
    "a seed that numpy does not take": (
        override("seed=4294967296"),
        "seed: input should be less than 4294967296",
    ),
    "an unknown choice": (override("warp.advantage=gae"), "warp.advantage: input should be 'rloo'"),
    "a logger of another name": (override("loggers=[comet]"), "loggers.0"),
    "a logger that is not installed": (
        override("loggers=[mlflow]"),
        "pip install 'raywarp[mlflow]'",
    ),
    "control characters": (
        override('out="a\\0b"'),
        "out: must be text, without control characters",
    ),
    "no text": (override('model=""'), "model: must be text"),
    "no target module": (
        override("lora.target_modules=[]"),
        "lora.target_modules: list should have at least 1 item",
    ),
    "one and a half GPUs": (
        override("cluster.gpus_per_policy=1.5"),
        "cluster.gpus_per_policy: must be a whole number",
    ),
    "a batch that does not divide": (
        override("optim.batch_size=10"),
        "is not a multiple of rollout.completions_per_prompt=4",
    ),
    "a lone completion with rloo": (
        override("rollout.completions_per_prompt=1"),
        "must be at least 2 with warp.advantage=rloo",
    ),
    "two rules of choice": (
        override("front.choose={eta: 0.5, max_kl: 2}"),
        "exactly one of eta and max_kl",
    ),
    "model and function": (
        override("reward={model: ./here, function: 'a:b'}"),
        "both a model and a function",
    ),
    "no override": (override("nonsense"), "is not of the form key=value"),
    "longer than the context": (
        override("rollout.max_new_tokens=600"),
        "leaves no room in the model's context of 512 tokens",
    ),
    "prompts and completions longer than the context": (
        override("rollout.max_new_tokens=510"),
        "set prompts.max_tokens",
    ),
    "no time for the reward": (
        override("reward.timeout_seconds=0"),
        "reward.timeout_seconds: input should be greater than 0",
    ),
    "LoRA slots that vLLM has not": (
        override("lora.rank=600", "rollout.adapter=lora", "dtype=float32"),
        "and vLLM's largest is 512",
    ),
    "LoRA without vLLM": (
        override("rollout.engine=transformers", "rollout.adapter=lora"),
        "has rollout.adapter=unmerged (or auto)",
    ),
    "merged weights in bfloat16": (
        override("rollout.adapter=merged", "dtype=bfloat16"),
        "rounds W + ΔW",
    ),
    "modules that do not exist": (
        override("lora.target_modules=[nothing]"),
        "lora.target_modules=['nothing'] does not fit the model",
    ),
    "modules that are not linear": (
        override("lora.target_modules=[embed_tokens]"),
        "only linear layers are adapted",
    ),
    "a password": (override("out=s3://key:hunter2@bucket/run"), "out holds credentials"),
    "a secret parameter": (
        override("prompts.dataset=https://x.org/a?secret_token=hunter2"),
        "prompts.dataset holds credentials",
    ),
    "an out inside a file": (
        override("out=config.yaml/run"),
        "out=config.yaml/run cannot be written: Not a directory",
    ),
    "a reward's out inside a file": (
        lambda folder: ["reward", "config.yaml", "out=config.yaml/run"],
        "cannot be written: Not a directory",
    ),
    "an out that is a file": (
        override("out=config.yaml"),
        "out=config.yaml cannot be written: Not a directory",
    ),
    "an out of 300 letters": (
        override(f"out={'a' * 300}"),
        "cannot be written: File name too long; choose another folder",
    ),
    "a store inside a file": (
        override("store=config.yaml/store"),
        "store=config.yaml/store cannot be written: Not a directory",
    ),
    "an out that is a link to nothing": (broken_link, "out=link cannot be written: File exists"),
    "a password without a key": (
        override("s3://key:hunter2@bucket/run"),
        "'s3://***@bucket/run' is not of the form",
    ),
}


def prompts(
    name: str, content: str | bytes | list[dict[str, Any]], *overrides: str
) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        jsonl(folder, name, content) if isinstance(content, list) else write(folder, name, content)
        return ["train", "config.yaml", f"prompts.dataset=./{name}", *overrides]

    return build


def preferences(
    name: str, content: str | bytes | list[dict[str, Any]], *overrides: str
) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        jsonl(folder, name, content) if isinstance(content, list) else write(folder, name, content)
        return ["reward", "config.yaml", f"preferences.dataset=./{name}", *overrides]

    return build


def scripted(folder: Path) -> list[str]:
    """A dataset's folder with code, which would tell that it ran."""
    (folder / "data").mkdir()
    write(folder / "data", "data.py", f"open({str(folder / 'executed')!r}, 'w')\n")
    return ["train", "config.yaml", "prompts.dataset=./data"]


def rated(*ratings: float | str | None) -> list[dict[str, Any]]:
    return [{"text": text, "rating": ratings[n % len(ratings)]} for n, text in enumerate(TEXTS)]


DATASETS: dict[str, Case] = {
    "prompts: missing file": (
        override("prompts.dataset=./missing.jsonl"),
        "./missing.jsonl does not exist",
    ),
    "prompts: unknown format": (prompts("p.txt", "the film"), "p.txt is none of .parquet"),
    "prompts: empty file": (prompts("p.jsonl", ""), "p.jsonl"),
    "prompts: broken line": (
        prompts("p.jsonl", '{"text": "a film"}\n{"text": "the\n'),
        "cannot load split 'train'",
    ),
    "prompts: mixed types": (
        prompts("p.jsonl", [{"text": "a film"}, {"text": {"a": 1}}]),
        "row 2 of prompts.dataset=./p.jsonl: prompts.column=text holds a dict; it must",
    ),
    "prompts: broken parquet": (
        prompts("p.parquet", b"PAR1" + bytes(50) + b"PAR1"),
        "cannot load split 'train'",
    ),
    "prompts: wrong column": (
        override("prompts.column=question"),
        "prompts.column=question: the dataset's columns are",
    ),
    "prompts: wrong split": (override("prompts.split=test"), "cannot load split 'test'"),
    "prompts: wrong held-out split": (
        override("prompts.held_out_split=test"),
        "cannot load split 'test'",
    ),
    "prompts: empty texts": (
        prompts("p.jsonl", [{"text": " "}] * 5),
        "too few prompts, once empty and repeated ones are dropped",
    ),
    "prompts: one text": (prompts("p.jsonl", [{"text": "the film"}] * 5), "too few prompts"),
    "prompts: numbers": (
        prompts("p.jsonl", [{"text": n} for n in range(9)]),
        "row 1 of prompts.dataset=./p.jsonl: prompts.column=text holds a int; it must hold text",
    ),
    "prompts: lists": (
        prompts("p.jsonl", [{"text": ["a"]}] * 5),
        "row 1 of prompts.dataset=./p.jsonl: prompts.column=text: message 1 has no role",
    ),
    "prompts: messages without a template": (
        prompts("p.jsonl", [{"text": [{"role": "user", "content": "a film"}]}] * 5),
        "holds messages; set prompts.template=chat",
    ),
    "prompts: a system turn without a template": (
        override("prompts.system=be kind"),
        "prompts: system='be kind' is for a chat template, and template=none",
    ),
    "prompts: an unknown way with long ones": (
        override("prompts.too_long=shorten"),
        "prompts.too_long: ",
    ),
    "prompts: one of several is missing": (
        override("prompts.datasets=[{dataset: ./prompts.jsonl}, {dataset: ./missing.jsonl}]"),
        "./missing.jsonl does not exist",
    ),
    "prompts: a source without a dataset": (
        override("prompts.datasets=[{name: ./prompts.jsonl}]"),
        "prompts.datasets.0.dataset: field required",
    ),
    "an empty stop string": (override("rollout.stop=['']"), "rollout.stop.0: "),
    "a stop string for a list": (override("rollout.stop=END"), "rollout.stop: "),
    "prompts: a file as folder": (override("prompts.dataset=./config.yaml/x"), "does not exist"),
    "prompts: a script": (scripted, "cannot load split 'train'"),
    "prompts: unknown embedded data": (
        override("prompts.dataset=embedded:poems"),
        "unknown embedded dataset",
    ),
    "prompts: too long": (
        prompts("p.jsonl", [{"text": "film " * 600}] * 5, "prompts.max_words=null"),
        "set prompts.max_tokens",
    ),
    "preferences: missing file": (
        override("preferences.dataset=./missing.csv", command="reward"),
        "./missing.csv does not exist",
    ),
    "preferences: other columns": (
        preferences("p.jsonl", [{"text": "a"}]),
        "needs columns chosen and rejected, or text and rating",
    ),
    "preferences: NaN": (
        preferences("p.jsonl", rated(1.0, float("nan"))),
        "a rated row needs a text and a number",
    ),
    "preferences: no rating": (
        preferences("p.jsonl", rated(1.0, None)),
        "a rated row needs a text and a number",
    ),
    "preferences: words as ratings": (
        preferences("p.jsonl", rated("good", "bad")),
        "a rated row needs a text and a number",
    ),
    "preferences: equal ratings": (
        preferences("p.jsonl", rated(3.0)),
        "too few preferences: 0 for training",
    ),
    "preferences: equal texts": (
        preferences("p.jsonl", [{"chosen": "a", "rejected": "a"}] * 9),
        "too few preferences",
    ),
    "preferences: numbers": (
        preferences("p.jsonl", [{"chosen": 1, "rejected": 2}] * 9),
        "it must hold text, or a list of messages",
    ),
    "preferences: nobody answers": (
        preferences(
            "p.jsonl",
            [{part: [{"role": "user", "content": part}] for part in ("chosen", "rejected")}] * 9,
        ),
        "has no assistant turn",
    ),
    "preferences: missing prompt": (
        preferences(
            "p.jsonl", [{"chosen": "a", "rejected": "b"}] * 9, "preferences.prompt=question"
        ),
        "preferences.prompt=question: the dataset's columns are",
    ),
    "preferences: a prompt that is the answer": (
        preferences("p.jsonl", rated(1.0, 3.0), "preferences.prompt=text"),
        "preferences.prompt=text is also the column of the texts or ratings",
    ),
    "preferences: answers to different prompts": (
        preferences(
            "p.jsonl",
            [{part: f"\n\nHuman: {part}\n\nAssistant: a" for part in ("chosen", "rejected")}] * 9,
        ),
        "preferences: row 0: chosen and rejected answer different prompts",
    ),
    "preferences: more tokens than the backbone has": (
        override("reward_training.max_length=100000", command="reward"),
        "reward_training.max_length=100000, but",
    ),
    "preferences: no margin": (
        preferences(
            "p.jsonl",
            [{"chosen": f"a{n}", "rejected": f"b{n}"} for n in range(20)],
            "reward_training.margin_loss=true",
        ),
        "no number in the column margin",
    ),
    "preferences: missing backbone": (
        override("reward_training.backbone=./missing", command="reward"),
        "reward_training.backbone folder",
    ),
    "preferences: a batch that workers cannot share": (
        override("reward_training.num_workers=3", command="reward"),
        "is not a multiple of",
    ),
}


def model(change: Callable[[Path], object], *overrides: str) -> Callable[[Path], list[str]]:
    """A copy of the tiny Llama with one change."""

    def build(folder: Path) -> list[str]:
        shutil.copytree(
            yaml.safe_load((folder / "config.yaml").read_text())["model"], folder / "model"
        )
        change(folder / "model")
        return ["train", "config.yaml", "model=./model", *overrides]

    return build


def edit(name: str, **changes: Any) -> Callable[[Path], None]:
    """Keys of a JSON file; None removes one."""

    def change(folder: Path) -> None:
        tree = {**json.loads((folder / name).read_text()), **changes}
        (folder / name).write_text(
            json.dumps({key: value for key, value in tree.items() if value is not None})
        )

    return change


def replaced(name: str, content: str | bytes) -> Callable[[Path], None]:
    return lambda folder: write(folder, name, content)


def without(*names: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def cut(name: str) -> Callable[[Path], None]:
    return lambda folder: write(folder, name, (folder / name).read_bytes()[:-100])


def pickled(folder: Path) -> None:
    weights = LlamaForCausalLM.from_pretrained(folder).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shards(**weight_map: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "part.safetensors")
        shutil.copy(folder / "part.safetensors", folder.parent / "elsewhere.safetensors")
        write(folder, "model.safetensors.index.json", json.dumps({"weight_map": weight_map}))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """The weights with some of them changed."""

    def write_weights(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        change(held)
        save_file(held, folder / "model.safetensors", metadata={"format": "pt"})

    return write_weights


def without_tensor(name: str) -> Callable[[Path], None]:
    return weights(lambda held: held.pop(name))


def another_shape(name: str) -> Callable[[Path], None]:
    return weights(lambda held: held.update({name: held[name][:-1].clone()}))


def apart(index: bool, lost: str = "", repeated: str = "") -> Callable[[Path], None]:
    """The weights in two files: one tensor in none of them, which the index has all the same, or
    one in both.
    """

    def change(folder: Path) -> None:
        held = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        places = {name: f"model-{n % 2}.safetensors" for n, name in enumerate(sorted(held))}
        for file in sorted(set(places.values())):
            part = {
                name: held[name]
                for name in held
                if name != lost and (places[name] == file or name == repeated)
            }
            save_file(part, folder / file, metadata={"format": "pt"})
        if index:
            write(folder, "model.safetensors.index.json", json.dumps({"weight_map": places}))

    return change


def two_models(folder: Path) -> None:
    """One file, and an index of two others."""
    shutil.copy(folder / "model.safetensors", folder / "single")
    apart(index=True)(folder)
    (folder / "single").rename(folder / "model.safetensors")


def untied(folder: Path) -> None:
    """Two embeddings that differ, where the configuration says that they are one."""
    edit("config.json", tie_word_embeddings=True)(folder)


def linked(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "elsewhere")
        (folder / name).symlink_to(folder.parent / "elsewhere")

    return change


def with_code(folder: Path) -> None:
    """A model type of its own, whose code would tell that it ran."""
    edit(
        "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Model"},
    )(folder)
    write(folder, "code.py", f"open({str(folder.parent / 'executed')!r}, 'w')\n")


def tokenizer_with_code(folder: Path) -> None:
    edit(
        "tokenizer_config.json",
        tokenizer_class="Mine",
        auto_map={"AutoTokenizer": ["code.Mine", None]},
    )(folder)
    write(folder, "code.py", f"open({str(folder.parent / 'executed')!r}, 'w')\n")


def encoder(folder: Path) -> None:
    shutil.rmtree(folder)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
    }
    BertForMaskedLM(BertConfig(vocab_size=30, **sizes)).save_pretrained(folder)


MODELS: dict[str, Case] = {
    "no such folder": (override("model=./missing"), "./missing does not exist"),
    "a file": (override("model=./config.yaml"), "config.yaml is a file; it must be a folder"),
    "not on the hub": (
        override("model=nobody/nothing-at-all"),
        "model=nobody/nothing-at-all cannot be loaded",
    ),
    "an unknown embedded model": (
        override("model=embedded:gpt5"),
        "embedded:smollm2-135m-instruct",
    ),
    "no config": (model(without("config.json")), "has no config.json"),
    "broken config": (model(replaced("config.json", '{"model_type":')), "not a valid JSON file"),
    "config of no type": (model(replaced("config.json", "[1]")), "model=./model cannot be loaded"),
    "config of unknown type": (model(edit("config.json", model_type="foo")), "model type `foo`"),
    "config of wrong types": (model(edit("config.json", hidden_size="wide")), "hidden_size"),
    "config that cannot be": (
        model(edit("config.json", num_attention_heads=7)),
        "multiple of the number of attention heads",
    ),
    "an encoder": (model(encoder), "holds a BertForMaskedLM; it must be a causal language model"),
    "a classifier": (
        model(edit("config.json", architectures=["LlamaForSequenceClassification"])),
        "must be a causal language model",
    ),
    "no tokenizer": (
        model(without("tokenizer.json", "tokenizer_config.json")),
        "there are no tokenizer files",
    ),
    "broken tokenizer": (
        model(replaced("tokenizer.json", '{"a":')),
        "its tokenizer cannot be loaded",
    ),
    "another model's tokenizer": (
        model(edit("config.json", vocab_size=9)),
        "they belong to different models",
    ),
    "no weights": (model(without("model.safetensors")), "has no weights"),
    "truncated weights": (model(cut("model.safetensors")), NOT_WHOLE),
    "weights that are none": (
        model(replaced("model.safetensors", b"weights")),
        "is no safetensors file",
    ),
    "a pickle": (model(pickled), "pytorch_model.bin, a pickle, which may run code"),
    "a missing shard": (
        model(shards(a="part.safetensors", b="lost.safetensors")),
        "lacks lost.safetensors",
    ),
    "a shard outside": (
        model(shards(a="part.safetensors", b="../elsewhere.safetensors")),
        "names a file outside its folder",
    ),
    "an absolute shard": (model(shards(a="/etc/passwd")), "names a file outside its folder"),
    "a broken index": (model(shards()), "has no weights"),
    "a link out of the folder": (
        model(linked("model.safetensors")),
        "is a link that leads out of its folder",
    ),
    "no head": (
        model(without_tensor("lm_head.weight")),
        "model=./model lacks the tensor lm_head.weight; it would be made up at random",
    ),
    "a layer without a weight": (
        model(without_tensor(f"{LAYER}.up_proj.weight")),
        f"lacks the tensor {LAYER}.up_proj.weight;",
    ),
    "a layer without weights": (
        model(weights(lambda held: [held.pop(name) for name in list(held) if LAYER in name])),
        f"lacks the tensor {LAYER}.down_proj.weight and 2 more",
    ),
    "a weight of another shape": (
        model(another_shape("model.norm.weight")),
        "the tensor model.norm.weight has the shape (63,), and by its config.json (64,)",
    ),
    "a tensor of two files": (
        model(apart(index=True, repeated="model.norm.weight")),
        (
            "holds the tensor model.norm.weight twice, in model-0.safetensors and in"
            " model-1.safetensors"
        ),
    ),
    "a tensor of two files, and no index": (
        model(apart(index=False, repeated="model.norm.weight")),
        (
            "holds the tensor model.norm.weight twice, in model-0.safetensors and in"
            " model-1.safetensors, and no model.safetensors.index.json"
        ),
    ),
    "a copy beside the model": (
        model(
            lambda folder: (
                shutil.copy(folder / "model.safetensors", folder / "old.safetensors") and None
            )
        ),
        (
            "holds the tensor lm_head.weight twice, in model.safetensors and in old.safetensors,"
            " and no model.safetensors.index.json"
        ),
    ),
    "two files, and no index": (
        model(apart(index=False)),
        "model-0.safetensors is not read, since there is neither model.safetensors nor",
    ),
    "an index of a tensor that is not there": (
        model(apart(index=True, lost="lm_head.weight")),
        (
            "lacks the tensor lm_head.weight: model.safetensors.index.json says that it is in"
            " model-0.safetensors"
        ),
    ),
    "two models": (
        model(two_models),
        (
            "model.safetensors.index.json says that lm_head.weight is in model-0.safetensors, and"
            " model.safetensors"
        ),
    ),
    "a tensor under two names": (
        model(weights(lambda held: held.update({"norm.weight": held["model.norm.weight"] + 1}))),
        "norm.weight in model.safetensors and model.norm.weight in model.safetensors",
    ),
    "two embeddings that are one": (
        model(untied),
        "tie_word_embeddings in config.json says that they are one",
    ),
    "an adapter beside the model": (
        model(replaced("adapter_config.json", "{}")),
        "has an adapter beside the model (adapter_config.json)",
    ),
    "code of its own": (
        model(with_code),
        "it comes with code of its own, which is not run unless trust_remote_code=true",
    ),
    "a tokenizer's code": (
        model(tokenizer_with_code),
        "it comes with code of its own, which is not run unless trust_remote_code=true",
    ),
    "no chat template": (
        model(lambda folder: (folder / "chat_template.jinja").unlink(), "prompts.template=chat"),
        "tokenizer has no chat template; use prompts.template=none",
    ),
    "a template that raises": (
        model(
            lambda folder: (folder / "chat_template.jinja").write_text(
                "{{ raise_exception('no user turns here') }}"
            ),
            "prompts.template=chat",
        ),
        "row 1 of prompts.dataset=./prompts.jsonl: the model's chat template does not take it"
        " (TemplateError: no user turns here)",
    ),
    "a template's argument that it does not read": (
        override("prompts.template=chat", "prompts.template_kwargs={enable_thinking: false}"),
        "prompts.template_kwargs.enable_thinking: the model's chat template does not read",
    ),
}


def reward_code(text: str) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        name = f"reward_{abs(hash(text))}"  # a module is imported once in a process
        write(folder, f"{name}.py", text)
        return ["train", "config.yaml", f"reward.function={name}:score"]

    return build


def reward_model(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    def build(folder: Path) -> list[str]:
        arguments = model(change)(folder)
        (folder / "model").rename(folder / "reward")
        return [*arguments[:2], "reward={model: ./reward}"]

    return build


def classifier(change: Callable[[Path], object]) -> Callable[[Path], None]:
    """The tiny Llama as a sound classifier with one label, and then changed."""

    def build(folder: Path) -> None:
        LlamaForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(folder)
        change(folder)

    return build


def renamed(old: str, new: str) -> Callable[[Path], None]:
    return weights(lambda held: held.update({new: held.pop(old)}))


def backbone(change: Callable[[Path], object]) -> Callable[[Path], list[str]]:
    return lambda folder: (
        model(change)(folder),
        ["reward", "config.yaml", "reward_training.backbone=./model"],
    )[1]


ONE_LABEL = {"id2label": {"0": "score"}, "architectures": ["LlamaForSequenceClassification"]}
REWARDS: dict[str, Case] = {
    "none": (override("reward={}"), "there is no reward: set reward.model"),
    "no function's name": (
        override("reward.function=fine_reward"),
        "is not of the form module:function",
    ),
    "no such module": (
        override("reward.function=missing_module:score"),
        "'missing_module' cannot be imported",
    ),
    "no such function": (override("reward.function=fine_reward:missing"), "has no 'missing'"),
    "not callable": (override("reward.function=fine_reward:NUMBER"), "is a int, not a function"),
    "a syntax error": (reward_code("def score(:\n"), "SyntaxError"),
    "an import that fails": (reward_code("import nothing_of_that_name\n"), "nothing_of_that_name"),
    "a module that exits": (reward_code("raise SystemExit(0)\n"), "cannot be imported (SystemExit"),
    "one argument": (
        reward_code("def score(texts):\n    return [0.0]\n"),
        "cannot be called as score(prompts, completions, id=)",
    ),
    "a column that is not there": (
        reward_code("def score(prompts, completions, stars, **others):\n    return [0.0]\n"),
        "'stars'",
    ),
    "no columns": (
        reward_code("def score(prompts, completions):\n    return [0.0]\n"),
        "add **columns to take any",
    ),
    "a generator": (
        reward_code("def score(prompts, completions, **columns):\n    yield 0.0\n"),
        "is a generator",
    ),
    "an exception that is none": (
        override("reward.retry_on=[fine_reward.NUMBER]"),
        "'fine_reward.NUMBER' is no exception",
    ),
    "two labels": (reward_model(lambda folder: None), "num_labels=2, a reward needs 1"),
    "a language model with one label": (
        reward_model(edit("config.json", id2label={"0": "score"})),
        "it must be a sequence classifier",
    ),
    "a classifier without weights": (
        reward_model(
            lambda folder: (
                edit("config.json", **ONE_LABEL)(folder),
                without("model.safetensors")(folder),
            )
        ),
        "has no weights",
    ),
    "a head of another name": (
        reward_model(classifier(renamed("score.weight", "value_head.weight"))),
        HEADLESS,
    ),
    "a language model in a classifier's clothes": (
        reward_model(edit("config.json", **ONE_LABEL)),
        HEADLESS,
    ),
    "a classifier without a layer's weight": (
        reward_model(classifier(without_tensor("model.layers.0.mlp.up_proj.weight"))),
        "lacks the tensor model.layers.0.mlp.up_proj.weight",
    ),
    "a classifier of another shape": (
        reward_model(classifier(another_shape("model.norm.weight"))),
        "has the shape (63,)",
    ),
    "a classifier's tensor of two files": (
        reward_model(classifier(apart(index=True, repeated="score.weight"))),
        "holds the tensor score.weight twice, in model-0.safetensors and in model-1.safetensors",
    ),
    "a control without a head": (
        lambda folder: [
            *reward_model(classifier(without_tensor("score.weight")))(folder)[:2],
            "control={model: ./reward}",
        ],
        HEADLESS,
    ),
    "a backbone without a weight": (
        backbone(without_tensor("model.norm.weight")),
        "lacks the tensor model.norm.weight",
    ),
    "a backbone of another shape": (
        backbone(another_shape("model.norm.weight")),
        "has the shape (63,)",
    ),
    "a classifier's code": (reward_model(with_code), "it comes with code of its own"),
    "no control": (override("control={}"), "control has neither a model nor a function"),
}


def adapter(change: Callable[[Path], object], *options: str) -> Callable[[Path], list[str]]:
    """Two sound adapters, one of them changed."""

    def build(folder: Path) -> list[str]:
        for n, name in enumerate(("a", "b")):
            save_peft(random_delta(n), folder / name, torch.float32)
        change(folder / "b")
        return ["merge", "slerp", "a", "b", "--out", "merged", *options]

    return build


def tensors(function: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        held = load_file(folder / "adapter_model.safetensors")
        function(held)
        save_file(held, folder / "adapter_model.safetensors")

    return change


LORA_A = "base_model.model.model.layers.0.attn.q.lora_A.weight"
LORA_B = "base_model.model.model.layers.0.attn.q.lora_B.weight"
JSON = "adapter_config.json"

ADAPTERS: dict[str, Case] = {
    "no such folder": (
        lambda folder: ["merge", "slerp", "./x", "./y", "--out", "merged"],
        "there is no such folder",
    ),
    "no config": (adapter(without(JSON)), "is not a PEFT adapter: it has no adapter_config.json"),
    "no weights": (
        adapter(without("adapter_model.safetensors")),
        "it has no adapter_model.safetensors",
    ),
    "a pickle": (
        adapter(
            lambda folder: (folder / "adapter_model.safetensors").rename(
                folder / "adapter_model.bin"
            )
        ),
        "adapter_model.bin is a pickle, which may run code",
    ),
    "broken config": (adapter(replaced(JSON, "{")), "is not valid JSON"),
    "binary config": (adapter(replaced(JSON, bytes(range(128, 256)))), "is not valid JSON"),
    "config that is a list": (adapter(replaced(JSON, "[]")), "must hold an object, not a list"),
    "rank 0": (adapter(edit(JSON, r=0)), "must be a positive integer, not 0"),
    "another rank": (adapter(edit(JSON, r=7, rank_pattern={})), "adapter_config.json says 7"),
    "alpha that is no number": (adapter(edit(JSON, lora_alpha="x")), "must be a number, not 'x'"),
    "a wrong pattern": (adapter(edit(JSON, rank_pattern={"(": 2})), "is not a valid pattern"),
    "DoRA": (adapter(edit(JSON, use_dora=True)), "uses use_dora"),
    "trained modules": (
        adapter(edit(JSON, modules_to_save=["../lm_head"])),
        "uses modules_to_save",
    ),
    "biases": (adapter(edit(JSON, bias="all")), "trains biases"),
    "not LoRA": (adapter(edit(JSON, peft_type="IA3")), "is a IA3 adapter"),
    "PiSSA": (adapter(edit(JSON, init_lora_weights="pissa")), "changes the base weights too"),
    "another base": (
        adapter(
            lambda folder: [
                edit(JSON, base_model_name_or_path=name)(folder.parent / name)
                for name in ("a", "b")
            ]
        ),
        "base",
    ),
    "truncated": (adapter(cut("adapter_model.safetensors")), NOT_WHOLE),
    "not safetensors": (
        adapter(replaced("adapter_model.safetensors", b"PK\x03\x04" + bytes(99))),
        "adapter_model.safetensors",
    ),
    "an empty file": (
        adapter(replaced("adapter_model.safetensors", b"")),
        "is no safetensors file",
    ),
    "no pair": (adapter(tensors(lambda held: held.pop(LORA_B))), "lora_B is missing"),
    "wrong shapes": (
        adapter(tensors(lambda held: held.update({LORA_B: torch.zeros(6, 9)}))),
        "no matching pair",
    ),
    "other sizes": (
        adapter(tensors(lambda held: held.update({LORA_B: torch.zeros(8, 3)}))),
        "layers.0.attn.q",
    ),
    "NaN": (
        adapter(tensors(lambda held: held[LORA_A].fill_(float("nan")))),
        "holds NaN or infinity",
    ),
    "an unknown tensor": (
        adapter(tensors(lambda held: held.update({"../x": torch.zeros(2)}))),
        "tensor ../x cannot be averaged",
    ),
    "a place that is a file": (
        adapter(lambda folder: write(folder.parent, "merged", "")),
        "merged is a file; name a folder",
    ),
    "weights that are no numbers": (
        adapter(lambda folder: None, "--weights", "a,b"),
        "--weights takes numbers",
    ),
    "a rank of 0": (adapter(lambda folder: None, "--rank", "0"), "the rank must be at least 1"),
}

TABLE = {
    f"{kind}: {name}": case
    for kind, cases in {
        "config": CONFIGS,
        "dataset": DATASETS,
        "model": MODELS,
        "reward": REWARDS,
        "adapter": ADAPTERS,
    }.items()
    for name, case in cases.items()
}


@pytest.fixture
def good_inputs(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, no_ray: None
) -> Iterator[Path]:
    """A user's folder in which all is well; if Ray were started, the test would fail."""
    jsonl(tmp_path, "prompts.jsonl", [{"text": text, "id": n} for n, text in enumerate(TEXTS)])
    jsonl(tmp_path, "ratings.jsonl", rated(1.0, 2.0, 3.0))
    write(
        tmp_path,
        "fine_reward.py",
        "def score(prompts, completions, **columns):\n    return [0.0] * len(completions)\nNUMBER"
        " = 3\n",
    )
    tree = {
        "model": str(tiny_llama),
        "out": "run",
        "prompts": {"dataset": "./prompts.jsonl", "max_words": 4},
        "preferences": {"dataset": "./ratings.jsonl"},
        "reward_training": {"backbone": str(tiny_llama)},
        "reward": {"function": "fine_reward:score"},
        "optim": {"batch_size": 8},
    }
    write(tmp_path, "config.yaml", yaml.safe_dump(tree))
    monkeypatch.setenv("HF_HOME", str(tmp_path / ".hf"))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec",
        lambda name, *rest: None if name == "mlflow" else find(name, *rest),
    )
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)
    sys.path[:] = [entry for entry in sys.path if entry != str(tmp_path)]
    sys.modules.pop("fine_reward", None)


def message_of(stderr: str) -> str:
    """The one message on stderr, after what libraries may have warned of."""
    lines = stderr.splitlines()
    starts = [n for n, line in enumerate(lines) if line.startswith("raywarp: ")]
    assert len(starts) == 1, stderr
    assert "Traceback" not in stderr
    return "\n".join(lines[starts[0] :])


@pytest.mark.parametrize("name", TABLE)
def test_malformed_input(good_inputs: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    build, expected = TABLE[name]
    arguments = build(good_inputs)
    assert arguments is not None
    assert main(arguments) == 2
    captured = capsys.readouterr()
    message = message_of(captured.err)
    assert expected in message, message
    assert len(message) < 1200
    assert "hunter2" not in captured.err + captured.out
    assert not (good_inputs / "run").exists()
    assert not (good_inputs / "merged").is_dir()
    assert not (good_inputs / "executed").exists()


def test_the_sound_ones_pass(good_inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table's cases fail for the reason they name: without their fault they get as far as
    Ray.
    """
    for command in ("train", "reward"):
        with pytest.raises(pytest.fail.Exception, match="Ray would have started"):
            main([command, "config.yaml"])
    assert main(adapter(lambda folder: None)(good_inputs)) == 0


AT_WORK = """
import sys
from pathlib import Path

from raywarp.storage.locks import exclusive

with exclusive("run", Path("run"), print):
    print("at work", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("command", ["train", "reward", "tune"])
def test_a_folder_in_which_another_command_is_at_work(
    good_inputs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    monkeypatch.setattr("raywarp.storage.locks.ENDING_SECONDS", 0.2)
    arguments = [
        command,
        "config.yaml",
        *(["tune={warp.ema_rate: {grid: [0.01, 0.1]}}"] if command == "tune" else []),
    ]
    with subprocess.Popen(
        [sys.executable, "-c", AT_WORK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        assert other.stdout.readline() == "at work\n"
        assert main(arguments) == 2
        captured = capsys.readouterr()
        assert "another command is at work in" in captured.out
        assert "stop it or wait for its end, or choose another out" in message_of(captured.err)
        assert not list((good_inputs / "run").iterdir())
        other.kill()
    with pytest.raises(pytest.fail.Exception, match="Ray would have started"):
        main(arguments)


def test_an_empty_folder_that_the_first_command_takes_away_is_made_again_for_the_next(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "new" / "run"
    first, said = exclusive("run", folder, print), threading.Event()
    first.__enter__()

    def wait() -> bool:
        with exclusive("run", folder, lambda text: said.set()) as waited:
            with pytest.raises(BlockingIOError):
                lock(folder)
            (folder / "a").touch()
            return waited

    with ThreadPoolExecutor() as pool:
        second = pool.submit(wait)
        assert said.wait(10)
        first.__exit__(None, None, None)
        assert second.result(10)
    assert (folder / "a").exists()


@pytest.mark.parametrize(
    "name", ["config: a duplicate key", "model: truncated weights", "adapter: NaN"]
)
def test_malformed_input_in_a_process_of_its_own(good_inputs: Path, name: str) -> None:
    build, expected = TABLE[name]
    arguments = build(good_inputs)
    assert arguments is not None
    done = subprocess.run(
        [sys.executable, "-m", "raywarp.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert expected in message_of(done.stderr)


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 60
