"""The effect of an adapter in an engine, compared with its effect in the trainer.

The comparison shows whether an engine runs the policy that the trainer holds. It uses log-probs of
fixed sequences.

A log-ratio is a token's log-prob with an adapter minus that without one, in nats. n is the number
of scored tokens. z is the trainer's float32 log-ratio, t the trainer's in its own precision, and s
the sampler's.

The slope of s relative to t is Σ z·s / Σ z·t, with z as the instrument. Both s and t carry the
noise of their precision, so a regression of one on the other would be biased towards 0. The few
tokens with the largest errors are left out of both sums.

This module imports neither Ray nor torch: the pool judges effects too, and does not load torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raywarp.config.schema import ConfigError

SLOPES = (0.9, 1.1)  # of an engine that runs the trainer's policy
PRECISE = 0.03  # standard error up to which a slope is judged
TRIMMED, TRIMMINGS = 0.01, 5  # share of the tokens that the slope leaves out, and its rounds
RMS = 0.5  # nats, of log-ratios that are large enough to be judged
# The allowed distance is NOISE times the noise of the precision, plus FLOOR nats per token.
NOISE, FLOOR = 4.0, 0.02


class EffectError(ConfigError):
    """The sampler does not run the trained policy.

    The message names model, engine and mode, and what to try.
    """


@dataclass(frozen=True)
class Probe:
    """Sequences to score.

    Attributes:
        sequences: token ids of each.
        heads: number of tokens at the start of each that are not scored; at least 1.
    """

    sequences: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]

    def scored(self, logprobs: Sequence[Sequence[float]]) -> list[float]:
        """Return the (n,) log-probs of the scored tokens, sequence after sequence.

        Args:
            logprobs: for each sequence, the log-prob of every token but the first.
        """
        return [
            value
            for row, head in zip(logprobs, self.heads, strict=True)
            for value in row[head - 1 :]
        ]


@dataclass(frozen=True)
class Trainer:
    """The trainer's (n,) log-probs of a probe.

    Attributes:
        own: in the trainer's own precision.
        exact: in float32.
    """

    own: list[float]
    exact: list[float]

    @property
    def noise(self) -> float:
        """The mean distance that the precision explains, in nats per token."""
        return distance(self.own, self.exact)


@dataclass(frozen=True)
class Effect:
    """What an adapter does in an engine.

    Attributes:
        slope: of the sampler's log-ratios relative to the trainer's.
        error: the slope's standard error.
        rms: root mean square of the float32 log-ratios, in nats.
        engine_gap: mean |sampler − trainer| without the adapter, in nats per token.
        adapted_gap: the same with the adapter.
        noise: the part of engine_gap that the trainer's precision explains.
        adapted_noise: the part of adapted_gap that the trainer's precision explains.
        least: the smallest rms at which the effect is judged.
    """

    slope: float
    error: float
    rms: float
    engine_gap: float
    adapted_gap: float
    noise: float
    adapted_noise: float
    least: float = RMS

    @property
    def is_judged(self) -> bool:
        """Whether the log-ratios are large enough and the slope is precise enough to judge."""
        return self.rms >= self.least and self.error <= PRECISE

    def doubt(self) -> tuple[bool, float]:
        """Return the sort key of several effects.

        Judged effects come first, ordered by the distance of their slope from 1. The others come
        last.
        """
        return not self.is_judged, abs(self.slope - 1)

    def described(self) -> str:
        return (
            f"the effect of an adapter in it is {self.slope:.2f} ± {self.error:.2f} times what it"
            " is in the trainer"
        )

    def metrics(self) -> dict[str, float]:
        """Return the values for a row of metrics.jsonl, without those that are not finite."""
        found = {
            "adapter_effect": self.slope,
            "adapter_effect_error": self.error,
            "engine_gap": self.engine_gap,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def fault(self) -> str:
        """Return a description of the fault; empty if there is none or it cannot be judged."""
        if not self.engine_gap <= allowed(self.noise):
            return (
                f"without any adapter its log-probs are {self.engine_gap:.3g} nats per token from"
                f" the trainer's, of which the precision explains {self.noise:.2g}"
            )
        if self.is_judged and not SLOPES[0] <= self.slope <= SLOPES[1]:
            return f"{self.described()} (it must be {SLOPES[0]:g} to {SLOPES[1]:g})"
        if self.rms >= self.least and not self.adapted_gap <= allowed(self.adapted_noise):
            return (
                f"with an adapter its log-probs are {self.adapted_gap:.3g} nats per token from the"
                f" trainer's, of which the precision explains {self.adapted_noise:.2g};"
                f" {self.described()}"
            )
        return ""


@dataclass(frozen=True)
class Sampler:
    """The sampler under examination.

    Attributes:
        model: folder or hub id.
        engine: rollout.engine.
        mode: rollout.adapter, with auto resolved.
        dtype: of the weights.
    """

    model: str
    engine: str
    mode: str
    dtype: str

    def refusal(self, who: str, fault: str) -> EffectError:
        """Return the error that ends a run, in one line.

        Args:
            who: the process, as in "rollout worker 1".
            fault: from Effect.fault.
        """
        remedies = [
            *(["rollout.engine=transformers"] if self.engine != "transformers" else []),
            *(["dtype=float32"] if self.dtype != "float32" else []),
            "lora.target_modules=[q_proj, k_proj, v_proj, o_proj] (or what the model calls these)",
        ]
        return EffectError(
            f"the sampler does not run the policy that is trained: model={self.model},"
            f" rollout.engine={self.engine}, rollout.adapter={self.mode}, dtype={self.dtype},"
            f" {who}: {fault}; try"
            f" {', '.join(remedies[:-1])}{' or ' * (len(remedies) > 1)}{remedies[-1]}; also look"
            " for files of the model that changed, or memory that fails, on the worker's node"
        )


def effect(
    base: Trainer, adapted: Trainer, sampled_base: Sequence[float], sampled: Sequence[float]
) -> Effect:
    """Return how an adapter's effect in the sampler compares with that in the trainer.

    Args:
        base, adapted: the trainer without and with the adapter.
        sampled_base, sampled: (n,) log-probs of the sampler without and with the adapter.
    """
    instrument, trainers = (
        differences(adapted.exact, base.exact),
        differences(adapted.own, base.own),
    )
    value, error = slope(instrument, trainers, differences(sampled, sampled_base))
    return Effect(
        slope=value,
        error=error,
        rms=root_mean_square(instrument),
        engine_gap=distance(sampled_base, base.own),
        adapted_gap=distance(sampled, adapted.own),
        noise=base.noise,
        adapted_noise=adapted.noise,
    )


def slope(
    instrument: Sequence[float], ours: Sequence[float], theirs: Sequence[float]
) -> tuple[float, float]:
    """Return the slope Σ z·theirs / Σ z·ours and its standard error by the delta method.

    The error is √(Σ z²·e²) / |Σ z·ours| with e = theirs − slope·ours.

    The sums leave out the share TRIMMED of the tokens, those with the largest |z·e| (least trimmed
    squares, Rousseeuw 1984). In bfloat16, one token in a hundred is nats off, mostly where a
    sequence is two or three tokens long, and such tokens would be 99 % of the error.

    Args:
        instrument: (n,) z.
        ours, theirs: (n,) log-ratios.

    Returns:
        slope and error; (nan, inf) where Σ z·ours is 0.
    """
    tokens = list(zip(instrument, ours, theirs, strict=True))
    value = _ratio(tokens)
    for _ in range(TRIMMINGS):
        tokens.sort(key=lambda token: _influence(token, value))
        kept = tokens[: len(tokens) - int(TRIMMED * len(tokens))]
        value = _ratio(kept)
    total = abs(math.fsum(z * t for z, t, _ in kept))
    spread = math.sqrt(math.fsum(_influence(token, value) ** 2 for token in kept))
    return value, spread / total if total else math.inf


def _ratio(tokens: Sequence[tuple[float, float, float]]) -> float:
    total = math.fsum(z * t for z, t, _ in tokens)
    return math.fsum(z * s for z, _, s in tokens) / total if total else math.nan


def _influence(token: tuple[float, float, float], value: float) -> float:
    z, ours, theirs = token
    return abs(z * (theirs - value * ours))


def allowed(noise: float) -> float:
    """Return the nats per token by which an engine may differ from the trainer."""
    return NOISE * noise + FLOOR


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Return the mean |difference|."""
    return math.fsum(map(abs, differences(one, other))) / len(one)


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
