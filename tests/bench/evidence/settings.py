"""What the study trains: its settings, the arms, and the configuration of each as a user would
write it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raywarp.config.datasets import SNIPPETS
from raywarp.config.load import load_config
from raywarp.config.rewards import MINILM
from raywarp.config.schema import SMOLLM2, Config
from raywarp.data import embedded
from raywarp.storage.sealed import write_text

SELECTION_FILE = "selection.json"
# A reward model from human ratings; a reward by function, to rule out luck; the first with another
# backbone for its control model.
REVIEWS, PRESENT_TENSE, OTHER_CONTROL = TASKS = ("reviews", "present-tense", "smollm2-control")


@dataclass(frozen=True)
class Settings:
    """Everything that decides a number. Points that were measured under other settings are refused,
    not mixed in.

    task: of TASKS, or tiny (of seconds, for tests). steps: T. prompts: held out, for every point.
    kls: where fronts are compared; upper_kls likewise, where they reach so far; reference_kl: of
    the hypervolume.
    """

    task: str = REVIEWS
    steps: int = 32
    lr: float = 1e-3
    ema_rate: float = 0.1
    kl_coef: float = 0.1
    liti_rate: float = 0.5
    batch_size: int = 32
    group: int = 4
    new_tokens: int = 24
    rank: int = 16
    prompts: int = 500
    kls: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    upper_kls: tuple[float, ...] = (6.0, 8.0, 10.0)
    reference_kl: float = 10.0

    def as_json(self) -> dict[str, Any]:
        settings: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return settings


TINY = Settings(
    task="tiny",
    steps=4,
    lr=0.03,
    batch_size=8,
    new_tokens=4,
    rank=2,
    prompts=4,
    kls=(0.01, 0.02, 0.05),
    upper_kls=(0.2, 0.5),
    reference_kl=0.5,
)


def selected(settings: Settings, *folders: Path) -> Settings:
    """With the learning rate that `--select` chose: of the first of the results' folders for which
    it was run.
    """
    found = [path for folder in folders if (path := folder / SELECTION_FILE).is_file()]
    return replace(settings, lr=json.loads(found[0].read_text())["lr"]) if found else settings


@dataclass(frozen=True)
class Arm:
    """One run of raywarp.

    length: its steps, in units of T. lr, rank: in units of the study's. init: of A. ema_rate,
    kl_coef: None for the study's.
    kept: points of training whose policies are kept, in units of T; the end is kept anyway.
    """

    name: str
    policies: int = 2
    iterations: int = 1
    length: int = 1
    lr: float = 1.0
    rank: int = 1
    init: str = "independent"
    ema_rate: float | None = None
    kl_coef: float | None = None
    kept: tuple[float, ...] = ()

    def kept_steps(self, settings: Settings) -> list[int]:
        return [round(settings.steps * part) for part in self.kept]


EARLY, LATE = (0.25, 0.5, 0.75), (0.5, 1, 2, 3)
SFT_COEFS = (0.0, 0.01, 0.03, 0.1, 0.3)  # β of the runs that are anchored at the SFT model
ARMS = {
    arm.name: arm
    for arm in (
        Arm("warp", kept=EARLY),
        Arm("warp-m4", policies=4, kept=EARLY),
        Arm("warp-i2", iterations=2, kept=EARLY),
        Arm("warp-i3", iterations=3, kept=EARLY),
        Arm("warp-i2-init", iterations=2, ema_rate=0.0),
        Arm("shared", init="shared"),
        Arm("frozen", init="frozen"),
        Arm("half-lr", lr=0.5),
        Arm("double-lr", lr=2.0),
        Arm("high-rank", rank=4),
        Arm("ema-long", policies=1, length=4, kept=LATE),
        *(
            Arm(f"sft-{coef:g}-long", policies=1, length=4, ema_rate=0.0, kl_coef=coef, kept=LATE)
            for coef in SFT_COEFS
        ),
    )
}


def seed_folder(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}"


def arm_config(settings: Settings, arm: Arm, seed: int, folder: Path) -> Config:
    """The arm's configuration. Its own front is made small: the study measures with more prompts,
    and keeps what each gave.
    """
    cores, rank = os.cpu_count() or 2, settings.rank * arm.rank
    tree: dict[str, Any] = {
        "seed": seed,
        "out": str(seed_folder(folder, seed) / "arms" / f"{arm.name}-lr-{settings.lr:g}"),
        "store": str(folder / "store"),
        "lora": {"rank": rank, "alpha": float(rank), "init": arm.init},
        "warp": {
            "iterations": arm.iterations,
            "policies": arm.policies,
            "steps": settings.steps * arm.length,
            "ema_rate": settings.ema_rate if arm.ema_rate is None else arm.ema_rate,
            "liti_rate": settings.liti_rate,
            "kl_coef": settings.kl_coef if arm.kl_coef is None else arm.kl_coef,
        },
        "optim": {"lr": settings.lr * arm.lr, "batch_size": settings.batch_size, "warmup_steps": 2},
        "rollout": {
            "completions_per_prompt": settings.group,
            "max_new_tokens": settings.new_tokens,
        },
        # Threads are part of a policy's key, and arms of different M share policies.
        "cluster": {"threads": cores if arm.policies == 1 else max(1, cores // 2)},
        "front": {"prompts": 2, "etas": [0.0, 1.0], "choose": {"eta": 1.0}, "samples": 1},
        "checkpoint_every": _checkpoint_every(settings, arm),
        "kl_to_sft_every": max(1, settings.steps // 4),
    }
    return load_config(_merged(tree, _task(settings.task, seed, folder)))


def _checkpoint_every(settings: Settings, arm: Arm) -> int:
    """A kept step is one that has a checkpoint."""
    every = round(settings.steps * min(arm.kept, default=0.5))
    assert all(step % every == 0 for step in arm.kept_steps(settings)), arm
    return every


def reward_configs(settings: Settings, seed: int, folder: Path) -> list[Config]:
    """Of the reward models that the task needs: the reward, and a control from ratings of other
    snippets.
    """
    if settings.task not in (REVIEWS, OTHER_CONTROL):
        return []
    own = seed_folder(folder, seed)
    ratings = own / "control.jsonl"
    if not ratings.is_file():
        rows = [
            json.dumps({"text": snippet.text, "rating": snippet.rating})
            for snippet in embedded.split_snippets(seed).control
        ]
        write_text(ratings, "\n".join(rows) + "\n")
    task = {"seed": seed, **_task(settings.task, seed, folder), "control": None}
    control = SMOLLM2 if settings.task == OTHER_CONTROL else MINILM
    return [
        load_config(
            {
                **task,
                "out": str(own / name),
                "preferences": {"dataset": source},
                "reward_training": {"backbone": backbone},
            }
        )
        for name, source, backbone in (
            ("reward", SNIPPETS, MINILM),
            ("control", str(ratings), control),
        )
    ]


def _task(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Model, prompts, reward and control score."""
    own = seed_folder(folder, seed)
    if name == "tiny":
        return _tiny_task(tiny_project(folder))
    model = {"model": SMOLLM2, "prompts": {"dataset": SNIPPETS, "max_words": 4}}
    if name == PRESENT_TENSE:
        return {
            **model,
            "reward": {"function": "bench.evidence.present_tense:score"},
            "control": {"function": "raywarp.embedded:vader"},
        }
    return {
        **model,
        "reward": {"model": str(own / "reward")},
        "control": {"model": str(own / "control")},
    }


def tiny_project(folder: Path) -> Path:
    """Its model, prompts and reward module, made if need be."""
    from tiny_models import save_tiny_llama
    from tiny_run import make_project

    project = (folder / "project").absolute()
    if not (project / "prompts.jsonl").is_file():
        project.mkdir(parents=True, exist_ok=True)
        save_tiny_llama(project / "model")
        make_project(project)
    return project


def _tiny_task(project: Path) -> dict[str, Any]:
    return {
        "model": str(project / "model"),
        "dtype": "float32",
        "prompts": {"dataset": str(project / "prompts.jsonl")},
        "reward": {"function": "count_good:score"},
        "control": {"function": "raywarp.embedded:vader"},
        "rollout": {"engine": "transformers", "temperature": 1.0},
        "cluster": {"policy_actors": 1, "threads": 1},
    }


def _merged(tree: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Section by section; where both say something, `other` does."""
    sections = {
        name: (
            {**tree.get(name, {}), **value}
            if isinstance(value, Mapping) and name in tree
            else value
        )
        for name, value in other.items()
    }
    return {**tree, **sections}
