"""The tensors of a policy's checkpoint: what its next steps depend on, saved and restored."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raywarp.model.policy import Policy
from raywarp.storage.sealed import DamagedError

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for a parameter
_KEPT = re.compile(r"kept/(.+?)/((?:policy|ema)/.+)")  # a tensor of one of the states kept so far


def state_of(policy: Policy) -> dict[str, Tensor]:
    """Return everything that the next steps depend on.

    That is the adapter, the EMA, the optimiser's moments and step, the random generators, the
    states kept so far, β where it moves, and the loss scale of float16. The learning rate follows
    from the step.
    """
    saved: dict[str, Tensor] = {
        "step": torch.tensor(policy.step),
        **_coefficient(policy),
        **_loss_scale(policy),
        **{f"rng/{name}": states for name, states in policy.rng.items()},
        **policy.snapshot(),
    }
    for name, state in policy.kept.items():
        saved |= {f"kept/{name}/{key}": tensor for key, tensor in state.items()}
    for index, parameter in enumerate(policy.trained):
        for name, value in policy.optimiser.state[parameter].items():
            saved[f"adamw/{index}/{name}"] = value.detach().cpu().clone()
    return saved


def load_state(policy: Policy, saved: Mapping[str, Tensor]) -> None:
    """Continue from `state_of` as if there had been no interruption.

    Raises:
        DamagedError: it is not the state of such a policy after at least one step. Nothing was
            changed.
    """
    _check_state(policy, saved)
    policy.restore(saved)
    policy.kept = _kept(saved)
    for index, parameter in enumerate(policy.trained):
        if f"adamw/{index}/step" in saved:
            moments: dict[str, Any] = {
                name: saved[f"adamw/{index}/{name}"].to(parameter.device) for name in _MOMENTS
            }
            policy.optimiser.state[parameter] = moments
    policy.rng = {name: saved[f"rng/{name}"] for name in policy.rng}
    policy.step = int(saved["step"])
    if "kl_coef" in saved:
        policy.kl_coef = float(saved["kl_coef"])
    if policy.loss_scale:
        policy.loss_scale.value = float(saved["loss_scale"])
        policy.loss_scale.clean_steps = int(saved["clean_steps"])


def _coefficient(policy: Policy) -> dict[str, Tensor]:
    """Return β in float64 where it moves."""
    moves = policy.config.warp.kl_target is not None
    return {"kl_coef": torch.tensor(policy.kl_coef, dtype=torch.float64)} if moves else {}


def _loss_scale(policy: Policy) -> dict[str, Tensor]:
    """Return the loss scale, and since how many steps it has fitted; nothing without a scale."""
    if (scale := policy.loss_scale) is None:
        return {}
    return {
        "loss_scale": torch.tensor(scale.value),
        "clean_steps": torch.tensor(scale.clean_steps),
    }


def _kept(saved: Mapping[str, Tensor]) -> dict[str, Mapping[str, Tensor]]:
    """Return the states kept so far, by name."""
    kept: dict[str, dict[str, Tensor]] = {}
    for key, tensor in saved.items():
        if found := _KEPT.fullmatch(key):
            kept.setdefault(found[1], {})[found[2]] = tensor
    return dict(kept)


def _check_state(policy: Policy, saved: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes with the model's."""
    expected = {
        "step": torch.tensor(0),
        **_coefficient(policy),
        **_loss_scale(policy),
        **{f"rng/{name}": states for name, states in policy.rng.items()},
        **(now := policy.snapshot()),
    }
    for name in policy.kept_after(int(saved["step"])) if "step" in saved else ():
        expected |= {f"kept/{name}/{key}": tensor for key, tensor in now.items()}
    untouched = _without_gradients(policy, saved)
    for index, parameter in enumerate(policy.trained):
        if index not in untouched:
            expected |= {f"adamw/{index}/{name}": parameter for name in _MOMENTS if name != "step"}
            expected[f"adamw/{index}/step"] = torch.tensor(0.0)
    if differing := sorted(expected.keys() ^ saved.keys()):
        raise DamagedError(
            f"the state and the model differ in {len(differing)} tensors, the first is"
            f" {differing[0]}"
        )
    for name, tensor in expected.items():
        ours, theirs = (
            (tensor.dtype, tuple(tensor.shape)),
            (saved[name].dtype, tuple(saved[name].shape)),
        )
        if ours != theirs:
            raise DamagedError(
                f"{name} is {theirs[0]} {theirs[1]} in the state and {ours[0]} {ours[1]} in the"
                " model"
            )
    if not 0 < int(saved["step"]) <= policy.config.warp.steps:
        raise DamagedError(
            f"the state is of step {int(saved['step'])}, and the policy takes"
            f" {policy.config.warp.steps}"
        )


def _without_gradients(policy: Policy, saved: Mapping[str, Tensor]) -> set[int]:
    """Return the indices of trained tensors that have never had a gradient.

    No token reached them, for example because a router chose other experts. AdamW keeps nothing
    for them, and they still have their initial values.
    """
    names = [
        name
        for name, tensor in policy.model.tensors(policy.name).items()
        if any(tensor is trained for trained in policy.trained)
    ]
    absent = {
        n
        for n in range(len(names))
        if not any(f"adamw/{n}/{moment}" in saved for moment in _MOMENTS)
    }
    now = policy.model.tensors(policy.name)
    return {
        n
        for n in absent
        if (theirs := saved.get(f"policy/{names[n]}")) is not None
        and torch.equal(theirs, now[names[n]].cpu())
    }
