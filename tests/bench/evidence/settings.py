"""What the study trains: its settings, the arms, and the configuration of each as a user would
write it.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from raywarp.config.datasets import SNIPPETS
from raywarp.config.load import load_config
from raywarp.config.rewards import MINILM
from raywarp.config.schema import SMOLLM2, Config
from raywarp.data import embedded
from raywarp.storage.sealed import write_text

# A reward model from human ratings; a reward by function, to rule out luck; the first with another
# backbone for its control model; the first two together.
REVIEWS, PRESENT_TENSE, OTHER_CONTROL, BOTH = TASKS = (
    *("reviews", "present-tense", "smollm2-control", "two-rewards"),
)
TINY_BOTH = "tiny-two-rewards"
# The names of the two rewards of BOTH, in the order of an arm's mixtures.
REWARDS = ("reviews", "present")


LEARNING_RATE = 3e-4  # see `--select`


@dataclass(frozen=True)
class Settings:
    """Everything that decides a number. Points that were measured under other settings are refused,
    not mixed in.

    task: of TASKS, or tiny, tiny-two-rewards (of seconds, for tests). steps: T. temperature: 1, at
    which the sampler also scores texts without an adapter. prompts: held out, for every point.
    targets: KLs at which the points of a line are placed, besides its end. kls: KLs at which fronts
    are compared. checked_prompts: those whose texts' own log-ratio is measured. sloped_prompts:
    those whose texts show the slope. ceiling_prompts: those with ceiling_completions each.
    """

    task: str = REVIEWS
    steps: int = 32
    lr: float = LEARNING_RATE
    ema_rate: float = 0.1
    kl_coef: float = 0.1
    liti_rate: float = 0.5
    batch_size: int = 32
    group: int = 4
    new_tokens: int = 24
    temperature: float = 1.0
    rank: int = 16
    prompts: int = 500
    targets: tuple[float, ...] = (1.0, 2.0, 3.3, 5.0)
    kls: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    checked_prompts: int = 200
    sloped_prompts: int = 24
    ceiling_prompts: int = 250
    ceiling_completions: int = 64

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
    targets=(0.01, 0.05),
    kls=(0.01, 0.02, 0.05),
    checked_prompts=4,
    sloped_prompts=2,
    ceiling_prompts=4,
    ceiling_completions=4,
)


@dataclass(frozen=True)
class Arm:
    """One run of raywarp.

    length: its steps, in units of T. batch: completions of a step, in units of the study's.
    kept: points of training whose policies are kept, in units of T; the end is kept anyway.
    mixtures: weights of the two rewards of BOTH for each policy.
    """

    name: str
    policies: int = 1
    iterations: int = 1
    length: int = 1
    anchor: str = "ema"
    schedule: str = "constant"
    batch: int = 1
    kept: tuple[float, ...] = ()
    mixtures: tuple[tuple[float, float], ...] = ()

    @property
    def cost(self) -> int:
        """Completions that it trains on, in units of T steps of one policy."""
        return self.policies * self.iterations * self.length * self.batch


EARLY = (0.25, 0.5, 0.75)
LAST = (7, 7.25, 7.5, 7.75)
ARMS = {
    arm.name: arm
    for arm in (
        Arm("warp", policies=2, kept=EARLY),
        Arm("warp-m4", policies=4),
        Arm("warp-i2", policies=2, iterations=2),
        Arm("ema-4t", length=4, kept=(2,)),
        Arm("sft-4t", length=4, anchor="sft", kept=(2,)),
        Arm("sft-8t", length=8, anchor="sft", kept=LAST),
        Arm("sft-m2", policies=2, length=4, anchor="sft"),
        Arm("sft-m4", policies=4, length=2, anchor="sft"),
        Arm("sft-decay", length=8, anchor="sft", schedule="linear"),
        Arm("sft-batch", length=2, anchor="sft", batch=4),
        *(
            Arm(name, policies=len(mixtures), length=4, anchor="sft", mixtures=mixtures)
            for name, mixtures in (
                ("soup", ((1.0, 0.0), (0.0, 1.0))),
                ("mix-2", ((0.67, 0.33), (0.33, 0.67))),
                ("mix-4", ((0.8, 0.2), (0.6, 0.4), (0.4, 0.6), (0.2, 0.8))),
            )
        ),
    )
}


def seed_folder(folder: Path, seed: int) -> Path:
    return folder / f"seed-{seed}"


def arm_config(settings: Settings, arm: Arm, seed: int, folder: Path) -> Config:
    """The arm's configuration. Its own front is made small: the study measures with more prompts,
    and keeps what each gave.
    """
    warp: dict[str, Any] = {
        "iterations": arm.iterations,
        "policies": arm.policies,
        "steps": settings.steps * arm.length,
        "anchor": arm.anchor,
        "liti_rate": settings.liti_rate,
        "kl_coef": settings.kl_coef,
    }
    if arm.anchor == "ema":
        warp["ema_rate"] = settings.ema_rate
    if arm.mixtures:
        own = [dict(zip(REWARDS, mixture, strict=True)) for mixture in arm.mixtures]
        warp["each"] = [{"rewards": weights} for weights in own]
    tree: dict[str, Any] = {
        "seed": seed,
        "out": str(seed_folder(folder, seed) / "arms" / f"{arm.name}-lr-{settings.lr:g}"),
        "store": str(folder / "store"),
        "lora": {"rank": settings.rank, "alpha": float(settings.rank)},
        "warp": warp,
        "optim": {
            "lr": settings.lr,
            "batch_size": settings.batch_size * arm.batch,
            "warmup_steps": 2,
            "schedule": arm.schedule,
        },
        "rollout": {
            "completions_per_prompt": settings.group,
            "max_new_tokens": settings.new_tokens,
            "temperature": settings.temperature,
        },
        # Policies share one actor and its threads, which are part of their keys: arms of different
        # M share policies.
        "cluster": {"policy_actors": 1, "threads": os.cpu_count() or 2},
        "front": {
            "prompts": 2,
            "etas": [0.0, 1.0],
            "weights": 0,
            "choose": {"eta": 1.0},
            "samples": 1,
            "every": 0,
            "ceiling_completions": 0,
        },
        "retention": {"texts": 1},
        # A kept step is one that has a checkpoint.
        "checkpoint_every": settings.steps // 4,
        "kl_to_sft_every": max(1, settings.steps // 4),
    }
    return load_config(_merged(tree, _task(settings.task, seed, folder)))


def reward_configs(settings: Settings, seed: int, folder: Path) -> list[Config]:
    """Of the reward models that the task needs: the reward, and a control from ratings of other
    snippets.
    """
    if settings.task not in (REVIEWS, OTHER_CONTROL, BOTH):
        return []
    own = seed_folder(folder, seed)
    ratings = own / "control.jsonl"
    if not ratings.is_file():
        rows = [
            json.dumps({"text": snippet.text, "rating": snippet.rating})
            for snippet in embedded.split_snippets(seed).control
        ]
        write_text(ratings, "\n".join(rows) + "\n")
    task = {"seed": seed, **_task(REVIEWS, seed, folder), "control": None}
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
            *([] if settings.task == BOTH else [("control", str(ratings), control)]),
        )
    ]


def _task(name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Model, prompts, reward and control score."""
    own = seed_folder(folder, seed)
    if name == "tiny":
        return _tiny_task(tiny_project(folder))
    if name == TINY_BOTH:
        task = {**_tiny_task(tiny_project(folder)), "reward": {}, "control": None}
        return {**task, "rewards": _two({"function": "count_good:score"})}
    model = {"model": SMOLLM2, "prompts": {"dataset": SNIPPETS, "max_words": 4}}
    if name == PRESENT_TENSE:
        return {
            **model,
            "reward": {"function": "raywarp.rewards.tense:present"},
            "control": {"function": "raywarp.embedded:vader"},
        }
    if name == BOTH:
        return {**model, "rewards": _two({"model": str(own / "reward")})}
    return {
        **model,
        "reward": {"model": str(own / "reward")},
        "control": {"model": str(own / "control")},
    }


def _two(first: Mapping[str, Any]) -> list[dict[str, Any]]:
    present = {"function": "raywarp.rewards.tense:present", "standardise": True}
    sources = zip(REWARDS, (first, present), strict=True)
    return [{"name": name, **source} for name, source in sources]


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
        "rollout": {"engine": "transformers"},
        "cluster": {"threads": 1},
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
