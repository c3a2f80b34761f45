"""`raywarp quickstart`: the whole pipeline on the embedded model, in minutes on two cores.

It trains a reward model on human ratings, runs WARP, and measures the front.
"""

from collections.abc import Sequence
from typing import Any

from raywarp.config.datasets import SNIPPETS
from raywarp.config.load import load_config
from raywarp.config.rewards import MINILM
from raywarp.config.schema import SMOLLM2
from raywarp.run.display import Display
from raywarp.run.folder import Run

QUICKSTART: dict[str, Any] = {
    "model": SMOLLM2,
    "out": "runs/quickstart",
    "prompts": {"dataset": SNIPPETS, "max_words": 4},
    "preferences": {"dataset": SNIPPETS},
    "reward_training": {"backbone": MINILM},
    "control": {"function": "raywarp.embedded:vader"},
    "lora": {"rank": 16, "alpha": 16.0},
    "warp": {
        "iterations": 2,
        "policies": 2,
        "steps": 14,
        "ema_rate": 0.1,
        "liti_rate": 0.5,
        "kl_coef": 0.05,
    },
    "optim": {"lr": 1.2e-3, "batch_size": 12, "warmup_steps": 2},
    "rollout": {"completions_per_prompt": 4, "max_new_tokens": 12},
    "front": {
        "prompts": 80,
        "etas": [0.0, 0.3, 0.6, 1.0],
        "choose": {"max_kl": 8.0},
        "every": 7,
        "tracked_prompts": 16,
    },
    "kl_to_sft_every": 7,
}


def quickstart(overrides: Sequence[str] = (), display: Display | None = None) -> Run:
    """Run the reward stage and then WARP, or only WARP if the configuration names a reward.

    If it is run again, it continues or shows what is there.

    Args:
        overrides: key=value pairs that change QUICKSTART.
        display: where progress is printed.
    """
    from raywarp.reward_stage import prepare_stage, reward
    from raywarp.warp import train

    config, display = load_config(QUICKSTART, overrides), display or Display()
    if config.rewards or config.reward.model or config.reward.function:
        return train(config, display)
    folder = f"{config.out.rstrip('/')}/reward"
    config = config.model_copy(
        update={"reward": config.reward.model_copy(update={"model": folder})}
    )
    stage = config.model_copy(update={"out": folder})
    run, inputs = Run.open(config, display.say), prepare_stage(stage)
    run.save_config(config)
    # The session of `train` standardises the reward, which saves starting another session.
    reward(stage, display, standardise=False, inputs=inputs)
    return train(config, display)
