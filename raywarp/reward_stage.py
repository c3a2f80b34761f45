"""`raywarp reward`: Bradley–Terry training, then the score's mean and deviation over SFT completions, by which rewards are standardised."""

from collections.abc import Sequence

from raywarp.config import Config
from raywarp.data import Prompt, resolve_model
from raywarp.inputs import first_prompts, prepare_prompts
from raywarp.progress import Display
from raywarp.reward_training import RewardSummary, is_standardised, save_standardisation, train_reward
from raywarp.rewards import statistics
from raywarp.run import Run
from raywarp.session import Session, check_vllm, start_ray


def reward(config: Config, display: Display | None = None) -> RewardSummary:
    """Train the reward model into the folder `out`, or continue; a finished one is left as it is.

    Raises:
        ConfigError: the input is wrong; nothing was started.
    """
    display = display or Display()
    check_vllm()
    model, prompts = prepare_prompts(config)
    start_ray()
    display.say(f"reward: training {config.reward_training.backbone} on preferences from {config.preferences.dataset}")
    summary = train_reward(config)
    if not is_standardised(summary.folder):
        display.say(f"reward: scoring {config.reward_training.sft_completions} SFT completions to standardise it")
        scorer = config.reward.model_copy(update={"model": str(summary.folder), "function": None, "standardise": False})
        scores = sft_scores(config.model_copy(update={"reward": scorer, "control": None}), model, prompts.train)
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


def standardise_in_run(session: Session, run: Run, config: Config, prompts: Sequence[Prompt]) -> dict[str, float]:
    """A classifier without statistics of its own (from a hub, say) is standardised by this run's SFT completions; the run keeps them.

    Returns:
        what was applied, for the keys of the policies; empty where the reward needs nothing.
    """
    if not config.reward.model or config.reward.standardise is False or is_standardised(resolve_model(config.reward.model)):
        return {}
    if not is_standardised(run.folder):
        save_standardisation(run.folder, session.sft_scores(first_prompts(prompts, config.reward_training.sft_completions)))
    mean, deviation = statistics(str(run.folder)) or (0.0, 1.0)
    session.set_reward_statistics(mean, deviation)
    return {"score_mean": mean, "score_std": deviation}
