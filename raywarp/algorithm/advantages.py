"""Advantages: the baselines that REINFORCE subtracts from the rewards.

The functions are pure. N completions = P prompts × G completions each. The completions of one
prompt are adjacent.
"""

from torch import Tensor


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


def advantages(rewards: Tensor, baseline: str, group: int) -> Tensor:
    """Return the (N,) advantages under the baseline that the configuration names.

    Args:
        rewards: (N,), N = P·G.
        baseline: "rloo", "mean" or "none".
        group: G, which only rloo reads.

    Raises:
        ValueError: the baseline is none of the three.
    """
    if baseline == "rloo":
        return rloo(rewards, group)
    if baseline == "mean":
        return batch_mean(rewards)
    if baseline == "none":
        return rewards
    raise ValueError(f"unknown baseline {baseline!r}: use rloo, mean or none")


def _leave_one_out(rewards: Tensor) -> Tensor:
    """Return (P, G) rewards, each minus the mean of the G − 1 others in its row."""
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others
