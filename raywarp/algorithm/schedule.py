"""What changes from step to step of a policy: its learning rate, and β under warp.kl_target."""

import math

GAIN = 0.1  # the most that β changes in a step, as a share of itself


def adapted(kl_coef: float, kl: float, target: float | None) -> float:
    """Return β for the next step, moved in proportion to the relative error of the KL.

    This is Ziegler et al. 2019 (arXiv 1909.08593), section 2.2. The error is cut to ±1, not to
    ±0.2, since runs of LoRA take tens of steps.

    Args:
        kl_coef: β of this step.
        kl: mean KL to the anchor in this step, in nats per completion.
        target: warp.kl_target; None leaves β as it is.
    """
    if target is None:
        return kl_coef
    return kl_coef * (1 + GAIN * max(-1.0, min(1.0, kl / target - 1)))


def rate_factor(schedule: str, warmup: int, step: int, steps: int) -> float:
    """Return the learning rate of a step as a share of the largest one.

    It rises as (step + 1) / warmup. Then it is constant, or falls from 1 to 0, which it reaches
    after the last step.

    Args:
        schedule: constant, linear or cosine.
        warmup: steps of warm-up.
        step: finished steps, 0 … steps − 1.
        steps: T.
    """
    if step < warmup:
        return (step + 1) / warmup
    left = (steps - step) / max(steps - warmup, 1)
    match schedule:
        case "linear":
            return left
        case "cosine":
            return 0.5 - 0.5 * math.cos(math.pi * left)
    return 1.0
