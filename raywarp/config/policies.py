"""The sections on how policies are trained: the base, LoRA, WARP, the optimiser, stops."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from raywarp.config.each import in_full
from raywarp.config.field_types import (
    Count,
    Modules,
    NotNegative,
    Number,
    Positive,
    Rate,
    Section,
    Whole,
    finite_sum,
)

Betas = Annotated[list[Annotated[Number, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
RATES = {"ema_rate": 0.01, "liti_rate": 0.3}  # their defaults, where they are used


def unused_rates(warp: Mapping[str, Any]) -> list[str]:
    """Return which of the rates nothing uses, with this anchor and this restart.

    Args:
        warp: keys of the section `warp`; what is missing has its default.
    """
    elastic = warp.get("elastic_reset") is True
    used = {"ema_rate": elastic or warp.get("anchor", "ema") == "ema", "liti_rate": not elastic}
    return [key for key in RATES if not used[key]]


class BaseConfig(Section):
    """How the frozen base is held. Trainer and sampler run the same weights in either case."""

    quantize: Literal["none", "nf4"] = Field(
        "none",
        description=(
            "nf4: linear layers have weights of 4 bits (bitsandbytes, as QLoRA has them), which a"
            " policy actor holds as they are, and a rollout worker in the run's dtype; embeddings,"
            " head and norms stay as they are; another setting makes other policies"
        ),
    )


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
    anchor: Literal["ema", "init", "sft"] = Field(
        "ema",
        description=(
            "what a policy's KL is taken to: its own EMA (WARP), the iteration's init, or the SFT"
            " model; with the last, a converged policy's KL front is the highest"
        ),
    )
    ema_rate: Rate | None = Field(
        None,
        description=(
            "mu, rate at which the EMA follows the policy after every step, default 0.01, the"
            " paper's; higher: the policy gets further, and less of it is taken back; only for"
            " anchor=ema and elastic_reset"
        ),
    )
    liti_rate: Rate | None = Field(
        None,
        description=(
            "eta, how far the next iteration's init goes towards the merge, default 0.3; lower:"
            " each iteration starts nearer to SFT; not with elastic_reset"
        ),
    )
    elastic_reset: bool = Field(
        False,
        description=(
            "Elastic Reset (Noukhovitch et al. 2023): with one policy, each iteration starts from"
            " the EMA of the one before, and not from LITI"
        ),
    )
    kl_coef: NotNegative = Field(
        0.1,
        description=(
            "beta, reward taken per nat of KL to the anchor, the paper's by default; higher: less"
            " KL and slower; 0: nothing holds the policy back"
        ),
    )
    kl_target: Positive | None = Field(
        None,
        description=(
            "KL to the anchor, in nats per completion, that kl_coef is adapted to after every step"
            " (Ziegler et al. 2019), from its value above; default: kl_coef stays"
        ),
    )
    average_last: Count = Field(
        1,
        description=(
            "a policy's result is the mean of its last so many checkpoints (checkpoint_every),"
            " exact in its change of the weights; its rank is as many times lora.rank"
        ),
    )
    each: list[dict[str, Any]] | None = Field(
        None,
        description=(
            "what differs between the policies: a list with one mapping per policy, such as [{lr:"
            " 1.0e-4, rewards: {helpful: 1, brief: 0}}, {rank: 4, prompts: {where: {language:"
            " de}}}]; keys in full, by their last part, or in sections"
        ),
    )
    merge_weights: Annotated[list[Positive], AfterValidator(finite_sum)] | None = Field(
        None,
        description=("the policies' shares in SLERP, one number each; default: equal ones"),
    )
    advantage: Literal["rloo", "grpo", "mean", "none"] = Field(
        "rloo",
        description=(
            "baseline that is taken from a reward: the mean of the prompt's other completions, of"
            " the batch's others, or none; grpo: that of all the prompt's, divided by their"
            " deviation"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def rates(cls, tree: Any) -> Any:
        """Fill in the rates that this anchor and this restart use, and refuse the others."""
        if not isinstance(tree, Mapping):
            return tree
        unused, rates = unused_rates(tree), {key: tree.get(key) for key in RATES}
        if "ema_rate" in unused and rates["ema_rate"] is not None:
            raise ValueError(
                f"ema_rate={rates['ema_rate']} has no EMA to move with anchor={tree['anchor']};"
                " leave it out, or use anchor=ema"
            )
        if "liti_rate" in unused and rates["liti_rate"] is not None:
            raise ValueError(
                f"liti_rate={rates['liti_rate']} contradicts elastic_reset=true, which starts each"
                " iteration from the EMA; leave one of them out"
            )
        defaults = {key: RATES[key] for key, value in rates.items() if value is None}
        return {**tree, **defaults, **dict.fromkeys(unused)}

    @field_validator("each")
    @classmethod
    def keys_in_full(cls, each: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        return None if each is None else [in_full(changes) for changes in each]

    @model_validator(mode="after")
    def consistent(self) -> "WarpConfig":
        for key in ("each", "merge_weights"):
            given = getattr(self, key)
            if given is not None and len(given) != self.policies:
                raise ValueError(
                    f"{key} has {len(given)} entries, and policies={self.policies}; give one for"
                    " each policy"
                )
        if self.elastic_reset and self.policies != 1:
            raise ValueError(
                f"elastic_reset=true continues from one policy's EMA, and policies={self.policies};"
                " set policies=1"
            )
        if self.elastic_reset and self.iterations < 2:
            raise ValueError(
                "elastic_reset=true acts between iterations, and iterations=1; set iterations=2 or"
                " more"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError(
                f"kl_target={self.kl_target:g} adapts kl_coef, which must be above 0 to start with"
            )
        return self


class OptimConfig(Section):
    """One policy's optimiser."""

    lr: Positive = Field(
        5e-4,
        description=(
            "AdamW's learning rate after warm-up; higher: more reward and more KL per step, until"
            " texts break"
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
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description=(
            "the learning rate after warm-up: constant, or falling to 0 at the last step of every"
            " iteration, linearly or along a cosine"
        ),
    )
    grad_clip: Positive = Field(
        1.0, description="largest norm of a policy's gradient; a longer one is scaled down"
    )
    weight_decay: NotNegative = Field(
        0.0,
        description=(
            "AdamW's weight decay of the adapter, per step and lr; higher: the policy stays nearer"
            " to its init"
        ),
    )
    betas: Betas = Field(
        [0.9, 0.999],
        description=(
            "AdamW's decay rates of the gradient's mean and square; higher: smoother and slower"
        ),
    )
    importance_cap: Positive = Field(
        2.0,
        description=(
            "largest weight of a token, the trainer's over the sampler's probability; higher: less"
            " bias and more variance where the two differ"
        ),
    )

    @property
    def adamw(self) -> dict[str, Any]:
        """Return the arguments of torch's AdamW."""
        first, second = self.betas
        return {"lr": self.lr, "betas": (first, second), "weight_decay": self.weight_decay}


class StopConfig(Section):
    """When a policy's training ends early, by its held-out measurements (front.every).

    With any of these rules, a policy's result is its best measured state: the one of the highest
    reward (of the highest control score, where control_falls is given) whose KL is within max_kl.
    """

    max_kl: Positive | None = Field(
        None, description="end when the KL to SFT is above this, in nats per completion"
    )
    control_falls: Positive | None = Field(
        None,
        description=(
            "end when the control score is more than this below its best so far, in the score's"
            " units"
        ),
    )
    plateau: Count | None = Field(
        None,
        description="end when so many measurements in a row have not raised the best reward so far",
    )

    @property
    def is_set(self) -> bool:
        """Whether there is any rule."""
        return any(value is not None for value in self.model_dump().values())
