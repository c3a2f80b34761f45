"""The inputs of a run, checked before anything starts: model, prompts and reward.

Each has a fingerprint of its contents, which goes into the policies' keys.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import transformers  # without `from`, because transformers' submodules take seconds to import

from raywarp import identity
from raywarp.config.schema import Config, ConfigError
from raywarp.data.models import check_causal, check_tensors, read_model_config, read_tokenizer
from raywarp.data.moment import stored_moment
from raywarp.data.prompt_set.table import PromptSplits
from raywarp.data.prompts import load_prompts, prompts_fingerprint, resolve_model
from raywarp.data.quantised_models import refuse_quantised_model
from raywarp.data.retention_texts import Tokens, load_texts, retention_dataset
from raywarp.data.text import Prompt
from raywarp.model.supported import refuse_unsupported
from raywarp.planning.base_weights import base_fingerprint, check_base
from raywarp.planning.jobs import check_paths
from raywarp.planning.memory import Shapes
from raywarp.planning.sft_adapter import check_start, start_fingerprint
from raywarp.rewards import score
from raywarp.rewards.classifier import check_classifier, load_tokenizer, read_tokens
from raywarp.rewards.functions import load_exceptions, load_function
from raywarp.rewards.reading import cut_warning
from raywarp.rollout.engine import check_engine
from raywarp.run.loggers import check_loggers
from raywarp.storage import sealed

# What configurations call the number of positions, by family.
POSITIONS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)


@dataclass(frozen=True)
class Inputs:
    """A configuration with all that it refers to, resolved once.

    Attributes:
        config: the run's configuration. The models of reward and control are folders or hub ids in
            it, and their templates are decided.
        model: folder or hub id of the SFT model.
        settings: transformers' configuration of the model.
        shapes: shapes of the model and its adapters.
        prompts: training and held-out prompts in the model's tokens.
        base, prompt_set, reward, evaluation: fingerprints of contents, for the keys.
        texts: the tokens of the texts that show what is kept; none where there are no such texts.
        start: fingerprint of the SFT adapter; empty without one.
        each: the inputs of each policy, where they differ (warp.each); else none.
    """

    config: Config
    model: str
    settings: Any
    shapes: Shapes
    prompts: PromptSplits
    base: str
    prompt_set: str
    reward: str
    evaluation: str
    texts: list[Tokens]
    start: str = ""
    each: tuple["Inputs", ...] = ()

    def of_policy(self, index: int) -> "Inputs":
        """Return the inputs of policy m, counted from 1, as those of a run without `each`."""
        return self.each[index - 1] if self.each else self

    @property
    def front(self) -> str:
        """Fingerprint of all that a front is measured on; no policy depends on the texts."""
        if not self.texts:
            return self.evaluation
        return identity.content_key([self.evaluation, self.texts])

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, also of any policy's own."""
        return max(own.prompts.longest for own in (self, *self.each))

    def measured(self, config: Config) -> Config:
        """Return a configuration with as many prompts in `front` as the front is measured on."""
        held_out = min(config.front.prompts, len(self.prompts.held_out))
        front = config.front.model_copy(update={"prompts": held_out})
        return config.model_copy(update={"front": front})

    @property
    def prompt_notes(self) -> list[str]:
        wanted, found = self.config.front.prompts, self.measured(self.config).front.prompts
        few = f"front.prompts={wanted}, but only {found} are held out: the front is measured on"
        return [*self.prompts.notes, *([f"{few} {found} prompts"] if found < wanted else [])]

    @property
    def warnings(self) -> list[str]:
        """What a reward model may not read of the completions, and what the front lacks."""
        config, found = self.config, []
        for key, scorer in config.scorers.items():
            if scorer.model:
                read = read_tokens(scorer, config.trust_remote_code)
                found.append(
                    cut_warning(key, read, self.longest_prompt, config.rollout.max_new_tokens)
                )
        return [*self.prompt_notes, *(text for text in found if text)]

    @property
    def notes(self) -> list[str]:
        """What a user should know before the run starts."""
        scope = [self.shapes.scope] if self.shapes.scope else []
        return [*scope, *(f"warning: {text}" for text in self.warnings)]

    def fingerprints(self) -> dict[str, Any]:
        """Return the fingerprints that the policies' keys depend on.

        Where the policies differ, `each` has what a policy has instead.
        """
        found: dict[str, Any] = {
            "base": self.base,
            "prompts": self.prompt_set,
            "reward": self.reward,
        }
        found |= {"sft_adapter": self.start} if self.start else {}
        found |= {"evaluation": self.evaluation} if self.config.stop.is_set else {}
        own = [inputs.fingerprints() for inputs in self.each]
        return found | ({"each": own} if own else {})


