"""What a run is made from, checked before anything starts: model, prompts, reward; each with a fingerprint for the keys."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raywarp import rewards, store
from raywarp.config import Config, ConfigError
from raywarp.data import Prompt, PromptSplits, fingerprint, load_prompts, resolve_model
from raywarp.engines import check_engine
from raywarp.jobs import check_paths
from raywarp.loggers import check_loggers


@dataclass(frozen=True)
class Inputs:
    """model: folder or hub id. longest_prompt: in tokens. The other fields are fingerprints of contents."""

    model: str
    prompts: PromptSplits
    base: str
    prompt_set: str
    reward: str
    evaluation: str

    @property
    def longest_prompt(self) -> int:
        return max(len(prompt.token_ids) for prompt in [*self.prompts.train, *self.prompts.held_out])

    def fingerprints(self) -> dict[str, str]:
        return {"base": self.base, "prompts": self.prompt_set, "reward": self.reward}


def prepare(config: Config) -> Inputs:
    """Resolve and check everything that a run reads.

    Raises:
        ConfigError: a missing or unusable model, dataset, column, reward or engine; prompts that leave no room for a completion.
    """
    check_paths(config)
    check_loggers(config)
    check_engine(config)
    model, prompts = prepare_prompts(config)
    check_reward(config)
    return Inputs(
        model=model,
        prompts=prompts,
        base=model_fingerprint(model, config.trust_remote_code),
        prompt_set=fingerprint(prompts.train),
        reward=rewards.fingerprint(config.reward),
        evaluation=store.content_key([fingerprint(prompts.held_out), rewards.fingerprint(config.control) if config.control else None]),
    )


def prepare_prompts(config: Config) -> tuple[str, PromptSplits]:
    """The model's folder or hub id, and the prompts in its tokens."""
    from transformers import AutoConfig, AutoTokenizer

    model = resolve_model(config.model)
    try:
        settings = AutoConfig.from_pretrained(model, trust_remote_code=config.trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model={config.model} cannot be loaded: {_first_line(error)}") from None
    context = getattr(settings, "max_position_embeddings", None) or 1 << 30
    room = context - config.rollout.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room in the model's context of {context} tokens"
        )
    return model, load_prompts(config.prompts, tokenizer, config.seed, room)


def check_reward(config: Config) -> None:
    """Raises ConfigError where there is no reward, or it (or the control) cannot be found or imported."""
    if not (config.reward.model or config.reward.function):
        raise ConfigError("there is no reward: set reward.model (for example the folder that `raywarp reward` wrote) or reward.function")
    for key, scorer in (("reward", config.reward), ("control", config.control)):
        if scorer is None:
            continue
        if scorer.function:
            rewards.load_function(scorer.function)
        elif scorer.model:
            model = resolve_model(scorer.model, what=f"{key} model")
            try:
                rewards.check_trained(Path(model))
            except store.DamagedError as error:
                raise ConfigError(
                    f"{key}.model={scorer.model} is damaged: {error}; `raywarp reward` with out={model} trains it anew"
                ) from None
            rewards.check_classifier(model, config.trust_remote_code)
        else:
            raise ConfigError(f"{key} has neither a model nor a function")


def model_fingerprint(model: str, trust_remote_code: bool = False) -> str:
    """Of a folder's weights, config and tokenizer; of a hub id, its commit."""
    folder = Path(model)
    if folder.is_dir():
        return store.folder_fingerprint(folder, ["*.safetensors", "*.bin", "*.json", "*.model", "*.jinja"])
    from transformers import AutoConfig

    commit: Any = getattr(AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code), "_commit_hash", None)
    return f"{model}@{commit or 'unknown'}"


def first_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """`count` prompts in order, from the beginning again where there are fewer."""
    return [prompts[n % len(prompts)] for n in range(count)]


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
