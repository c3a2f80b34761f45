"""Tests of the rollout pool with real engines, against the trainer's logits.

The engines are vLLM in both adapter modes and transformers. The checks around a swap are tested,
too.
"""

import contextlib
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import left_behind, traces
from killing import Patience
from ray.exceptions import RayActorError, RayTaskError
from tiny_models import WORDS, save_tiny_llama, trained_model

from raywarp.algorithm import losses
from raywarp.algorithm.deltas import add
from raywarp.cluster.faults import cause_of
from raywarp.cluster.health import Process
from raywarp.config.load import parse_config
from raywarp.config.schema import Config, ConfigError
from raywarp.data.text import Completion
from raywarp.model.batches import collate
from raywarp.rollout.engine import Engine
from raywarp.rollout.pool import RolloutPool
from raywarp.rollout.protocol import (
    SFT,
    Adapter,
    AdapterPart,
    Request,
    Rollout,
    RolloutError,
    join,
    submit,
)
from raywarp.rollout.worker import RolloutWorker
from raywarp.training.actors import Kinds
from raywarp.training.session import Session

pytestmark = pytest.mark.slow

PROMPT_TOKENS = (
    140  # longer than a block of vLLM's KV cache on CPUs (128), where stale prefixes would show
)

# of the tiny Llama's KV cache: layers, key and value, one head's width, float32
TOKEN_BYTES = 2 * 2 * 32 * 4


def config_for(folder: Path, engine: str = "vllm", adapter: str = "auto", **rollout: Any) -> Config:
    return parse_config(
        {
            "model": str(folder),
            "dtype": "float32",
            "reward": {"function": "raywarp.embedded:vader"},
            "lora": {"rank": 2, "alpha": 4},
            "warp": {"iterations": 1, "policies": 2},
            "optim": {"batch_size": 8},
            "rollout": {
                "engine": engine,
                "adapter": adapter,
                "max_new_tokens": 12,
                "temperature": 0.8,
                "workers": 2,
                **rollout,
            },
            "cluster": {"threads": 1, "cpus_per_rollout_worker": 0.5},
        }
    )


