"""A reward: a function with its standardisation, and the check of what it returns."""

import asyncio
import functools
import inspect
import math
import traceback
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import tenacity

from raywarp.config.schema import ConfigError
from raywarp.rewards import functions
from raywarp.rewards.functions import Score

Raw = float | None  # a score; None where the reward does not apply to a completion
EXCERPT = 200  # characters of a prompt or completion in an error


class RewardError(RuntimeError):
    """A reward failed, or did not return one finite number per completion.

    The message shows the text.
    """


@dataclass(frozen=True)
class Batch:
    """N completions with all that a reward may read of them.

    Attributes:
        prompts: N texts, or lists of messages.
        completions: N texts.
        columns: for each other column of the dataset a list of N values.
        completion_ids: N lists of token ids, where they are known.
        messages: N prompts as lists of messages; None where the dataset has a text.
    """

    prompts: Sequence[Any]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    completion_ids: Sequence[Sequence[int]] | None = None
    messages: Sequence[Any] | None = None


class Reward:
    """A source of scores with its standardisation. Its results are checked.

    Args:
        name: name of the reward in errors.
        function: called by the names of its parameters, see functions.py.
        mean: mean of the raw score.
        std: standard deviation of the raw score. The score returned is (raw - mean) / std.
        source: file of a user's function. Errors then point to its line.
        messages: whether prompts and completions are given as lists of messages. None: where the
            type of `completions` says so.
        retry_on: exceptions after which the call is repeated.
        retries: how often.
    """

    def __init__(
        self,
        name: str,
        function: Score,
        mean: float = 0.0,
        std: float = 1.0,
        source: str | None = None,
        messages: bool | None = None,
        retry_on: tuple[type[Exception], ...] = (),
        retries: int = 0,
    ):
        self.name, self.function, self.mean, self.std = name, function, mean, std
        self.source, self.retry_on, self.retries = source, retry_on, retries
        self.messages = functions.wants_messages(function) if messages is None else messages

    def score(
        self,
        prompts: Sequence[Any],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[Raw]:
        """Return one standardised score per completion, None where the reward does not apply.

        Args:
            prompts: N texts or lists of messages.
            completions: N texts.
            columns: for each column of the dataset a list of N values. Columns named `prompts`,
                `completions` or `completion_ids` are not passed on.

        Raises:
            RewardError: the function raised, or did not return one finite number per completion.
        """
        return self.standardised(self.raw(Batch(prompts, completions, columns or {})))

    def standardised(self, raw: Sequence[Raw]) -> list[Raw]:
        """Return (raw - mean) / std of each score that there is."""
        return standardised(raw, self.mean, self.std)

    def raw(self, batch: Batch) -> list[Raw]:
        """Return the raw scores of a batch; see score for the errors."""
        if not batch.completions:
            return []
        ask = functools.partial(self._ask, batch)
        try:
            result = self._retrying(tenacity.Retrying)(ask) if self.retry_on else ask()
            if inspect.isawaitable(result):
                result = asyncio.run(_await(result))
        except Exception as error:
            raise self._raised(error, batch) from None
        return self._checked(result, batch.prompts, batch.completions)

    async def raw_async(self, batch: Batch) -> list[Raw]:
        """Return the raw scores of an asynchronous function; see score for the errors."""
        if not batch.completions:
            return []

        async def ask() -> Any:
            return await self._ask(batch)

        try:
            result = await (self._retrying(tenacity.AsyncRetrying)(ask) if self.retry_on else ask())
        except Exception as error:
            raise self._raised(error, batch) from None
        return self._checked(result, batch.prompts, batch.completions)

    def _ask(self, batch: Batch) -> Any:
        call = functions.call_of(self.name, self.function, batch.columns)
        prompts: Sequence[Any] = batch.prompts
        completions: Sequence[Any] = batch.completions
        if self.messages:
            turns = batch.messages or [None] * len(prompts)
            prompts = [own or _messages(p) for own, p in zip(turns, prompts, strict=True)]
            completions = [[_message("assistant", text)] for text in completions]
        return call(self.function, prompts, completions, batch.completion_ids, batch.columns)

    def _retrying(self, kind: Any) -> Any:
        return kind(
            retry=tenacity.retry_if_exception_type(self.retry_on),
            stop=tenacity.stop_after_attempt(self.retries + 1),
            wait=tenacity.wait_exponential_jitter(initial=1, max=60),
            reraise=True,
        )

    def _raised(self, error: Exception, batch: Batch) -> RewardError | ConfigError:
        if isinstance(error, ConfigError):
            return error
        hint = ""
        if isinstance(error, TypeError) and "indices must be" in str(error) and not self.messages:
            hint = " (to get prompts and completions as lists of messages, set messages: true)"
        problem = f"raised {type(error).__name__}: {error}{_frame(error, self.source)}{hint}"
        return self._error(
            f"{problem}; the batch begins with", batch.prompts[0], batch.completions[0]
        )

    def _checked(
        self, result: Any, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[Raw]:
        """Return the scores as a list of N numbers, of a result of shape (N,) or (N, 1)."""
        shape = tuple(getattr(result, "shape", ()))
        if len(shape) > 1 and shape != (len(completions), 1):
            raise self._error(
                f"returned an array of shape {shape} for {len(completions)} completions; it must"
                f" be ({len(completions)},) or ({len(completions)}, 1), the first of them",
                prompts[0],
                completions[0],
            )
        values = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(values, list | tuple):
            raise self._error(
                f"returned {type(result).__name__}, not a list of floats, for",
                prompts[0],
                completions[0],
            )
        if len(values) != len(completions):
            problem = (
                f"returned {len(values)} scores for {len(completions)} completions, the first of"
                " them"
            )
            raise self._error(problem, prompts[0], completions[0])
        scores = list[Raw]()
        for value, prompt, completion in zip(values, prompts, completions, strict=True):
            number = _number(value)
            if number is not None and not (isinstance(number, Real) and math.isfinite(number)):
                raise self._error(
                    f"returned {_excerpt(repr(value), 60)}, not a finite number, for",
                    prompt,
                    completion,
                )
            scores.append(None if number is None else float(number))
        return scores

    def _error(self, problem: str, prompt: str, completion: str) -> RewardError:
        return RewardError(
            f"reward {self.name} {problem}\n  prompt: {_excerpt(prompt)!r}\n  completion:"
            f" {_excerpt(completion)!r}"
        )


def standardised(raw: Sequence[Raw], mean: float, std: float) -> list[Raw]:
    """Return (raw - mean) / std of each score that there is."""
    return [None if one is None else (one - mean) / std for one in raw]


def too_slow(name: str | None, error: Exception, completions: int) -> RewardError:
    """Return the error of a reward that took longer than its timeout_seconds."""
    return RewardError(
        f"reward {name} {error}, for {completions} completions: make it faster, or raise"
        " reward.timeout_seconds (of a control: control.timeout_seconds)"
    )


def _number(value: Any) -> Any:
    """Return the number in an array or list of one, and anything else unchanged."""
    if isinstance(value, list | tuple) and len(value) == 1:
        return _number(value[0])
    if hasattr(value, "item") and getattr(value, "size", None) in (1, None):
        return value.item()
    if callable(getattr(value, "numel", None)) and value.numel() == 1:  # a torch tensor
        return value.item()
    return value


def _messages(prompt: Any) -> list[dict[str, str]]:
    return [_message("user", prompt)] if isinstance(prompt, str) else prompt


def _message(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


async def _await(result: Awaitable[Any]) -> Any:
    return await result


def _frame(error: BaseException, source: str | None) -> str:
    """Return " (file:line)" of the deepest frame in the user's file, else of the deepest one."""
    here = (__file__, functions.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in here]
    own = [frame for frame in frames if frame.filename == source] or frames
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def _excerpt(text: str, length: int = EXCERPT) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
