"""Tests of an engine that works on several policies' calls at once (rollout.concurrency)."""

import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from test_pool import PROMPT_TOKENS, Breaking, config_for, prompts_of
from tiny_models import trained_model

from raywarp.algorithm.deltas import scale
from raywarp.config.load import parse_config
from raywarp.config.schema import ConfigError
from raywarp.data.text import Completion
from raywarp.rollout.engine import Engine, check_mode
from raywarp.rollout.pool import PoolReport
from raywarp.rollout.protocol import SFT, Adapter, AdapterPart, Request, Rollout, join, submit
from raywarp.training.actors import Kinds
from raywarp.training.session import Session

pytestmark = pytest.mark.slow

NAMES = ("one", "two", "three")


def requests_for(model: Path) -> list[Request]:
    """One request for each of three policies, and one for the SFT model."""
    trained = trained_model(model, NAMES)
    adapters = [Adapter(policy=AdapterPart.put(trained.delta(name))) for name in NAMES]
    return [
        Request(prompts_of(8), range(8 * n, 8 * n + 8), adapter)
        for n, adapter in enumerate([*adapters, SFT])
    ]


def one_by_one(session: Session, requests: Sequence[Request]) -> list[list[Completion]]:
    answers = []
    for request in requests:
        ((ref,),) = submit(session.pool, [request])
        answers.append(join([session.get(ref)], request.adapter))
    return answers


def at_once(session: Session, requests: Sequence[Request]) -> list[Rollout]:
    return [session.get(ref) for (ref,) in submit(session.pool, requests)]


def completions_of(
    rollouts: Sequence[Rollout], requests: Sequence[Request]
) -> list[list[Completion]]:
    return [join([r], request.adapter) for r, request in zip(rollouts, requests, strict=True)]


def overlap(rollouts: Sequence[Rollout]) -> bool:
    """Whether every call was under way at the same moment."""
    return max(r.ended - r.seconds for r in rollouts) < min(r.ended for r in rollouts)


class Counting(Breaking):
    """Counts vLLM's forward passes, and what they need not compute."""

    passes = cached = 0

    def _start_engine(self) -> Engine:
        engine: Any = super()._start_engine()
        step = engine.llm.llm_engine.step

        def counted() -> Any:
            self.passes += 1
            outputs = step()
            self.cached += sum(output.num_cached_tokens or 0 for output in outputs)
            return outputs

        engine.llm.llm_engine.step = counted
        return engine  # type: ignore[no-any-return]

    def count(self) -> int:
        return self.passes

    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed, since the last call of this method."""
        self.cached, cached = 0, self.cached
        return cached


@pytest.fixture(scope="module", params=["auto", "lora"])
def session(
    request: pytest.FixtureRequest, ray_cluster: Any, tiny_llama: Path
) -> Iterator[Session]:
    config = config_for(tiny_llama, adapter=request.param, workers=1, concurrency=4)
    kinds = Kinds(worker=Counting)
    with Session(config, str(tiny_llama), PROMPT_TOKENS, policies=False, kinds=kinds) as session:
        yield session


def test_calls_of_several_policies_run_together_and_give_the_same_bits(
    session: Session, tiny_llama: Path
) -> None:
    """Each call has its own adapter, and what its policy gives alone: tokens, log-probs, texts."""
    requests = requests_for(tiny_llama)
    alone = one_by_one(session, requests)
    assert len({str(answer) for answer in alone}) == 4
    for _ in range(3):
        rollouts = at_once(session, requests)
        assert completions_of(rollouts, requests) == alone
    assert overlap(rollouts)


def test_a_policy_keeps_its_adapter_while_others_come_and_go(
    session: Session, tiny_llama: Path
) -> None:
    """A long call meets new versions of the others, which take the slots of the old ones."""
    requests = requests_for(tiny_llama)
    long = Request(prompts_of(8) * 12, range(96), requests[0].adapter)
    (expected,) = one_by_one(session, [long])
    trained = trained_model(tiny_llama, NAMES)
    ((ref,),) = submit(session.pool, [long])
    for size in (0.5, 0.25, 0.125, 0.0625):
        part = AdapterPart.put(scale(trained.delta("two"), size))
        (found,) = one_by_one(session, [Request(prompts_of(1), [0], Adapter(policy=part))])
        assert found
    assert join([session.get(ref)], long.adapter) == expected


@pytest.mark.parametrize("session", ["auto"], indirect=True)
@pytest.mark.parametrize("how", ["killed", "raised"])
def test_a_loss_with_several_calls_under_way_is_one_loss(
    session: Session, tiny_llama: Path, how: str
) -> None:
    """All calls are made again, and as many can run at once as before."""
    requests = requests_for(tiny_llama)
    expected = one_by_one(session, requests)
    before: PoolReport = session.get(session.pool.report.remote())
    if how == "raised":
        session.get(session.workers[0].break_engine.remote())
    process = session.get(session.pool.pulse.remote()).processes[0]
    refs = submit(session.pool, requests)
    if how == "killed":
        os.kill(process.id, signal.SIGKILL)
    rollouts = [session.get(ref) for (ref,) in refs]
    assert completions_of(rollouts, requests) == expected
    assert session.get(session.pool.report.remote()).restarts == before.restarts + 1
    again = at_once(session, requests)
    assert completions_of(again, requests) == expected
    assert overlap(again)


@pytest.mark.parametrize(
    ("rollout", "advice"),
    [
        ({"adapter": "merged"}, "rollout.adapter=unmerged"),
        ({"engine": "transformers"}, "set rollout.engine=vllm with rollout.adapter=unmerged"),
    ],
)
def test_an_engine_that_runs_one_policy_at_a_time_is_refused(
    rollout: dict[str, Any], advice: str
) -> None:
    config = parse_config({"dtype": "float32", "rollout": {"concurrency": 2, **rollout}})
    with pytest.raises(ConfigError, match=f"rollout.concurrency=2: .*{advice}"):
        check_mode(config, gpu=False)


def test_batches_are_the_engines_own(session: Session, tiny_llama: Path) -> None:
    """Four calls at once need fewer forward passes than one after another, so they share them."""
    requests, worker, spent = requests_for(tiny_llama), session.workers[0], []
    for run in (one_by_one, at_once):
        before = session.get(worker.count.remote())
        run(session, requests)
        spent.append(session.get(worker.count.remote()) - before)
    assert spent[1] <= spent[0] // 2


def test_completions_of_a_prompt_share_its_prefix_in_lora_mode_alone(
    session: Session, tiny_llama: Path
) -> None:
    """Within a call of one adapter. The other mode would take the prefix of another adapter."""
    requests, worker = requests_for(tiny_llama), session.workers[0]
    prompt, block = prompts_of(2)[1], 128
    found = []
    for request in requests[:2]:
        session.get(worker.cached_tokens.remote())
        one_by_one(session, [Request([prompt] * 8, range(8), request.adapter)])
        found.append(session.get(worker.cached_tokens.remote()))
    shares = session.engine["adapter"] == "lora"
    assert found == [7 * block if shares else 0] * 2
