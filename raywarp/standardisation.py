"""Mean and standard deviation of a reward over SFT completions, to standardise rewards with."""

from collections.abc import Sequence
from pathlib import Path

import torch

from raywarp.config.schema import Config
from raywarp.data.text import Prompt
from raywarp.identity import content_key
from raywarp.planning.inputs import Inputs, first_prompts
from raywarp.rewards.reward import RewardError
from raywarp.rewards.score import REWARD_FILE, statistics
from raywarp.run.folder import Run
from raywarp.storage.sealed import DamagedError, read_record, write_record
from raywarp.training.evaluation import sft_scores
from raywarp.training.session import Session


def is_standardised(folder: str | Path) -> bool:
    return statistics(str(folder)) is not None


def save_standardisation(
    folder: str | Path, scores: Sequence[float], of: str = ""
) -> tuple[float, float]:
    """Write the scores' mean and standard deviation into a folder's reward.json, and return both.

    Args:
        folder: the reward model's folder, or the run's.
        scores: raw scores of SFT completions.
        of: a fingerprint of what was scored, and by which model.

    Raises:
        RewardError: there are fewer than two scores, one is not finite, or all are (nearly) equal.
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
    """Return raw scores of SFT completions of `reward_training.sft_completions` prompts."""
    chosen = first_prompts(prompts, config.reward_training.sft_completions)
    with Session(
        config, model, max(len(prompt.token_ids) for prompt in chosen), policies=False
    ) as session:
        return sft_scores(session, chosen)


def reward_statistics(session: Session, run: Run, inputs: Inputs) -> dict[str, float]:
    """Return the mean and deviation that standardise the run's reward, for its policies' keys.

    The result is empty where the reward is not standardised. A classifier without statistics gets
    them from this run's SFT completions. A model that raywarp trained keeps them. For any other
    model the run keeps them while its models and prompts stay the same.
    """
    config = inputs.config
    if not config.reward.model or config.reward.standardise is False:
        return {}
    model, completions = Path(config.reward.model), config.reward_training.sft_completions
    home = model if (model / REWARD_FILE).is_file() else run.folder
    of = content_key([inputs.fingerprints(), completions])
    try:
        known = read_record(home / REWARD_FILE) or {}
    except DamagedError as error:  # only the run's own file: a model's was checked before
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