def prepare(config: Config, say: Callable[[str], None] = lambda line: None) -> Inputs:
    """Resolve and check everything that a run reads.

    Args:
        say: gets a line now and then, while many prompts are read.

    Raises:
        ConfigError: a model, dataset, column, reward or engine is missing or unusable. Also if the
            prompts leave no room for a completion, the model lacks the target modules, or the
            engine would compute another model than transformers does. Also see prepare_texts.
    """
    from raywarp.planning.model_shapes import model_shapes

    check_paths(config)
    check_loggers(config)
    check_engine(config)
    model, settings, prompts = prepare_prompts(config, say)
    config = resolved(config, prompts.train[0].columns)
    longest = prompts.longest + config.rollout.max_new_tokens
    refuse_unsupported(config.model, settings, config.rollout, longest)
    shapes = model_shapes(settings, config.lora, trust_remote_code=config.trust_remote_code)
    start = check_start(config, model, settings)
    inputs = Inputs(
        config=config,
        model=model,
        settings=settings,
        shapes=replace(shapes, start_numbers=start.numbers) if start else shapes,
        prompts=prompts,
        base=base_fingerprint(config, model_fingerprint(model, config.trust_remote_code)),
        prompt_set=prompts_fingerprint(prompts.train),
        reward=score.rewards_fingerprint(config),
        evaluation=_evaluation(config, prompts),
        texts=prepare_texts(config, model, settings),
        start=start_fingerprint(config.sft_adapter) if config.sft_adapter else "",
    )
    each = config.of_policies if config.warp.each else []
    return replace(inputs, each=tuple(_of_policy(inputs, own, say) for own in each))


def _of_policy(inputs: Inputs, config: Config, say: Callable[[str], None]) -> Inputs:
    """Return the inputs of a policy with a configuration of its own.

    Its prompts are split by the run's seed, and lack those that the run holds out.

    Raises:
        ConfigError: as for a run with that configuration, or no training prompt is left.
    """
    prompts = inputs.prompts
    if config.prompts != inputs.config.prompts:
        seed = inputs.config.seed
        _, _, own = prepare_prompts(config.model_copy(update={"seed": seed}), say)
        prompts = own.without(inputs.prompts.held_out)
        if not prompts.train:
            raise ConfigError(
                "warp.each: all training prompts of a policy are among those that the run holds"
                " out; give it others"
            )
        config = resolved(config, prompts.train[0].columns)
    return replace(
        inputs,
        config=config,
        prompts=prompts,
        prompt_set=prompts_fingerprint(prompts.train),
        reward=score.rewards_fingerprint(config),
        evaluation=_evaluation(config, prompts),
    )


def _evaluation(config: Config, prompts: PromptSplits) -> str:
    control = score.reward_fingerprint(config.control) if config.control else None
    return identity.content_key([prompts_fingerprint(prompts.held_out), control])


def resolved(config: Config, columns: Iterable[str] = ()) -> Config:
    """Return the configuration with reward and control resolved and checked.

    Args:
        columns: the prompts' columns, with which a reward function is called.

    Raises:
        ConfigError: see check_reward and score.with_template.
    """
    scorers = config.scorers
    for key, scorer in scorers.items():
        if scorer.model:
            folder = resolve_model(scorer.model, what=f"{key} model")
            scorers[key] = scorer.model_copy(update={"model": folder})
    check_reward(config.with_scorers(scorers), columns)
    decided = {
        key: score.with_template(scorer, config.prompts, config.trust_remote_code)
        for key, scorer in scorers.items()
    }
    return config.with_scorers(decided)


