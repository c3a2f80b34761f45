"""Advantages: the baselines that REINFORCE subtracts from the rewards.

The functions are pure. N completions = P prompts × G completions each. The completions of one
prompt are adjacent. NaN stands for a completion without a reward: it has the advantage 0, and is in
no other's baseline.
"""

import torch
from torch import Tensor

GRPO_EPSILON = 1e-6  # added to a group's deviation


def rloo(rewards: Tensor, group: int) -> Tensor:
    """Return each reward minus the mean of the prompt's other completions (leave one out).

    Source: RLOO, Ahmadian et al. 2024.

    Args:
        rewards: (N,), N = P·G.
        group: G ≥ 2.

    Returns:
        (N,)
    """
    return _leave_one_out(rewards.view(-1, group)).reshape(-1)


def batch_mean(rewards: Tensor) -> Tensor:
    """Return (N,) rewards, each minus the mean of the batch's other N − 1 completions."""
    return _leave_one_out(rewards.view(1, -1)).reshape(-1)


def grpo(rewards: Tensor, group: int) -> Tensor:
    """Return each reward minus its group's mean, divided by the group's deviation.

    The deviation is that of a sample (G − 1), as in TRL and verl. Equal rewards give 0.
    Source: GRPO, Shao et al. 2024.

    Args:
        rewards: (N,), N = P·G.
        group: G ≥ 2.

    Returns:
        (N,)
    """
    rows = rewards.view(-1, group)
    present = ~rows.isnan()
    count = present.sum(1, keepdim=True)
    centred = rows - rows.nansum(1, keepdim=True) / count
    deviation = (centred.square().nansum(1, keepdim=True) / (count - 1)).sqrt()
    found = centred / (deviation + GRPO_EPSILON)
    return torch.where(present & (count > 1), found, 0.0).reshape(-1)


def advantages(rewards: Tensor, baseline: str, group: int) -> Tensor:
    """Return the (N,) advantages under the baseline that the configuration names.

    Args:
        rewards: (N,), N = P·G.
        baseline: "rloo", "grpo", "mean" or "none".
        group: G, which rloo and grpo read.

    Raises:
        ValueError: the baseline is none of the four.
    """
    if baseline == "rloo":
        return rloo(rewards, group)
    if baseline == "grpo":
        return grpo(rewards, group)
    if baseline == "mean":
        return batch_mean(rewards)
    if baseline == "none":
        return torch.where(rewards.isnan(), 0.0, rewards)
    raise ValueError(f"unknown baseline {baseline!r}: use rloo, grpo, mean or none")


def flat_groups(rewards: Tensor, group: int) -> int:
    """Return how many prompts have completions of equal rewards, from which nothing is learnt.

    A prompt with fewer than two rewards counts too.

    Args:
        rewards: (N,), N = P·G.
        group: G.
    """
    rows = rewards.view(-1, group)
    low, high = rows.nan_to_num(torch.inf).amin(1), rows.nan_to_num(-torch.inf).amax(1)
    return int((low >= high).sum())


def _leave_one_out(rewards: Tensor) -> Tensor:
    """Return (P, G) rewards, each minus the mean of the G − 1 others in its row."""
    present = ~rewards.isnan()
    if bool(present.all()):
        others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
        return rewards - others
    count, total = present.sum(1, keepdim=True), rewards.nansum(1, keepdim=True)
    found = rewards - (total - rewards) / (count - 1)
    return torch.where(present & (count > 1), found, 0.0)
