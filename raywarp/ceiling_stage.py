"""`raywarp ceiling`: measures what a reward lets any policy gain, before anything is trained."""

from collections.abc import Mapping
from typing import Any

from raywarp.cluster.claims import NO_CLAIMS, Claims
from raywarp.cluster.runtime import stoppable
from raywarp.config.schema import Config, ConfigError
from raywarp.data.moment import keep_moment
from raywarp.data.prompts import prompts_fingerprint
from raywarp.planning.inputs import Inputs, prepare
from raywarp.planning.plan import local_paths
from raywarp.planning.preflight import check_sampler, preflight
from raywarp.run.ceiling import FOLDER, Ceiling, find_ceiling, save_ceiling
from raywarp.run.display import Display
from raywarp.run.folder import Run
from raywarp.run.keys import ceiling_key, key_of_numerics
from raywarp.standardisation import reward_statistics
from raywarp.storage import sealed
from raywarp.storage.locks import exclusive
from raywarp.storage.sealed import DamagedError
from raywarp.training.session import Session
from raywarp.training.sft_rewards import rewards_of_sft

CEILING_FILE = "ceiling.json"


def ceiling(config: Config, display: Display | None = None) -> Ceiling:
    """Measure the ceiling of a configuration's fronts, or return the one that `out` has.

    It needs the model, the prompts and the reward; no policy is trained. `train` with the same
    `out` finds it again.

    Raises:
        ConfigError: the input is wrong; nothing was started.
        RewardError: the reward failed or was not a finite number.
        FaultError: an actor died too often, or the cluster has no room for it any more.
        Stopped: SIGTERM or Ctrl-C, a KeyboardInterrupt.
    """
    if not config.front.ceiling_completions:
        raise ConfigError(
            "front.ceiling_completions=0 measures no ceiling; set it to at least 4, for example 32"
        )
    display = display or Display()
    inputs = prepare(config, display.progress)
    run = Run.open(config, display.say)
    with exclusive(config.out, run.folder, display.say), run.mirrored(), stoppable():
        keep_moment(run.store, inputs.prompts.rendered_at)
        found = _measure(config, inputs, run, display)
    display.ceiling(found, config.front.share_kl)
    return found


def _measure(config: Config, inputs: Inputs, run: Run, display: Display) -> Ceiling:
    numerics_key = key_of_numerics(config, inputs.fingerprints())
    known = run.numerics(numerics_key) or _kept_numerics(run, numerics_key)

    def check() -> None:
        display.place()
        check_sampler(inputs.config)
        preflight(inputs.config, None, local_paths(inputs.config, inputs.model))

    with Session(
        inputs.config,
        inputs.model,
        inputs.longest_prompt,
        policies=False,
        report=lambda event, **details: display.event({"event": event, **details}),
        check=check,
        lazy=known is not None,
    ) as session:
        statistics = reward_statistics(session, run, inputs)
        numerics = known or session.numerics()
        determinants = {**inputs.fingerprints(), **statistics, **numerics}
        found = measured_ceiling(session, run, inputs, determinants, display)
    assert found
    sealed.write_record(
        run.folder / CEILING_FILE,
        {"numerics": {numerics_key: numerics}, "ceiling": found.json()},
    )
    return found


def _kept_numerics(run: Run, key: str) -> dict[str, Any] | None:
    """Return the numerics that an earlier measurement into this folder found, or None.

    Args:
        key: see raywarp.run.keys.key_of_numerics.
    """
    try:
        kept = sealed.read_record(run.folder / CEILING_FILE) or {}
    except DamagedError as error:
        run.say(f"{error}; written anew")
        return None
    found: dict[str, Any] | None = kept.get("numerics", {}).get(key)
    return found


def measured_ceiling(
    session: Session,
    run: Run,
    inputs: Inputs,
    determinants: Mapping[str, object],
    display: Display,
    claims: Claims = NO_CLAIMS,
) -> Ceiling | None:
    """Return the ceiling of the run's front, from its store or measured now.

    Return None where front.ceiling_completions is 0. Of several runs that share a store, one
    measures it, and the others wait.

    Args:
        determinants: what the policies' keys depend on besides the configuration.
        claims: what this run may do, where runs share a store.
    """
    config = inputs.config
    if not config.front.ceiling_completions:
        return None
    prompts = inputs.prompts.held_out[: config.front.prompts]
    key = ceiling_key(config, prompts_fingerprint(prompts), determinants)

    def measure() -> Ceiling:
        count = config.front.ceiling_completions
        with display.sampling(len(prompts), count) as done:
            rewards = rewards_of_sft(session, prompts, count, done)
        return save_ceiling(run.store, key, rewards)

    return claims.once(
        f"{FOLDER}/{key}",
        lambda: find_ceiling(run.store, key, run.say),
        session.start,
        measure,
    )
