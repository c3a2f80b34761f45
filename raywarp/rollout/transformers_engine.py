"""transformers as the engine of a rollout worker, where vLLM does not exist.

It is slower than vLLM, and its completions follow the same distribution. Its adapted layers are the
trainer's own.

Each completion draws its random numbers from its own seed, so they do not depend on the rest of
the batch. N completions, P longest prompt, T longest completion, V vocabulary.
"""

import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors
from raywarp.cluster.turns import InTurns
from raywarp.data.models import load_model
from raywarp.data.text import Completion
from raywarp.model.backbone import choose_and_set_attention, find_head, keep_layers_unscaled
from raywarp.model.lengths import Lengths
from raywarp.model.linear import AdaptedLinear
from raywarp.model.probe import close, probe
from raywarp.model.quantised import NF4, round_layers, stored_codes
from raywarp.rollout.base_weights import BaseWeights
from raywarp.rollout.engine import EngineSettings, Loader, adapter_mode
from raywarp.rollout.loaders import MergedLoader, UnmergedLoader
from raywarp.rollout.protocol import Adapter, Request

_FORCED = 3  # tokens of a probe that are fed through the cache
ROWS = 64  # completions that run at once
SCORED = 1024  # tokens scored at once, or one sequence, since their logits are held


class TransformersEngine:
    """A causal language model with adapters beside its weights, or merged into them.

    Merging is for float32.
    """

    def __init__(self, settings: EngineSettings):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.settings, self.adapter_mode = settings, adapter_mode(settings.rollout, settings.gpu)
        # Ray may count a GPU that torch does not see.
        self.device = torch.device("cuda" if settings.gpu and torch.cuda.is_available() else "cpu")
        remote = settings.trust_remote_code
        what = f"model={settings.model}"
        load = partial(
            load_model, AutoModelForCausalLM, settings.model, what, trust_remote_code=remote
        )
        dtype = getattr(torch, settings.dtype)
        codes = stored_codes(load, dtype) if settings.quantize == NF4 else {}
        model = load(dtype=dtype)
        if settings.quantize == NF4:
            round_layers(model, codes)  # in 4 bits, every token would dequantise all weights again
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=remote)
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        self.layers: dict[str, AdaptedLinear] = {}
        self.loader: Loader = UnmergedLoader(self._take)
        if self.adapter_mode == "merged":
            self.loader = MergedLoader(BaseWeights(self.parameters.items, dtype), self._install)
        declared = _end_tokens(
            self.tokenizer.eos_token_id, self.model.generation_config.eos_token_id
        )
        self.end = set() if settings.rollout.ignore_eos else declared
        self._passes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        keep_layers_unscaled(self.model)
        self._lengths = Lengths(self.model)
        choose_and_set_attention(
            self.model, settings.model, find_head(self.model, self._lengths), self._lengths
        )
        self.cached = self._may_cache()

    def sample(self, requests: Sequence[Request]) -> InTurns[list[list[Completion]]]:
        """Return the completions of each request. The loader has loaded their adapters."""
        answers = []
        for request in requests:
            self.activate(request.adapter)
            answers.append(
                [
                    completion
                    for part in request.cut(ROWS)
                    for completion in self._complete(part.prompts, part.seeds)
                ]
            )
            yield
        return answers

    def logprobs(self, requests: Sequence[Request]) -> InTurns[list[list[tuple[float, ...]]]]:
        """Return log-probs as Engine.logprobs does."""
        rows = max(
            1, SCORED // max(len(prompt) for request in requests for prompt in request.prompts)
        )
        answers = []
        for request in requests:
            self.activate(request.adapter)
            answers.append([row for part in request.cut(rows) for row in self._score(part.prompts)])
            yield
        return answers

    def capacity(self) -> int:
        return ROWS

    def sleep(self) -> None:
        self.model.to("cpu")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        self.model.to(self.device)

    def close(self) -> None:
        """Do nothing, since there is nothing to stop."""

    def activate(self, adapter: Adapter) -> None:
        """Make this loaded adapter take part from now on."""
        slot = self.loader.request(adapter)
        for layer in self.layers.values():
            layer.activate([str(slot)] if str(slot) in layer.adapters else [])

    def _take(
        self, new: Mapping[int, AdapterDelta], kept: Collection[int]
    ) -> dict[int, AdapterDelta]:
        """Hold new adapters by their slots, besides those in the slots that are kept.

        Returns:
            what the layers hold in the new slots.
        """
        stay = {str(slot) for slot in kept}
        for layer in self.layers.values():
            for old in layer.adapters.keys() - stay:
                del layer.adapters[old]
        for slot, delta in new.items():
            for module, f in delta.factors.items():
                held = self._layer(module).add(str(slot), f.rank, 1.0)
                held.A.data.copy_(f.A)
                held.B.data.copy_(f.B)
        return {
            slot: replace(delta, factors=self._held(str(slot), delta.factors))
            for slot, delta in new.items()
        }

    def _held(self, slot: str, modules: Iterable[str]) -> dict[str, Factors]:
        held = {module: self.layers[module].adapters[slot] for module in modules}
        return {
            module: Factors(adapter.B.data.cpu(), adapter.A.data.cpu())
            for module, adapter in held.items()
        }

    def _layer(self, module: str) -> AdaptedLinear:
        if module not in self.layers:
            base: Any = self.model.get_submodule(module)
            self.layers[module] = AdaptedLinear(base)
            self.model.set_submodule(module, self.layers[module])
        return self.layers[module]

    def _install(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        for name, weight in weights:
            self.parameters[name].copy_(weight)

    @torch.inference_mode()
    def _may_cache(self) -> bool:
        """Return whether padded prompts and a cache give the model's own logits.

        Its own logits are those of whole sequences, each alone. The probe measures this.
        """
        batch = probe(self.model)
        answers = batch.responses[:, :_FORCED]
        try:
            ids, attention = _left_padded(batch.prompts, self.device)
            logits, cache = self._pass(ids, attention, None)
            for n in range(_FORCED):
                attention = torch.cat([attention, torch.ones_like(attention[:, :1])], dim=1)
                logits, cache = self._pass(answers[:, n : n + 1], attention, cache)
        # The model's own code may not know this cache or mask. Any exception means no.
        except Exception:
            return False
        whole = [
            [*prompt, *answer]
            for prompt, answer in zip(batch.prompts, answers.tolist(), strict=True)
        ]
        return close(logits, torch.stack([logits[-1] for logits in self._alone(whole)]))

    def _pass(self, ids: Tensor, attention: Tensor, cache: Any) -> tuple[Tensor, Any]:
        """Return the (N, V) logits of each row's next token, and the cache with these ids in it."""
        positions = (attention.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        arguments: dict[str, Any] = {"position_ids": positions} if self._passes_positions else {}
        output = self.model(
            input_ids=ids,
            attention_mask=attention,
            past_key_values=cache,
            use_cache=True,
            **arguments,
        )
        return output.logits[:, -1], output.past_key_values

    def _alone(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the (L, V) logits of each whole sequence, without a cache or padding.

        Sequences of equal length share a pass.
        """
        found: dict[int, Tensor] = {}
        for length in {len(sequence) for sequence in sequences}:
            chosen = [n for n, sequence in enumerate(sequences) if len(sequence) == length]
            self._lengths.restore()
            logits = self.model(
                input_ids=torch.tensor([sequences[n] for n in chosen], device=self.device),
                use_cache=False,
            ).logits
            found |= dict(zip(chosen, logits, strict=True))
        return [found[n] for n in range(len(sequences))]

    @torch.inference_mode()
    def _complete(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Completion]:
        rollout, end = (
            self.settings.rollout,
            torch.tensor(sorted(self.end), dtype=torch.long, device=self.device),
        )
        uniform = uniform_numbers(seeds, rollout.max_new_tokens).to(self.device)
        ids, attention = _left_padded(prompts, self.device)
        sequences = [list(prompt) for prompt in prompts]
        finished = torch.zeros(len(prompts), dtype=torch.bool, device=self.device)
        tokens, logprobs, cache = [], [], None
        self._lengths.restore()
        for step in range(rollout.max_new_tokens):
            if self.cached:
                logits, cache = self._pass(ids, attention, cache)
            else:
                logits = torch.stack([logits[-1] for logits in self._alone(sequences)])
            chosen, logprob = draw(logits, rollout.temperature, uniform[:, step])
            tokens.append(chosen)
            logprobs.append(logprob)
            finished |= torch.isin(chosen, end)
            if rollout.stop:
                self._stop(prompts, torch.stack(tokens, 1).tolist(), finished)
            if bool(finished.all()):
                break
            ids = chosen[:, None]
            attention = torch.cat([attention, torch.ones_like(ids)], dim=1)
            sequences = [
                [*sequence, token]
                for sequence, token in zip(sequences, chosen.tolist(), strict=True)
            ]
        rows = zip(
            prompts,
            torch.stack(tokens, 1).tolist(),
            torch.stack(logprobs, 1).tolist(),
            strict=True,
        )
        return [self._completion(*row) for row in rows]

    def _stop(
        self, prompts: Sequence[Sequence[int]], tokens: list[list[int]], finished: Tensor
    ) -> None:
        """Mark the rows as finished whose text has come to a stop string."""
        for n in torch.nonzero(~finished)[:, 0].tolist():
            text = following(self.tokenizer, prompts[n], tokens[n])
            finished[n] = stop_place(text, self.settings.rollout.stop or ()) is not None

    @torch.inference_mode()
    def _score(self, prompts: Sequence[Sequence[int]]) -> list[tuple[float, ...]]:
        """Score whole sequences, laid out as prompts are where that gives the same result."""
        scored = []
        for logits, prompt in zip(
            self._padded(prompts) if self.cached else self._alone(prompts), prompts, strict=True
        ):
            logprobs, tokens = (
                logits[:-1].float().log_softmax(-1),
                torch.tensor(prompt[1:], device=self.device),
            )
            scored.append(tuple(logprobs.gather(-1, tokens[:, None])[:, 0].tolist()))
        return scored

    def _padded(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the (L, V) logits of each whole sequence, from one padded pass."""
        ids, attention = _left_padded(prompts, self.device)
        arguments: dict[str, Any] = (
            {"position_ids": (attention.cumsum(1) - 1).clamp(min=0)}
            if self._passes_positions
            else {}
        )
        logits = self.model(
            input_ids=ids, attention_mask=attention, use_cache=False, **arguments
        ).logits
        return [row[-len(prompt) :] for row, prompt in zip(logits, prompts, strict=True)]

    def _completion(
        self, prompt: Sequence[int], tokens: list[int], logprobs: list[float]
    ) -> Completion:
        """Cut the tokens after the first EOS, or after the one that completes a stop string.

        They are part of the completion. Its text ends before them.
        """
        length = next(
            (n for n, token in enumerate(tokens, start=1) if token in self.end), len(tokens)
        )
        finished = tokens[length - 1] in self.end
        body, stops = tokens[: length - finished], self.settings.rollout.stop or ()
        text = following(self.tokenizer, prompt, body)
        if (place := stop_place(text, stops)) is not None:
            count = next(
                n
                for n in range(1, len(body) + 1)
                if stop_place(following(self.tokenizer, prompt, body[:n]), stops) is not None
            )
            text = following(self.tokenizer, prompt, body[:count])
            place = stop_place(text, stops)
            length, text, finished = count, text[:place], True
        return Completion(tuple(tokens[:length]), tuple(logprobs[:length]), text, finished)


def following(tokenizer: Any, prompt: Sequence[int], tokens: Sequence[int]) -> str:
    """Return the text of tokens where it follows a prompt, without special tokens.

    Decoded alone, tokens of some tokenizers (Llama 2's, Gemma's) lose the space before them.
    """
    before, whole, alone = (
        str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for ids in ([*prompt], [*prompt, *tokens], [*tokens])
    )
    return whole[len(before) :] if whole.startswith(before) else alone


def stop_place(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop string in a text begins, or None."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return min(places, default=None)


def uniform_numbers(seeds: Sequence[int], count: int) -> Tensor:
    """Return (N, count) float64 numbers in [0, 1), each row from its own seed alone."""
    return torch.stack(
        [
            torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
    )


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the distribution function.

    Args:
        logits: (N, V).
        temperature: of the sampling.
        uniform: (N,) in [0, 1).

    Returns:
        (N,) tokens and (N,) float32 log-probs at the temperature.
    """
    logprobs = (logits.float() / temperature).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    tokens = torch.searchsorted(
        cumulative, uniform[:, None] * cumulative[:, -1:], right=True
    ).clamp(max=logits.shape[1] - 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]


def _left_padded(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the (N, P) token ids and attention mask."""
    longest = max(len(prompt) for prompt in prompts)
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    attention = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor(attention, device=device)


def _end_tokens(*declared: int | Sequence[int] | None) -> set[int]:
    """Return the end tokens of the tokenizer and of the model's generation config, as vLLM does."""
    return {
        token
        for value in declared
        if value is not None
        for token in ([value] if isinstance(value, int) else value)
    }
