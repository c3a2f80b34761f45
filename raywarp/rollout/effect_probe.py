"""The trainer's side of the proof by effect: sequences, a synthetic adapter, and its log-probs."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch

from raywarp.algorithm.deltas import AdapterDelta, add, scale
from raywarp.algorithm.factors import Factors, norm
from raywarp.data.text import Completion
from raywarp.identity import derive_seed
from raywarp.model.adapted import INIT, AdaptedModel
from raywarp.model.batches import collate, micro_batches
from raywarp.model.probe import check_range
from raywarp.rollout.effect import RMS, EffectError, Probe, Trainer, differences, root_mean_square

# Nats. Above the largest, log-ratios no longer resemble those of a trained policy.
WANTED_RMS, LARGEST_RMS = 0.65, 0.9
# The first and the largest ‖ΔW‖ / ‖W‖, and how many sizes are tried.
FIRST_SIZE, LARGEST_SIZE, TRIES = 0.02, 1.0, 16
NO_EFFECT = 0.01  # nats: below this RMS an adapter of the largest size has no effect
USUAL = 64  # tokens of each sequence except the first
LOGITS = 2**28  # at most, for one sequence: vLLM holds them all at once, in float32


@dataclass(frozen=True)
class Reference:
    """What an engine is compared with.

    The synthetic adapter has two halves, init and policy. The policy alone is large enough to be
    judged. Where the model cannot be moved that far, the policy is as large as the base's own
    weights. This happens where a model scales its logits down, for example.

    Attributes:
        probe: the scored sequences.
        init, policy: the two halves.
        none: the trainer without an adapter.
        both: the trainer with both halves.
        alone: the trainer with the policy.
    """

    probe: Probe
    init: AdapterDelta
    policy: AdapterDelta
    none: Trainer
    both: Trainer
    alone: Trainer


def reference(model: AdaptedModel, probe: Probe, seed: int, budget: int | None = None) -> Reference:
    """Make the synthetic adapter and score the probe. Replaces the model's init.

    Args:
        model: the trainer's model.
        probe: the sequences to score.
        seed: of the adapter's random factors.
        budget: the largest number of tokens in a micro-batch.

    Raises:
        EffectError: no size of the adapter changes the log-probs.
    """
    none = score(model, probe, [], budget)
    init, policy = (
        synthetic(model, derive_seed(seed, "effect", part)) for part in ("init", "policy")
    )
    size, exact = _sized(model, probe, policy, none, budget)
    init, policy = scale(init, size), scale(policy, size)
    alone = Trainer(
        exact if model.dtype == torch.float32 else logprobs(model, probe, [INIT], budget), exact
    )
    model.set_init(add(init, policy))
    return Reference(probe, init, policy, none, score(model, probe, [INIT], budget), alone)


def make_probe(
    texts: Sequence[Sequence[int]], vocabulary: int, longest: int, tokens: int, seed: int
) -> Probe:
    """Return sequences with at least `tokens` scored tokens.

    Their tokens come from the texts, or from the whole vocabulary where there are no texts.

    The first sequence is as long as the run's sequences can be, so it exceeds every window that
    they exceed. The others come in pairs with the same head, which the trainer may lay out in one
    row. Half of them are running text, and half are tokens in random order. All begin as a text
    does.

    Args:
        texts: token ids of each text.
        vocabulary: number of token ids.
        longest: number of tokens that the engine can score.
        tokens: number of scored tokens.
        seed: of the random choices.
    """
    generator = random.Random(derive_seed(seed, "probe"))
    texts = [tuple(text) for text in texts if text]
    pool = sorted({token for text in texts for token in text}) or range(vocabulary)
    beginnings = [text[0] for text in texts] or pool
    noise: Iterator[int] = iter(lambda: generator.choice(pool), -1)
    text = _running(texts, generator) if texts else noise
    first = max(2, min(longest, LOGITS // vocabulary))
    sequences, heads = [(generator.choice(beginnings), *_take(text, first - 1))], [1]
    for source in cycle((noise, text)):
        if sum(map(len, sequences)) - sum(heads) >= tokens:
            return Probe(tuple(sequences), tuple(heads))
        length = generator.randint(max(2, min(first, USUAL) // 2), min(first, USUAL))
        head = (generator.choice(beginnings), *_take(source, max(0, length // 4 - 1)))
        sequences += [head + _take(source, length - len(head)) for _ in range(2)]
        heads += [len(head)] * 2
    raise AssertionError("a cycle has no end")


def _running(texts: Sequence[Sequence[int]], generator: random.Random) -> Iterator[int]:
    """Yield the texts' tokens without end, the texts in random order."""
    while True:
        yield from generator.choice(texts)


