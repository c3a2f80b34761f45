"""The section `tune`: what `raywarp tune` searches, and how.

search.py resolves its keys to those of the configuration.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from raywarp.config.field_types import Count, Integer, Number, Positive, Section, Seed

Objective = Literal["hypervolume", "reward", "kl", "control", "ceiling_share"]
Range = tuple[Number, Number]


class Domain(Section):
    """The values of one key, exactly one of these."""

    grid: list[Any] | None = Field(
        None,
        min_length=1,
        description="[a, b, …]: each of them, with every combination of the other grids",
    )
    choice: list[Any] | None = Field(
        None, min_length=1, description="[a, b, …]: one of them, drawn at random"
    )
    uniform: Range | None = Field(None, description="[low, high]: a number between the two")
    loguniform: Range | None = Field(
        None, description="[low, high]: a number between the two, whose logarithm is uniform"
    )
    randint: tuple[Integer, Integer] | None = Field(
        None, description="[low, high]: a whole number, at least low and below high"
    )

    @property
    def kind(self) -> str:
        return next(name for name in Domain.model_fields if getattr(self, name) is not None)

    @property
    def values(self) -> list[Any]:
        """All values of a grid or choice; the two ends of a range."""
        return list(getattr(self, self.kind))

    @property
    def is_range(self) -> bool:
        return self.kind not in ("grid", "choice")

    @model_validator(mode="before")
    @classmethod
    def known_kinds(cls, tree: Any) -> Any:
        if isinstance(tree, Mapping) and (
            others := [key for key in tree if key not in Domain.model_fields]
        ):
            kinds = ", ".join(Domain.model_fields)
            raise ValueError(
                f"'{others[0]}' is none of {kinds}; a key inside a section is written in one word,"
                " as in warp.ema_rate"
            )
        return tree

    @model_validator(mode="after")
    def one_kind(self) -> "Domain":
        if len([name for name in Domain.model_fields if getattr(self, name) is not None]) != 1:
            raise ValueError(f"needs exactly one of {', '.join(Domain.model_fields)}")
        if self.is_range:
            low, high = self.values
            if low >= high:
                raise ValueError(
                    f"{self.kind}: [{low:g}, {high:g}] is empty; the lower end comes first"
                )
            if self.loguniform and low <= 0:
                raise ValueError(
                    f"loguniform: [{low:g}, {high:g}] has no logarithm; its lower end must be"
                    " above 0"
                )
        return self


class TuneConfig(Section):
    """Besides these settings, every mapping holds the values to search of the key that names it."""

    space: dict[str, Domain] = Field(
        {},
        description=(
            "the keys that are searched, each with its values; they may as well stand beside these"
            " settings, without `space`"
        ),
    )
    search: Literal["grid", "random", "asha", "optuna"] | None = Field(
        None,
        description=(
            "grid: every combination; random; asha: random, and the worse half ends after"
            " iterations 1, 2, 4, …; optuna: each follows from those before; default: grid where"
            " every key has one, else random"
        ),
    )
    num_samples: Count = Field(
        8,
        description=(
            "trials of random, asha and optuna; where there are grids, of each of their"
            " combinations"
        ),
    )
    objectives: list[Objective] = Field(
        ["hypervolume"],
        min_length=1,
        description=(
            "what makes a trial good: hypervolume (of its front); reward and control (more is"
            " better), kl (less is) of the point that front.choose names; ceiling_share (more is"
            " better): the front's best reward within front.share_kl, over the ceiling there;"
            " optuna takes several"
        ),
    )
    seed: Seed | None = Field(
        None,
        description=(
            "of random, asha and optuna; default: the run's (a mapping here searches over that)"
        ),
    )
    max_concurrent: Count | None = Field(
        None, description="trials at the same time; default: as many as fit on the cluster"
    )
    reference_kl: Positive | None = Field(
        None,
        description=(
            "KL in nats up to which the hypervolume counts; default: front.choose.max_kl, or 10"
        ),
    )
    reference_reward: Number | None = Field(
        None, description="reward above which it counts; default: the SFT model's"
    )

    @model_validator(mode="before")
    @classmethod
    def sorted_out(cls, tree: Any) -> Any:
        if not isinstance(tree, Mapping):
            return tree
        space = {
            key: value
            for key, value in tree.items()
            if isinstance(value, Mapping) and key != "space"
        }
        given = tree.get("space", {})
        if not isinstance(given, Mapping):
            return tree
        settings = {
            key: value for key, value in tree.items() if key not in space and key != "space"
        }
        if others := [key for key in settings if key not in cls.model_fields]:
            names = ", ".join(name for name in cls.model_fields if name != "space")
            raise ValueError(
                f"{others[0]} is no setting ({names}) and has no values to search, as in {{grid:"
                " [0.1, 0.3]}"
            )
        return {**settings, "space": {**given, **space}}

    @model_validator(mode="after")
    def consistent(self) -> "TuneConfig":
        if len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives={self.objectives} names one twice")
        if self.search == "asha" and len(self.objectives) > 1:
            raise ValueError(
                f"search=asha compares trials by one objective, not by {len(self.objectives)};"
                " optuna takes several"
            )
        return self
