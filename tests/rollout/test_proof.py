"""Tests of the proof by effect in real engines, and of a front's numbers.

A right engine passes. Engines that run another policy are refused.
"""

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import left_behind, traces
from killing import Patience
from ray.exceptions import RayTaskError
from tiny_run import make_project, tiny_config

from raywarp.algorithm.deltas import scale
from raywarp.config.schema import Config
from raywarp.data.text import Completion, Prompt
from raywarp.rollout.effect import EffectError, effect
from raywarp.rollout.engine import Engine
from raywarp.rollout.proof import PROOF_STEPS, requests
from raywarp.rollout.protocol import SFT, Adapter, AdapterPart, Request, join, submit
from raywarp.rollout.worker import RolloutWorker
from raywarp.run.policy_files import Job
from raywarp.storage.location import Storage
from raywarp.training.actors import Kinds
from raywarp.training.evaluation import submit_points
from raywarp.training.session import Session

pytestmark = pytest.mark.slow

PROMPT_TOKENS, TEMPERATURE = 6, 0.8


class Meddling(RolloutWorker):
    """Runs other adapters than those it is asked for, once told how."""

    how = ""
    other: AdapterPart | None = None

    def meddle(self, how: str, other: AdapterPart | None = None) -> None:
        self.how, self.other = how, other

    def spoil(self, factor: float) -> None:
        """Multiply a layer's weights, one that no swap of merged weights writes again."""
        engine: Any = self._engine()
        engine.llm.collective_rpc(_multiply, args=(factor,))

    def _logprobs(
        self, engine: Engine, requests: Sequence[Request]
    ) -> list[list[tuple[float, ...]]]:
        adapters = [request.adapter for request in requests]
        if self.how == "none":
            adapters = [SFT] * len(adapters)
        elif self.how == "stale":
            adapters = [adapters[0], *adapters[:-1]]
        elif self.how == "no init":
            adapters = [replace(adapter, init=None) for adapter in adapters]
        elif self.how == "policy twice":
            adapters = [
                replace(adapter, init=adapter.init and adapter.policy) for adapter in adapters
            ]
        elif self.how == "other":
            adapters = [
                Adapter(policy=self.other) if adapter.parts else SFT for adapter in adapters
            ]
        elif self.how == "half":
            adapters = [
                Adapter(*map(_half, (adapter.init, adapter.policy))) for adapter in adapters
            ]
        return super()._logprobs(
            engine,
            [replace(r, adapter=adapter) for r, adapter in zip(requests, adapters, strict=True)],
        )


def _half(part: AdapterPart | None) -> AdapterPart | None:
    return AdapterPart.put(scale(part.fetch(), 0.5)) if part else None


def _multiply(worker: Any, factor: float) -> None:
    worker.get_model().get_submodule("model.norm").weight.data.mul_(factor)


def config_of(folder: Path, model: Path, **changes: Any) -> Config:
    warp = {"iterations": 1, "policies": 1, "steps": PROOF_STEPS + 1, **changes.pop("warp", {})}
    return tiny_config(
        make_project(folder),
        model,
        folder / "run",
        warp=warp,
        reward={"function": "raywarp.embedded:vader"},
        **changes,
    )


@pytest.fixture(
    scope="module", params=[("merged", "float32"), ("unmerged", "bfloat16")], ids="-".join
)
def session(
    request: pytest.FixtureRequest,
    ray_cluster: Any,
    tiny_llama: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Session]:
    """vLLM, which passed at the start."""
    mode, dtype = request.param
    before, rollout = (
        traces(),
        {"engine": "vllm", "adapter": mode, "max_new_tokens": 12, "temperature": TEMPERATURE},
    )
    config = config_of(tmp_path_factory.mktemp("effect"), tiny_llama, rollout=rollout, dtype=dtype)
    texts = [(3, 4, 5, 6), (7, 8, 9), (10, 11, 12, 13, 14)]
    with Session(
        config, str(tiny_llama), PROMPT_TOKENS, kinds=Kinds(worker=Meddling), texts=texts
    ) as session:
        yield session
    assert not left_behind(before)


def test_an_adapter_that_was_loaded_alone_acts_beside_none(session: Session) -> None:
    """A step's batch has loaded a policy alone when its effect is asked for."""
    proof = session.proof
    assert proof is not None
    adapter = proof.adapters[0]
    another = Adapter(policy=_half(adapter.parts[0]))
    for alone in (another, adapter):
        ((ref,),) = submit(session.pool, [Request([[3, 4]], [0], alone)])
        session.get(ref)
    answers = session.get(session.pool.logprobs.remote(requests(proof.probe, [SFT, adapter])))
    before, adapted = map(proof.probe.scored, answers)
    found = effect(proof.none, proof.trained[0], before, adapted)
    assert found.slope == pytest.approx(1, abs=0.05)


