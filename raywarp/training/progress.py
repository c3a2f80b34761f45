"""A policy's progress on its actor, with the checkpoints that another actor can resume it from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raywarp.adapters.start import of_base
from raywarp.algorithm.deltas import AdapterDelta, add
from raywarp.algorithm.finite import NotFiniteError
from raywarp.data.text import Completion, Prompt
from raywarp.rewards.totals import means
from raywarp.rollout.protocol import SFT, Adapter, Scores
from raywarp.rollout.transport import digest
from raywarp.run.policy_files import EMA, TRAJECTORY_FILE, Checkpoint, Job, PolicyFiles
from raywarp.storage.sealed import DamagedError, read_jsonl
from raywarp.training.last_good import keep_last_good
from raywarp.training.tracking import Measurement, Row, best, reason_to_stop

# Imported only where the actor runs: transformers and PEFT take seconds to import.
if TYPE_CHECKING:
    from raywarp.model.batches import Batch
    from raywarp.model.policy import Policy


@dataclass
class Progress:
    """A policy that is being trained, with its files, its metrics and the rollouts it waits for.

    Attributes:
        metrics: one row per finished step.
        prompts: prompts of the present step, one per completion.
        adapter: version of the policy that samples the step's completions.
        rollouts: refs of the workers' rollouts for the step.
        scores: ref of their scores.
        request_seconds: time spent on asking for them, with the adapter's way to the object store.
        requested: when they were asked for, in Unix seconds.
        probed: ref of the sampler's log-probs of the probe, without and with the policy's adapter.
            None where they were not asked for.
        samples: one completion per finished step.
        trajectory: one row per measurement on held-out prompts.
        measurement: the pending one; None where nothing is measured at this step.
        ended: which stop rule has ended the training.
        saved_step: step of the last checkpoint.
        discarded: why older checkpoints could not be used.
        broken: whether its present state has given numbers that are not finite.
    """

    job: Job
    policy: "Policy"
    files: PolicyFiles
    metrics: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    adapter: Adapter = SFT
    rollouts: list[Any] = field(default_factory=list)
    scores: Any = None
    request_seconds: float = 0.0
    requested: float = 0.0
    probed: Any = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    trajectory: list[Row] = field(default_factory=list)
    measurement: Measurement | None = None
    ended: str | None = None
    saved_step: int = 0
    discarded: list[str] = field(default_factory=list)
    broken: bool = False

    @classmethod
    def resume(cls, job: Job, policy: "Policy") -> "Progress":
        """Return the progress of the newest checkpoint that is whole, or that of a new policy.

        Damaged checkpoints are discarded, and `discarded` says why.
        """
        progress = cls(job, policy, PolicyFiles(job.store, job.key))
        for name in reversed(progress.files.checkpoints()):
            try:
                if checkpoint := progress.files.load_checkpoint(name):
                    progress._restore(checkpoint)
                    break
            except DamagedError as error:
                progress.discarded.append(str(error))
                progress.files.discard(name)
        return progress

    @property
    def name(self) -> str:
        """Return whose progress it is, for messages."""
        return f"iteration {self.job.iteration} policy {self.job.index}"

    @property
    def steps_left(self) -> int:
        return max(0, self.policy.config.warp.steps - self.policy.step)

    def event(self, name: str, **details: Any) -> dict[str, Any]:
        """Return an event of this policy at its present step."""
        return {"event": name, **self.job.label, "step": self.policy.step, **details}

    def add_sample(
        self, step: int, completions: Sequence[Completion], scores: Sequence[float]
    ) -> None:
        """Keep the step's first prompt, completion and reward, to show how the policy changes."""
        self.samples.append(
            {
                "step": step,
                "prompt": self.prompts[0].text,
                "completion": completions[0].text,
                "reward": None if math.isnan(scores[0]) else scores[0],
            }
        )

    def save_checkpoint(self, prompts_per_step: int) -> None:
        """Save everything up to the last finished step, unless that is saved already."""
        from raywarp.model.checkpoint import state_of

        if self.policy.step == self.saved_step or self.broken:
            return
        position = {
            **self.job.label,
            "step": self.policy.step,
            "prompts_drawn": self.policy.step * prompts_per_step,
            "rollout_version": digest(self.policy.task_vector()),
        }
        self.files.save_checkpoint(
            Checkpoint(state_of(self.policy), position, self.metrics, self.samples, self.trajectory)
        )
        self.saved_step = self.policy.step

    def save_result(self, init: AdapterDelta) -> None:
        """Save θ_m as a PEFT adapter on the base: init's columns, then the policy's own r."""
        start = self.policy.model.start
        result = of_base(start, add(init, self.policy.result()))
        if self.policy.config.warp.elastic_reset:
            self.files.save_ema(of_base(start, add(init, self.policy.ema())))
        self.files.save_result(result, self.metrics, self.samples, self.trajectory)

    def update(
        self, batch: "Batch", scores: Scores, completions: Sequence[Completion], sft: bool
    ) -> dict[str, float]:
        """Take the policy's next step, and return its metrics; see Policy.update.

        Raises:
            NotFiniteError: something is not finite. The last good checkpoint is kept as an adapter.
        """
        import torch

        try:
            found = self.policy.update(batch, torch.tensor(scores), completions, sft)
            return {**found, **means(scores.parts)}
        except NotFiniteError as error:
            texts = [completion.text for completion in completions]
            self.broken = not error.is_reward
            raise keep_last_good(
                self.job, self.policy, error, self.prompts, texts, scores
            ) from None

    def add_measurement(self, row: Row) -> None:
        """Add a row to the trajectory, keep the state if it is the best, and apply stop rules.

        Raises:
            NotFiniteError: the KL is not finite. The last good checkpoint is kept as an adapter.
        """
        from raywarp.model.policy import BEST

        if not math.isfinite(row["kl"]):
            text = f"the KL to SFT on held-out prompts is {row['kl']}"
            self.broken = True
            raise keep_last_good(self.job, self.policy, NotFiniteError(text))
        rule = self.policy.config.stop
        self.trajectory.append(row)
        if rule.is_set:
            if best(self.trajectory, rule) is row:
                self.policy.kept[BEST] = self.policy.snapshot()
            self.ended = reason_to_stop(self.trajectory, rule)

    def _restore(self, checkpoint: Checkpoint) -> None:
        from raywarp.model.checkpoint import load_state

        load_state(self.policy, checkpoint.state)
        self.metrics, self.samples = checkpoint.metrics, checkpoint.samples
        self.trajectory = checkpoint.trajectory
        self.saved_step = checkpoint.step


def finished_rows(job: Job, with_ema: bool) -> tuple[list[Row], list[Row]] | None:
    """Return metrics and trajectory of a policy that is finished in the store; None if it is not.

    An actor may have finished it and died before it could report that.

    Args:
        with_ema: whether its EMA has to be there too.
    """
    try:
        folder = job.store.fetch(f"policies/{job.key}")
        ema = job.store.fetch(f"policies/{job.key}{EMA}") if with_ema else folder
    except DamagedError:
        return None
    if folder is None or ema is None:
        return None
    return read_jsonl(folder / "metrics.jsonl"), read_jsonl(folder / TRAJECTORY_FILE)


def task_name(jobs: Sequence[Job]) -> str:
    """Return the name of an actor's task, for the dashboard and the process's title.

    For example PolicyActor.fine_tune iteration 1 policies 1, 3.
    """
    indices = ", ".join(str(job.index) for job in jobs)
    return (
        f"PolicyActor.fine_tune iteration {jobs[0].iteration}"
        f" {'policy' if len(jobs) == 1 else 'policies'} {indices}"
    )
