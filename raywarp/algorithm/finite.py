"""The guard of a step: nothing that is not finite is trained on or published."""

import torch
from torch import Tensor


class NotFiniteError(RuntimeError):
    """A gradient, loss, reward or KL is not finite. The message says which, and where.

    Attributes:
        completions: indices in the batch of those that it comes from; none where all together do.
        is_reward: whether it is the reward, so that the policy itself is sound.
    """

    def __init__(self, message: str, completions: tuple[int, ...] = (), is_reward: bool = False):
        super().__init__(message)
        self.completions, self.is_reward = completions, is_reward


def check_completions(
    rewards: Tensor, logprobs: Tensor, anchor: Tensor, sampler: Tensor, mask: Tensor
) -> None:
    """Raise NotFiniteError for the first completions with a number that is not finite.

    Args:
        rewards: (N,). NaN stands for a completion without a reward, and is no fault.
        logprobs, anchor, sampler: (N, T) log-probs of the policy, its anchor and the sampler.
        mask: (N, T).
    """
    names = ("log-prob", "log-prob of the anchor", "log-prob of the sampler")
    found = {"reward": rewards.nan_to_num(0.0, torch.inf, -torch.inf)}
    for name, values in zip(names, (logprobs, anchor, sampler), strict=True):
        found[name] = values.masked_fill(mask == 0, 0.0).sum(-1)
    for name, numbers in found.items():
        (wrong,) = (~numbers.isfinite()).nonzero(as_tuple=True)
        if len(wrong):
            text = f"the {name} is {float(numbers[wrong[0]])}"
            raise NotFiniteError(text, tuple(wrong.tolist()), is_reward=name == "reward")


def check_gradient(norm: Tensor) -> None:
    """Raise NotFiniteError unless the norm of a policy's gradient is finite."""
    if not norm.isfinite():
        raise NotFiniteError(f"the gradient's norm is {float(norm)}")
