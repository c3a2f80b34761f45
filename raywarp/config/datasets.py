"""The sections of the configuration that name a dataset: prompts and preferences."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from raywarp.config.field_types import Cells, Count, Multiline, Number, Positive, Section, Text

SNIPPETS = "embedded:movie-snippets"
EDITORIALS = "embedded:editorials"  # for retention alone
DATASET = (
    "hub id, local folder (also of save_to_disk), file (.parquet, .jsonl, .json or .csv), or"
    " embedded:movie-snippets, whose parts have fixed sizes"
)


class PromptSource(Section):
    """One of several datasets that prompts come from."""

    dataset: Text = Field(description="as prompts.dataset")
    name: Text | None = Field(None, description="configuration (subset) of the dataset")
    split: Text = Field("train", description="split that training prompts come from")
    held_out_split: Text | None = Field(
        None, description="split for evaluation; default: a share of split, as prompts' own"
    )
    column: Text | None = Field(None, description="as prompts.column, which is the default")
    where: Cells = Field({}, description="as prompts.where")
    weight: Positive = Field(
        1.0, description="share of the prompts, relative to the others' weights"
    )


class PromptsConfig(Section):
    """What the policies complete, in training and in the evaluation."""

    dataset: Text = Field(SNIPPETS, description=DATASET)
    datasets: Annotated[list[PromptSource], Field(min_length=1)] | None = Field(
        None,
        description=(
            "several datasets in place of dataset: a list of {dataset, name, split, held_out_split,"
            " column, where, weight}; weight is the share of prompts that come from one, relative"
            " to the others"
        ),
    )
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
            "column that holds the prompt: text, or messages with role and content; a reward"
            " function gets the others by name"
        ),
    )
    where: Cells = Field(
        {},
        description=(
            "take the rows with these values alone, training and held out: {column: value}, or"
            " {column: [value, value]} for any of them; of several columns all must fit"
        ),
    )
    max_words: Count | None = Field(
        None, description="keep at most so many words of each text, its first"
    )
    max_tokens: Count | None = Field(
        None,
        description=(
            "keep at most so many tokens of each text, its first; of messages, the longest prompt"
            " with its template"
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
            " template, to be answered; messages need chat"
        ),
    )
    template_kwargs: dict[Text, Any] = Field(
        {}, description="passed to the chat template, for example {enable_thinking: false}"
    )
    system: Multiline | None = Field(
        None, description="system turn before prompts that have none; only with template=chat"
    )
    last_answer: Literal["refuse", "drop", "continue"] = Field(
        "refuse",
        description=(
            "messages that end with the assistant's: refuse them, drop the last one, or have the"
            " policy continue it"
        ),
    )
    too_long: Literal["refuse", "drop", "cut"] = Field(
        "refuse",
        description=(
            "a prompt that leaves no room for a completion in the model's context: refuse it, drop"
            " its row, or cut the end of its last text; drop also leaves out texts longer than"
            " max_tokens"
        ),
    )

    @model_validator(mode="after")
    def lengths(self) -> "PromptsConfig":
        if self.min_tokens and self.max_tokens and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens={self.min_tokens} is more than max_tokens={self.max_tokens}"
            )
        if self.min_tokens and self.max_tokens and self.too_long == "drop":
            raise ValueError(
                "too_long=drop leaves out what min_tokens and max_tokens together cut to drawn"
                " lengths; leave one of the three out"
            )
        return self

    @model_validator(mode="after")
    def chat(self) -> "PromptsConfig":
        if self.template == "none":
            for key in ("system", "template_kwargs"):
                if value := getattr(self, key):
                    raise ValueError(
                        f"{key}={value!r} is for a chat template, and template=none; set"
                        " template=chat"
                    )
        return self

    @model_validator(mode="after")
    def one_source(self) -> "PromptsConfig":
        single: dict[str, Any] = {"dataset": SNIPPETS, "name": None, "split": "train"}
        single |= {"held_out_split": None, "where": {}}
        for key, default in single.items():
            if self.datasets and getattr(self, key) != default:
                raise ValueError(
                    f"{key}={getattr(self, key)} and datasets contradict each other; name it in"
                    " the list"
                )
        return self

    @property
    def sources(self) -> list[PromptSource]:
        """The datasets that prompts come from, one or several."""
        if self.datasets:
            return self.datasets
        own = {"dataset", "name", "split", "held_out_split", "where"}
        return [PromptSource.model_validate(self.model_dump(include=own))]


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
