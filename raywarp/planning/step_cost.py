"""What a policy step costs in GPU-seconds, by phase, from the data sheet of a GPU.

Sampling is taken to be bound by the GPU's memory, which is read in full for each token of a call;
the passes of training and of a reward model by its arithmetic.
"""

from dataclasses import dataclass

from raywarp.config.schema import Config
from raywarp.planning.machines import Gpu
from raywarp.planning.memory import DTYPE_BYTES, Shapes

UTILISATION = 0.4  # share of a GPU's arithmetic that passes over whole sequences use
READ = 0.6  # share of its memory's bandwidth that sampling uses


@dataclass(frozen=True)
class StepCost:
    """GPU-seconds of one step of one policy: batch_size completions of full length.

    Attributes:
        rollout: sampling. update: the policy's passes and the anchor's. reward: scoring.
    """

    rollout: float
    update: float
    reward: float

    @property
    def total(self) -> float:
        return self.rollout + self.update + self.reward


def step_cost(
    config: Config,
    shapes: Shapes,
    dtype: str,
    gpu: Gpu,
    prompt_tokens: int,
    scored: float,
    scoring: str,
) -> StepCost:
    """Return the estimate for a run on GPUs of one kind.

    Args:
        dtype: of the base model.
        prompt_tokens: of the longest prompt, which all are taken to have.
        scored: parameters of all reward models on GPUs together; 0 without.
        scoring: dtype of the reward models.
    """
    rows, new = config.optim.batch_size, config.rollout.max_new_tokens
    length, width = prompt_tokens + new, DTYPE_BYTES[dtype]
    passes = 2.0 * shapes.parameters * rows * length / (gpu.flops(dtype) * UTILISATION)
    reward = 2.0 * scored * rows * length / (gpu.flops(scoring) * UTILISATION)
    # A call's rows share the reading of the weights; the average row has half of its new tokens.
    calls = -(-rows // (config.rollout.chunk_size or rows))
    kept = rows * (prompt_tokens + new / 2) * shapes.kv_numbers * width
    read = (shapes.parameters * width * calls + kept) * new / (gpu.bandwidth * 1e12 * READ)
    # Forward and backward through frozen weights, once more with checkpointing, and the anchor's.
    count = 4 if config.optim.gradient_checkpointing else 3
    return StepCost(read, passes * count, reward)


def cost_lines(cost: StepCost, gpus: float, name: str) -> list[str]:
    """Return lines on a policy step's cost and on what an hour of the run's GPUs makes.

    Args:
        gpus: of the whole run.
    """
    parts = {"rollout": cost.rollout, "update": cost.update, "reward": cost.reward}
    told = ", ".join(f"{phase} {seconds:.3g}" for phase, seconds in parts.items() if seconds)
    return [
        f"a policy step costs about {cost.total:.3g} GPU-seconds of {name} ({told}): estimated with"
        f" {UTILISATION:.0%} of its arithmetic and {READ:.0%} of its memory's bandwidth, and full"
        " lengths",
        f"an hour of the run's {gpus:g} GPUs are {gpus * 3600:,.0f} GPU-seconds: at most"
        f" {gpus * 3600 / cost.total:,.0f} policy steps, if none waits for another",
    ]
