"""The Ray actor around an engine; wrapped by ray.remote where it is placed."""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray

from raywarp.cluster.health import GROUP, Process, Work, stack_here
from raywarp.rollout.engine import Engine, EngineSettings
from raywarp.rollout.protocol import Request, Rollout


class RolloutWorker:
    """One engine. Ray runs its methods one at a time, but for `stack` and `loads`, so a swap and
    the generation after it are one step.

    A call depends on nothing but itself: Ray may start a worker that died again, and repeat the
    call that it died of.

    Args:
        number: counted from 1, for messages.
    """

    def __init__(self, settings: EngineSettings, number: int = 1):
        self.settings, self.number = settings, number
        self.engine: Engine | None = None
        self.hasher = ThreadPoolExecutor(1)
        self.thread = 0
        self.loading = Work()

    @ray.method(concurrency_group=GROUP)
    def stack(self) -> str:
        """Where generate is."""
        return stack_here(self.thread)

    @ray.method(concurrency_group=GROUP)
    def loads(self) -> bool:
        """Whether it starts its engine just now, be it in generate."""
        return self.loading.busy

    def start(self) -> dict[str, Any]:
        """Load the engine; returns what a run's results depend on (`numerics`), how many
        completions run at once (`capacity`), and this `process`.

        Raises:
            ConfigError: what the engine cannot do.
        """
        engine = self._engine()
        numerics = {"engine": self.settings.rollout.engine, "adapter": engine.adapter_mode}
        return {"numerics": numerics, "capacity": engine.capacity(), "process": Process.here()}

    def generate(self, requests: Sequence[Request]) -> tuple[Process, list[Rollout]]:
        """This process, and the requests' Rollouts; those that the engine can hold at the same time
        run together.
        """
        return self._answer(self._generate, requests)

    def logprobs(
        self, requests: Sequence[Request]
    ) -> tuple[Process, list[list[tuple[float, ...]]]]:
        """This process, and for each prompt of the requests what Engine.logprobs says of it."""
        return self._answer(self._logprobs, requests)

    def shutdown(self) -> None:
        """Stop the engine and take its temporary files away."""
        if self.engine is not None:
            self.engine.close()

    def _answer(
        self, work: Callable[[Engine, Sequence[Request]], Any], requests: Sequence[Request]
    ) -> tuple[Process, Any]:
        self.thread = threading.get_ident()
        engine = self._engine()
        try:
            return Process.here(), work(engine, requests)
        except Exception:
            if engine.lost():
                with contextlib.suppress(Exception):
                    engine.close()
                os._exit(1)  # Ray starts this worker again, and repeats the call
            raise

    def _logprobs(
        self, engine: Engine, requests: Sequence[Request]
    ) -> list[list[tuple[float, ...]]]:
        found = []
        for _, group in itertools.groupby(
            requests, key=lambda request: engine.loader.in_weights(request.adapter)
        ):
            together = list(group)
            engine.loader.load([request.adapter for request in together])
            found += engine.logprobs(together)
        return found

    def _generate(self, engine: Engine, requests: Sequence[Request]) -> list[Rollout]:
        rollouts = []
        for _, group in itertools.groupby(
            requests, key=lambda request: engine.loader.in_weights(request.adapter)
        ):
            together, start = list(group), time.perf_counter()
            adapters = [request.adapter for request in together]
            engine.loader.load(adapters)
            swapped = time.perf_counter()
            digests = self.hasher.submit(
                engine.loader.digests, adapters
            )  # while the engine samples
            completions = engine.sample(together)
            seconds, swap = (
                (time.perf_counter() - start) / len(together),
                (swapped - start) / len(together),
            )
            ended = time.time()
            parts = zip(completions, digests.result(), strict=True)
            rollouts += [Rollout(c, d, self.number, seconds, swap, ended=ended) for c, d in parts]
        return rollouts

    def _engine(self) -> Engine:
        """The engine, started where it is not: also after a death of this process."""
        if self.engine is None:
            with self.loading:
                self.engine = self._start_engine()
        return self.engine

    def _start_engine(self) -> Engine:
        return start_engine(self.settings)


def start_engine(settings: EngineSettings) -> Engine:
    """The engine that rollout.engine names; raises ConfigError as the engine does."""
    if settings.rollout.engine == "transformers":
        from raywarp.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(settings)
    from raywarp.rollout.vllm_engine import VllmEngine

    return VllmEngine(settings)
