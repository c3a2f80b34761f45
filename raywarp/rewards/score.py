"""Sources of scores for completions: a one-label sequence classifier, or a user's Python function.

Both are called as `score(prompts, completions, **columns) -> list[float]`. Prompts and completions
are lists of N texts. Every other column of the prompts' dataset is a list of N values.

A function needs neither torch nor transformers, whose import takes two seconds and 270 MB in each
process. So the code that needs them is in classifier.py, and is imported only where it is called.
"""

import importlib
import inspect
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import ModuleType
from typing import Any

from raywarp.config.datasets import PromptsConfig
from raywarp.config.rewards import RewardConfig
from raywarp.config.schema import ConfigError
from raywarp.identity import content_key, folder_fingerprint
from raywarp.rewards.reading import Reading
from raywarp.rewards.record import REWARD_FILE as REWARD_FILE
from raywarp.rewards.record import reading_of, stored_reading
from raywarp.storage.sealed import DamagedError, check_sealed, is_sealed, read_record

Score = Callable[..., Any]
MODEL_FILES = ["*.safetensors", "*.bin", "*.json", "*.model", "*.jinja", "*.txt", "*.py"]
EXCERPT = 200  # characters of a prompt or completion in an error
# Kept from the time when the module's source was hashed, since the function is still the same.
_KNOWN = {"raywarp.embedded:vader": "7f7a66ec6e713b0d"}


class RewardError(RuntimeError):
    """A reward failed, or did not return one finite number per completion.

    The message shows the text.
    """


class Reward:
    """A source of scores with its standardisation. Its results are checked.

    Args:
        name: name of the reward in errors.
        function: score(prompts, completions, **columns).
        mean: mean of the raw score.
        std: standard deviation of the raw score. The score returned is (raw - mean) / std.
        source: file of a user's function. Errors then point to its line.
    """

    def __init__(
        self,
        name: str,
        function: Score,
        mean: float = 0.0,
        std: float = 1.0,
        source: str | None = None,
    ):
        self.name, self.function, self.mean, self.std, self.source = (
            name,
            function,
            mean,
            std,
            source,
        )

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> list[float]:
        """Return one standardised score per completion.

        Args:
            prompts: N texts.
            completions: N texts.
            columns: for each column of the dataset a list of N values. Columns named `prompts` or
                `completions` are not passed on.

        Raises:
            RewardError: the function raised, or did not return one finite number per completion.
        """
        if not completions:
            return []
        extra = {
            key: list(values)
            for key, values in (columns or {}).items()
            if key not in ("prompts", "completions")
        }
        try:
            result = self.function(list(prompts), list(completions), **extra)
        except Exception as error:
            place = _frame(error, self.source)
            raise self._error(
                f"raised {type(error).__name__}: {error}{place}; the batch begins with",
                prompts[0],
                completions[0],
            ) from None
        return [(raw - self.mean) / self.std for raw in self._checked(result, prompts, completions)]

    def _checked(
        self, result: Any, prompts: Sequence[str], completions: Sequence[str]
    ) -> list[float]:
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
        scores = []
        for value, prompt, completion in zip(values, prompts, completions, strict=True):
            number = (
                value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
            )
            if not isinstance(number, Real) or not math.isfinite(number):
                raise self._error(
                    f"returned {_excerpt(repr(value), 60)}, not a finite number, for",
                    prompt,
                    completion,
                )
            scores.append(float(number))
        return scores

    def _error(self, problem: str, prompt: str, completion: str) -> RewardError:
        return RewardError(
            f"reward {self.name} {problem}\n  prompt: {_excerpt(prompt)!r}\n  completion:"
            f" {_excerpt(completion)!r}"
        )


