"""Tiny random models of all families that the project names, with the model's own log-probs.

Every window, chunk, top-k and rope limit is 16 to 64 tokens, so that a sequence of LONG tokens
passes all of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_models import WORDS, save_tokenizer
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import dense
from raywarp.config.load import parse_config
from raywarp.config.policies import LoraConfig
from raywarp.data.text import Completion
from raywarp.model.adapted import AdaptedModel
from raywarp.model.batches import Batch, collate, micro_batches
from raywarp.model.checkpoint import load_state, state_of
from raywarp.model.lengths import length_limits
from raywarp.model.policy import Policy

VOCABULARY = 3 + len(WORDS)
# tokens: the largest window and rope limit of the matrix; a sequence longer than twice that
LIMIT, LONG = (
    32,
    80,
)
# prompts with completions, on both sides of it
MIXED = (
    (5, (4, 1, 7)),
    (20, (10, 3)),
    (LONG - 6, (6, 9, 2)),
    (LIMIT - 2, (2, 3, 5)),
)
INSIDE = ((5, (4, 1, 7)), (20, (10, 3)), (22, (2, 9)))  # the same on one side
IDS = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2}
SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
DENSE = {
    **IDS,
    **SHAPE,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MLA = {
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 32,
}
DEEPSEEK = {
    **DENSE,
    **MLA,
    **EXPERTS,
    "num_key_value_heads": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}
SIGLIP = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "image_size": 28,
    "patch_size": 14,
}
GEMMA3 = {
    **DENSE,
    "sliding_window": LIMIT,
    "layer_types": ["sliding_attention", "full_attention"],
    "query_pre_attn_scalar": 16,
}
GDN = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
QWEN35_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 1,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [1 + n / 2 for n in range(16)],
    "original_max_position_embeddings": LIMIT,
}


@dataclass(frozen=True)
class Family:
    """One row of the table.

    name: as the table has it. config: transformers' class of it. settings: its arguments.
    targets: lora.target_modules of the row.
    refused: what the refusal says where the trainer has to refuse it; empty where it has to be
    right.
    wrapper: the saved model is this class, not the causal language model of the configuration.
    lengths: of prompts and completions of the trainer's comparison; shorter ones where longer
    sequences are refused.
    """

    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    targets: str | list[str] = "all-linear"
    refused: str = ""
    wrapper: str = ""
    lengths: Sequence[tuple[int, Sequence[int]]] = MIXED

    def build(self) -> Any:
        """transformers' configuration."""
        return getattr(transformers, self.config)(**self.settings)


def _family(
    name: str,
    config: str,
    /,
    *,
    targets: str = "all-linear",
    refused: str = "",
    wrapper: str = "",
    **settings: Any,
) -> Family:
    return Family(name, f"{config}Config", settings, targets, refused, wrapper)


