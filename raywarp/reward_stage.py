"""`raywarp reward`: trains a Bradley–Terry reward model, then standardises its score.

The score is standardised by its mean and standard deviation over completions of the SFT model.
"""

from dataclasses import dataclass
from pathlib import Path

from raywarp.cluster import runtime
from raywarp.config.schema import Config
from raywarp.data.prompt_set.table import PromptSplits
from raywarp.planning import preflight
from raywarp.planning.inputs import prepare_prompts
from raywarp.planning.jobs import check_paths
from raywarp.rewards.inputs import RewardInputs, prepare_reward
from raywarp.rewards.score import with_template
from raywarp.rewards.training import RewardSummary, train_reward
from raywarp.rollout.engine import check_engine
from raywarp.run.display import Display
from raywarp.standardisation import is_standardised, save_standardisation, scores_of_sft
from raywarp.storage.locks import exclusive


@dataclass(frozen=True)
class StageInputs:
    """What the reward stage reads.

    Attributes:
        model: folder or hub id of the SFT model.
        prompts: prompts in the SFT model's tokens.
        training: what the training reads; None if the reward model is finished.
    """

    model: str
    prompts: PromptSplits
    training: RewardInputs | None


def prepare_stage(config: Config) -> StageInputs:
    """Return all that the stage reads, checked.

    Raises:
        ConfigError: the input is wrong; nothing was started or written.
    """
    check_paths(config)
    check_engine(config)
    model, _, prompts = prepare_prompts(config)
    return StageInputs(model, prompts, prepare_reward(config))


def reward(
    config: Config,
    display: Display | None = None,
    standardise: bool = True,
    inputs: StageInputs | None = None,
) -> RewardSummary:
    """Train the reward model in the folder `out`, or continue its training.

    A finished reward model is not trained again.

    Args:
        standardise: measure its score over SFT completions now. Otherwise the first run that uses
            the model measures it.
        inputs: what prepare_stage returned, if it was called before.

    Raises:
        ConfigError: the input is wrong; nothing was started.
    """
    display, inputs = display or Display(), inputs or prepare_stage(config)
    with exclusive(config.out, Path(config.out), display.say) as waited:
        return _train_and_standardise(
            config, display, standardise, prepare_stage(config) if waited else inputs
        )


def _train_and_standardise(
    config: Config, display: Display, standardise: bool, inputs: StageInputs
) -> RewardSummary:
    samples = standardise and not is_standardised(config.out)
    if inputs.training or samples:
        runtime.start_ray()
        display.place()
        if samples:
            preflight.check_sampler(config)
        preflight.preflight(config, None, [])
    if inputs.training:
        display.progress(
            f"reward: training {config.reward_training.backbone} on preferences from"
            f" {config.preferences.dataset}"
        )
    summary = train_reward(config, inputs.training, display)
    if standardise and not is_standardised(summary.folder):
        display.progress(
            f"reward: scoring {config.reward_training.sft_completions} SFT completions to"
            " standardise it"
        )
        scorer = config.reward.model_copy(
            update={"model": str(summary.folder), "function": None, "standardise": False}
        )
        scorer = with_template(scorer, config.prompts, config.trust_remote_code)
        scores = scores_of_sft(
            config.model_copy(update={"reward": scorer, "rewards": [], "control": None}),
            inputs.model,
            inputs.prompts.sampled,
        )
        save_standardisation(summary.folder, scores)
    low, high = summary.accuracy_ci
    accuracy = f"{summary.accuracy:.3f} [{low:.3f}, {high:.3f}] on {summary.pairs} held-out pairs"
    display.say(f"reward: pairwise accuracy {accuracy}; {summary.folder}")
    return summary