def _take(tokens: Iterator[int], count: int) -> tuple[int, ...]:
    return tuple(next(tokens) for _ in range(count))


def synthetic(model: AdaptedModel, seed: int) -> AdapterDelta:
    """Return random factors for every adapted module, with ‖ΔW‖ = ‖W‖.

    They have the run's rank, and both B and A are non-zero.
    """
    wanted = model.weight_norms()

    def factors(module: str, zero: Factors) -> Factors:
        generator = torch.Generator().manual_seed(derive_seed(seed, module))
        B = torch.randn(len(zero.B), model.lora.rank, generator=generator)
        A = torch.randn(model.lora.rank, zero.A.shape[1], generator=generator)
        return Factors(B * ((wanted[module] or 1.0) / norm(Factors(B, A))), A)

    return model.zero_delta().map(factors)


def score(
    model: AdaptedModel, probe: Probe, adapters: Sequence[str], budget: int | None = None
) -> Trainer:
    """Return the trainer's log-probs, in its own precision and in float32."""
    own = logprobs(model, probe, adapters, budget)
    return Trainer(
        own,
        (
            own
            if model.dtype == torch.float32
            else logprobs(model, probe, adapters, budget, exact=True)
        ),
    )


def logprobs(
    model: AdaptedModel,
    probe: Probe,
    adapters: Sequence[str],
    budget: int | None = None,
    exact: bool = False,
) -> list[float]:
    """Return the (n,) log-probs at temperature 1 of the probe's scored tokens.

    Args:
        model: the trainer's model.
        probe: the sequences to score.
        adapters: names of the model's adapters that take part.
        budget: the largest number of tokens in a micro-batch.
        exact: use float32, and a row of its own for each sequence. Otherwise score as in training.

    Raises:
        ConfigError: float16 is too narrow for the model.
    """
    split = [
        (row[:head], row[head:]) for row, head in zip(probe.sequences, probe.heads, strict=True)
    ]
    completions = [Completion(rest, (0.0,) * len(rest), "", False) for _, rest in split]
    batch = collate([head for head, _ in split], completions).to(model.device)
    values = torch.zeros_like(batch.mask)
    for part in micro_batches(batch, budget, None if exact else model.pairs_per_token):
        values[part.completions] = (
            model.exact_logprobs(part, adapters)
            if exact
            else model.logprobs(part, model.states(part, adapters), temperature=1.0)
        )
    if not exact:
        check_range(model.source, model.dtype, values)
    return [
        value
        for row, (_, rest) in zip(values.tolist(), split, strict=True)
        for value in row[: len(rest)]
    ]


def _sized(
    model: AdaptedModel, probe: Probe, unit: AdapterDelta, none: Trainer, budget: int | None
) -> tuple[float, list[float]]:
    """Return a size of the adapter with large enough float32 log-ratios, and its log-probs.

    The size is a factor. The search uses secants within a bracket.
    """
    size, low, high = FIRST_SIZE, 0.0, math.inf
    for _ in range(TRIES):
        model.set_init(scale(unit, size))
        exact = logprobs(model, probe, [INIT], budget, exact=model.dtype != torch.float32)
        rms = root_mean_square(differences(exact, none.exact))
        if RMS <= rms <= LARGEST_RMS or (NO_EFFECT < rms < RMS and size == LARGEST_SIZE):
            return size, exact
        if rms < RMS and size == LARGEST_SIZE:
            break
        low, high = (size, high) if rms < RMS else (low, size)
        guess = size * min(WANTED_RMS / max(rms, 1e-6), 10.0) if math.isfinite(rms) else 0.0
        size = min(
            guess if low < guess < high else (low + min(high, 10 * low or high)) / 2, LARGEST_SIZE
        )
    raise EffectError(
        f"no adapter on lora.target_modules={model.lora.target_modules!r} could be found that"
        f" changes the log-probs of {model.source} by {RMS} to {LARGEST_RMS} nats, so it cannot be"
        " proven that adapters act: do these modules take part in a forward pass?"
    )