def test_a_healthy_engine_passes(session: Session) -> None:
    assert session.proof is not None
    found = session.proof.found
    assert found is not None
    exact = session.plan.dtype == "float32"
    assert found.slope == pytest.approx(1, abs=1e-3 if exact else 0.03)
    assert found.error < (1e-3 if exact else 0.01)
    assert found.engine_gap < (1e-3 if exact else 0.05)
    assert found.rms >= 0.5
    assert {token for row in session.proof.probe.sequences for token in row} == set(range(3, 15))


@pytest.mark.parametrize("how", ["none", "stale", "no init", "policy twice", "other", "half"])
def test_an_engine_with_the_wrong_adapter_is_refused(
    session: Session, ray_cluster: Any, how: str
) -> None:
    assert session.proof is not None
    (worker,), (_, policy) = session.workers, session.proof.adapters
    assert policy.policy is not None
    # as large, and another one
    reversed_columns = policy.policy.fetch().map(lambda _, f: f._replace(B=f.B.flip(1)))
    ray_cluster.get(worker.meddle.remote(how, AdapterPart.put(reversed_columns)))
    with pytest.raises(EffectError) as refusal:
        session.examine_workers()
    ray_cluster.get(worker.meddle.remote(""))
    message = str(refusal.value)
    assert (
        f"model={session.model}, rollout.engine=vllm, rollout.adapter={session.engine['adapter']}, "
        in message
    )
    assert f"dtype={session.plan.dtype}, rollout worker 1: " in message
    assert re.search(
        r"adapter its log-probs are 0?\.\d+ nats|[\d.]+ ± [\d.]+ times what it is in the trainer",
        message,
    )
    assert "try rollout.engine=transformers" in message
    session.examine_workers()


def test_an_engine_with_spoilt_weights_is_refused(session: Session, ray_cluster: Any) -> None:
    (worker,) = session.workers
    ray_cluster.get(worker.spoil.remote(1.5))
    with pytest.raises(
        EffectError, match="rollout worker 1: without any adapter its log-probs are"
    ):
        session.examine_workers()
    ray_cluster.get(worker.spoil.remote(1 / 1.5))
    session.examine_workers()


def test_a_points_reward_and_kl_are_of_the_policy_that_was_sampled(
    session: Session, tiny_llama: Path
) -> None:
    """A second computation: the sampled texts under transformers' own float32 model with W + ΔW
    written in, without code of raywarp.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert session.proof is not None
    delta = session.proof.adapters[1].policy
    assert delta is not None
    sft: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    policy: Any = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    for module, (B, A) in delta.fetch().factors.items():
        policy.get_submodule(module).weight.data += B @ A
    prompts = [Prompt(f"prompt {n}", (1, 3 + n % 20, 4 + n % 7), {}) for n in range(160)]
    (pending,) = submit_points(session, [delta.fetch()], prompts, list(range(len(prompts))))
    rollouts = session.get(pending.refs[2:])
    scored, completions = pending.wait(), join(rollouts, pending.request.adapter)
    ratios, gaps = [], []
    for prompt, completion in zip(prompts, completions, strict=True):
        ours, theirs = (
            plain_logprobs(model, prompt.token_ids, completion) for model in (policy, sft)
        )
        ratios.append(float((ours - theirs).sum()))
        gaps.append(float((ours - torch.tensor(completion.logprobs)).abs().mean()))
    # what was sampled from is W + ΔW
    assert max(gaps) < (1e-3 if session.plan.dtype == "float32" else 0.2)
    assert sum(gaps) / len(gaps) < (1e-4 if session.plan.dtype == "float32" else 0.03)
    beyond = torch.tensor(ratios) - torch.tensor(scored.kl)
    assert abs(float(beyond.mean())) < 3 * float(beyond.std()) / len(prompts) ** 0.5
    # so that 3 errors could tell
    assert float(torch.tensor(scored.kl).mean()) > 5 * float(beyond.std()) / len(prompts) ** 0.5
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny_llama)
    decoded = [tokenizer.decode(c.token_ids, skip_special_tokens=True) for c in completions]
    assert [text.strip() for text in scored.texts] == decoded


def plain_logprobs(model: Any, prompt: Sequence[int], completion: Completion) -> torch.Tensor:
    """(T,) log π of a completion's tokens at the sampling temperature."""
    tokens = torch.tensor(completion.token_ids)
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion.token_ids]])).logits[
            0, len(prompt) - 1 : -1
        ]
    logprobs: torch.Tensor = (logits / TEMPERATURE).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    return logprobs


