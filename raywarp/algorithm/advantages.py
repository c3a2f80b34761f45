"""What a completion's reward is compared with: the baseline of REINFORCE.

Pure functions. N completions = P prompts x G completions each, the completions of a prompt next to
each other.
"""

from torch import Tensor


def rloo(rewards: Tensor, group: int) -> Tensor:
    """Reward minus the mean of the other completions of the same prompt (leave one out; Ahmadian et
    al. 2024).

    Args:
        rewards: (N,), N = P·G.
        group: G ≥ 2.

    Returns:
        (N,)
    """
    return _leave_one_out(rewards.view(-1, group)).reshape(-1)


def batch_mean(rewards: Tensor) -> Tensor:
    """(N,) rewards minus the mean of the batch's other N − 1 completions."""
    return _leave_one_out(rewards.view(1, -1)).reshape(-1)


def advantages(rewards: Tensor, baseline: str, group: int) -> Tensor:
    """(N,) advantages by the config's name of the baseline: rloo, mean or none."""
    if baseline == "rloo":
        return rloo(rewards, group)
    if baseline == "mean":
        return batch_mean(rewards)
    if baseline == "none":
        return rewards
    raise ValueError(f"unknown baseline {baseline!r}: use rloo, mean or none")


def _leave_one_out(rewards: Tensor) -> Tensor:
    """(P, G) rewards minus the mean of the G − 1 others in the row."""
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (rewards.shape[1] - 1)
    return rewards - others