def prompts_of(count: int) -> list[list[int]]:
    """The first one short, the others longer than a block."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randint(3, len(WORDS), (PROMPT_TOKENS if n else 3,), generator=generator).tolist()
        for n in range(count)
    ]


def with_another_models_file(model: Path, folder: Path) -> Path:
    """vLLM 0.32 would read consolidated.safetensors and nothing else."""
    shutil.copytree(model, folder)
    other = save_tiny_llama(folder.parent / "other", seed=1)
    shutil.copy(other / "model.safetensors", folder / "consolidated.safetensors")
    return folder


@pytest.fixture(
    scope="module",
    params=[
        ("vllm", "auto", 1),
        ("vllm", "merged", 1),
        ("vllm", "lora", 2),
        ("transformers", "auto", 1),
    ],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def session(
    request: pytest.FixtureRequest,
    ray_cluster: Any,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Session]:
    """Two workers; in lora mode each model is split over two processes, and in one case there are
    files beside it that are not its own.
    """
    before, folder = traces(), tiny_llama
    if request.param[:2] == ("vllm", "auto"):
        folder = with_another_models_file(tiny_llama, tmp_path_factory.mktemp("beside") / "model")
    config = config_for(folder, *request.param[:2], tensor_parallel_size=request.param[2])
    with Session(config, str(folder), PROMPT_TOKENS, policies=False) as session:
        assert session.numerics()["engine"] == request.param[0]
        assert session.numerics()["adapter"] == request.param[1].replace("auto", "unmerged")
        yield session
    assert not left_behind(before)


def test_every_swap_samples_from_the_adapter_that_was_asked_for(
    ray_cluster: Any, tiny_llama: Path, session: Session
) -> None:
    """Adapters one after another, as init, as policy, both, several in one call: trainer and
    sampler agree each time, nothing is stale.
    """
    model = trained_model(tiny_llama, ("one", "two"))
    one, two = (AdapterPart.put(model.delta(name)) for name in ("one", "two"))
    both = AdapterPart.put(add(model.delta("one"), model.delta("two")))
    cases = {
        (): SFT,
        ("one",): Adapter(policy=one),
        ("two",): Adapter(policy=two),
        ("one", "two"): Adapter(init=one, policy=two),
        ("two", "one"): Adapter(init=two, policy=one),
        ("one", "sum"): Adapter(init=one),
        ("both",): Adapter(policy=both),  # rank 4
    }
    names = {(): [], ("one", "sum"): ["one"], ("both",): ["one", "two"]}
    prompts, tokens = prompts_of(8), {}
    calls = [
        [()],
        [("one",)],
        [("two",)],
        [("one",)],
        [("one", "two")],
        [("two", "one")],
        [()],
        [("one", "sum")],
        [("both",)],
    ]
    calls += [[("one",), (), ("two",), ("one", "two"), ("both",)]]  # one call of several adapters
    for call in calls:
        requests = [Request(prompts, list(range(8)), cases[case]) for case in call]
        for case, refs in zip(
            call, submit(session.pool, requests, chunk=4, together=True), strict=True
        ):
            assert len(refs) == 2  # two chunks, each to the next idle worker
            completions = join(ray_cluster.get(refs), cases[case])
            batch = collate(prompts, completions)
            active = names.get(case, list(case))
            own = losses.token_logprobs(model.logits(batch, active), batch.responses, 0.8)
            assert losses.sampler_gap(own, batch.sampler_logprobs, batch.mask) < 1e-3, case
            other = losses.token_logprobs(
                model.logits(batch, ["two"] if active != ["two"] else []), batch.responses, 0.8
            )
            assert losses.sampler_gap(other, batch.sampler_logprobs, batch.mask) > 0.05, case
            found = [c.token_ids for c in completions]
            # Same seeds, same adapter: the same tokens. Sums are only equal up to rounding, as are
            # calls of another composition.
            if len(call) == 1:
                assert tokens.setdefault(case, found) == found, case
            # EOS belongs to it
            assert all(
                c.token_ids[-1] == 2 if c.finished else len(c.token_ids) == 12 for c in completions
            )
    assert len({str(tokens[case]) for case in [(), ("one",), ("two",), ("one", "two")]}) == 4


def test_the_pool_and_the_reward_worker_load_no_torch(session: Session) -> None:
    """They forward and count: an import would take a second and 200 MB of every run."""
    pool = session.get(session.pool.pulse.remote()).process
    reward = session.get(session.reward.actor.pulse.remote())
    for process in (pool, reward):
        assert "libtorch" not in Path(f"/proc/{process.id}/maps").read_text()


def test_completions_do_not_depend_on_the_number_of_workers(
    ray_cluster: Any, tiny_llama: Path, session: Session
) -> None:
    """Bit for bit: whole batches and chunks of a fixed size, with one worker and with two."""
    part = AdapterPart.put(trained_model(tiny_llama, ("one",)).delta("one"))
    request = Request(prompts_of(8), list(range(8)), Adapter(policy=part))
    second = ray_cluster.remote(RolloutPool).options(num_cpus=0).remote(session.workers[1:])
    for chunk, calls in ((None, 1), (3, 3)):
        answers = []
        for pool in (session.pool, second):
            (refs,) = submit(pool, [request], chunk)
            assert len(refs) == calls
            answers.append(join(ray_cluster.get(refs), request.adapter))
        assert answers[0] == answers[1]  # tokens, log-probs, texts
    ray_cluster.kill(second)


def test_a_mixed_up_adapter_is_found_out(
    ray_cluster: Any, tiny_llama: Path, session: Session
) -> None:
    """The content of one version under the name of another, as the policy and as the init."""
    model = trained_model(tiny_llama, ("one", "two"))
    one, two = (AdapterPart.put(model.delta(name)) for name in ("one", "two"))
    wrong = AdapterPart(two.version, two.rank, one.ref, two.hashed)
    for adapter in (Adapter(policy=wrong), Adapter(init=wrong, policy=one)):
        ((ref,),) = submit(session.pool, [Request(prompts_of(2), [0, 1], adapter)])
        held = "+".join(one.digest[:8] for _ in adapter.parts)
        message = (
            rf"rollout worker \d sampled from adapter version {re.escape(held)} instead of"
            rf" {two.digest[:8]}"
        )
        with pytest.raises(RolloutError, match=message):
            join([ray_cluster.get(ref)], adapter)


class Skipping(RolloutWorker):
    """A worker that, once told so, leaves out the next swap."""

    skipping = False

    def _start_engine(self) -> Engine:
        engine: Any = super()._start_engine()
        take = engine.loader._take

        def take_or_skip(new: Any, kept: Any) -> Any:
            if self.skipping:
                self.skipping = False
                return dict.fromkeys(new, self.last)
            *_, self.last = new.values()
            return take(new, kept)

        engine.loader._take = take_or_skip
        return engine  # type: ignore[no-any-return]

    def skip(self) -> None:
        self.skipping = True


def test_a_skipped_swap_stops_with_worker_and_version(
    ray_cluster: Any, tiny_llama: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Along the way: a KV cache of 10 blocks holds 4 completions (152 tokens take 2 blocks, one
    stays empty), and a batch has 8.
    """
    model = trained_model(tiny_llama, ("one", "two"))
    one, two = (Adapter(policy=AdapterPart.put(model.delta(name))) for name in ("one", "two"))
    kinds = Kinds(worker=Skipping)
    config = config_for(tiny_llama, workers=1, kv_cache_gib=10 * 128 * TOKEN_BYTES / 2**30)
    with Session(config, str(tiny_llama), PROMPT_TOKENS, policies=False, kinds=kinds) as session:

        def sample(adapter: Adapter) -> list[Completion]:
            ((ref,),) = submit(session.pool, [Request(prompts_of(2), [0, 1], adapter)])
            return join([ray_cluster.get(ref)], adapter)

        assert (
            "holds 4 completions of 140 + 12 tokens at once, a batch has 8: raise"
            " rollout.kv_cache_gib=" in caplog.text
        )
        assert "lower optim.batch_size, rollout.chunk_size or rollout.max_new_tokens" in caplog.text
        assert len(sample(one)) == 2
        ray_cluster.get(session.workers[0].skip.remote())
        with pytest.raises(
            RolloutError,
            match=(
                f"rollout worker 1 sampled from adapter version .* instead of {two.digests[0][:8]}"
            ),
        ):
            sample(two)


