"""`raywarp reward`: Bradley–Terry training, then the score's mean and deviation over SFT
completions, by which rewards are standardised.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from raywarp.cluster.runtime import start_ray
from raywarp.config.schema import Config
from raywarp.data.prompts import resolve_model
from raywarp.data.text import Prompt, PromptSplits
from raywarp.identity import content_key
from raywarp.planning.inputs import Inputs, first_prompts, prepare_prompts
from raywarp.planning.jobs import check_paths
from raywarp.planning.plan import check_cluster
from raywarp.rewards.inputs import RewardInputs, prepare_reward
from raywarp.rewards.score import REWARD_FILE, RewardError, statistics
from raywarp.rewards.training import RewardSummary, train_reward
from raywarp.rollout.engine import check_engine
from raywarp.run.display import Display
from raywarp.run.folder import Run
from raywarp.storage.locks import exclusive
from raywarp.storage.sealed import DamagedError, read_record, write_record
from raywarp.training.evaluation import sft_scores
from raywarp.training.session import Session


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
    model, prompts = prepare_prompts(config)
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
        start_ray()
        check_cluster(config, inputs.model)
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


def is_standardised(folder: str | Path) -> bool:
    return statistics(str(folder)) is not None


def save_standardisation(
    folder: str | Path, scores: Sequence[float], of: str = ""
) -> tuple[float, float]:
    """Write mean and standard deviation of raw scores (of SFT completions) into a reward model's
    reward.json; returns both.

    Args:
        of: a fingerprint of what was scored, and by what.

    Raises:
        RewardError: fewer than two scores, one that is not finite, or all (nearly) the same.
    """
    path = Path(folder) / REWARD_FILE
    values = torch.tensor(list(scores), dtype=torch.float64)
    mean, std = (values.mean().item(), values.std().item()) if len(values) > 1 else (0.0, 0.0)
    if not 1e-8 < std < float("inf"):
        raise RewardError(
            f"cannot standardise {folder}: {len(values)} scores of SFT completions deviate by"
            f" {std:.2g}, it must be above 0"
        )
    known = read_record(path) or {}
    write_record(
        path,
        known
        | {"score_mean": mean, "score_std": std, "score_count": len(values)}
        | ({"score_of": of} if of else {}),
    )
    return mean, std


def scores_of_sft(config: Config, model: str, prompts: Sequence[Prompt]) -> list[float]:
    """Raw scores of `reward_training.sft_completions` completions of the SFT model on training
    prompts.
    """
    chosen = first_prompts(prompts, config.reward_training.sft_completions)
    with Session(
        config, model, max(len(prompt.token_ids) for prompt in chosen), policies=False
    ) as session:
        return sft_scores(session, chosen)


def reward_statistics(
    session: Session, run: Run, config: Config, inputs: Inputs
) -> dict[str, float]:
    """Mean and deviation that standardise the run's reward, for the keys of its policies; empty
    where it is not standardised.

    A classifier that has none gets them from this run's SFT completions; a model that raywarp
    trained keeps them, else the run does, for as long as its models and prompts are the same.
    """
    if not config.reward.model or config.reward.standardise is False:
        return {}
    model = Path(resolve_model(config.reward.model))
    home, completions = (
        model if (model / REWARD_FILE).is_file() else run.folder,
        config.reward_training.sft_completions,
    )
    of = content_key([inputs.fingerprints(), completions])
    try:
        known = read_record(home / REWARD_FILE) or {}
    except DamagedError as error:  # the run's own: a model's was checked before
        run.say(f"{error}; measured again")
        (home / REWARD_FILE).unlink()
        known = {}
    if home == run.folder and known.get("score_of", of) != of:
        run.say(f"{home / REWARD_FILE} is of another model, reward or prompts; measured again")
        known = {}
    if "score_mean" in known:
        mean, deviation = known["score_mean"], known["score_std"]
    else:
        mean, deviation = save_standardisation(
            home, sft_scores(session, first_prompts(inputs.prompts.train, completions)), of
        )
    session.set_reward_statistics(mean, deviation)
    return {"score_mean": mean, "score_std": deviation}
