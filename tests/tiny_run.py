"""A WARP run of seconds, for tests and benchmarks that need many.

It uses a tiny Llama and the transformers engine.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from tiny_models import WORDS

from raywarp.config.load import parse_config
from raywarp.config.schema import Config
from raywarp.run.display import Display
from raywarp.run.folder import Run
from raywarp.storage import sealed

REWARD = '''
"""Counts good words; returns NaN from its Nth call on while the file `broken` says N."""
import pathlib

HERE = pathlib.Path(__file__).parent
CALLS = [0]

def score(prompts, completions, **columns):
    CALLS[0] += 1
    broken = HERE / "broken"
    if broken.exists() and CALLS[0] >= int(broken.read_text()):
        return [float("nan")] * len(completions)
    return [float(text.split().count("good")) for text in completions]
'''


def make_project(folder: Path) -> Path:
    """A user's folder with a reward module and prompts."""
    (folder / "count_good.py").write_text(REWARD)
    rows = [
        {"text": f"{a} {b} {c}", "id": n}
        for n, (a, b, c) in enumerate(zip(WORDS, WORDS[3:], WORDS[7:], strict=False))
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def copied(run: Run, folder: Path) -> Path:
    """Without the adapters, which a report does not read."""
    return Path(shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("*.safetensors")))


def tiny_config(project: Path, model: Path, out: str | Path, **changes: Any) -> Config:
    """I = 2, M = 2, T = 6, a checkpoint every 2 steps; `changes` by section."""
    tree: dict[str, Any] = {
        "model": str(model),
        "dtype": "float32",
        "out": str(out),
        "prompts": {"dataset": str(project / "prompts.jsonl")},
        "reward": {"function": "count_good:score"},
        "lora": {"rank": 2, "alpha": 4},
        "warp": {
            "iterations": 2,
            "policies": 2,
            "steps": 6,
            "ema_rate": 0.2,
            "liti_rate": 0.5,
            "kl_coef": 0.02,
        },
        "optim": {"lr": 0.03, "batch_size": 8, "warmup_steps": 1},
        "rollout": {
            "engine": "transformers",
            "completions_per_prompt": 4,
            "max_new_tokens": 4,
            "temperature": 1.0,
        },
        "cluster": {"policy_actors": 1, "threads": 1},
        "front": {
            "prompts": 2,
            "completions_per_prompt": 2,
            "etas": [0, 0.5, 1],
            "choose": {"eta": 0.5},
            "samples": 2,
            "every": 0,
            "ceiling_completions": 4,
        },
        "checkpoint_every": 2,
        "kl_to_sft_every": 3,
    }
    for section, values in changes.items():
        tree[section] = {**tree.get(section, {}), **values} if isinstance(values, dict) else values
    return parse_config(tree)


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    """One bit, in the middle."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGE: dict[str, Callable[[Path], None]] = {
    "halved": halve,
    "flipped": flip,
    "emptied": empty,
    "deleted": Path.unlink,
}


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def as_of_before(run: Path, dtype: str | None = "bfloat16", adapter: str = "merged") -> Path:
    """Make a run one of the earlier sampler, by taking out what says that it is not.

    Args:
        dtype, adapter: what it says that its engine had; dtype None: nothing.
    """
    text = "".join(
        line
        for line in (run / "config.yaml").read_text().splitlines(keepends=True)
        if not line.startswith("#")
    )
    text = text.replace("dtype: float32\n", f"dtype: {dtype or 'auto'}\n")
    (run / "config.yaml").write_text(
        f"# sha256 of the lines below: {hashlib.sha256(text.encode()).hexdigest()}\n{text}"
    )
    rows = [
        {key: value for key, value in row.items() if key != "sampler"}
        for row in sealed.read_jsonl(run / "events.jsonl")
    ]
    sealed.write_jsonl(run / "events.jsonl", rows)
    if (front := sealed.read_record(run / "front.json")) is not None:
        del front["sampler"]
        found = {
            key: {**numerics, "dtype": dtype, "adapter": adapter}
            for key, numerics in front["numerics"].items()
        }
        sealed.write_record(run / "front.json", {**front, "numerics": found if dtype else {}})
    return run


class Listener(Display):
    """A display that keeps what is said."""

    def __init__(self) -> None:
        self.heard = io.StringIO()
        super().__init__(Console(file=self.heard, width=400))

    def text(self) -> str:
        return self.heard.getvalue()
