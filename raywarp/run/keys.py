"""Keys of policies, fronts and numerics: hashes of all that determines them.

Nothing else goes into a key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from raywarp import identity
from raywarp.cluster.node_report import PACKAGES, versions
from raywarp.config.policies import OptimConfig
from raywarp.config.schema import Config
from raywarp.data.prompts import prompts_fingerprint
from raywarp.data.text import Prompt
from raywarp.run.front import wanted_etas

# Part of every key. Raise it when the same settings no longer give the same policy.
ALGORITHM_VERSION = 3
CEILING_VERSION = POINT_VERSION = 1  # likewise of a ceiling, and of a front's point
# Keys of `optim` that are newer than the first policies' keys.
_NEWER = ("weight_decay", "betas", "importance_cap")
# Keys of `front` that its measured points do not depend on.
_NOT_OF_POINTS = {
    "choose",
    "weights",
    "every",
    "tracked_prompts",
    "ceiling_completions",
    "share_kl",
}


def policy_keys(
    config: Config, inputs: Mapping[str, object], iteration: int, init_key: str
) -> list[str]:
    """Return the keys of θ_1..θ_M: hashes of all that determines a policy.

    Nothing else goes into them: neither the cluster nor the number of workers. The size of
    microbatches is left out, because it changes a gradient by rounding only. A run that was short
    of memory thus continues with smaller microbatches.

    Args:
        config: the run's configuration.
        inputs: fingerprints of base, prompts and reward, and the numerical settings.
        iteration: the iteration, counted from 1.
        init_key: "sft", or the hash of what the iteration's init was made from.
    """
    return [
        _policy_key(config.of_policy(m), _inputs_of(inputs, m), iteration, init_key, m)
        for m in range(1, config.warp.policies + 1)
    ]


def _inputs_of(inputs: Mapping[str, object], index: int) -> dict[str, object]:
    """Return the fingerprints of one policy, which may have its own prompts and rewards."""
    own: Any = inputs.get("each") or []
    common = {name: value for name, value in inputs.items() if name != "each"}
    return common | (own[index - 1] if own else {})


def _policy_key(
    config: Config, inputs: Mapping[str, object], iteration: int, init_key: str, index: int
) -> str:
    sampling = {
        "completions_per_prompt",
        "max_new_tokens",
        "temperature",
        "ignore_eos",
        "missing_eos_penalty",
        "chunk_size",
    }
    rollout = config.rollout.model_dump(include=sampling)
    parts = {
        "algorithm": ALGORITHM_VERSION,
        "init": init_key,
        "inputs": dict(inputs),
        "lora": config.lora.model_dump(),
        "optim": config.optim.model_dump(
            exclude={"max_tokens_per_microbatch", "gradient_checkpointing", "schedule", *_NEWER}
        ),
        "warp": _warp(config, iteration),
        "rollout": rollout,
        "seed": config.seed,
        "iteration": iteration,
        **_choices(config),
        "policy": index,
    }
    return identity.content_key(parts)


def _warp(config: Config, iteration: int) -> dict[str, object]:
    """Return the settings of WARP that a policy depends on, equal for equal policies.

    An anchor that stays at the init is an EMA of rate 0. In the first iteration the SFT model is
    the init.
    """
    warp = config.warp
    settings: dict[str, object] = {
        **warp.model_dump(include={"steps", "kl_coef", "advantage"}),
        "ema_rate": warp.ema_rate or 0.0,
    }
    if warp.elastic_reset:
        settings |= {"elastic_reset": True, "anchor": warp.anchor}
    if warp.anchor == "sft" and iteration > 1:
        settings["anchor"] = "sft"
    return settings


def _choices(config: Config) -> dict[str, object]:
    """Return the settings that are newer than the first keys, as far as they are in use."""
    warp, found = config.warp, dict[str, object]()
    defaults = OptimConfig()
    for name in _NEWER:
        if (value := getattr(config.optim, name)) != getattr(defaults, name):
            found[name] = value
    if config.optim.schedule != "constant":
        found["schedule"] = config.optim.schedule
    if warp.kl_target is not None:
        found["kl_target"] = warp.kl_target
    if warp.average_last > 1:
        found["average_last"] = [warp.average_last, config.checkpoint_every]
    if config.rollout.concurrency > 1:
        found["calls_share_engine"] = True
    if config.rollout.stop:
        found["stop_strings"] = sorted(set(config.rollout.stop))
    if config.stop.is_set:
        measured = config.front.model_dump(include={"every", "tracked_prompts", "prompts"})
        found["stop"] = [config.stop.model_dump(), measured]
    return found


# Settings that are newer than the first keys, which keys have only where they are in use.
_USED_ONLY = {
    "rollout": ("stop", "concurrency", "sleep"),
    "prompts": ("datasets", "where", "template_kwargs", "system", "last_answer", "too_long"),
}


def used_settings(config: Config, sections: set[str]) -> dict[str, Any]:
    """Return sections of the configuration for a key, without newer settings that are not used."""
    found, default = config.model_dump(include=sections), Config()
    for section, names in _USED_ONLY.items():
        for name in names if section in sections else ():
            if found[section][name] == getattr(getattr(default, section), name):
                del found[section][name]
    return found


def key_chain(config: Config, inputs: Mapping[str, object]) -> list[list[str]]:
    """Return the keys of all policies, one list per iteration.

    They are known before anything is trained.

    Args:
        config: the run's configuration.
        inputs: see policy_keys.
    """
    chain, init_key = list[list[str]](), "sft"
    weights = {"weights": unequal} if (unequal := _unequal_weights(config)) else {}
    for iteration in range(1, config.warp.iterations + 1):
        chain.append(policy_keys(config, inputs, iteration, init_key))
        init_key = identity.content_key(
            {
                "parents": [init_key, *chain[-1]],
                **(
                    {"merge": "ema"}
                    if config.warp.elastic_reset
                    else {"merge": "slerp", "liti_rate": config.warp.liti_rate}
                ),
                **weights,
            }
        )
    return chain


def _unequal_weights(config: Config) -> list[float]:
    """Return warp.merge_weights; [] where they are equal, as without any."""
    weights = config.warp.merge_weights or []
    return weights if len({*weights}) > 1 else []


def key_of_numerics(config: Config, inputs: Mapping[str, object]) -> str:
    """Return the key of all that a session's numerics follow from, except the machines.

    What a finished run found therefore holds on every machine that reads its folder.

    Args:
        config: the run's configuration.
        inputs: see policy_keys.
    """
    sections = used_settings(config, {"dtype", "rollout", "lora", "cluster", "trust_remote_code"})
    return identity.content_key(
        [ALGORITHM_VERSION, sections, dict(inputs), versions((*PACKAGES, "peft"))]
    )


def front_key(
    config: Config,
    evaluation: str,
    keys: Sequence[str],
    mixes: Sequence[Mapping[str, float]] = (),
) -> str:
    """Return the key of an iteration's front. The choice of a point is no part of it.

    Neither is the ceiling, which has a key of its own, or what is measured while policies train.

    Args:
        config: the run's configuration.
        evaluation: fingerprint of what the evaluation reads.
        keys: keys of the iteration's policies.
        mixes: shares of the merges that are measured besides the line to SLERP. Which η of theirs
            are measured depends on the choice of η.
    """
    front = config.front.model_dump(exclude=_NOT_OF_POINTS) | {
        "etas": sorted({*wanted_etas(config), 0.0, 1.0})
    }
    weights = [unequal] if (unequal := _unequal_weights(config)) else []
    rule = config.front.choose
    mixed = [{"mixes": list(mixes), "choose": [rule.eta, rule.max_kl]}] if mixes else []
    return identity.content_key([keys, evaluation, front, config.cluster.threads, *weights, *mixed])


def points_key(config: Config, evaluation: str, determinants: Mapping[str, object]) -> str:
    """Return the key of all that a measured point depends on, except its adapter.

    Args:
        config: the run's configuration.
        evaluation: fingerprint of what the evaluation reads.
        determinants: see ceiling_key.
    """
    counts = config.front.model_dump(include={"prompts", "completions_per_prompt"})
    return identity.content_key(
        {
            "version": POINT_VERSION,
            "evaluation": [evaluation, counts],
            **_of_sampling(config, determinants),
        }
    )


def ceiling_key(config: Config, prompts: str, determinants: Mapping[str, object]) -> str:
    """Return the key of a ceiling: a hash of all that its completions and rewards follow from.

    Args:
        config: the run's configuration.
        prompts: fingerprint of its held-out prompts.
        determinants: fingerprints of base and reward, the reward's statistics, and the numerics;
            others are ignored.
    """
    return identity.content_key(
        {
            "version": CEILING_VERSION,
            "prompts": prompts,
            "completions": config.front.ceiling_completions,
            **_of_sampling(config, determinants),
        }
    )


def _of_sampling(config: Config, determinants: Mapping[str, object]) -> dict[str, object]:
    """Return what completions and rewards of held-out prompts follow from."""
    of_policies = ("prompts", "evaluation", "each")  # what they do not depend on
    return {
        "seed": config.seed,
        "rollout": config.rollout.model_dump(
            include={"max_new_tokens", "temperature", "ignore_eos", "chunk_size"}
            | ({"stop"} if config.rollout.stop else set())
        ),
        "determinants": {
            name: value for name, value in determinants.items() if name not in of_policies
        },
    }


def merge_key(keys: Sequence[str], prompts: Sequence[Prompt]) -> str:
    """Return the key of what was measured of an iteration's merge.

    Args:
        keys: keys of the iteration's policies, which depend on sampling and numerics, too.
        prompts: those that it is measured on.
    """
    return identity.content_key(["merge", list(keys), prompts_fingerprint(prompts)])
