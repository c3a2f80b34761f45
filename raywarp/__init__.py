"""raywarp aligns language models with WARP on a Ray cluster, exactly, with LoRA.

WARP stands for Weight Averaged Rewarded Policies.

raywarp.train(config) -> Run            Algorithm 1 (raywarp.load_config reads a YAML file)
raywarp.reward(config) -> RewardSummary the reward model from preferences
raywarp.ceiling(config) -> Ceiling      what the reward lets a policy gain, before any training
raywarp.front(adapters, config) -> Run  the KL–reward front of adapters from anywhere
raywarp.tune(config) -> Sweep           Ray Tune over any key; work that trials share is done once
raywarp.plan(config) -> Forecast        what a run needs of the cluster, memory per process, and
                                        whether it fits
raywarp.slerp([delta, ...])             exact averages of adapters; also lerp, karcher, ema, liti,
                                        load_peft, save_peft
raywarp.merge(Recipe(...), out)         the same from folder to folder, block by block;
                                        raywarp.inspect looks at adapters
raywarp.bake(adapter, out)              base + η·ΔW as full weights, with what rounding loses
"""

from importlib import import_module
from typing import Any

_WHERE = {
    "train": "warp",
    "reward": "reward_stage",
    "ceiling": "ceiling_stage",
    "front": "front_stage",
    "tune": "sweep.sweep",
    "plan": "planning.plan",
    "Run": "run.folder",
    "Stopped": "cluster.runtime",
    "FaultError": "cluster.faults",
    "Config": "config.schema",
    "ConfigError": "config.schema",
    "AdapterError": "algorithm.factors",
    "AntipodalError": "algorithm.averaging",
    "BaseWeightsError": "rollout.base_weights",
    "DamagedError": "storage.sealed",
    "EffectError": "rollout.effect",
    "FetchError": "data.pypi",
    "NotFiniteError": "algorithm.finite",
    "RewardError": "rewards.reward",
    "RolloutError": "rollout.protocol",
    "StoreError": "storage.sealed",
    "load_config": "config.load",
    "AdapterDelta": "algorithm.deltas",
    "add": "algorithm.deltas",
    "subtract": "algorithm.deltas",
    "scale": "algorithm.deltas",
    "concatenate": "algorithm.deltas",
    "compress": "algorithm.truncation",
    "truncate": "algorithm.truncation",
    "load_peft": "adapters.peft",
    "save_peft": "adapters.peft",
    "slerp": "algorithm.averaging",
    "lerp": "algorithm.averaging",
    "karcher": "algorithm.averaging",
    "ema": "algorithm.averaging",
    "liti": "algorithm.averaging",
    "geometry": "algorithm.geometry",
    "merge": "adapters.merging",
    "inspect": "adapters.merging",
    "bake": "baking.bake",
    "Recipe": "adapters.recipe",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `raywarp --help` answers at once.

    The message about a wrong configuration comes at once for the same reason.
    """
    if name not in _WHERE:
        raise AttributeError(f"module 'raywarp' has no attribute '{name}'")
    return getattr(import_module(f"raywarp.{_WHERE[name]}"), name)
