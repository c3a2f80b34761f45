"""`raywarp reward`: Bradley–Terry training, then the score's mean and deviation over SFT completions, by which rewards are standardised."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from raywarp.config import Config
from raywarp.data import Prompt, PromptSplits, resolve_model
from raywarp.engines import check_engine
from raywarp.inputs import first_prompts, prepare_prompts
from raywarp.jobs import check_paths
from raywarp.planning import check_cluster
from raywarp.progress import Display
from raywarp.reward_training import RewardInputs, RewardSummary, is_standardised, prepare_reward, save_standardisation, train_reward
from raywarp.rewards import REWARD_FILE, statistics
from raywarp.run import Run
from raywarp.session import Session, start_ray
from raywarp.store import DamagedError


@dataclass(frozen=True)
class StageInputs:
    """The SFT model's folder or hub id, its prompts, and what the training reads (None: it is finished)."""

    model: str
    prompts: PromptSplits
    training: RewardInputs | None


def prepare_stage(config: Config) -> StageInputs:
    """Check all that the stage reads; raises ConfigError before anything is started or written."""
    check_paths(config)
    check_engine(config)
    model, prompts = prepare_prompts(config)
    return StageInputs(model, prompts, prepare_reward(config))


def reward(config: Config, display: Display | None = None, standardise: bool = True, inputs: StageInputs | None = None) -> RewardSummary:
    """Train the reward model into the folder `out`, or continue; a finished one is left as it is.

    Args:
        standardise: measure its score over SFT completions now; otherwise the first run that uses it does.
        inputs: what prepare_stage returned, if it was called.

    Raises:
        ConfigError: the input is wrong; nothing was started.
    """
    display, inputs = display or Display(), inputs or prepare_stage(config)
    if inputs.training or (standardise and not is_standardised(config.out)):
        start_ray()
        check_cluster(config, inputs.model)
    if inputs.training:
        display.progress(f"reward: training {config.reward_training.backbone} on preferences from {config.preferences.dataset}")
    summary = train_reward(config, inputs.training, display)
    if standardise and not is_standardised(summary.folder):
        display.progress(f"reward: scoring {config.reward_training.sft_completions} SFT completions to standardise it")
        scorer = config.reward.model_copy(update={"model": str(summary.folder), "function": None, "standardise": False})
        scores = sft_scores(config.model_copy(update={"reward": scorer, "control": None}), inputs.model, inputs.prompts.train)
        save_standardisation(summary.folder, scores)
    low, high = summary.accuracy_ci
    accuracy = f"{summary.accuracy:.3f} [{low:.3f}, {high:.3f}] on {summary.pairs} held-out pairs"
    display.say(f"reward: pairwise accuracy {accuracy}; {summary.folder}")
    return summary


def sft_scores(config: Config, model: str, prompts: Sequence[Prompt]) -> list[float]:
    """Raw scores of `reward_training.sft_completions` completions of the SFT model on training prompts."""
    chosen = first_prompts(prompts, config.reward_training.sft_completions)
    with Session(config, model, max(len(prompt.token_ids) for prompt in chosen), policies=False) as session:
        return session.sft_scores(chosen)


def reward_statistics(session: Session, run: Run, config: Config, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Mean and deviation that standardise the run's reward, for the keys of its policies; empty where it is not standardised.

    A classifier that has none gets them from this run's SFT completions; a model that raywarp trained keeps them, else the run does.
    """
    if not config.reward.model or config.reward.standardise is False:
        return {}
    model = Path(resolve_model(config.reward.model))
    home = model if (model / REWARD_FILE).is_file() else run.folder
    try:
        standardised = is_standardised(home)
    except DamagedError as error:  # the run's own: a model's was checked before
        run.say(f"{error}; measured again")
        (home / REWARD_FILE).unlink()
        standardised = False
    if not standardised:
        save_standardisation(home, session.sft_scores(first_prompts(prompts, config.reward_training.sft_completions)))
    mean, deviation = statistics(str(home)) or (0.0, 1.0)
    session.set_reward_statistics(mean, deviation)
    return {"score_mean": mean, "score_std": deviation}
