"""The sections of the configuration that name a dataset: prompts and preferences."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from raywarp.config.field_types import Count, Number, Positive, Section, Text

SNIPPETS = "embedded:movie-snippets"
EDITORIALS = "embedded:editorials"  # for retention alone
DATASET = (
    "hub id, local folder, file (.parquet, .jsonl, .json or .csv), or embedded:movie-snippets,"
    " whose parts have fixed sizes"
)


class PromptsConfig(Section):
    """What the policies complete, in training and in the evaluation."""

    dataset: Text = Field(SNIPPETS, description=DATASET)
    name: Text | None = Field(None, description="configuration (subset) of the dataset")
    split: Text = Field("train", description="split that training prompts come from")
    held_out_split: Text | None = Field(
        None, description="split for evaluation; without it held_out_fraction of split is kept back"
    )
    held_out_fraction: Annotated[Number, Field(gt=0, lt=1)] = Field(
        0.2, description="share of split kept for evaluation"
    )
    column: Text = Field(
        "text",
        description=(
            "column that holds the prompt's text; a reward function gets the others by name"
        ),
    )
    max_words: Count | None = Field(
        None, description="keep at most so many words of each text, its first"
    )
    max_tokens: Count | None = Field(
        None,
        description=(
            "keep at most so many tokens of each text, its first; a prompt that leaves no room for"
            " a completion is refused"
        ),
    )
    min_tokens: Count | None = Field(
        None,
        description=(
            "drop shorter texts; with max_tokens, each text keeps a number of tokens drawn from"
            " min_tokens to max_tokens"
        ),
    )
    template: Literal["none", "chat"] = Field(
        "none",
        description=(
            "none: the text is continued as it is; chat: it is a user turn in the model's chat"
            " template, to be answered"
        ),
    )

    @model_validator(mode="after")
    def lengths(self) -> "PromptsConfig":
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}"
            )
        return self


class PreferencesConfig(Section):
    """What people preferred, for `raywarp reward`: pairs of texts, or texts with ratings."""

    dataset: Text = Field(SNIPPETS, description=DATASET)
    name: Text | None = Field(None, description="configuration (subset) of the dataset")
    split: Text = Field("train", description="split that preferences come from")
    held_out_split: Text | None = Field(
        None,
        description=(
            "split whose halves are validation and test; without it held_out_fraction of split is"
            " kept back twice"
        ),
    )
    prompt: Text | None = Field(
        None,
        description=(
            "column with the prompt, a text or chat messages, which stands before the answers;"
            " default: the column prompt, where there is one"
        ),
    )
    chosen: Text = Field("chosen", description="column with the preferred text, or chat messages")
    rejected: Text = Field("rejected", description="column with the other text, or chat messages")
    text: Text = Field("text", description="column with the rated text, or answer to the prompt")
    rating: Text = Field(
        "rating",
        description=(
            "column with the rating, for rated data (used where chosen/rejected are absent);"
            " several ratings of one text are averaged"
        ),
    )
    margin: Positive = Field(
        0.5,
        description=(
            "smallest difference of two ratings that makes a preference, among answers to one"
            " prompt where there are prompts; higher: fewer and clearer ones"
        ),
    )
    held_out_fraction: Annotated[Number, Field(gt=0, lt=0.5)] = Field(
        0.1, description="share of the texts kept for validation, and the same again for the test"
    )