class Forgetting(Meddling):
    """From the second call on, which is about a policy's own adapter, adapters have no effect,
    though the right ones are loaded.
    """

    calls = 0

    def _logprobs(
        self, engine: Engine, requests: Sequence[Request]
    ) -> list[list[tuple[float, ...]]]:
        self.calls += 1
        self.how = "none" if self.calls > 1 else ""
        return super()._logprobs(engine, requests)


@pytest.mark.parametrize("kind", [RolloutWorker, Forgetting])
def test_a_policys_own_adapter_is_examined_again(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path, kind: type[RolloutWorker]
) -> None:
    """At step 25; where it has no effect, the policy is saved and the run stops with the same
    message as at the start.
    """
    config, prompts = (
        config_of(tmp_path, tiny_llama),
        [Prompt(f"prompt {n}", (3, 4, 5 + n), {}) for n in range(8)],
    )
    job, rows = Job(1, 1, "key", Storage(tmp_path / "policies")), []
    with Session(config, str(tiny_llama), 3, kinds=Kinds(worker=kind)) as session:
        events = session.fine_tune([job], session.zero, prompts)
        if kind is Forgetting:
            with pytest.raises(
                EffectError,
                match=r"iteration 1 policy 1 step 25: .*an adapter.*; try lora.target_modules",
            ):
                rows += [event for event in events if event["event"] == "step"]
        else:
            rows += [event for event in events if event["event"] == "step"]
    measured = {row["step"]: row for row in rows if "adapter_effect" in row}
    if kind is Forgetting:
        (checkpoint,) = (tmp_path / "policies").rglob("*25*")
        assert checkpoint.is_dir()
        return
    assert set(measured) == {0, 25}
    for row in measured.values():
        assert row["adapter_effect"] == pytest.approx(1, abs=1e-3)
        assert row["engine_gap"] < 1e-3


def test_a_worker_that_was_started_again_is_examined_before_its_work_counts(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """Its first process is right, the one that takes its place is not. The pool was started again
    before, and had forgotten the proof.
    """

    class Relapsing(Meddling):
        def pid(self) -> int:
            return os.getpid()

        def nap(self) -> None:
            time.sleep(1)

        def _start_engine(self) -> Engine:
            self.how = "none" if (tmp_path / "started").exists() else ""
            (tmp_path / "started").touch()
            return super()._start_engine()

    config = config_of(tmp_path, tiny_llama)
    events: list[tuple[str, str]] = []
    with Session(
        config,
        str(tiny_llama),
        3,
        kinds=Kinds(worker=Relapsing),
        report=lambda event, **details: events.append((event, details["what"])),
    ) as session:
        ((ref,),) = submit(session.pool, [Request([[3, 4]], [0])])
        assert len(join([session.get(ref)], SFT)) == 1
        for _ in range(3):  # whoever waits looks after the actors
            session.get(session.workers[0].nap.remote())
        pool = session.get(session.pool.pulse.remote()).process.id
        os.kill(pool, signal.SIGKILL)
        patience = Patience(120)
        while ("recovered", "rollout pool") not in events:
            assert patience.lasts()
            session.get(session.workers[0].nap.remote())
        os.kill(session.get(session.workers[0].pid.remote()), signal.SIGKILL)
        ((ref,),) = submit(session.pool, [Request([[3, 4]], [0])])
        with pytest.raises(
            RayTaskError,
            match="the sampler does not run the policy that is trained: .* rollout worker 1",
        ):
            session.get(ref)


def test_a_run_that_starts_with_a_wrong_engine_takes_no_step(
    ray_cluster: Any, tiny_llama: Path, tmp_path: Path
) -> None:
    """The session does not start, and leaves nothing behind."""

    class Deaf(Meddling):
        how = "none"

    before = traces()
    config = config_of(tmp_path, tiny_llama)
    refusal = (
        r"rollout.engine=transformers, .*rollout worker 1: .*0.00 ± 0.00 times what it is in the"
        r" trainer"
    )
    with (
        pytest.raises(EffectError, match=refusal),
        Session(config, str(tiny_llama), 3, kinds=Kinds(worker=Deaf)),
    ):
        pass
    assert not left_behind(before)
