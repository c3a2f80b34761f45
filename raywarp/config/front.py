"""The sections of the configuration on the front: what is measured, and which point is kept."""

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from raywarp.config.field_types import (
    Count,
    NotNegative,
    Positive,
    Section,
    Text,
    Whole,
    finite_sum,
)

# Shares of the policies in a merge, by the reward that a policy is trained on, or by policy.
Weights = Annotated[dict[str, NotNegative], AfterValidator(finite_sum)]


class ChooseConfig(Section):
    """Which point of the front is kept: exactly one of eta and max_kl."""

    eta: NotNegative | None = Field(None, description="take this eta, which is measured, too")
    max_kl: Positive | None = Field(
        None, description="take the largest eta whose KL is not above this, in nats per completion"
    )

    weights: Weights | None = Field(
        None,
        description=(
            "shares of the policies in the merge whose eta is taken, by reward, such as {helpful:"
            " 0.7, brief: 0.3}, or by policy, such as {policy 1: 0.7, policy 2: 0.3}; default:"
            " warp.merge_weights"
        ),
    )

    @model_validator(mode="after")
    def one_rule(self) -> "ChooseConfig":
        if (self.eta is None) == (self.max_kl is None):
            raise ValueError("needs exactly one of eta and max_kl")
        return self


class FrontConfig(Section):
    """The evaluation at the end, and which point of it is kept as an adapter."""

    etas: list[NotNegative] = Field(
        [0.0, 0.25, 0.5, 0.75, 1.0],
        description=(
            "points of the LITI front; 0 is SFT, 1 is SLERP, and both are always measured; above 1"
            " is extrapolation, and marked as such"
        ),
    )
    weights: Whole | list[Weights] | None = Field(
        None,
        description=(
            "merges with other shares of the policies that are measured, too, each at the eta that"
            " front.choose wants: a list of mappings as in front.choose.weights, or n for all"
            " shares in steps of 1/n; default: 4 (less for more than three) where policies are"
            " trained on rewards that differ, else 0"
        ),
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
    ceiling_completions: Whole = Field(
        32,
        description=(
            "SFT completions of each held-out prompt, n, that measure the front's ceiling up to"
            " log n - 1 nats, and best of n; at least 4, or 0 for no ceiling"
        ),
    )
    share_kl: Positive = Field(
        2.0,
        description=(
            "KL in nats at which the front's share of the ceiling is stated; beyond what was"
            " measured, at the measured end"
        ),
    )
    every: Whole = Field(
        10,
        description=(
            "steps between two measurements of a policy on held-out prompts while it trains:"
            " reward, KL to SFT and control score; 0: none"
        ),
    )
    tracked_prompts: Count = Field(
        32,
        description="held-out prompts of each such measurement, the same ones with the same seeds",
    )
    samples: Count = Field(
        100, description="prompts whose texts are kept for every point, in samples.json"
    )

    @model_validator(mode="after")
    def enough_completions(self) -> "FrontConfig":
        if 0 < self.ceiling_completions < 4:
            raise ValueError(
                f"ceiling_completions={self.ceiling_completions} measures no ceiling; it must be at"
                " least 4, or 0 for none"
            )
        return self


class RetentionConfig(Section):
    """What the models keep: the cross-entropy on texts that have nothing to do with the reward."""

    dataset: Text | None = Field(
        None,
        description=(
            "hub id, local folder, file (.parquet, .jsonl, .json or .csv), or embedded:editorials;"
            " default: the latter where prompts.dataset is embedded, else none"
        ),
    )
    name: Text | None = Field(None, description="configuration (subset) of the dataset")
    split: Text = Field("train", description="split that the texts come from")
    column: Text = Field("text", description="column that holds the text")
    texts: Count = Field(64, description="texts, the first ones")
    max_tokens: Annotated[Count, Field(ge=2)] = Field(
        64, description="tokens of each text, its first; texts of one token are left out"
    )
