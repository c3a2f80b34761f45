"""The Ray actor that fine-tunes policies: one base model, and every policy it was given.

It turns to the policy whose rollouts are ready. While one policy updates, the shared rollout
workers generate for another. Within a policy every batch is on-policy.
"""

import functools
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
import torch

from raywarp.adapters.start import load_start
from raywarp.algorithm.deltas import AdapterDelta
from raywarp.cluster.card import see_own_gpus, shared_cards
from raywarp.cluster.faults import GPU_ERROR, kind_of
from raywarp.cluster.health import START_SECONDS, WATCH, Process, Work, stack_here
from raywarp.config.schema import Config
from raywarp.data.text import Prompt
from raywarp.identity import derive_seed
from raywarp.model.batches import collate
from raywarp.rewards.actor import Scorer
from raywarp.rollout.proof import PROOF_STEPS, Proof, requests
from raywarp.rollout.protocol import (
    SFT,
    Adapter,
    AdapterPart,
    Request,
    Scores,
    join,
    submit,
)
from raywarp.run.policy_files import Job
from raywarp.training.draws import draws
from raywarp.training.measuring import Measuring
from raywarp.training.progress import Progress, finished_rows
from raywarp.training.timing import spans_of, work_of
from raywarp.training.tracking import HeldOut, Measurement, fetch, is_due, measured

# Imported only where the actor runs: transformers and PEFT take seconds to import.
if TYPE_CHECKING:
    from raywarp.model.policy import Policy
    from raywarp.rollout.effect_probe import Reference

STOP_SECONDS = 0.1  # time between two checks of whether to stop, while there is no other work


