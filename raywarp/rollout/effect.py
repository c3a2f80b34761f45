"""Whether an engine runs the policy that the trainer holds, judged by what an adapter does to the
log-probs of fixed sequences.

Log-ratio: a token's log-prob with an adapter less that without one, in nats. n scored tokens; z is
the trainer's float32 log-ratio, t the trainer's in its own precision, s the sampler's.

The slope of s relative to t is Σ z·s / Σ z·t: z is the instrument. Both s and t carry the noise of
their precision, and a regression of one on the other would be biased towards 0. No module here
knows Ray or torch: the pool, which judges too, has no torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from raywarp.config.schema import ConfigError

SLOPES = (0.9, 1.1)  # of an engine that runs the trainer's policy
PRECISE = 0.03  # standard error up to which a slope is judged
RMS = 0.5  # nats, of log-ratios that are large enough to be judged
NOISE, FLOOR = (
    4.0,
    0.02,
    # an engine may be so many times the precision's own noise away, and so many nats per token
    # besides
)


class EffectError(ConfigError):
    """The sampler does not run the policy that is trained; the message names model, engine and
    mode, and what to try.
    """


@dataclass(frozen=True)
class Probe:
    """Sequences of token ids to score. heads: how many tokens at the start of each are not scored,
    at least one.
    """

    sequences: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]

    def scored(self, logprobs: Sequence[Sequence[float]]) -> list[float]:
        """(n,) the scored tokens' log-probs of all sequences in a row.

        Args:
            logprobs: for each sequence the log-prob of every token but the first.
        """
        return [
            value
            for row, head in zip(logprobs, self.heads, strict=True)
            for value in row[head - 1 :]
        ]


@dataclass(frozen=True)
class Trainer:
    """(n,) log-probs of a probe by the trainer. own: in its own precision. exact: in float32."""

    own: list[float]
    exact: list[float]

    @property
    def noise(self) -> float:
        """Nats per token that the precision explains."""
        return distance(self.own, self.exact)


@dataclass(frozen=True)
class Effect:
    """What an adapter does in an engine.

    slope, error: of the sampler's log-ratios relative to the trainer's, and its standard error.
    rms: of the float32 log-ratios, nats.
    engine_gap, adapted_gap: mean |sampler − trainer| in nats per token, without and with the
    adapter.
    noise, adapted_noise: how much of these the trainer's precision explains.
    least: the RMS from which on the effect is judged.
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
        """Whether the log-ratios are large and the slope precise enough to tell."""
        return self.rms >= self.least and self.error <= PRECISE

    def doubt(self) -> tuple[bool, float]:
        """By which several are sorted: those that cannot be told come last, then those further from
        1.
        """
        return not self.is_judged, abs(self.slope - 1)

    def described(self) -> str:
        return (
            f"the effect of an adapter in it is {self.slope:.2f} ± {self.error:.2f} times what it"
            " is in the trainer"
        )

    def metrics(self) -> dict[str, float]:
        """For a row of metrics.jsonl; what is not known is left out."""
        found = {
            "adapter_effect": self.slope,
            "adapter_effect_error": self.error,
            "engine_gap": self.engine_gap,
        }
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def fault(self) -> str:
        """What is wrong, in words; empty where nothing is, or where it cannot be told."""
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
    """What is on trial. model: folder or hub id. engine: rollout.engine. mode: what rollout.adapter
    became. dtype: of the weights.
    """

    model: str
    engine: str
    mode: str
    dtype: str

    def refusal(self, who: str, fault: str) -> EffectError:
        """The error that ends a run, in one line.

        Args:
            who: the process, as in "rollout worker 1".
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
    """Compare the sampler with the trainer.

    Args:
        base, adapted: the trainer without and with the adapter.
        sampled_base, sampled: (n,) the sampler's log-probs, likewise.
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
    """Return Σ z·theirs / Σ z·ours and its standard error by the delta method: √(Σ z²·e²) / |Σ
    z·ours|, e = theirs − slope·ours.

    Args:
        instrument, ours, theirs: (n,) each. Where Σ z·ours is 0, slope and error are not known:
            (nan, inf).
    """
    total = math.fsum(z * t for z, t in zip(instrument, ours, strict=True))
    if not total:
        return math.nan, math.inf
    value = math.fsum(z * s for z, s in zip(instrument, theirs, strict=True)) / total
    residuals = [s - value * t for s, t in zip(theirs, ours, strict=True)]
    return value, math.sqrt(
        math.fsum((z * e) ** 2 for z, e in zip(instrument, residuals, strict=True))
    ) / abs(total)


def allowed(noise: float) -> float:
    """Nats per token that an engine may be away from the trainer."""
    return NOISE * noise + FLOOR


def differences(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(one, other, strict=True)]


def distance(one: Sequence[float], other: Sequence[float]) -> float:
    """Mean |difference|."""
    return math.fsum(map(abs, differences(one, other))) / len(one)


def root_mean_square(values: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in values) / len(values))
