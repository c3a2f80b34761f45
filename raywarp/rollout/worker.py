"""The Ray actor around an engine; ray.remote wraps it where it is placed."""

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray.exceptions import RayError

from raywarp.cluster import faults
from raywarp.cluster.card import see_own_gpus, shared_cards, turn
from raywarp.cluster.health import WATCH, Process, Work, stack_here
from raywarp.cluster.turns import InTurns, Turns
from raywarp.rollout.engine import Engine, EngineSettings
from raywarp.rollout.pool import Answer
from raywarp.rollout.protocol import (
    Adapter,
    AdapterPart,
    Request,
    Rollout,
    RolloutError,
)

if TYPE_CHECKING:  # the pool imports this module with its workers' handles, and needs no torch
    from raywarp.adapters.start import Start

T = TypeVar("T")


class RolloutWorker:
    """The actor of one engine.

    It works on rollout.concurrency calls at once, in turns. The engine holds the adapters of all of
    them. A call depends on nothing outside itself: Ray may restart a dead worker and repeat the
    call during which it died.

    Args:
        settings: of the engine.
        number: counted from 1, for messages.
    """

    def __init__(self, settings: EngineSettings, number: int = 1):
        see_own_gpus()
        self.settings, self.number = settings, number
        self.title = f"the engine of rollout worker {number}"
        self.engine: Engine | None = None
        self.broken: faults.BrokenProcessError | None = None
        self.beginning: Beginning | None = None
        self.hasher = ThreadPoolExecutor(1)
        self.turns = Turns()
        self.starting, self.loading = threading.Lock(), Work()
        self.held: list[Sequence[Adapter]] = []  # of the calls that are under way
        self.cards = shared_cards() if settings.rollout.sleep else []
        self.awake = 0  # calls for which the engine is awake
        self.turn = contextlib.ExitStack()  # at the GPU

    @ray.method(concurrency_group=WATCH)
    def stack(self) -> str:
        """Return the Python stack of the thread that works on the calls."""
        return stack_here(self.turns.thread)

    @ray.method(concurrency_group=WATCH)
    def loads(self) -> bool:
        """Return whether the engine is starting now, also inside generate."""
        return self.loading.busy

    def start(self) -> dict[str, Any]:
        """Load the engine.

        Returns:
            `numerics` (what a run's results depend on), `capacity` (how many completions run at
            once) and this `process`.

        Raises:
            ConfigError: the engine cannot do what the settings ask.
        """
        engine = self._engine()
        numerics = {"engine": self.settings.rollout.engine, "adapter": engine.adapter_mode}
        return {"numerics": numerics, "capacity": engine.capacity(), "process": Process.here()}

    def generate(self, requests: Sequence[Request]) -> Answer[list[Rollout]]:
        """Return the requests' Rollouts.

        Requests whose adapters the engine can hold at the same time run together.
        """
        return self._answer(self._generate, requests)

    def logprobs(self, requests: Sequence[Request]) -> Answer[list[list[tuple[float, ...]]]]:
        """Return what Engine.logprobs returns for the requests."""
        return self._answer(self._logprobs, requests)

    def end(self) -> None:
        """End this process. Ray restarts the worker."""
        os._exit(1)

    def shutdown(self) -> None:
        """Stop the engine and remove its temporary files."""
        if self.engine is not None and not self.broken:
            self.engine.close()

    def _answer(
        self, work: Callable[[Engine, Sequence[Request]], InTurns[Any]], requests: Sequence[Request]
    ) -> Answer[Any]:
        """Return what `work` finds.

        Raises:
            BrokenProcessError: the engine raised an error of its own. What it was doing is still
                in it, and the next call would get that call's completions.
        """
        engine = self._engine()
        try:
            found = self.turns.finish(self._awake(engine, work(engine, self._of_base(requests))))
            return Answer(Process.here(), self.turns.seconds(), found)
        except Exception as error:
            if faults.is_own(error) or isinstance(error, RayError):
                raise
            if self.broken is None:
                self.broken = faults.BrokenProcessError.after(self.title, error)
                with contextlib.suppress(Exception):
                    engine.close()
            raise self.broken from error

    def _awake(self, engine: Engine, work: InTurns[T]) -> InTurns[T]:
        """Work while the engine is awake. It sleeps when the last call has ended.

        An engine that failed keeps its turn at the GPU until its process ends.
        """
        if self.settings.rollout.sleep and not self.awake:
            self.turn.enter_context(turn(self.cards))
            engine.wake()
        self.awake += 1
        try:
            found = yield from work
        except Exception as error:
            if faults.is_own(error) or isinstance(error, RayError):
                self._rest(engine)
            raise
        self._rest(engine)
        return found

    def _rest(self, engine: Engine) -> None:
        self.awake -= 1
        if self.settings.rollout.sleep and not self.awake:
            engine.sleep()
            self.turn.close()

    def _logprobs(
        self, engine: Engine, requests: Sequence[Request]
    ) -> InTurns[list[list[tuple[float, ...]]]]:
        found = []
        for together in in_one_engine(engine, requests):
            with self._loaded(engine, [request.adapter for request in together]):
                found += yield from engine.logprobs(together)
        return found

    def _generate(self, engine: Engine, requests: Sequence[Request]) -> InTurns[list[Rollout]]:
        rollouts = []
        for together in in_one_engine(engine, requests):
            start, adapters = time.perf_counter(), [request.adapter for request in together]
            with self._loaded(engine, adapters):
                swapped = time.perf_counter()
                # Runs while the engine samples.
                digests = self.hasher.submit(engine.loader.digests, adapters)
                completions = yield from engine.sample(together)
                seconds, swap = (
                    (time.perf_counter() - start) / len(together),
                    (swapped - start) / len(together),
                )
                ended = time.time()
                parts = zip(completions, digests.result(), strict=True)
            rollouts += [
                Rollout(c, self._of_sft(d), self.number, seconds, swap, ended=ended)
                for c, d in parts
            ]
        return rollouts

    @contextlib.contextmanager
    def _loaded(self, engine: Engine, adapters: Sequence[Adapter]) -> Iterator[None]:
        """Hold adapters in the engine, besides those of the other calls."""
        self.held.append(adapters)
        try:
            engine.loader.load([adapter for held in reversed(self.held) for adapter in held])
            yield
        finally:
            self.held.remove(adapters)

    def _engine(self) -> Engine:
        """Return the engine. Start it where it is not running, also after this process died.

        Raises:
            BrokenProcessError: the engine, or its start, has made this process useless.
        """
        with self.starting:
            if self.broken:
                raise self.broken
            if self.engine is None:
                try:
                    with self.loading:
                        self.engine = self.turns.run(self._start_engine)
                except Exception as error:
                    if not faults.breaks_process(error):
                        raise
                    self.broken = faults.BrokenProcessError.after(self.title, error)
                    raise self.broken from error
            return self.engine

    def _start_engine(self) -> Engine:
        from raywarp.adapters.start import load_start

        if start := load_start(self.settings.sft_adapter):
            self.beginning = Beginning(start)
        with turn(self.cards):
            engine = start_engine(self.settings)
            if self.settings.rollout.sleep:
                engine.sleep()
        return engine

    def _of_base(self, requests: Sequence[Request]) -> list[Request]:
        """Return requests whose adapters begin with the SFT adapter, if there is one."""
        if self.beginning is None:
            return list(requests)
        return [
            replace(request, adapter=self.beginning.before(request.adapter)) for request in requests
        ]

    def _of_sft(self, digests: tuple[str, ...]) -> tuple[str, ...]:
        """Return digests without that of the SFT adapter, after a check that the engine has it.

        Raises:
            RolloutError: the engine took another SFT adapter.
        """
        if self.beginning is None:
            return digests
        if not self.beginning.is_digest(digests[0]):
            raise RolloutError(
                f"rollout worker {self.number} sampled from another SFT adapter than"
                f" sft_adapter={self.settings.sft_adapter}"
            )
        return digests[1:]