FAMILIES = {
    family.name: family
    for family in (
        _family("Llama", "Llama", **DENSE),
        _family(
            "Llama, dynamic NTK",
            "Llama",
            **{**DENSE, "max_position_embeddings": LIMIT},
            rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        ),
        _family("Qwen2", "Qwen2", **DENSE),
        _family("Qwen3", "Qwen3", **DENSE),
        _family("Qwen2-MoE", "Qwen2Moe", **DENSE, **EXPERTS, num_experts=4, shared_expert_intermediate_size=32),  # noqa: E501
        _family("Qwen3-MoE", "Qwen3Moe", **DENSE, **EXPERTS, num_experts=4),
        _family("Mistral, window", "Mistral", **DENSE, sliding_window=LIMIT),
        _family("Mixtral", "Mixtral", **DENSE, num_local_experts=4, num_experts_per_tok=2),
        _family(
            "Gemma-2",
            "Gemma2",
            **{**DENSE, "pad_token_id": 0},
            query_pre_attn_scalar=16,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
            sliding_window=LIMIT,
        ),
        _family("Gemma-3, text", "Gemma3Text", **GEMMA3),
        _family(
            "Gemma-3, wrapper",
            "Gemma3",
            text_config=GEMMA3,
            vision_config=SIGLIP,
            mm_tokens_per_image=4,
            image_token_index=VOCABULARY - 1,
            boi_token_index=VOCABULARY - 2,
            eoi_token_index=VOCABULARY - 3,
            wrapper="Gemma3ForConditionalGeneration",
        ),
        _family(
            "Qwen3.5, wrapper",
            "Qwen3_5",
            text_config={**DENSE, **GDN, "num_hidden_layers": 4},
            vision_config=QWEN35_VISION,
            image_token_id=VOCABULARY - 1,
            video_token_id=VOCABULARY - 2,
            vision_start_token_id=VOCABULARY - 3,
            vision_end_token_id=VOCABULARY - 4,
            wrapper="Qwen3_5ForConditionalGeneration",
        ),
        _family("Phi-3", "Phi3", **DENSE, sliding_window=LIMIT),
        _family("Phi-3, longrope", "Phi3", **DENSE, sliding_window=None, original_max_position_embeddings=LIMIT, rope_parameters=LONGROPE),  # noqa: E501
        _family(
            "Phi-MoE",
            "Phimoe",
            **DENSE,
            num_local_experts=4,
            num_experts_per_tok=2,
            original_max_position_embeddings=LIMIT,
            rope_parameters={**LONGROPE, "short_mscale": 1.2, "long_mscale": 1.4},
        ),
        _family("Granite", "Granite", **DENSE, logits_scaling=4.0, residual_multiplier=0.7, embedding_multiplier=3.0),  # noqa: E501
        _family("Granite-MoE", "GraniteMoe", **DENSE, num_local_experts=4, num_experts_per_tok=2, logits_scaling=4.0),  # noqa: E501
        _family("Cohere-2", "Cohere2", **DENSE, logit_scale=0.3, sliding_window=LIMIT, layer_types=["sliding_attention", "full_attention"]),  # noqa: E501
        _family("OLMo-2", "Olmo2", **DENSE),
        _family("SmolLM3", "SmolLM3", **DENSE),
        _family("GPT-2", "GPT2", **IDS, n_embd=64, n_layer=2, n_head=2, n_positions=512),
        _family(
            "GPT-Neo",
            "GPTNeo",
            **IDS,
            hidden_size=64,
            num_layers=2,
            num_heads=2,
            intermediate_size=96,
            attention_types=[[["global", "local"], 1]],
            window_size=LIMIT,
            max_position_embeddings=512,
        ),
        _family("GPT-NeoX", "GPTNeoX", **IDS, **SHAPE, max_position_embeddings=512),
        _family("GPT-OSS", "GptOss", **DENSE, num_local_experts=4, num_experts_per_tok=2, sliding_window=LIMIT),  # noqa: E501
        _family(
            "Llama-4",
            "Llama4Text",
            **DENSE,
            intermediate_size_mlp=96,
            num_local_experts=2,
            num_experts_per_tok=1,
            moe_layers=[1],
            attention_chunk_size=LIMIT,
            no_rope_layers=[1, 0],
            layer_types=["chunked_attention", "full_attention"],
        ),
        _family("DeepSeek-V3", "DeepseekV3", **DEEPSEEK, first_k_dense_replace=1),
        _family(
            "DeepSeek-V3.2",
            "DeepseekV32",
            **DEEPSEEK,
            mlp_layer_types=["dense", "sparse"],
            index_topk=16,
            index_head_dim=64,
            # of few, all scores of a token may be 0, and which of equal ones are chosen depends on
            # the width of a pass
            index_n_heads=16,
        ),
        _family("Falcon, rotary", "Falcon", **IDS, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, alibi=False),  # noqa: E501
        _family(
            "Falcon, alibi",
            "Falcon",
            **IDS,
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            alibi=True,
            refused="with eager attention and with sdpa",
        ),
        _family("Bloom", "Bloom", **IDS, hidden_size=64, n_layer=2, n_head=2),
        Family("Doge", "DogeConfig", {**DENSE, "keep_window_size": LIMIT}, lengths=INSIDE),
        _family(
            "Jamba",
            "Jamba",
            **DENSE,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            num_experts=2,
            num_experts_per_tok=1,
            mamba_d_state=8,
            use_mamba_kernels=False,
        ),
        _family("Mamba", "Mamba", **IDS, hidden_size=64, num_hidden_layers=2, state_size=8),
        _family("RWKV", "Rwkv", **IDS, hidden_size=64, num_hidden_layers=3, attention_hidden_size=64, context_length=512, rescale_every=2),  # noqa: E501
    )
}  # fmt: skip


