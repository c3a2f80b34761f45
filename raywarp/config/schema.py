"""The configuration's schema: `Config`, the sections of a WARP run, and ConfigError.

Every key has a description. Every command gets a `Config`, and its resolved form is saved with the
run.
"""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raywarp.config.cluster import ClusterConfig
from raywarp.config.datasets import PreferencesConfig, PromptsConfig
from raywarp.config.field_types import (
    Count,
    Modules,
    NotNegative,
    Number,
    Positive,
    Rate,
    Section,
    Seed,
    Text,
    Whole,
)
from raywarp.config.rewards import RewardConfig, RewardTrainingConfig
from raywarp.config.tune import TuneConfig

SMOLLM2 = "embedded:smollm2-135m-instruct"


class ConfigError(ValueError):
    """The user's input is wrong; the message says what, where, and what would be right."""


class LoraConfig(Section):
    """The adapter that each policy trains."""

    rank: Count = Field(
        16,
        description="rank r of every policy's adapter; memory and traffic grow with it",
    )
    alpha: Positive = Field(
        16.0,
        description=(
            "an adapter's change is scaled by alpha / rank; higher acts much like a higher optim.lr"
        ),
    )
    target_modules: Modules = Field(
        "all-linear", description="all-linear, or names of the modules to adapt"
    )
    init: Literal["independent", "shared", "frozen"] = Field(
        "independent",
        description=(
            "the initial A: one per policy, one for all, or one for all that is never trained, by"
            " which merges stay at rank r"
        ),
    )


class WarpConfig(Section):
    """WARP itself, by the paper's letters."""

    iterations: Count = Field(
        2,
        description=(
            "I, iterations of the whole loop, one after another, each from where LITI left the one"
            " before"
        ),
    )
    policies: Count = Field(
        2, description="M, policies trained in parallel and merged; each costs as much again"
    )
    steps: Count = Field(
        40,
        description=(
            "T, optimiser steps per policy and iteration; more: further from SFT, and longer"
        ),
    )
    ema_rate: Rate = Field(
        0.01,
        description=(
            "mu, rate at which the anchor follows the policy after every step, the paper's by"
            " default; higher: the policy gets further, and less of it is taken back; 0 keeps the"
            " anchor at the iteration's init"
        ),
    )
    liti_rate: Rate = Field(
        0.3,
        description=(
            "eta, how far the next iteration's init goes towards the merge; lower: each iteration"
            " starts nearer to SFT"
        ),
    )
    kl_coef: NotNegative = Field(
        0.1,
        description=(
            "beta, reward taken per nat of KL to the anchor, the paper's by default; higher: less"
            " KL and slower; 0: nothing holds the policy back"
        ),
    )
    advantage: Literal["rloo", "mean", "none"] = Field(
        "rloo",
        description=(
            "baseline that is taken from a reward: the mean of the prompt's other completions, of"
            " the batch's others, or none"
        ),
    )


class OptimConfig(Section):
    """One policy's optimiser."""

    lr: Positive = Field(
        5e-4,
        description=(
            "AdamW's learning rate, constant after warm-up; higher: more reward and more KL per"
            " step, until texts break"
        ),
    )
    batch_size: Count = Field(
        64, description="completions per optimiser step of a policy; more: less noise, longer steps"
    )
    max_tokens_per_microbatch: Count = Field(
        4096,
        description=(
            "tokens per forward pass, padding included: lower it where a trainer's memory runs out;"
            " gradients do not depend on it"
        ),
    )
    gradient_checkpointing: bool = Field(
        False,
        description="less memory for a third more time: blocks are computed again for gradients",
    )
    warmup_steps: Whole = Field(
        10, description="steps of linear warm-up, of every policy in every iteration"
    )
    grad_clip: Positive = Field(
        1.0, description="largest norm of a policy's gradient; a longer one is scaled down"
    )


class RolloutConfig(Section):
    """Sampling, in training and in the evaluation."""

    engine: Literal["vllm", "transformers"] = Field(
        "vllm", description="what samples; transformers where there is no vLLM, slower"
    )
    workers: Count = Field(
        1,
        description=(
            "R, workers (engines) that all policies share; more where rollouts bound the run"
        ),
    )
    chunk_size: Count | None = Field(
        None,
        description=(
            "completions per engine call, for fewer policies than workers; default: a whole batch"
        ),
    )
    completions_per_prompt: Count = Field(
        4,
        description=(
            "completions of each prompt in a step; more: a better baseline, fewer prompts in a"
            " batch"
        ),
    )
    max_new_tokens: Count = Field(
        24,
        description=(
            "longest completion, in tokens; KL per completion, time and memory grow with it"
        ),
    )
    temperature: Positive = Field(
        0.9,
        description=(
            "sampling temperature, of training and evaluation; log-probs and KL are taken at the"
            " same one"
        ),
    )
    adapter: Literal["auto", "unmerged", "lora", "merged"] = Field(
        "auto",
        description=(
            "how an engine applies an adapter: unmerged beside the weights (CPUs), as vLLM's LoRA"
            " (GPUs), or merged into float32 weights; auto is unmerged on CPUs, lora on GPUs"
        ),
    )
    ignore_eos: bool = Field(
        False, description="sample past the end of text up to max_new_tokens; for benchmarks"
    )
    missing_eos_penalty: NotNegative = Field(
        0.0, description="taken from the reward of a completion that max_new_tokens cut off"
    )
    kv_cache_gib: Positive = Field(
        1.0,
        description=(
            "KV cache of a CPU worker, in GiB; each running completion takes 128 tokens or more"
        ),
    )
    gpu_memory_utilization: Annotated[Number, Field(gt=0, le=1)] = Field(
        0.85,
        description=(
            "share of a GPU's memory that a worker takes; lower it where others use that GPU"
        ),
    )
    tensor_parallel_size: Count = Field(1, description="GPUs that one worker's model is split over")