def test_no_room_for_one_completion_names_the_keys(ray_cluster: Any, tiny_llama: Path) -> None:
    config = config_for(tiny_llama, workers=1, kv_cache_gib=128 * TOKEN_BYTES / 2**30)
    message = (
        r"no room for one completion of 152 tokens .*raise rollout.kv_cache_gib.*lower"
        r" rollout.max_new_tokens=12 or prompts.max_tokens"
    )
    with (
        pytest.raises(ConfigError, match=message),
        Session(config, str(tiny_llama), PROMPT_TOKENS, policies=False),
    ):
        pass


class Dying:
    """Every call is its last."""

    def start(self) -> dict[str, Any]:
        return {"process": Process.here()}

    def generate(self, requests: Any) -> Any:
        os._exit(1)


def test_a_worker_that_dies_again_and_again_is_named(ray_cluster: Any) -> None:
    worker = ray_cluster.remote(Dying).options(num_cpus=0, max_restarts=-1).remote()
    pool = ray_cluster.remote(RolloutPool).options(num_cpus=0).remote([worker], max_failures=1)
    ((ref,),) = submit(pool, [Request([[1]], [0])])
    with pytest.raises(RayTaskError) as failure:
        ray_cluster.get(ref)
    assert isinstance(cause := cause_of(failure.value), RolloutError)
    assert "rollout worker 1 died again and again (2 deaths in one call)" in str(cause)
    ray_cluster.kill(pool)
    ray_cluster.kill(worker)


class Broken(Dying):
    """It does not start again."""

    def start(self) -> dict[str, Any]:
        raise ValueError("no engine")


def test_a_worker_that_is_given_up_is_waited_for_no_more(ray_cluster: Any) -> None:
    worker = ray_cluster.remote(Broken).options(num_cpus=0, max_restarts=-1).remote()
    pool = ray_cluster.remote(RolloutPool).options(num_cpus=0).remote([worker])
    ((ref,),) = submit(pool, [Request([[1]], [0])])
    with pytest.raises(RayTaskError, match="rollout worker 1 cannot be started again: .*no engine"):
        ray_cluster.get(ref)
    health = ray_cluster.get(pool.pulse.remote())
    assert [event["event"] for event in health.events] == ["fault", "lost"]
    assert not health.down
    assert not health.in_flight
    ray_cluster.kill(pool)
    ray_cluster.kill(worker)


