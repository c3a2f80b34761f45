"""`raywarp reward`: Bradley–Terry training, then the score's mean and deviation over SFT
completions, by which rewards are standardised.
"""

from dataclasses import dataclass
from pathlib import Path

from raywarp.cluster import runtime
from raywarp.config.schema import Config
from raywarp.data.text import PromptSplits
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
    """The SFT model's folder or hub id, its prompts, and what the training reads (None: it is
    finished).
    """

    model: str
    prompts: PromptSplits
    training: RewardInputs | None


def prepare_stage(config: Config) -> StageInputs:
    """Check all that the stage reads; raises ConfigError before anything is started or written."""
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
    """Train the reward model into the folder `out`, or continue; a finished one is left as it is.

    Args:
        standardise: measure its score over SFT completions now; otherwise the first run that uses
            it does.
        inputs: what prepare_stage returned, if it was called.

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
    if inputs.training or (standardise and not is_standardised(config.out)):
        runtime.start_ray()
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
            config.model_copy(update={"reward": scorer, "control": None}),
            inputs.model,
            inputs.prompts.train,
        )
        save_standardisation(summary.folder, scores)
    low, high = summary.accuracy_ci
    accuracy = f"{summary.accuracy:.3f} [{low:.3f}, {high:.3f}] on {summary.pairs} held-out pairs"
    display.say(f"reward: pairwise accuracy {accuracy}; {summary.folder}")
    return summary
