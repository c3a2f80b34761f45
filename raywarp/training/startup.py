"""The start of the rollout and reward workers, which Ray restarts when one dies meanwhile."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from raywarp.cluster import faults, placement_groups
from raywarp.cluster.faults import Failures, FaultError
from raywarp.cluster.placement_groups import Bundle
from raywarp.cluster.resources import Plan
from raywarp.cluster.supervisor import ActorSlot, restart
from raywarp.config.schema import Config
from raywarp.rollout.effect import Sampler
from raywarp.rollout.proof import Proof, prove
from raywarp.rollout.protocol import Request

CHECK_SECONDS = 1.0  # between two looks at the nodes of actors that start


def request_start(actors: Sequence[Any]) -> list[Any]:
    """Ask actors to start, and return the refs of their answers."""
    return [actor.start.options(max_task_retries=0).remote() for actor in actors]


@dataclass(frozen=True)
class Startup:
    """Waits for the first calls of actors that Ray restarts, and repeats those of dead actors.

    Attributes:
        get: fetches what a ref stands for, see Session.get.
    """

    config: Config
    get: Callable[[Any, Callable[[], None]], Any]

    def results(
        self,
        what: str,
        actors: Sequence[Any],
        refs: Sequence[Any],
        bundles: Sequence[Bundle | None],
        ask: Callable[[Any], Any] = lambda actor: request_start([actor])[0],
    ) -> list[Any]:
        """Return what the actors answered. Ask again those that died.

        Ray restarts a dead actor once its bundle has a node. An actor whose process is broken is
        restarted, too.

        Args:
            what: name of such an actor in errors.
            refs: of the answers, one per actor.
            bundles: of the actors.
            ask: sends the question to one actor again, and returns the ref of its answer.

        Raises:
            FaultError: actors died more than cluster.max_failures times, or one had no node for
                cluster.timeout_seconds.
        """
        failures = Failures(self.config.cluster.max_failures)
        return [
            self._result(what, actor, ref, bundle, ask, failures)
            for actor, ref, bundle in zip(actors, refs, bundles, strict=True)
        ]

    def prove_workers(
        self,
        sampler: Sampler,
        reference: Callable[[int], Any],
        workers: Sequence[Any],
        bundles: Sequence[Bundle | None],
    ) -> Proof:
        """Return the proof that each rollout worker runs the trainer's policies.

        Args:
            reference: asks a policy actor for a probe of so many scored tokens, and for the
                trainer's log-probs of it.
            bundles: of the workers.

        Raises:
            EffectError: an engine does not run the trainer's policies.
        """

        def score(requests: Sequence[Request]) -> list[Any]:
            asked = ray.put(list(requests))

            def ask(worker: Any) -> Any:
                return worker.logprobs.remote(asked)

            refs = [ask(worker) for worker in workers]
            answers = self.results("a rollout worker", workers, refs, bundles, ask)
            return [answer.found for answer in answers]

        return prove(sampler, reference, score)

    def look_after(self, slots: Sequence[ActorSlot]) -> Callable[[], None]:
        """Return a check of the nodes of policy actors that start; see NodeWait.check."""
        waits = [(slot, self._node_wait("a policy actor", slot.bundle)) for slot in slots]

        def check() -> None:
            for slot, wait in waits:
                if not slot.gone:
                    wait.check()

        return check

    def _node_wait(self, what: str, bundle: Bundle | None) -> "NodeWait":
        return NodeWait(what, bundle, self.config.cluster.timeout_seconds)

    def _result(
        self,
        what: str,
        actor: Any,
        ref: Any,
        bundle: Bundle | None,
        ask: Callable[[Any], Any],
        failures: Failures,
    ) -> Any:
        check = self._node_wait(what, bundle).check
        while True:
            try:
                return self.get(ref, check)
            except RayError as error:
                if not faults.is_survivable(error):
                    raise faults.cause_of(error) from None
                check()
                has_node = placement_groups.has_node(bundle)
                if has_node and not faults.is_restarting(error) and not failures.again():
                    cause = f"{faults.kind_of(error)}: {faults.explain(error)}"
                    raise FaultError(
                        f"{what} died again and again while it started ({cause})"
                    ) from None
                if faults.breaks_process(error):
                    restart(actor)
            time.sleep(failures.pause() or 0.5)
            ref = ask(actor)


@dataclass
class NodeWait:
    """The wait of an actor that starts for another node, after the loss of its own.

    Attributes:
        what: name of the actor in errors.
        longest: seconds without a node after which the run ends.
        since: when the node was missed, on the monotonic clock. None while there is one.
        due: when to look again.
    """

    what: str
    bundle: Bundle | None
    longest: float
    since: float | None = None
    due: float = 0.0

    def check(self) -> None:
        """Look after the node.

        Raises:
            FaultError: there has been none for too long.
        """
        now = time.monotonic()
        if now < self.due:
            return
        self.due = now + CHECK_SECONDS
        self.since = None if placement_groups.has_node(self.bundle) else self.since or now
        if self.since and now - self.since > self.longest:
            raise FaultError(
                f"{self.what} has waited {self.longest:.0f} s for another node after it lost its"
                f" own while it started: {placement_groups.lack()}; add nodes, or raise"
                " cluster.timeout_seconds; the same command continues"
            )


def warn_of_small_cache(config: Config, plan: Plan, prompt_tokens: int, capacity: int) -> None:
    """Warn when a rollout worker's engine cannot hold a whole batch at once.

    It then generates the batch in several rounds, which is correct but slow.

    Args:
        prompt_tokens: length of the longest prompt, in tokens.
        capacity: completions that the engine's KV cache holds.
    """
    rollout = config.rollout
    asked = rollout.chunk_size or config.optim.batch_size
    if capacity < asked:
        memory = (
            f"rollout.kv_cache_gib={rollout.kv_cache_gib:g}"
            if not plan.rollout.gpus
            else "rollout.gpu_memory_utilization"
        )
        logging.getLogger(__name__).warning(
            f"a rollout worker's KV cache holds {capacity} completions of {prompt_tokens}"
            f" + {rollout.max_new_tokens} tokens at once, a batch has {asked}: raise {memory},"
            " or lower optim.batch_size, rollout.chunk_size or rollout.max_new_tokens"
        )
