"""What is kept of a policy whose numbers are no longer finite: its last good checkpoint."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raywarp.algorithm.deltas import add
from raywarp.algorithm.finite import NotFiniteError

if TYPE_CHECKING:
    from raywarp.training.progress import Progress

SHOWN = 200  # characters of a text in a message


def keep_last_good(
    progress: "Progress",
    error: NotFiniteError,
    texts: Sequence[str] = (),
    scores: Sequence[float] = (),
) -> NotFiniteError:
    """Keep a policy's last good checkpoint as an adapter, and return the error with all its story.

    A state is good if a step from it was finite. So the present one is not, unless the reward is
    what failed, and neither is a checkpoint of this step. Without any other it is the init.

    Args:
        error: what is not finite, before the policy's next step.
        texts, scores: the completions of the step and their rewards; none where there are none.
    """
    from raywarp.model.adapted import INIT

    policy, step = progress.policy, progress.policy.step
    progress.broken, good_step = not error.is_reward, step
    if progress.broken:
        good_step = _go_back(progress)
    rows = [
        {
            "prompt": prompt.text,
            "completion": text,
            "reward": score if math.isfinite(score) else None,
        }
        for prompt, text, score in zip(progress.prompts, texts, scores, strict=False)
    ]
    for n in error.completions:
        rows[n]["not_finite"] = str(error)
    adapter = add(policy.model.delta(INIT), policy.task_vector())
    place = progress.files.save_last_good(adapter, rows)
    lr, out = policy.config.optim.lr, policy.config.out
    command = (
        f"raywarp train {out.rstrip('/')}/config.yaml optim.lr={lr / 10:g} out=NEW"
        f" sft_adapter={place}"
    )
    return NotFiniteError(
        f"{progress.name} step {step}: {error}{_which(rows, error.completions)}; the step was not"
        f" taken. The last good checkpoint, of step {good_step}, is kept as the adapter {place},"
        f" with the batch in batch.jsonl. To start from it: {command}"
    )


def _go_back(progress: "Progress") -> int:
    """Give the policy the adapter of its last good checkpoint, and return that one's step."""
    from raywarp.model.rng import lora_seed

    policy, job = progress.policy, progress.job
    if (good := progress.files.last_before(policy.step)) is not None:
        policy.restore(good.state)
        return good.step
    policy.model.remove(policy.name)
    policy.model.add_policy(policy.name, lora_seed(policy.config, job.iteration, job.index))
    return 0


def _which(rows: Sequence[dict[str, Any]], completions: Sequence[int]) -> str:
    """Return the part of a message that shows a prompt and its completion."""
    if not rows:
        return ""
    row = rows[completions[0] if completions else 0]
    of = f"for completion {completions[0]}" if completions else "in a batch that begins with"
    return (
        f" {of}\n  prompt: {row['prompt'][:SHOWN]!r}\n  completion: {row['completion'][:SHOWN]!r}\n"
    )
