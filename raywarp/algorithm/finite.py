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
    rewards: Tensor,
    logprobs: Tensor,
    anchor: Tensor,
    sampler: Tensor,
    mask: Tensor,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Raise NotFiniteError for the first completions with a number that is not finite.

    Args:
        rewards: (N,). NaN stands for a completion without a reward, and is no fault.
        logprobs, anchor, sampler: (N, T) log-probs of the policy, its anchor and the sampler.
        mask: (N, T).
        dtype: of the model.
    """
    names = ("log-prob", "log-prob of the anchor", "log-prob of the sampler")
    found = {"reward": rewards.nan_to_num(0.0, torch.inf, -torch.inf)}
    for name, values in zip(names, (logprobs, anchor, sampler), strict=True):
        found[name] = values.masked_fill(mask == 0, 0.0).sum(-1)
    for name, numbers in found.items():
        (wrong,) = (~numbers.isfinite()).nonzero(as_tuple=True)
        if len(wrong):
            text, is_reward = f"the {name} is {float(numbers[wrong[0]])}", name == "reward"
            text += "" if is_reward else overflow(dtype)
            raise NotFiniteError(text, tuple(wrong.tolist()), is_reward)


def check_gradient(norm: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Raise NotFiniteError unless the norm of a policy's gradient is finite.

    Args:
        norm: a scalar.
        dtype: of the model.
    """
    if not norm.isfinite():
        raise NotFiniteError(f"the gradient's norm is {float(norm)}{overflow(dtype)}")


def overflow(dtype: torch.dtype) -> str:
    """Return the part of a message that names a float16 model's likely fault and its remedy."""
    if dtype != torch.float16:
        return ""
    return " (dtype=float16 overflows above 65,504; dtype=bfloat16 or dtype=float32 does not)"
