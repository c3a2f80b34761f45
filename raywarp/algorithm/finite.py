"""The guard of a step: nothing that is not finite is trained on or published."""

from collections.abc import Mapping

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


def check_completions(values: Mapping[str, Tensor], present: Tensor) -> None:
    """Raise NotFiniteError for the first of these values that is not finite.

    Args:
        values: name → (N,) numbers, one per completion. The first is the reward.
        present: (N,), whether a completion has a reward. The reward of others is not looked at.
    """
    for n, (name, numbers) in enumerate(values.items()):
        wrong = ~numbers.isfinite() & (present | (n > 0))
        if wrong.any():
            (found,) = wrong.nonzero(as_tuple=True)
            text = f"the {name} is {float(numbers[found[0]])}"
            raise NotFiniteError(text, tuple(found.tolist()), is_reward=n == 0)


def check_gradient(norm: Tensor) -> None:
    """Raise NotFiniteError unless the norm of a policy's gradient is finite."""
    if not norm.isfinite():
        raise NotFiniteError(f"the gradient's norm is {float(norm)}")