def load_function(path: str) -> Score:
    """Return the callable that `module:function` names. Modules in the current directory count too.

    Raises:
        ConfigError: the path has another form, the module cannot be imported, or the name is
            missing or not callable.
    """
    module_name, separator, name = path.partition(":")
    if not (separator and module_name and name):
        raise ConfigError(
            f"the reward function '{path}' is not of the form module:function, for example"
            " my_rewards:score"
        )
    found: Any = _import(module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(
                f"the module {module_name} has no '{name}', which the reward function '{path}'"
                " asks for"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(
            f"the reward function '{path}' is a {type(found).__name__}, not a function"
        )
    return found  # type: ignore[no-any-return]


def check_call(path: str, function: Score, columns: Iterable[str] = ()) -> None:
    """Raise ConfigError if a reward function does not fit the call or is asynchronous.

    It must take two lists, and the columns by name.
    """
    if inspect.iscoroutinefunction(function):
        raise ConfigError(
            f"the reward function '{path}' is asynchronous; it must return a list of floats"
        )
    extra: dict[str, list[Any]] = {
        name: [] for name in columns if name not in ("prompts", "completions")
    }
    try:
        inspect.signature(function).bind([], [], **extra)
    except TypeError as error:
        called = ", ".join(["prompts", "completions", *(f"{name}=" for name in extra)])
        raise ConfigError(
            f"the reward function '{path}' cannot be called as score({called}): {error}; add"
            " **columns to take any"
        ) from None
    except ValueError:  # a builtin without a signature
        return


def load_reward(
    config: RewardConfig, trust_remote_code: bool = False, device: str = "cpu"
) -> Reward:
    """Return the reward that a configuration names, standardised where it says so.

    The configuration is a resolved one: its model is a folder or hub id.

    Raises:
        ConfigError: there is neither model nor function, it cannot be loaded, or standardise=true
            where no statistics are stored.
    """
    if config.function:
        if config.standardise:
            raise ConfigError(
                f"reward.standardise=true: the function {config.function} has no stored mean and"
                " deviation to scale by"
            )
        function = load_function(config.function)
        return Reward(config.function, function, source=_source_file(function))
    if not config.model:
        raise ConfigError("there is no reward: set reward.model or reward.function")
    from raywarp.rewards.classifier import ClassifierReward

    stored = statistics(config.model)
    if config.standardise and stored is None:
        raise ConfigError(
            f"reward.standardise=true: {config.model} has no {REWARD_FILE} with score_mean and"
            " score_std"
        )
    mean, std = stored if stored and config.standardise is not False else (0.0, 1.0)
    classifier = ClassifierReward(
        config.model,
        _reading(config, PromptsConfig(), trust_remote_code),
        config.batch_size,
        trust_remote_code,
        device,
    )
    return Reward(config.model, classifier.score, mean, std)


def with_template(
    config: RewardConfig, prompts: PromptsConfig, trust_remote_code: bool = False
) -> RewardConfig:
    """Return the configuration with all that decides how its model, which is resolved, reads texts.

    These are `template` (none, plain or chat), `max_length` and `append_eos`.

    Raises:
        ConfigError: see reading_of.
    """
    if not config.model:
        return config.model_copy(update={"template": "none"})
    reading = _reading(config, prompts, trust_remote_code)
    decided = {
        "template": reading.template,
        "max_length": reading.max_length,
        "append_eos": reading.append_eos,
    }
    return config.model_copy(update=decided)


def _reading(config: RewardConfig, prompts: PromptsConfig, trust_remote_code: bool) -> Reading:
    from raywarp.rewards.classifier import load_tokenizer

    assert config.model
    tokenizer = load_tokenizer(config.model, trust_remote_code)
    return reading_of(config, prompts, tokenizer, trust_remote_code)


def reward_fingerprint(config: RewardConfig) -> str:
    """Return a hash of what decides a raw score by a configuration whose model is resolved.

    That is a folder's files, a hub id's commit, or the source of a function's module, and the
    version. The statistics are left out, since they may be added later from SFT completions.
    """
    settings: dict[str, Any] = {"version": config.version}
    if config.function in _KNOWN:
        return (
            content_key([_KNOWN[config.function], config.version])
            if config.version
            else _KNOWN[config.function]
        )
    if config.function:
        module = _import(config.function.partition(":")[0])
        source = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
        settings |= {
            "function": config.function,
            "source": Path(source).read_text() if source else None,
        }
    elif config.model:
        settings |= {
            "max_length": config.max_length
            or (stored_reading(config.model) or Reading()).max_length,
            "standardise": config.standardise,
            "model": _model_fingerprint(config.model),
        }
        settings |= {"template": config.template} if config.template in ("chat", "plain") else {}
        settings |= {"append_eos": True} if config.append_eos else {}
    return content_key(settings)


def _model_fingerprint(name: str) -> str:
    if Path(name).is_dir():
        return folder_fingerprint(Path(name), MODEL_FILES, without=REWARD_FILE)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    return f"{name}@{Path(cached).parent.name}" if isinstance(cached, str) else name


def statistics(name: str) -> tuple[float, float] | None:
    """Return the mean and standard deviation of the score over SFT completions.

    The result is None where the folder has none.

    Raises:
        DamagedError: the file that holds them is damaged.
    """
    stored = read_record(Path(name) / REWARD_FILE) or {}
    return (stored["score_mean"], stored["score_std"]) if "score_mean" in stored else None


def check_trained(folder: Path) -> dict[str, Any] | None:
    """Return reward.json of a model that raywarp trained, or None for any other model.

    Raises:
        DamagedError: raywarp trained it, and its files are not what was written.
    """
    stored = read_record(folder / REWARD_FILE)
    if stored is not None and "settings" in stored:
        check_sealed(folder)
        return stored
    if is_sealed(folder):
        raise DamagedError(f"{folder / REWARD_FILE} is missing")
    return None


def own_file(path: str) -> str | None:
    """Return the file of a reward function in the working directory, which other nodes need too.

    The result is None for an installed function.
    """
    file = getattr(_import(path.partition(":")[0]), "__file__", None)
    # Ray copies a submitted job's folder to every node itself.
    in_job = "working_dir_files" in os.getcwd()
    return file if file and not in_job and Path(file).is_relative_to(os.getcwd()) else None


def _import(module_name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"the reward module '{module_name}' cannot be imported ({what}); looked in"
            f" {os.getcwd()} and sys.path"
        ) from None


def _source_file(function: Score) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return None


def _frame(error: BaseException, source: str | None) -> str:
    """Return " (file:line)" of the deepest frame in the user's file, else of the deepest one."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is in this file
    own = [frame for frame in frames if frame.filename == source] or frames
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def _excerpt(text: str, length: int = EXCERPT) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
