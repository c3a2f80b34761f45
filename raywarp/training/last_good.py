"""What is kept of a policy whose numbers are no longer finite: its last good checkpoint."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raywarp.adapters.start import of_base
from raywarp.algorithm.deltas import add
from raywarp.algorithm.finite import NotFiniteError
from raywarp.config.policies import OptimConfig
from raywarp.data.text import Prompt
from raywarp.run.policy_files import Job, PolicyFiles

# Imported only where the actor runs: transformers and PEFT take seconds to import.
if TYPE_CHECKING:
    from raywarp.model.policy import Policy

SHOWN = 200  # characters of a text in a message


def keep_last_good(
    job: Job,
    policy: "Policy",
    error: NotFiniteError,
    prompts: Sequence[Prompt] = (),
    texts: Sequence[str] = (),
    scores: Sequence[float] = (),
) -> NotFiniteError:
    """Keep a policy's last good checkpoint as an adapter, and return the error with all its story.

    A state is good if a step from it was finite. So the present one is not, unless the reward is
    what failed, and neither is a checkpoint of this step. Without any other it is the init.

    Args:
        error: what is not finite, before the policy's next step.
        prompts, texts, scores: of the N completions of the step; none where there are none.
    """
    from raywarp.model.adapted import INIT

    files, step = PolicyFiles(job.store, job.key), policy.step
    good = step if error.is_reward else _go_back(job, policy, files)
    rows = [
        {
            "prompt": prompt.text,
            "completion": text,
            "reward": score if math.isfinite(score) else None,
        }
        for prompt, text, score in zip(prompts, texts, scores, strict=True)
    ]
    for n in error.completions:
        rows[n]["not_finite"] = str(error)
    change = add(policy.model.delta(INIT), policy.task_vector())
    adapter = of_base(policy.model.start, change)
    place = files.save_last_good(adapter, rows)
    out = policy.config.out.rstrip("/")
    lr = min(policy.config.optim.lr / 10, OptimConfig().lr)
    return NotFiniteError(
        f"iteration {job.iteration} policy {job.index} step {step}:"
        f" {error}{_which(rows, error.completions)}; the step was not taken. The last good"
        f" checkpoint, of step {good}, is kept as the adapter {place}, with the batch in"
        f" batch.jsonl. To start from it: raywarp train {out}/config.yaml optim.lr={lr:g}"
        f" out=NEW sft_adapter={place}"
    )


def _go_back(job: Job, policy: "Policy", files: PolicyFiles) -> int:
    """Give the policy the adapter of its last good checkpoint, and return that one's step."""
    from raywarp.model.rng import lora_seed

    if (checkpoint := files.last_before(policy.step)) is not None:
        policy.restore(checkpoint.state)
        return checkpoint.step
    policy.model.remove(policy.name)
    seed = lora_seed(policy.config, job.iteration, job.index)
    policy.model.add_policy(policy.name, seed, policy.config.lora)
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
