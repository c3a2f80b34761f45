"""The types of values that the configuration's keys take."""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LARGEST = 2**31 - 1  # of a count
Cell = str | bool | int | float  # a value in a dataset's column


class Section(BaseModel):
    """Keys that belong together; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _not_a_bool(value: Any) -> Any:
    if isinstance(value, bool):  # pydantic would read it as 0 or 1
        raise ValueError("must be a number")
    return value


def _printable(text: str) -> str:
    if not text.strip() or any(ord(character) < 32 for character in text):
        raise ValueError("must be text, without control characters")
    return text


def _printable_lines(text: str) -> str:
    _printable(text.replace("\n", " ").replace("\t", " "))
    return text


def _cells(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    if not values or not all(isinstance(one, Cell | None) for one in values):
        raise ValueError("must be a text, a number, true, false or null, or a list of these")
    return value


def _whole_above_one(amount: float) -> float:
    if amount > 1 and amount != int(amount):
        raise ValueError("must be a whole number, or a share of one GPU")
    return amount


def finite_sum(weights: Any) -> Any:
    """Return weights as they are. What counts is each one's share of their sum.

    Raises:
        ValueError: the sum is not finite.
    """
    values = weights.values() if isinstance(weights, dict) else weights
    if not math.isfinite(sum(values)):
        raise ValueError("their sum is too large; only their ratios count, so give smaller ones")
    return weights


Integer = Annotated[int, BeforeValidator(_not_a_bool)]
Number = Annotated[float, BeforeValidator(_not_a_bool)]
Rate = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0)]
NotNegative = Annotated[Number, Field(ge=0)]
Count = Annotated[Integer, Field(ge=1, le=LARGEST)]
Whole = Annotated[Integer, Field(ge=0, le=LARGEST)]
Seed = Annotated[Integer, Field(ge=0, lt=2**32)]  # numpy's range
Gpus = Annotated[NotNegative, AfterValidator(_whole_above_one)]
Text = Annotated[str, AfterValidator(_printable)]
Multiline = Annotated[str, AfterValidator(_printable_lines)]
Cells = dict[Text, Annotated[Any, AfterValidator(_cells)]]  # by column: a value, or several
Modules = Text | Annotated[list[Text], Field(min_length=1)]
