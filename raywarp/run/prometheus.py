"""A run's metrics on Ray's own endpoints, for Prometheus and the dashboard.

Their names are ray_raywarp_…, with the tags run, iteration and policy. Ray's agents publish the
measurements of a process every 10 seconds, as long as the process lives. metrics.jsonl has every
step.
"""

import string
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import ray
from ray.util.metrics import Counter, Gauge

POLICY = ("run", "iteration", "policy")
# Metric → the entry of a step's row that it shows, and its meaning.
GAUGES = {
    "raywarp_step": ("step", "last finished optimiser step, counted from 0"),
    "raywarp_reward": ("reward", "mean reward of the step's completions"),
    "raywarp_kl_anchor_nats": ("kl_anchor", "KL to the anchor (warp.anchor), nats per completion"),
    "raywarp_kl_sft_nats": (
        "kl_sft",
        "KL to the SFT model, nats per completion, where it was measured",
    ),
    "raywarp_adapter_effect": (
        "adapter_effect",
        "an adapter's effect in the sampler over that in the trainer, where it was measured",
    ),
    "raywarp_engine_gap_nats": (
        "engine_gap",
        "sampler and trainer apart without an adapter, nats per token, where it was measured",
    ),
    "raywarp_rollout_seconds": ("rollout_seconds", "seconds of generation"),
    "raywarp_update_seconds": ("update_seconds", "seconds of the optimiser step"),
    "raywarp_trainer_busy_ratio": (
        "trainer_busy",
        "share of the time that the policy's trainer worked, 0 to 1",
    ),
    "raywarp_pool_busy_ratio": (
        "pool_busy",
        "share of the time that the rollout workers worked, 0 to 1",
    ),
}


def step_seconds(row: Mapping[str, Any]) -> float:
    """Return the seconds of a step, from the wait for rollouts to the end of the update.

    Args:
        row: of metrics.jsonl.
    """
    seconds: float = row["wait_seconds"] + row["request_seconds"] + row["update_seconds"]
    return seconds


def _tag(text: str) -> str:
    """Return a tag's value in ASCII, which is all that Ray 2.60 takes, with %XX for the rest."""
    return quote(text, safe=string.punctuation + " ")


class RunMetrics:
    """The gauges and counters of one run.

    They are made once Ray is running. Without Ray, nothing is published.

    Args:
        run: name of the run, the tag that distinguishes several runs on one cluster.
    """

    def __init__(self, run: str):
        self.run, self._is_made = _tag(run), False

    def _make(self) -> bool:
        """Make the metrics if Ray is running, and return whether they exist."""
        if self._is_made or not ray.is_initialized():
            return self._is_made
        self._is_made = True
        self._gauges = {
            name: Gauge(name, description, POLICY) for name, (_, description) in GAUGES.items()
        }
        self._step_seconds = Gauge(
            "raywarp_step_seconds",
            "seconds of a step: waiting for rollouts, request and update",
            POLICY,
        )
        self._speed = Gauge(
            "raywarp_tokens_per_second", "sampled and trained tokens per second of the step", POLICY
        )
        self._steps = Counter(
            "raywarp_steps_total", "optimiser steps done, by all policies", POLICY
        )
        self._tokens = Counter("raywarp_tokens_total", "tokens sampled and trained on", POLICY)
        self._faults = Counter(
            "raywarp_faults_total",
            "actors and nodes that died or hung, and were replaced",
            ("run", "what", "cause"),
        )
        return True

    def step(self, row: Mapping[str, Any]) -> None:
        """Publish one row of metrics.jsonl."""
        if not self._make():
            return
        tags = {"run": self.run, "iteration": str(row["iteration"]), "policy": str(row["policy"])}
        for name, (entry, _) in GAUGES.items():
            if entry in row:
                self._gauges[name].set(row[entry], tags)
        seconds = step_seconds(row)
        self._step_seconds.set(seconds, tags)
        self._speed.set(row["tokens"] / seconds, tags)
        self._steps.inc(1, tags)
        self._tokens.inc(row["tokens"], tags)

    def fault(self, what: str, cause: str) -> None:
        """Count a fault: an actor died or hung, or a file was damaged.

        Args:
            what: the actor or file.
            cause: why it happened.
        """
        if self._make():
            self._faults.inc(1, {"run": self.run, "what": _tag(what), "cause": _tag(cause)})
