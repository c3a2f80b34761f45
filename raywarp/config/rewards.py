"""The sections of the configuration that score completions or train a reward model."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from raywarp.config.callables import as_name
from raywarp.config.field_types import (
    Count,
    Modules,
    NotNegative,
    Number,
    Positive,
    Section,
    Text,
    Whole,
)

MINILM = "embedded:all-minilm-l6-v2"


class RewardLoraConfig(Section):
    """The reward model's own LoRA."""

    rank: Count = Field(16, description="rank of the reward model's LoRA")
    alpha: Positive = Field(32.0, description="its change is scaled by alpha / rank")
    target_modules: Modules = Field(
        "all-linear", description="all-linear, or names of the modules to adapt"
    )


class RewardTrainingConfig(Section):
    """How `raywarp reward` trains a reward model from preferences."""

    backbone: Text = Field(
        MINILM, description="hub id or folder of the sequence classifier's backbone"
    )
    lora: RewardLoraConfig | None = Field(
        None, description="LoRA fine-tuning; without it all weights are trained"
    )
    lr: Positive = Field(
        1e-4, description="AdamW's learning rate, which falls linearly to 0 after warm-up"
    )
    batch_size: Count = Field(
        16,
        description=(
            "pairs per optimiser step, over all workers; of rated texts twice as many, with every"
            " pair among them"
        ),
    )
    steps: Count = Field(
        120,
        description=(
            "optimiser steps; the accuracy on held-out pairs tells when more of them do not help"
        ),
    )
    warmup_steps: Whole = Field(10, description="steps of linear warm-up")
    eval_every: Count = Field(
        60, description="steps between validations and checkpoints; the best one is kept"
    )
    eval_pairs: Count = Field(
        300, description="pairs per validation, by whose accuracy the best checkpoint is told"
    )
    test_pairs: Count = Field(2000, description="held-out pairs of the final accuracy")
    max_length: Count = Field(
        256,
        description="tokens of prompt and completion together; longer prompts lose their beginning",
    )
    template: Literal["auto", "none", "chat"] = Field(
        "auto",
        description=(
            "chat: conversations, and texts with a prompt, are read in the backbone's chat"
            " template; none: as plain text; auto: chat where the backbone has a template"
        ),
    )
    append_eos: bool = Field(
        False, description="put the backbone's EOS token behind each text, as TRL does with texts"
    )
    margin_loss: bool = Field(
        False,
        description=(
            "the better score must exceed the worse by a margin: the difference of their ratings,"
            " or the pair's number in the column margin"
        ),
    )
    center_rewards_coefficient: NotNegative = Field(
        0.0,
        description=(
            "weight of the squared sum of a pair's scores in the loss; higher: scores closer to a"
            " mean of 0; TRL's documentation recommends 0.01"
        ),
    )
    num_workers: Count = Field(1, description="data-parallel workers of Ray Train")
    use_gpu: bool | None = Field(
        None, description="one GPU per worker; by default if the cluster has GPUs"
    )
    sft_completions: Count = Field(
        128, description="SFT completions whose mean and deviation standardise the score"
    )


class RewardConfig(Section):
    """What scores completions: a model or a function, exactly one of the two."""

    model: Text | None = Field(
        None, description="hub id or folder of a one-label sequence classifier"
    )
    function: Annotated[Text, BeforeValidator(as_name)] | None = Field(
        None,
        description=(
            "module:function with score(prompts, completions, **columns) -> list of numbers, None"
            " where it does not apply; parameters are filled by their names"
        ),
    )
    version: str = Field(
        "",
        description=(
            "declared version of the function, for what its source does not show; another one makes"
            " another run"
        ),
    )
    standardise: bool | None = Field(
        None,
        description=(
            "shift and scale by SFT completions; default: yes for a model, no for a function"
        ),
    )
    template: Literal["auto", "none", "plain", "chat"] = Field(
        "auto",
        description=(
            "what a model reads: none: the prompt with its completion; chat: both as turns of its"
            " own chat template; plain: turns as plain text; auto: what it was trained on by"
            " raywarp, else chat where prompts.template=chat and the model has a template"
        ),
    )
    append_eos: bool | None = Field(
        None,
        description=(
            "put the model's EOS token behind each text; default: as in its training by raywarp,"
            " TRL or OpenRLHF, else no"
        ),
    )
    max_length: Count | None = Field(
        None,
        description=(
            "tokens of prompt and completion together; longer prompts lose their beginning;"
            " default: as in its training by raywarp or TRL, else 256"
        ),
    )
    batch_size: Count = Field(
        64, description="texts per forward pass of a model; lower it where its memory runs out"
    )
    timeout_seconds: Positive | None = Field(
        600,
        description=(
            "longest time for the scores of one batch, after which the run stops; null: no limit"
        ),
    )

    messages: bool | None = Field(
        None,
        description=(
            "whether a function gets prompts and completions as lists of messages; default: where"
            " the type of its parameter completions is one of dicts, as TRL's are"
        ),
    )
    concurrency: Count = Field(
        1,
        description=(
            "processes that call a function, each with one batch at a time; an asynchronous one has"
            " a single process for all; more where several policies wait for a slow reward"
        ),
    )
    retry_on: list[Text] = Field(
        [],
        description=(
            "exceptions after which a function is called again, with longer and longer pauses, such"
            " as TimeoutError or httpx.HTTPError"
        ),
    )
    retries: Count = Field(5, description="how often it is called again, within timeout_seconds")

    @model_validator(mode="after")
    def one_source(self) -> "RewardConfig":
        if self.model and self.function:
            raise ValueError("has both a model and a function; give one of them")
        if self.model and self.concurrency > 1:
            raise ValueError(
                f"concurrency={self.concurrency} is of functions; a model is one process"
            )
        return self


class NamedRewardConfig(RewardConfig):
    """One of several rewards: a reward with its name and its weight in the total."""

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")] = Field(
        description="its name in metrics, the front and the report; letters, digits, '.', '_', '-'"
    )
    weight: Number = Field(
        1.0,
        description=(
            "what its standardised score is multiplied with in the total; negative: a penalty; 0:"
            " it is logged only"
        ),
    )