class ChooseConfig(Section):
    """Which point of the front is kept: exactly one of the two."""

    eta: Rate | None = Field(None, description="take this eta, which is measured, too")
    max_kl: Positive | None = Field(
        None, description="take the largest eta whose KL is not above this, in nats per completion"
    )

    @model_validator(mode="after")
    def one_rule(self) -> "ChooseConfig":
        if (self.eta is None) == (self.max_kl is None):
            raise ValueError("needs exactly one of eta and max_kl")
        return self


class FrontConfig(Section):
    """The evaluation at the end, and which point of it is kept as an adapter."""

    etas: list[Rate] = Field(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        description="points of the LITI front; 0 is SFT, 1 is SLERP, and both are always measured",
    )
    prompts: Count = Field(
        200, description="held-out prompts of each point; four times as many halve the intervals"
    )
    completions_per_prompt: Count = Field(
        1, description="completions of each held-out prompt, which are averaged"
    )
    choose: ChooseConfig = Field(
        ChooseConfig(max_kl=5.0),
        description="which eta the folder adapter/ holds: {eta: x} or {max_kl: x}",
    )
    samples: Count = Field(
        100, description="prompts whose texts are kept for every point, in samples.json"
    )


class Config(Section):
    model: Text = Field(
        SMOLLM2, description="hub id or folder of the SFT model, or embedded:smollm2-135m-instruct"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the frozen base; auto: bfloat16 where the hardware has it"
    )
    trust_remote_code: bool = Field(
        False,
        description=(
            "run the code that comes with a model; without it, a model that needs its own code is"
            " refused"
        ),
    )
    seed: Seed = Field(
        0, description="everything random derives from it; another one makes another run"
    )
    out: Text = Field(
        "runs/default",
        description="folder that the command writes, or s3://bucket/prefix, gs://bucket/prefix",
    )
    store: Text | None = Field(
        None,
        description=(
            "folder or URI of trained policies under their keys, which several runs may share;"
            " default: out"
        ),
    )
    prompts: PromptsConfig = PromptsConfig()
    preferences: PreferencesConfig = PreferencesConfig()
    reward_training: RewardTrainingConfig = RewardTrainingConfig()
    reward: RewardConfig = RewardConfig()
    control: RewardConfig | None = Field(
        None, description="a second score that training never sees"
    )
    lora: LoraConfig = LoraConfig()
    warp: WarpConfig = WarpConfig()
    optim: OptimConfig = OptimConfig()
    rollout: RolloutConfig = RolloutConfig()
    cluster: ClusterConfig = ClusterConfig()
    front: FrontConfig = FrontConfig()
    checkpoint_every: Count = Field(
        10,
        description=(
            "steps between a policy's checkpoints: the most that is done again after a death"
        ),
    )
    kl_to_sft_every: Count = Field(
        5, description="steps between measurements of kl_sft in training, a forward pass more each"
    )
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] = Field(
        [], description="where metrics go besides metrics.jsonl"
    )
    tune: TuneConfig | None = Field(
        None,
        description=(
            "of `raywarp tune`: {key: {grid: [a, b]}, …} for any key above, by its last part or in"
            " full; beside grid there are choice: [a, b], uniform: [low, high], loguniform: [low,"
            " high] and randint: [low, high] (high left out)"
        ),
    )

    @model_validator(mode="after")
    def consistent(self) -> "Config":
        batch, group = self.optim.batch_size, self.rollout.completions_per_prompt
        if batch % group:
            raise ValueError(
                f"optim.batch_size={batch} is not a multiple of"
                f" rollout.completions_per_prompt={group}"
            )
        if self.warp.advantage == "rloo" and group < 2:
            raise ValueError(
                "rollout.completions_per_prompt must be at least 2 with warp.advantage=rloo (or use"
                " advantage=mean)"
            )
        if self.warp.advantage == "mean" and batch < 2:
            raise ValueError("optim.batch_size must be at least 2 with warp.advantage=mean")
        return self
