"""Mean and standard deviation of a reward over SFT completions, to standardise rewards with."""

from collections.abc import Sequence
from pathlib import Path

import torch

from raywarp.config.rewards import RewardConfig
from raywarp.config.schema import Config
from raywarp.data.text import Prompt
from raywarp.identity import content_key
from raywarp.planning.inputs import Inputs, first_prompts
from raywarp.rewards.reward import RewardError
from raywarp.rewards.score import REWARD_FILE, statistics
from raywarp.rewards.totals import present
from raywarp.run.folder import Run
from raywarp.storage.sealed import DamagedError, read_record, write_record
from raywarp.training.evaluation import sft_scores
from raywarp.training.session import Session


def is_standardised(folder: str | Path) -> bool:
    return statistics(str(folder)) is not None


def save_standardisation(
    folder: str | Path, scores: Sequence[float], of: str = "", name: str = REWARD_FILE
) -> tuple[float, float]:
    """Write the scores' mean and standard deviation into a file of a folder, and return both.

    Args:
        folder: the reward model's folder, or the run's.
        scores: raw scores of SFT completions.
        of: a fingerprint of what was scored, and by which model.
        name: name of the file.

    Raises:
        RewardError: there are fewer than two scores, one is not finite, or all are (nearly) equal.
    """
    path = Path(folder) / name
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
    """Return the mean and deviation that standardise each of the run's rewards, for policies' keys.

    The result has nothing of a reward that is not standardised. One without statistics gets them
    from this run's SFT completions. A model that raywarp trained keeps them. For any other reward
    the run keeps them while its models and prompts stay the same.
    """
    config, known = inputs.config, dict[str, tuple[float, float]]()
    wanted = [key for key, source in config.rewards_by_key.items() if is_wanted(source)]
    of = content_key([inputs.fingerprints(), config.reward_training.sft_completions])
    for key in wanted:
        if (found := _stored(run, config.rewards_by_key[key], key, of)) is not None:
            known[key] = found
    if missing := [key for key in wanted if key not in known]:
        prompts = first_prompts(inputs.prompts.sampled, config.reward_training.sft_completions)
        scores = sft_scores(session, prompts)
        for key in missing:
            own = scores.parts.get(key.partition(".")[2], scores)
            home, name = _home(run, config.rewards_by_key[key], key)
            known[key] = save_standardisation(home, present(own), of, name)
    for key in wanted:
        session.set_reward_statistics(*known[key], key)
    return {
        f"{name}{key.removeprefix('reward').removeprefix('s').replace('.', '/')}": value
        for key in wanted
        for name, value in zip(("score_mean", "score_std"), known[key], strict=True)
    }


def is_wanted(source: RewardConfig) -> bool:
    """Return whether a reward is standardised: a model is, unless the configuration says no."""
    return bool(source.model) if source.standardise is None else source.standardise


def _home(run: Run, source: RewardConfig, key: str) -> tuple[Path, str]:
    """Return the folder and the file with a reward's statistics."""
    if source.model and (Path(source.model) / REWARD_FILE).is_file():
        return Path(source.model), REWARD_FILE
    return run.folder, REWARD_FILE if key == "reward" else f"reward-{key.partition('.')[2]}.json"


def _stored(run: Run, source: RewardConfig, key: str, of: str) -> tuple[float, float] | None:
    """Return the stored statistics of a reward, or None if there are none of it."""
    home, name = _home(run, source, key)
    try:
        known = read_record(home / name) or {}
    except DamagedError as error:  # only the run's own file: a model's was checked before
        run.say(f"{error}; measured again")
        (home / name).unlink()
        known = {}
    if home == run.folder and known.get("score_of", of) != of:
        run.say(f"{home / name} is of another model, reward or prompts; measured again")
        known = {}
    return (known["score_mean"], known["score_std"]) if "score_mean" in known else None