def fail_at(count: int, function: Callable[..., Any]) -> Callable[..., Any]:
    left = [count]

    def called(*arguments: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return function(*arguments, **options)

    return called


class Breaking(RolloutWorker):
    """vLLM raises in the third pass of a call, but not in a later process."""

    def break_engine(self) -> None:
        core = self._engine().llm.llm_engine.engine_core.engine_core  # type: ignore[attr-defined]
        core.model_executor.execute_model = fail_at(3, core.model_executor.execute_model)


class BreakingAlways(RolloutWorker):
    """Each of its engines raises in its first pass."""

    def _start_engine(self) -> Engine:
        engine: Any = super()._start_engine()
        engine._pass = fail_at(1, engine._pass)
        return engine  # type: ignore[no-any-return]


@contextlib.contextmanager
def breaking(
    config: Config, kind: type[RolloutWorker]
) -> Iterator[tuple[Session, list[dict[str, Any]]]]:
    events: list[dict[str, Any]] = []
    with Session(
        config,
        config.model,
        PROMPT_TOKENS,
        policies=False,
        kinds=Kinds(worker=kind),
        report=lambda event, **details: events.append({"event": event, **details}),
    ) as session:
        yield session, events


def test_an_engine_that_raised_is_not_used_again(ray_cluster: Any, tiny_llama: Path) -> None:
    """What was under way would stay in vLLM, and be taken for the next call's completions. The
    engine's own process is renewed, and the call is made again.
    """
    with breaking(config_for(tiny_llama, workers=1), Breaking) as (session, events):

        def sample(seed: int) -> list[Completion]:
            ((ref,),) = submit(session.pool, [Request(prompts_of(4), range(seed, seed + 4), SFT)])
            return join([session.get(ref)], SFT)

        first, second = sample(0), sample(4)
        ray_cluster.get(session.workers[0].break_engine.remote())
        assert sample(0) == first != second
        assert sample(4) == second
    assert [row["event"] for row in events] == ["fault", "recovered"]
    assert events[0]["cause"] == "out of memory"
    assert events[0]["message"] == (
        "the engine of rollout worker 1 failed with OutOfMemoryError: CUDA out of memory. Tried to"
        " allocate 2 GiB"
    )


def test_an_engine_that_always_raises_is_given_up_with_its_reason(
    ray_cluster: Any, tiny_llama: Path
) -> None:
    config = config_for(tiny_llama, "transformers", workers=1)
    config = config.model_copy(
        update={"cluster": config.cluster.model_copy(update={"max_failures": 1})}
    )
    with breaking(config, BreakingAlways) as (session, _):
        ((ref,),) = submit(session.pool, [Request(prompts_of(4), range(4), SFT)])
        with pytest.raises(RolloutError, match=r"2 deaths.*OutOfMemoryError: CUDA out of memory"):
            session.get(ref)


class Known(RolloutWorker):
    """Tells its process without an engine."""

    def pid(self) -> int:
        return os.getpid()

    def nap(self, seconds: float) -> None:
        time.sleep(seconds)


class Witnessed:
    """A session of `Known` workers, and what it tells of them."""

    def __init__(self, ray: Any, session: Session, events: list[dict[str, Any]]):
        self.ray, self.session, self.events = ray, session, events
        self.pids = [self.new_process(n, 0) for n in range(len(session.workers))]

    def submit(self, calls: int = 1) -> list[Any]:
        return [
            submit(self.session.pool, [Request(prompts_of(2), [0, 1], SFT)])[0][0]
            for _ in range(calls)
        ]

    def sample(self, calls: int = 1) -> list[list[Completion]]:
        return [join([self.session.get(ref)], SFT) for ref in self.submit(calls)]

    def new_process(self, worker: int, old: int) -> int:
        patience = Patience(120)
        while patience.lasts():
            with contextlib.suppress(RayActorError):
                if (pid := self.ray.get(self.session.workers[worker].pid.remote())) != old:
                    return int(pid)
        raise AssertionError("not started again")

    def kill(self) -> None:
        """The first worker; it is waited for until it is back."""
        os.kill(old := self.pids[0], signal.SIGKILL)
        self.pids[0] = self.new_process(0, old)

    def sample_and_kill(self, calls: int) -> list[list[Completion]]:
        """One of the calls waits for the first worker when that is killed."""
        nap = self.session.workers[0].nap.remote(300.0)
        refs = self.submit(calls)
        os.kill(old := self.pids[0], signal.SIGKILL)
        completions = [join([self.session.get(ref)], SFT) for ref in refs]
        with pytest.raises(RayActorError):
            self.ray.get(nap)
        self.pids[0] = self.new_process(0, old)
        return completions

    def await_restarts(self, count: int) -> None:
        patience = Patience(120)
        while self.session.get(self.session.pool.report.remote()).restarts != count:
            assert patience.lasts()

    def told(self, count: int) -> list[dict[str, Any]]:
        """The events, once there are so many."""
        for _ in range(30):
            # whoever waits looks after the actors
            self.session.get(self.session.workers[0].nap.remote(1.0))
            if len(self.events) >= count:
                break
        return self.events


@contextlib.contextmanager
def known_workers(
    ray: Any, model: Path, workers: int, kind: type[RolloutWorker] = Known
) -> Iterator[Witnessed]:
    events: list[dict[str, Any]] = []

    def report(event: str, **details: Any) -> None:
        events.append({"event": event, **details})

    config, kinds = config_for(model, "transformers", workers=workers), Kinds(worker=kind)
    with Session(
        config, str(model), PROMPT_TOKENS, policies=False, kinds=kinds, report=report
    ) as session:
        yield Witnessed(ray, session, events)


def test_a_death_between_two_calls_is_told(ray_cluster: Any, tiny_llama: Path) -> None:
    """No call fails of it, since the worker is back before the next one; its engine has to be
    loaded again.
    """
    with known_workers(ray_cluster, tiny_llama, workers=1) as witnessed:
        first = witnessed.sample()
        for count in (1, 2):
            witnessed.kill()
            assert witnessed.sample() == first
            witnessed.await_restarts(count)
        assert witnessed.sample() == first
        events = witnessed.told(4)
    assert [(row["event"], row["what"]) for row in events] == [
        ("fault", "rollout worker 1"),
        ("recovered", "rollout worker 1"),
    ] * 2
    assert [(row["cause"], row["message"]) for row in events[::2]] == [
        ("killed", "its process is a new one")
    ] * 2
    assert all(0 < row["seconds_lost"] < 60 for row in events[1::2])


def test_a_death_before_the_first_call_is_told(ray_cluster: Any, tiny_llama: Path) -> None:
    """Of a process that has only been started: at the beginning; and after the death of the one
    before, whose call another worker took.
    """
    with known_workers(ray_cluster, tiny_llama, workers=2) as witnessed:
        witnessed.kill()
        first = witnessed.sample(calls=2)
        witnessed.await_restarts(1)
        assert witnessed.sample_and_kill(calls=2) == first
        witnessed.await_restarts(2)
        witnessed.kill()
        assert witnessed.sample(calls=4) == first * 2
        witnessed.await_restarts(3)
        events = witnessed.told(6)
    assert [(row["event"], row["what"]) for row in events] == [
        ("fault", "rollout worker 1"),
        ("recovered", "rollout worker 1"),
    ] * 3
    assert [row["cause"] for row in events[::2]] == ["killed"] * 3


def test_a_worker_that_is_back_just_before_the_end_is_told_and_stops_by_itself(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """Else what its engine keeps on disk and in shared memory would stay."""

    class Leaving(Known):
        def shutdown(self) -> None:
            super().shutdown()
            (tmp_path / str(os.getpid())).touch()

    with known_workers(ray_cluster, tiny_llama, workers=1, kind=Leaving) as witnessed:
        first = witnessed.sample()
        assert witnessed.sample_and_kill(calls=1) == first
    assert [row["event"] for row in witnessed.events] == ["fault", "recovered"]
    assert [path.name for path in tmp_path.iterdir()] == [str(witnessed.pids[0])]


def test_join_names_worker_and_version() -> None:
    completion = Completion((3,), (-1.0,), "the", False)
    hashed: Future[str] = Future()
    hashed.set_result("a" * 64)
    adapter = Adapter(policy=AdapterPart("version 1", 1, None, hashed))
    good, stale = Rollout([completion], ("a" * 64,)), Rollout([completion], ("b" * 64,), worker=2)
    assert join([good, good], adapter) == [completion, completion]
    with pytest.raises(
        RolloutError,
        match="rollout worker 2 sampled from adapter version bbbbbbbb instead of aaaaaaaa",
    ):
        join([good, stale], adapter)
    with pytest.raises(RolloutError, match="adapter version none instead of aaaaaaaa"):
        join([Rollout([completion], ())], adapter)