class PolicyActor(Measuring):
    """Holds the base model across iterations. Its methods run one at a time.

    Those of the concurrency group "watch" run beside the others.

    Args:
        model: folder or hub id of the SFT model.
        dtype: float32, bfloat16 or float16.
        threads: CPU threads of torch. None leaves torch's own choice.
    """

    def __init__(self, config: Config, model: str, dtype: str, threads: int | None):
        see_own_gpus()
        self.config, self.source, self.dtype, self.threads = config, model, dtype, threads
        self.stopping = threading.Event()
        self.thread = 0
        self.working_since: float | None = None
        self.work = Work()
        self.cards = shared_cards() if config.rollout.sleep else []

    @ray.method(concurrency_group=WATCH)
    def pulse(self) -> Process:
        """Return what this process does. It answers while a policy is updated."""
        return Process.here(self.working_since, busy=self.work.busy)

    @ray.method(concurrency_group=WATCH)
    def stop(self) -> None:
        """Let fine_tune save every policy and end, as soon as no update is running."""
        self.stopping.set()

    @ray.method(concurrency_group=WATCH)
    def stack(self) -> str:
        """Return the stack of fine_tune."""
        return stack_here(self.thread)

    def start(self) -> AdapterDelta:
        """Load the base. Return the SFT model's task vector, of rank 0 in every adapted module.

        Raises:
            ConfigError: lora.target_modules does not fit the model.
        """
        from raywarp.model.adapted import AdaptedModel

        if self.threads:
            torch.set_num_threads(self.threads)
        device = torch.device("cuda" if ray.get_gpu_ids() and torch.cuda.is_available() else "cpu")
        self.model = AdaptedModel(
            self.source,
            self.config.lora,
            getattr(torch, self.dtype),
            device,
            self.config.trust_remote_code,
            self.config.optim.gradient_checkpointing,
            load_start(self.config.sft_adapter),
            self.config.base.quantize,
        )
        return self.model.zero_delta()

    def reference(self, texts: Sequence[Sequence[int]], longest: int, tokens: int) -> "Reference":
        """Return the probe, a synthetic adapter, and its effect in the trainer.

        See effect_probe.make_probe for the arguments.
        """
        from raywarp.rollout.effect_probe import make_probe, reference

        with self._turn():
            self._load()
            probe = make_probe(texts, self.model.vocabulary, longest, tokens, self.config.seed)
            return reference(
                self.model, probe, self.config.seed, self.config.optim.max_tokens_per_microbatch
            )

    def fine_tune(
        self,
        jobs: Sequence[Job],
        init: AdapterPart,
        prompts: Mapping[int, Sequence[Prompt]],
        pool: Any,
        reward: Scorer,
        held_out: HeldOut,
        proof: Proof | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Train the jobs' policies to the end, and yield their events.

        Events are fault (an unusable checkpoint), resumed (with the metrics and the trajectory so
        far), measured (on held-out prompts), step, ended (by a stop rule), done and stopped.

        Args:
            prompts: policy's index → its training prompts.
            proof: examines the sampler again every PROOF_STEPS steps. None leaves that out.

        Raises:
            EffectError: the sampler does not run a policy as this trainer does. Each policy is
                saved before.
            RewardError: the reward failed. Each policy is saved before.
            FaultError: the reward worker died again and again.
        """
        # The start counts as work only after START_SECONDS, so it is no hang before.
        self.thread, self.working_since = threading.get_ident(), time.monotonic() + START_SECONDS
        self._load()
        self.working_since = time.monotonic()
        initial = init.fetch()
        self.model.set_init(initial)
        self.proof = proof
        under_way = []
        for job in jobs:
            if (rows := finished_rows(job, self.config.warp.elastic_reset)) is None:
                under_way.append(self._start(job))
            else:
                steps = self.config.of_policy(job.index).warp.steps
                done = {"step": steps, "metrics": rows[0], "trajectory": rows[1]}
                yield {"event": "resumed", **job.label, **done}
                yield {"event": "done", **job.label}
        try:
            for progress in under_way:
                for cause in progress.discarded:
                    yield progress.event("fault", cause=cause)
                yield progress.event(
                    "resumed", metrics=progress.metrics, trajectory=progress.trajectory
                )
            self.started, self.busy_seconds = time.perf_counter(), 0.0
            ask = functools.partial(self._ask, init, prompts, pool, reward, held_out)
            waiting = {ref: p for p in under_way if (ref := ask(p)) is not None}
            idle = time.perf_counter()
            while waiting:
                if self.stopping.is_set():
                    for progress in under_way:
                        self._checkpoint(progress)
                        yield progress.event("stopped")
                    return
                self.working_since = None
                ready = self._ready(waiting)
                self.working_since = time.monotonic()
                if ready is None:
                    continue
                progress = waiting.pop(ready)
                if progress.probed not in (None, ready):
                    # Waited for here, where others have their turn: the engine may need the GPU.
                    waiting[progress.probed] = progress
                    continue
                if progress.measurement:
                    yield {"event": "measured", **self._measure(progress, progress.measurement)}
                if progress.ended:
                    yield progress.event("ended", message=progress.ended)
                elif progress.steps_left:
                    scores = fetch(progress.scores)
                    with self._turn():
                        row = self._step(progress, scores, time.perf_counter() - idle)
                    yield {"event": "step", **row}
                if (ref := ask(progress)) is not None:
                    waiting[ref] = progress
                idle = time.perf_counter()
            for progress in under_way:
                progress.save_result(initial)
                yield {"event": "done", **progress.job.label}
        except Exception as error:
            if kind_of(error) == GPU_ERROR:
                raise  # nothing can be read from that GPU by this process any more
            for progress in under_way:
                self._checkpoint(progress)
            raise
        finally:
            self.working_since = None
            for progress in under_way:
                progress.policy.close()

    def _ready(self, waiting: Mapping[Any, Progress]) -> Any:
        """Return the ref, among those that are ready, of the policy with the most steps left.

        So no policy is left to end alone, when this actor would wait for each of its rollouts.
        The result is None if none is ready within STOP_SECONDS.
        """
        refs = list(waiting)
        if not ray.wait(refs, num_returns=1, timeout=STOP_SECONDS)[0]:
            return None
        ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return max(ready, key=lambda ref: waiting[ref].steps_left)

    def _work(self, row: Mapping[str, Any], requested: float) -> list[tuple[str, float, float]]:
        """Return this actor's spans of the step that has just ended, in the form of work_of."""
        now = time.time()
        return [
            (self.title, requested - row["request_seconds"], requested),
            (self.title, now - row["update_seconds"], now),
        ]

    def _load(self) -> None:
        """Load the base in an actor that replaced a dead one, and so was never told to start."""
        if not hasattr(self, "model"):
            self.start()

    def _new_policy(self, job: Job) -> "Policy":
        from raywarp.model.policy import Policy

        return Policy(self.model, self.config.of_policy(job.index), job.iteration, job.index)

    def _start(self, job: Job) -> Progress:
        """Resume the policy from its newest checkpoint that is whole, or begin it."""
        return Progress.resume(job, self._new_policy(job))

    def _ask(
        self,
        init: AdapterPart,
        prompts: Mapping[int, Sequence[Prompt]],
        pool: Any,
        reward: Scorer,
        held_out: HeldOut,
        progress: Progress,
    ) -> Any:
        """Ask for all that the policy's next step needs. Return the ref that comes last.

        A due measurement is asked for first. The result is None once the policy is finished.
        """
        start, step = time.perf_counter(), progress.policy.step
        progress.measurement = progress.probed = None
        config, m = progress.policy.config, progress.job.index
        own = reward.weighted(config.rewards_by_key)
        due = held_out.prompts.get(m) and is_due(config, step, progress.trajectory)
        if progress.ended or not (due or progress.steps_left):
            return None
        vector = AdapterPart.put(progress.policy.task_vector(), getattr(torch, self.dtype))
        progress.adapter = Adapter(init, vector)
        if due:
            scorers = [own, *([held_out.control] if held_out.control else [])]
            progress.measurement = Measurement.request(
                config, held_out.prompts[m], progress.adapter, pool, scorers
            )
        if not progress.steps_left:
            return progress.measurement and progress.measurement.scores[-1]
        progress.scores = self._request(progress, prompts[m], pool, own)
        progress.request_seconds, progress.requested = time.perf_counter() - start, time.time()
        return progress.scores

    def _measure(self, progress: Progress, measurement: Measurement) -> dict[str, Any]:
        """Return the row of a measurement, after adding it to the policy's trajectory."""
        from raywarp.model.adapted import INIT, completion_kls

        self.working_since = None  # the pool may do other work before this
        rollouts, scores = measurement.wait()
        self.working_since, start = time.monotonic(), time.time()
        prompts = [prompt.token_ids for prompt in measurement.prompts]
        batch = collate(prompts, join(rollouts, measurement.adapter))
        with self._turn():
            kl = completion_kls(self.model, batch, self.config, [INIT, progress.policy.name])
        label = {**progress.job.label, "step": progress.policy.step}
        work = [*work_of(rollouts, scores), (self.title, start, time.time())]
        row = {**label, **measured(scores, kl), "spans": spans_of(work)}
        progress.add_measurement(row)
        return row

    def _request(
        self, progress: Progress, prompts: Sequence[Prompt], pool: Any, reward: Scorer
    ) -> Any:
        """Ask for the next step's completions and their scores. Return the ref of the scores."""
        job, step, config = progress.job, progress.policy.step, progress.policy.config
        group = config.rollout.completions_per_prompt
        chosen = draws(config, job, step, len(prompts))
        progress.prompts = [prompts[i] for i in chosen for _ in range(group)]
        seeds = [
            derive_seed(config.seed, "sampling", job.iteration, job.index, step, n)
            for n in range(config.optim.batch_size)
        ]
        request = Request([p.token_ids for p in progress.prompts], seeds, progress.adapter)
        (progress.rollouts,) = submit(pool, [request], config.rollout.chunk_size)
        if self.proof and step and step % PROOF_STEPS == 0:
            progress.probed = pool.logprobs.remote(
                requests(self.proof.probe, [SFT, progress.adapter])
            )
        return reward.submit(progress.prompts, progress.rollouts)

    def _step(self, progress: Progress, scores: Scores, idle_seconds: float) -> dict[str, Any]:
        start, step = time.perf_counter(), progress.policy.step
        rollouts = ray.get(progress.rollouts)
        completions = join(rollouts, progress.adapter)
        batch = collate([p.token_ids for p in progress.prompts], completions)
        effect_in_engine = self._effect(progress)
        with_sft_kl = step % self.config.kl_to_sft_every == 0
        measured = progress.update(batch, scores, completions, with_sft_kl)
        row = {
            **progress.job.label,
            "step": step,
            **measured,
            **effect_in_engine,
            "tokens": sum(len(c.token_ids) for c in completions),
            "rollout_seconds": max(r.seconds for r in rollouts),
            "swap_seconds": max(r.swap_seconds for r in rollouts),
            "wait_seconds": idle_seconds,
            "request_seconds": progress.request_seconds,
            "update_seconds": time.perf_counter() - start,
            "pool_busy": max(r.pool_busy for r in rollouts),
        }
        row["spans"] = spans_of(self._work(row, progress.requested) + work_of(rollouts, [scores]))
        self.busy_seconds += row["request_seconds"] + row["update_seconds"]
        row["trainer_busy"] = self.busy_seconds / (time.perf_counter() - self.started)
        progress.metrics.append(row)
        progress.add_sample(step, completions, scores)
        if progress.policy.step % self.config.checkpoint_every == 0:
            self._checkpoint(progress)
        return row

    def _effect(self, progress: Progress) -> dict[str, float]:
        """Return metrics of what the step's adapter did in the engine.

        Before the first step they are those of the synthetic adapter at the start.
        """
        if (
            not self.proof
            or not self.proof.found
            or (progress.probed is None and progress.policy.step)
        ):
            return {}
        if progress.probed is None:
            return self.proof.found.metrics()
        from raywarp.model.adapted import INIT
        from raywarp.rollout.effect_probe import score

        answers = ray.get(progress.probed)
        most, adapters = self.config.optim.max_tokens_per_microbatch, [INIT, progress.policy.name]
        ours = score(self.model, self.proof.probe, adapters, most)
        return self.proof.judge(
            answers, ours, f"{progress.name} step {progress.policy.step}"
        ).metrics()

    def _checkpoint(self, progress: Progress) -> None:
        """Save everything up to the last finished step."""
        config = progress.policy.config
        progress.save_checkpoint(config.optim.batch_size // config.rollout.completions_per_prompt)
