"""What scores completions: a one-label sequence classifier, or a Python function of the user's.

Both are called as `score(prompts, completions, **columns) -> list[float]`: lists of N texts, and for every other column of the
prompts' dataset a list of N values.
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

import torch
import transformers  # not `from`: its parts take seconds to import, which a reward by function need not wait for
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from raywarp.config import ConfigError, PromptsConfig, RewardConfig
from raywarp.data import resolve_model
from raywarp.hardware import supports_bf16
from raywarp.model_files import check_one_label, first_line, read_model_config, read_tokenizer
from raywarp.store import DamagedError, check_sealed, content_key, folder_fingerprint, is_sealed, read_record

Score = Callable[..., Any]
REWARD_FILE = "reward.json"
MODEL_FILES = ["*.safetensors", "*.bin", "*.json", "*.model", "*.jinja", "*.txt", "*.py"]
SHOWN = 200  # characters of a prompt or completion in an error


class RewardError(RuntimeError):
    """A reward failed or returned something other than one finite number per completion; the message shows the text."""


def encode(tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], max_length: int, chat: bool = False) -> Any:
    """Token ids and attention mask of prompt + completion, or of the two as turns of a chat, (N, longest), right-padded.

    A text above max_length tokens (or above what the tokenizer says its model takes) loses its beginning: the completion is kept.
    """
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    pairs = list(zip(prompts, completions, strict=True))
    texts = [_as_turns(tokenizer, *pair) for pair in pairs] if chat else [prompt + completion for prompt, completion in pairs]
    length = min(max_length, tokenizer.model_max_length)
    return tokenizer(texts, padding=True, truncation=True, max_length=length, add_special_tokens=not chat, return_tensors="pt")


def _as_turns(tokenizer: Any, prompt: str, completion: str) -> str:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return text


def classify(
    model: Any, tokenizer: Any, prompts: Sequence[str], completions: Sequence[str], max_length: int, batch_size: int, chat: bool = False
) -> Tensor:
    """The classifier's scores, (N,) float32 on its device, with a gradient if autograd is on: training and scoring both call this.

    Texts of similar length share a forward pass of at most batch_size, which saves most of the padding.
    """
    device = next(model.parameters()).device
    order = sorted(range(len(completions)), key=lambda n: len(prompts[n]) + len(completions[n]))
    parts = []
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = encode(tokenizer, [prompts[n] for n in chosen], [completions[n] for n in chosen], max_length, chat)
        parts.append(model(**batch.to(device)).logits[:, 0].float())
    place = torch.empty(len(order), dtype=torch.long, device=device)
    place[torch.tensor(order, device=device)] = torch.arange(len(order), device=device)
    return torch.cat(parts)[place]


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    """A model's tokenizer; where it has no padding token (GPT-2's has none) its EOS pads, behind the attention mask.

    Raises:
        ConfigError: it cannot be loaded, or has neither token.
    """
    tokenizer = read_tokenizer(name, trust_remote_code, f"the model {name}")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ConfigError(f"the tokenizer of {name} has neither a padding nor an EOS token, so texts cannot be batched")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def check_classifier(name: str, trust_remote_code: bool = False) -> None:
    """Raises ConfigError where the model (folder or hub id) cannot be read, is not whole or has not exactly one label; loads no weights."""
    what = f"the reward model {name}"
    check_one_label(name, read_model_config(name, trust_remote_code, what), trust_remote_code, what)


class ClassifierReward:
    """A one-label AutoModelForSequenceClassification that scores prompt + completion.

    Args:
        name: folder or hub id, already resolved.
        max_length: tokens per text; see encode.
        batch_size: texts per forward pass.
        chat: prompt and completion are turns of its chat template.

    Raises:
        ConfigError: not loadable, or not one label.
    """

    def __init__(
        self,
        name: str,
        max_length: int = 256,
        batch_size: int = 64,
        trust_remote_code: bool = False,
        device: str | torch.device = "cpu",
        chat: bool = False,
    ):
        check_classifier(name, trust_remote_code)
        self.max_length, self.batch_size, self.chat = max_length, batch_size, chat
        self.tokenizer = load_tokenizer(name, trust_remote_code)
        dtype = "auto" if supports_bf16(torch.device(device)) else torch.float32
        try:
            model = transformers.AutoModelForSequenceClassification.from_pretrained(
                name, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"the reward model {name} cannot be loaded: {first_line(error)}") from None
        if model.config.pad_token_id is None:  # a decoder's classifier reads the last token that is not this one
            model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(device).eval()

    def score(self, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """Raw scores, in the order of the completions."""
        if not completions:
            return []
        with torch.inference_mode():
            scores = classify(self.model, self.tokenizer, prompts, completions, self.max_length, self.batch_size, self.chat)
        return [float(score) for score in scores.tolist()]


class Reward:
    """A source of scores with its standardisation, whose results are checked.

    Args:
        name: how errors call it.
        function: score(prompts, completions, **columns).
        mean, std: the score returned is (raw - mean) / std.
        source: file of a user's function; errors then point to its line.
    """

    def __init__(self, name: str, function: Score, mean: float = 0.0, std: float = 1.0, source: str | None = None):
        self.name, self.function, self.mean, self.std, self.source = name, function, mean, std, source

    def score(self, prompts: Sequence[str], completions: Sequence[str], columns: Mapping[str, Sequence[Any]] | None = None) -> list[float]:
        """One standardised score per completion.

        Args:
            columns: per column of the dataset a list as long as the prompts; `prompts` and `completions` are not passed on.

        Raises:
            RewardError: the function raised, or did not return one finite number per completion.
        """
        if not completions:
            return []
        extra = {key: list(values) for key, values in (columns or {}).items() if key not in ("prompts", "completions")}
        try:
            result = self.function(list(prompts), list(completions), **extra)
        except Exception as error:
            place = _place(error, self.source)
            raise self._error(f"raised {type(error).__name__}: {error}{place}; the batch begins with", prompts[0], completions[0]) from None
        return [(raw - self.mean) / self.std for raw in self._checked(result, prompts, completions)]

    def _checked(self, result: Any, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        values = result.tolist() if hasattr(result, "tolist") else result
        if not isinstance(values, list | tuple):
            raise self._error(f"returned {type(result).__name__}, not a list of floats, for", prompts[0], completions[0])
        if len(values) != len(completions):
            problem = f"returned {len(values)} scores for {len(completions)} completions, the first of them"
            raise self._error(problem, prompts[0], completions[0])
        scores = []
        for value, prompt, completion in zip(values, prompts, completions, strict=True):
            number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
            if not isinstance(number, Real) or not math.isfinite(number):
                raise self._error(f"returned {_short(repr(value), 60)}, not a finite number, for", prompt, completion)
            scores.append(float(number))
        return scores

    def _error(self, problem: str, prompt: str, completion: str) -> RewardError:
        return RewardError(f"reward {self.name} {problem}\n  prompt: {_short(prompt)!r}\n  completion: {_short(completion)!r}")


def load_function(path: str) -> Score:
    """The callable that `module:function` names; modules are looked for in the current directory too.

    Raises:
        ConfigError: not of that form, not importable, no such attribute, or not callable.
    """
    module_name, separator, name = path.partition(":")
    if not (separator and module_name and name):
        raise ConfigError(f"the reward function '{path}' is not of the form module:function, for example my_rewards:score")
    found: Any = _import(module_name)
    for part in name.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"the module {module_name} has no '{name}', which the reward function '{path}' asks for")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"the reward function '{path}' is a {type(found).__name__}, not a function")
    return found  # type: ignore[no-any-return]


def check_call(path: str, function: Score, columns: Iterable[str] = ()) -> None:
    """Raises ConfigError where a reward function cannot take two lists and the columns by name, or would have to be awaited."""
    if inspect.iscoroutinefunction(function):
        raise ConfigError(f"the reward function '{path}' is asynchronous; it must return a list of floats")
    extra: dict[str, list[Any]] = {name: [] for name in columns if name not in ("prompts", "completions")}
    try:
        inspect.signature(function).bind([], [], **extra)
    except TypeError as error:
        called = ", ".join(["prompts", "completions", *(f"{name}=" for name in extra)])
        raise ConfigError(f"the reward function '{path}' cannot be called as score({called}): {error}; add **columns to take any") from None
    except ValueError:  # a builtin that does not say what it takes
        return


def load_reward(config: RewardConfig, trust_remote_code: bool = False, device: str | torch.device = "cpu") -> Reward:
    """The reward that a configuration names, standardised where it says so.

    Raises:
        ConfigError: neither model nor function, one that cannot be loaded, or standardise=true where no statistics are stored.
    """
    if config.function:
        if config.standardise:
            raise ConfigError(f"reward.standardise=true: the function {config.function} has no stored mean and deviation to scale by")
        function = load_function(config.function)
        return Reward(config.function, function, source=_source_file(function))
    if not config.model:
        raise ConfigError("there is no reward: set reward.model or reward.function")
    name = resolve_model(config.model, what="reward model")
    stored = statistics(name)
    if config.standardise and stored is None:
        raise ConfigError(f"reward.standardise=true: {config.model} has no {REWARD_FILE} with score_mean and score_std")
    mean, std = stored if stored and config.standardise is not False else (0.0, 1.0)
    classifier = ClassifierReward(name, config.max_length, config.batch_size, trust_remote_code, device, config.template == "chat")
    return Reward(config.model, classifier.score, mean, std)


def with_template(config: RewardConfig, prompts: PromptsConfig, trust_remote_code: bool = False) -> RewardConfig:
    """With `template` decided where it is auto.

    Raises:
        ConfigError: chat is asked for, and the model has no chat template.
    """
    if not config.model or config.template == "none" or (config.template == "auto" and prompts.template != "chat"):
        return config.model_copy(update={"template": "none"})
    name = resolve_model(config.model, what="reward model")
    has_one = bool(load_tokenizer(name, trust_remote_code).chat_template)
    if config.template == "chat" and not has_one:
        raise ConfigError(f"reward.template=chat, but the tokenizer of {config.model} has no chat template; use template=none")
    own = (Path(name) / REWARD_FILE).is_file()  # raywarp trains on the two texts as they are
    wanted = config.template == "chat" or (has_one and not own)
    return config.model_copy(update={"template": "chat" if wanted else "none"})


def fingerprint(config: RewardConfig) -> str:
    """A hash of what decides a raw score: a folder's files, a hub id's commit, a function's module source and version.

    What standardises it (see statistics) is not in it: that may come later, from SFT completions.
    """
    settings: dict[str, Any] = {"version": config.version}
    if config.function:
        module = _import(config.function.partition(":")[0])
        source = inspect.getsourcefile(module) if getattr(module, "__file__", None) else None
        settings |= {"function": config.function, "source": Path(source).read_text() if source else None}
    elif config.model:
        name = resolve_model(config.model, what="reward model")
        settings |= {"max_length": config.max_length, "standardise": config.standardise, "model": _model_fingerprint(name)}
        settings |= {"template": "chat"} if config.template == "chat" else {}
    return content_key(settings)


def _model_fingerprint(name: str) -> str:
    if Path(name).is_dir():
        return folder_fingerprint(Path(name), MODEL_FILES, without=REWARD_FILE)
    cached = try_to_load_from_cache(name, "config.json")
    return f"{name}@{Path(cached).parent.name}" if isinstance(cached, str) else name


def statistics(name: str) -> tuple[float, float] | None:
    """Mean and standard deviation of the score over SFT completions, where a folder has them.

    Raises:
        DamagedError: it has, or had.
    """
    stored = read_record(Path(name) / REWARD_FILE) or {}
    return (stored["score_mean"], stored["score_std"]) if "score_mean" in stored else None


def check_trained(folder: Path) -> dict[str, Any] | None:
    """What reward.json says of a model that raywarp trained; None for any other model.

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
    """The file of a reward function that lies in the working directory, which other nodes need as well; None for an installed one."""
    file = getattr(_import(path.partition(":")[0]), "__file__", None)
    in_job = "working_dir_files" in os.getcwd()  # Ray brings a submitted job's folder to every node itself
    return file if file and not in_job and Path(file).is_relative_to(os.getcwd()) else None


def _import(module_name: str) -> ModuleType:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}"
        raise ConfigError(f"the reward module '{module_name}' cannot be imported ({what}); looked in {os.getcwd()} and sys.path") from None


def _source_file(function: Score) -> str | None:
    try:
        return inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:
        return None


def _place(error: BaseException, source: str | None) -> str:
    """The file:line, in brackets, of the deepest frame in the user's own file, else of the deepest frame."""
    frames = traceback.extract_tb(error.__traceback__)[1:]  # the first one is ours
    own = [frame for frame in frames if frame.filename == source] or frames
    return f" ({own[-1].filename}:{own[-1].lineno})" if own else ""


def _short(text: str, length: int = SHOWN) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