class Beginning:
    """The SFT adapter as the first part of every adapter that a worker samples from."""

    def __init__(self, start: "Start"):
        self.start, self.alone = start, AdapterPart.put(start.delta)
        self.over: AdapterPart | None = None  # with the modules that the policies have besides

    def before(self, adapter: Adapter) -> Adapter:
        if not adapter.parts:
            return replace(adapter, start=self.alone)
        if self.over is None:
            self.over = AdapterPart.put(self.start.over(adapter.parts[0].fetch()))
        return replace(adapter, start=self.over)

    def is_digest(self, digest: str) -> bool:
        parts = (self.alone, self.over)
        return digest in [part.digest for part in parts if part]


def in_one_engine(engine: Engine, requests: Sequence[Request]) -> Iterator[list[Request]]:
    """Yield requests, in order, whose adapters the engine can hold at the same time."""
    for _, together in itertools.groupby(
        requests, key=lambda request: engine.loader.in_weights(request.adapter)
    ):
        yield list(together)


def start_engine(settings: EngineSettings) -> Engine:
    """Return the engine that rollout.engine names.

    Raises:
        ConfigError: from the engine.
    """
    if settings.rollout.engine == "transformers":
        from raywarp.rollout.transformers_engine import TransformersEngine

        return TransformersEngine(settings)
    from raywarp.rollout.vllm.engine import VllmEngine

    return VllmEngine(settings)