def prepare_prompts(
    config: Config, say: Callable[[str], None] = lambda line: None
) -> tuple[str, Any, PromptSplits]:
    """Return the model's folder or hub id, its configuration, and the prompts in its tokens.

    A template that asks for the date gets that of the run's first start.

    Args:
        say: see prepare.

    Raises:
        ConfigError: the model, its tokenizer or the prompts are missing or unusable, or
            rollout.max_new_tokens fills the model's whole context.
    """
    model, what = resolve_model(config.model), f"model={config.model}"
    refuse_quantised_model(model, what)
    settings = read_model_config(model, config.trust_remote_code, what)
    check_causal(model, settings, config.trust_remote_code, what)
    check_base(config, model, settings)
    tokenizer = read_tokenizer(model, config.trust_remote_code, what)
    room = most_tokens(settings) - config.rollout.max_new_tokens
    if room < 1:
        raise ConfigError(
            f"rollout.max_new_tokens={config.rollout.max_new_tokens} leaves no room in the model's"
            f" context of {most_tokens(settings)} tokens"
        )
    moment = partial(stored_moment, config)
    prompts = load_prompts(config.prompts, tokenizer, config.seed, room, say, moment)
    _check_vocabulary(prompts.largest_token, settings, what)
    check_tensors(
        transformers.AutoModelForCausalLM,
        model,
        settings,
        what,
        trust_remote_code=config.trust_remote_code,
    )
    return model, settings, prompts


def prepare_texts(config: Config, model: str, settings: Any) -> list[Tokens]:
    """Return the texts that show what is kept, in the model's tokens; [] without a dataset.

    Raises:
        ConfigError: see load_texts.
    """
    dataset, what = retention_dataset(config), f"model={config.model}"
    if dataset is None:
        return []
    tokenizer = read_tokenizer(model, config.trust_remote_code, what)
    texts = load_texts(config, dataset, tokenizer, most_tokens(settings))
    _check_vocabulary(max(max(ids) for ids in texts), settings, what)
    return texts


def most_tokens(settings: Any) -> int:
    """Return the most tokens that a model takes, by its configuration."""
    text = settings.get_text_config()
    found = [getattr(text, name, None) for name in POSITIONS]
    return next((count for count in found if isinstance(count, int) and count > 0), 1 << 30)


def _check_vocabulary(largest: int, settings: Any, what: str) -> None:
    """Raise ConfigError if a token is beyond the model's vocabulary."""
    vocabulary = settings.get_text_config().vocab_size
    if largest >= vocabulary:
        raise ConfigError(
            f"{what}: its tokenizer gives token {largest}, and its vocabulary has {vocabulary};"
            " they belong to different models"
        )


def check_reward(config: Config, columns: Iterable[str] = ()) -> None:
    """Check that reward and control can be found, imported and called.

    Args:
        columns: the prompts' columns, with which a reward function is called.

    Raises:
        ConfigError: there is no reward, or one of the two is unusable.
    """
    if not (config.rewards or config.reward.model or config.reward.function):
        raise ConfigError(
            "there is no reward: set reward.model (for example the folder that `raywarp reward`"
            " wrote) or reward.function"
        )
    for key, scorer in config.scorers.items():
        if scorer.function:
            score.check_call(scorer.function, load_function(scorer.function), columns)
            load_exceptions(scorer.retry_on)
        elif scorer.model:
            model = scorer.model
            try:
                score.check_trained(Path(model))
            except sealed.DamagedError as error:
                raise ConfigError(
                    f"{key}.model={scorer.model} is damaged: {error}; `raywarp reward` with"
                    f" out={model} trains it anew"
                ) from None
            check_classifier(model, config.trust_remote_code)
            load_tokenizer(model, config.trust_remote_code)
        else:
            raise ConfigError(f"{key} has neither a model nor a function")


def model_fingerprint(model: str, trust_remote_code: bool = False) -> str:
    """Return the fingerprint of a model.

    It hashes a folder's weights, config and tokenizer. For a hub id it names the commit.
    """
    folder = Path(model)
    if folder.is_dir():
        return identity.folder_fingerprint(
            folder, ["*.safetensors", "*.bin", "*.json", "*.model", "*.jinja"]
        )
    commit: Any = getattr(
        read_model_config(model, trust_remote_code, f"model={model}"), "_commit_hash", None
    )
    return f"{model}@{commit or 'unknown'}"


def first_prompts(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return `count` prompts in order. If there are fewer, start again from the first."""
    return [prompts[n % len(prompts)] for n in range(count)]
