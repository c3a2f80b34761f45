"""The tensors of a policy's checkpoint: what its next steps depend on, saved and restored."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from raywarp.model.policy import Policy
from raywarp.storage.sealed import DamagedError

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # what AdamW keeps for a parameter


def state_of(policy: Policy) -> dict[str, Tensor]:
    """Return everything that the next steps depend on.

    That is the adapter, the EMA, the optimiser's moments and step, and the random generators.
    The learning rate follows from the step.
    """
    saved: dict[str, Tensor] = {
        "step": torch.tensor(policy.step),
        **{f"rng/{name}": states for name, states in policy.rng.items()},
    }
    for kind, adapter in (("policy", policy.name), ("ema", policy.ema_name)):
        saved |= {
            f"{kind}/{name}": tensor.detach().cpu().clone()
            for name, tensor in policy.model.tensors(adapter).items()
        }
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
    for kind, adapter in (("policy", policy.name), ("ema", policy.ema_name)):
        for name, tensor in policy.model.tensors(adapter).items():
            tensor.data.copy_(saved[f"{kind}/{name}"])
    for index, parameter in enumerate(policy.trained):
        if f"adamw/{index}/step" in saved:
            moments: dict[str, Any] = {
                name: saved[f"adamw/{index}/{name}"].to(parameter.device) for name in _MOMENTS
            }
            policy.optimiser.state[parameter] = moments
    policy.rng = {name: saved[f"rng/{name}"] for name in policy.rng}
    policy.step = int(saved["step"])


def _check_state(policy: Policy, saved: Mapping[str, Tensor]) -> None:
    """Compare names, shapes and dtypes with the model's."""
    expected = {
        "step": torch.tensor(0),
        **{f"rng/{name}": states for name, states in policy.rng.items()},
    }
    for kind, adapter in (("policy", policy.name), ("ema", policy.ema_name)):
        expected |= {
            f"{kind}/{name}": tensor for name, tensor in policy.model.tensors(adapter).items()
        }
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