def save_model(family: Family, folder: Path, seed: int = 0) -> Path:
    """Random weights, large enough that windows, chunks and adapters show; and the tokenizer of the
    other tests.
    """
    torch.manual_seed(seed)
    config = family.build()
    model = (
        getattr(transformers, family.wrapper)(config)
        if family.wrapper
        else transformers.AutoModelForCausalLM.from_config(config)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("self_attn.A"):  # Doge's: zeros would make all keys equal
            parameter.data.normal_(0, 1)
        # likewise: large ones end in the same number
        elif name.endswith("self_attn.dt_proj.weight"):
            parameter.data.normal_(0, 0.02)
        elif parameter.ndim > 1 and not any(
            part in name for part in ("conv1d", "A_log", "time_", "vision", "visual")
        ):
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def eager_model(folder: Path) -> Any:
    """The model as transformers has it: eager attention, float32, no adapters."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", use_safetensors=True
    )
    return model.eval()


def with_change(model: Any, delta: AdapterDelta) -> Any:
    """The same model with W + ΔW written into its float32 weights."""
    if hasattr(model.config, "rescale_every"):
        model.config.rescale_every = (
            0  # RWKV would divide weights in place, and their gradients with them
        )
    for module, factors in delta.factors.items():
        change = dense(factors).float()
        layer = model.get_submodule(module)
        layer.weight.data += change.T if isinstance(layer, Conv1D) else change
    return model


def own_logprobs(model: Any, batch: Batch) -> Tensor:
    """(N, T) log π of the response tokens, zero on padding: one sequence at a time, whole and
    without padding, each by a model in the state in which it was loaded (a rope that grows with its
    sequences remembers the longest).
    """
    loaded = [
        (module, dict(vars(module)), dict(module._buffers))
        for module in model.modules()
        if hasattr(module, "max_seq_len_cached")
    ]
    rows = []
    for n, prompt in enumerate(batch.prompts):
        for module, attributes, buffers in loaded:
            vars(module).update(attributes)
            module._buffers.update(buffers)
        response = batch.responses[n, : int(batch.mask[n].sum())]
        logits = model(torch.tensor([[*prompt, *response.tolist()]]), use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        logprobs = logits.float().log_softmax(-1).gather(-1, response[:, None])[:, 0]
        rows.append(torch.nn.functional.pad(logprobs, (0, batch.mask.shape[1] - len(response))))
    return torch.stack(rows)


def mixed_batch(lengths: Sequence[tuple[int, Sequence[int]]] = MIXED) -> Batch:
    """Prompts of these lengths, each with completions of these lengths, of random words."""
    generator = torch.Generator().manual_seed(1)
    prompts, completions = [], []
    for prompt_length, completion_lengths in lengths:
        prompt = torch.randint(3, VOCABULARY - 4, (prompt_length,), generator=generator).tolist()
        for length in completion_lengths:
            tokens = torch.randint(3, VOCABULARY - 4, (length,), generator=generator).tolist()
            prompts.append(prompt)
            completions.append(Completion(tuple(tokens), (-1.0,) * length, "", True))
    return collate(prompts, completions)


def engine_prompts(config: Any, new_tokens: int) -> list[list[int]]:
    """Short and long, past every window; with their completions up to the limit where longer ones
    are refused.
    """
    most = (
        getattr(config, "keep_window_size", None) or length_limits(config, ropes_only=True).lowest
    )
    lengths = (3, 9, LONG, LIMIT - 4) if most is None else (3, 9, most - new_tokens)
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randint(3, VOCABULARY - 4, (length,), generator=generator).tolist()
        for length in lengths
    ]


def trainer(folder: Path, family: Family, dtype: torch.dtype = torch.float32) -> AdaptedModel:
    """The trainer's model with one policy, `policy`, whose factors are random and not small."""
    model = AdaptedModel(
        str(folder),
        LoraConfig(rank=2, alpha=4.0, target_modules=family.targets),
        dtype,
        torch.device("cpu"),
    )
    random_policy(model, "policy", seed=3)
    return model


def random_policy(model: AdaptedModel, name: str, seed: int) -> None:
    model.add_policy(name, 0)
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.tensors(name).values():
        tensor.data.normal_(0, 0.12, generator=generator)


def resumes_exactly(folder: Path, family: Family) -> bool:
    """Whether two steps, and two with a new process between them, end in the same state, bit for
    bit.
    """
    whole, first, second = (_policy(folder, family) for _ in range(3))
    for policy in (whole, whole, first):
        _step(policy)
    load_state(second, state_of(first))
    _step(second)
    ours, theirs = state_of(whole), state_of(second)
    return ours.keys() == theirs.keys() and all(
        torch.equal(tensor, theirs[name]) for name, tensor in ours.items()
    )


def _policy(folder: Path, family: Family) -> Policy:
    settings = {
        "lora": {"rank": 2, "target_modules": family.targets},
        "optim": {"batch_size": 4, "lr": 0.01, "warmup_steps": 0},
    }
    config = parse_config({**settings, "rollout": {"completions_per_prompt": 2}})
    return Policy(
        AdaptedModel(str(folder), config.lora, torch.float32, torch.device("cpu")), config, 1, 1
    )


def _step(policy: Policy) -> None:
    batch = mixed_batch(((5, (4, 2)), (40, (3, 6))))
    completions = [Completion((), (), "", True)] * len(batch)
    policy.update(batch, torch.tensor([1.0, -1.0, 0.5, 2.0]), completions, with_sft_kl=False)


@dataclass(frozen=True)
class Comparison:
    """Of the trainer with the model's own eager code, on a mixed batch: largest differences of
    log-probs in nats.

    gradient: largest difference of a gradient, relative to that tensor's largest entry. effect:
    largest change by the adapter, in nats.
    """

    plain: float
    adapted: float
    gradient: float
    effect: float

    @property
    def is_right(self) -> bool:
        return (
            self.plain < 1e-4 and self.adapted < 1e-4 and self.gradient < 1e-3 and self.effect > 0.5
        )


def compare(model: AdaptedModel, folder: Path, batch: Batch) -> Comparison:
    """All sequences in one micro-batch here, each alone there; the adapter here, W + ΔW in the
    weights there.
    """
    (part,) = micro_batches(batch, pairs_per_token=model.pairs_per_token)
    order = part.completions.argsort()
    with torch.no_grad():
        own, plain = (
            own_logprobs(eager_model(folder), batch),
            model.logprobs(part, model.states(part, []), 1.0)[order],
        )
    merged = with_change(eager_model(folder), model.delta("policy"))
    weight = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(4))
    changed = own_logprobs(merged, batch)
    (changed * weight).sum().backward()
    adapted = model.logprobs(part, model.states(part, ["policy"], "policy"), 1.0)[order]
    (adapted * weight).sum().backward()
    return Comparison(
        plain=_largest(plain - own),
        adapted=_largest(adapted - changed),
        gradient=max(_gradient_errors(model, merged), default=float("inf")),
        effect=_largest(changed - own),
    )


def _gradient_errors(model: AdaptedModel, merged: Any) -> list[float]:
    """By the chain rule through ΔW = s·B·A. A tensor without a gradient here must have none
    there.
    """
    errors = []
    for name, layer in model._layers.items():
        adapter, wanted = layer.adapters["policy"], merged.get_submodule(name).weight.grad
        if wanted is None or adapter.A.grad is None:
            assert wanted is adapter.A.grad, f"{name} has a gradient on one side only"
            continue
        wanted = wanted.T if isinstance(layer.base, Conv1D) else wanted
        for found, exact in (
            (adapter.A.grad, adapter.scale * adapter.B.T @ wanted),
            (adapter.B.grad, adapter.scale * wanted @ adapter.A.T),
        ):
            errors.append(_largest(found - exact) / (_largest(exact) + 1e-6))
    return errors


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max())
