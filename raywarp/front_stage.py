"""The front of a run, or of adapters that were trained anywhere.

It is measured under its ceiling, and saved with the adapter of the chosen η.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import PurePosixPath
from typing import Any

from raywarp.algorithm.averaging import slerp
from raywarp.algorithm.deltas import add
from raywarp.algorithm.hypervolume import simplex
from raywarp.ceiling_stage import measured_ceiling
from raywarp.cluster.claims import NO_CLAIMS, Claims
from raywarp.cluster.health import Report
from raywarp.cluster.runtime import stoppable
from raywarp.config.each import directions, reward_weights, shares
from raywarp.config.schema import Config, ConfigError
from raywarp.planning.front_sources import Sources, check_same, front_config, read_sources
from raywarp.planning.inputs import Inputs, prepare
from raywarp.planning.plan import check_cluster
from raywarp.run.card import Origin, card, code, hub_name, run_origin
from raywarp.run.ceiling import Ceiling
from raywarp.run.display import Display
from raywarp.run.events import Journal
from raywarp.run.figures import plot_front, plot_preferences
from raywarp.run.folder import PICTURE, PREFERENCES, SOURCES_FILE, Run
from raywarp.run.front import (
    candidates,
    choose,
    front_json,
    is_current,
    more_averages,
    on_line,
    sample_rows,
    wanted_etas,
)
from raywarp.run.keys import front_key, key_of_numerics, points_key
from raywarp.run.points import Candidate, Point, Scored
from raywarp.run.prometheus import RunMetrics
from raywarp.soup_stage import PREFERENCE_KEYS, Soup, measure_soup, preference_json
from raywarp.standardisation import reward_statistics
from raywarp.storage import sealed
from raywarp.storage.locks import exclusive
from raywarp.training.evaluation import evaluate
from raywarp.training.kept_points import KeptPoints
from raywarp.training.merges import measure_merge
from raywarp.training.session import Session
from raywarp.training.timing import spans_of

# Shares of a merge: by name, or one number for each adapter.
Shares = Mapping[str, float] | Sequence[float]
TEXTS = 256  # prompts whose tokens prove that the sampler runs the trainer's policies


def session_of(
    inputs: Inputs, display: Display, report: Report, lazy: bool, shares: bool = False
) -> Session:
    """Return a session with policy actors, which is proven on a run's own prompts.

    Args:
        display: says where the run is.
        report, lazy, shares: see Session.
    """

    def check() -> None:
        display.place()
        check_cluster(inputs.config, inputs)

    return Session(
        inputs.config,
        inputs.model,
        inputs.longest_prompt,
        report=report,
        shares=shares,
        check=check,
        lazy=lazy,
        texts=[prompt.token_ids for prompt in inputs.prompts.train[:TEXTS]],
    )


@dataclass(frozen=True)
class Fronts:
    """What measures a run's front, and saves it.

    Attributes:
        config: the run's configuration, as it is saved; that of the inputs is resolved.
        more: what front.json holds besides.
    """

    config: Config
    inputs: Inputs
    run: Run
    session: Session
    display: Display
    claims: Claims = NO_CLAIMS
    more: Mapping[str, Any] = field(default_factory=dict)

    def save(
        self,
        key: str,
        points: Callable[[], list[Candidate]],
        origin: Origin,
        determinants: Mapping[str, object],
        numerics: Mapping[str, object],
        soup: Soup,
    ) -> bool:
        """Measure a front, and save it with the adapter of the chosen η.

        If front.json already has these points, they are not measured again. A new choice of η then
        only rewrites adapter/ and the files beside it. Likewise for the ceiling.

        Args:
            key: of the front, see raywarp.run.keys.front_key.
            points: gives the points to measure, of which the first is SFT.
            origin: where the adapters come from.
            determinants: what the policies' keys depend on besides the configuration.
            numerics: are kept in front.json, see Run.numerics.
            soup: the merges with other shares, if any are wanted.

        Returns:
            Whether anything was saved.
        """
        config, run = self.config, self.run
        ceiling = measured_ceiling(
            self.session, run, self.inputs, determinants, self.display, self.claims
        )
        limits, told = ceiling.json() if ceiling else None, self.inputs.measured(config)
        is_measured = run.has_front(key)
        if is_measured and is_current(run.front(), told, limits):
            self.display.front(run)
            return False
        line = points()
        measured, mixed = self._known() if is_measured else self._measure(line, determinants, soup)
        chosen = choose(measured, config.front.choose, list(soup.corners))
        delta = (
            soup.on_line(chosen.weights, chosen.liti or 0.0)
            if chosen.weights
            else on_line(line, chosen.eta or 0.0)
        )
        self._draw(measured, chosen, origin, ceiling, mixed.get("preference_front", []))
        about = card(told, measured, chosen, delta.rank, list(delta.factors), ceiling, origin)
        run.save_adapter(delta, about)
        numerics_key = key_of_numerics(config, self.inputs.fingerprints())
        found = {"key": key, "numerics": {numerics_key: numerics}, **self.more, **mixed}
        run.save_front({**found, **front_json(measured, chosen, told, limits)})
        self.display.front(run)
        return True

    def _draw(
        self,
        points: Sequence[Point],
        chosen: Point,
        origin: Origin,
        ceiling: Ceiling | None,
        preferences: Sequence[str],
    ) -> None:
        folder = self.run.folder
        plot_front(points, chosen, folder / PICTURE, origin.picture, ceiling)
        if preferences and len(points[0].rewards) > 1:
            plot_preferences(points, preferences, chosen, folder / PREFERENCES)

    def _known(self) -> tuple[list[Point], dict[str, Any]]:
        """Return what `_measure` gave, from front.json."""
        front = self.run.front()
        points = [Point(**point) for point in front["points"]]
        return points, {name: front[name] for name in PREFERENCE_KEYS if name in front}

    def _measure(
        self, line: Sequence[Candidate], determinants: Mapping[str, object], soup: Soup
    ) -> tuple[list[Point], dict[str, Any]]:
        """Measure points on the held-out prompts, and write their texts to samples.json.

        Returns:
            The points, and what front.json says of the merges with other shares.
        """
        inputs, held_out, rule = self.inputs, self.inputs.prompts.held_out, self.config.front
        kept = KeptPoints(self.run, points_key(inputs.config, inputs.front, determinants))

        def measure(
            points: Sequence[Candidate], sft: Scored | None = None
        ) -> list[tuple[Point, Scored]]:
            with self.display.evaluation(len(points)) as done:
                return evaluate(
                    self.session, self.config, points, held_out, done, inputs.texts, kept, sft
                )

        results = measure(line)
        results += measure_soup(soup, rule.choose, partial(measure, sft=results[0][1]))
        self.run.save_evaluation_work(
            spans_of([piece for _, scored in results for piece in scored.work])
        )
        sealed.write_json(
            self.run.folder / "samples.json", sample_rows(results, held_out, self.config.front)
        )
        ways = directions(reward_weights(self.config.of_policies))
        mixed = preference_json(soup, results, rule.choose, rule.completions_per_prompt, ways)
        return [point for point, _ in results], mixed


def front(
    adapters: Sequence[str],
    config: Config,
    init: str | None = None,
    lambdas: Sequence[float] = (),
    display: Display | None = None,
    weights: Sequence[Shares] = (),
) -> Run:
    """Measure the KL–reward front of adapters, and save it; nothing is trained.

    Its points are the SFT model, each adapter, their LERP and Karcher mean, and the LITI line from
    the SFT model through their SLERP. Points that `out` already holds are not measured again.

    Args:
        adapters: folders or hub ids of PEFT LoRA adapters of `config.model`; or one run's folder
            (or s3://bucket/prefix), whose last policies are measured anew.
        config: as for `train`. Model, prompts, reward, rollout and `front` are used; `lora` is
            taken from the adapters, and of `warp` nothing is used.
        init: θ_init that the adapters' task vectors start from; by default the SFT model.
        lambdas: for two adapters, the shares λ of the second one at which SLERP is measured, too.
        display: where progress is printed.
        weights: shares of the adapters in further merges, by name or one number each. Each merge is
            measured at the η that `config.front.choose` wants; if there is one, it is chosen. In a
            run, policies that are trained on one reward each have its name.

    Returns:
        The run in `config.out`: front.json, front.png, samples.json, and the chosen point in
        adapter/.

    Raises:
        ConfigError: an adapter cannot be read exactly, is of another model, or the rest is wrong,
            as in `train`; nothing was started.
        RewardError: the reward failed or was not a finite number. What was measured is kept.
        FaultError: an actor died too often, or the cluster has no room for it any more.
        Stopped: SIGTERM or Ctrl-C, a KeyboardInterrupt. The same call continues.
    """
    display = display or Display()
    wide = front_config(config, adapters, init)
    inputs = prepare(wide, display.progress)
    sources = read_sources(inputs, adapters, init)
    _check_lambdas(lambdas, len(sources.policies))
    soup = _soup(wide, sources, weights)
    if weights and len(soup.wanted) == 1:
        wide = _chosen(wide, soup.wanted[0])
    run = Run.open(config, display.say, trains=False)
    check_same(run.folder, sources, config.out)
    for text in inputs.notes:
        display.say(text)
    with (
        exclusive(config.out, run.folder, display.say),
        run.mirrored(),
        Journal(run, display, RunMetrics(PurePosixPath(config.out).name)) as journal,
        stoppable(),
    ):
        known = run.numerics(key_of_numerics(wide, inputs.fingerprints()))
        with session_of(inputs, display, journal.report, lazy=known is not None) as session:
            sealed.write_record(run.folder / SOURCES_FILE, {"key": sources.key, **sources.json()})
            run.save_config(config, inputs.prompts.rendered_at)
            journal.begin()
            stage = Fronts(wide, inputs, run, session, display, more=sources.json())
            _measure_sources(stage, sources, lambdas, known, soup)
    return run


def _soup(config: Config, sources: Sources, weights: Sequence[Shares]) -> Soup:
    """Return the merges that are asked for, or else those of the configuration.

    The merge that front.choose names is one of them, unless a single other one replaces it.
    """
    own = {name: [m] for m, name in enumerate(sources.names, start=1)}
    corners, choice = config.corners if sources.of_run else own, config.front.choose.weights
    if weights:
        wanted = [_shares("weights", given, corners) for given in weights]
    else:
        wanted = config.mixes if sources.of_run else _of_adapters(config, corners)
    if choice and not (weights and all(one == wanted[0] for one in wanted)):
        wanted = [*wanted, _shares("front.choose.weights", choice, corners)]
    distinct = [one for n, one in enumerate(wanted) if one not in wanted[:n]]
    return Soup(sources.init, sources.policies, corners, distinct)


def _of_adapters(config: Config, names: Mapping[str, Sequence[int]]) -> list[dict[str, float]]:
    """Return what front.weights means for adapters with these names; by default nothing."""
    wanted = config.front.weights or []
    if wanted and len(names) == 1:
        raise ConfigError("front.weights are shares of adapters, and there is one")
    given: Sequence[Shares] = simplex(len(names), wanted) if isinstance(wanted, int) else wanted
    return [_shares("front.weights", own, names) for own in given]


def _shares(key: str, given: Shares, corners: Mapping[str, Sequence[int]]) -> dict[str, float]:
    try:
        if isinstance(given, Mapping):
            return shares(given, corners)
        if len(given) != len(corners):
            raise ValueError(f"give one share for each of {', '.join(corners)}")
        return shares(dict(zip(corners, given, strict=True)), corners)
    except ValueError as error:
        raise ConfigError(f"{key} {given}: {error}") from None


def _chosen(config: Config, weights: Mapping[str, float]) -> Config:
    """Return the configuration that chooses the merge with these weights."""
    choice = config.front.choose.model_copy(update={"weights": dict(weights)})
    return config.model_copy(update={"front": config.front.model_copy(update={"choose": choice})})


def _check_lambdas(lambdas: Sequence[float], count: int) -> None:
    if lambdas and count != 2:
        raise ConfigError(f"lambdas lie between two adapters, and there are {count}")
    if odd := [share for share in lambdas if not 0 <= share <= 1]:
        raise ConfigError(
            f"lambda {odd[0]:g} is not between 0 and 1; beyond the adapters, `raywarp merge` makes"
            " one to measure"
        )


def _measure_sources(
    stage: Fronts,
    sources: Sources,
    lambdas: Sequence[float],
    known: Mapping[str, object] | None,
    soup: Soup,
) -> None:
    """Measure the merge and the front of adapters, unless that was done before."""
    run, session, inputs, config = stage.run, stage.session, stage.inputs, stage.config
    statistics = reward_statistics(session, run, inputs)
    numerics = known or session.numerics()
    determinants = {**inputs.fingerprints(), **statistics, **numerics}
    key = points_key(inputs.config, inputs.front, determinants)
    prompts = inputs.prompts.tracked(config.front.tracked_prompts)
    measured = measure_merge(
        session, config, run, [sources.key, key], sources.init, sources.policies, prompts
    )
    merged = add(sources.init, slerp(sources.policies, config.warp.merge_weights))
    run.save_iteration(1, sources.init, merged, (), sources.policies, measured)
    stage.display.merged(None, sources.policies, measured)
    stage.save(
        front_key(config, inputs.front, [sources.key, key, *map(str, lambdas)], soup.wanted),
        lambda: candidates_of(sources, wanted_etas(config), lambdas, config.warp.merge_weights),
        _origin(config, sources),
        determinants,
        numerics,
        soup,
    )


def candidates_of(
    sources: Sources,
    etas: Sequence[float],
    lambdas: Sequence[float],
    weights: Sequence[float] | None = None,
) -> list[Candidate]:
    """Return the points to measure of adapters; a single one is the end of its line."""
    init, policies = sources.init, sources.policies
    if len(policies) > 1:
        between = more_averages(init, policies, lambdas)
        return candidates(init, policies, etas, between, sources.names, weights)
    line = candidates(init, policies, etas)
    return [
        replace(point, name=sources.names[0]) if point.eta == 1 else point
        for point in line
        if point.eta is not None
    ]


def _origin(config: Config, sources: Sources) -> Origin:
    """Return what a card says of the adapters: of a run's policies, what the run says of them."""
    if sources.of_run:
        return run_origin(config)
    count, base = len(sources.names), hub_name(config.model) or config.model
    one = count == 1
    made = "one adapter" if one else f"{count} adapters, averaged in ΔW on the sphere"
    rows = [*zip(sources.names, sources.places, strict=True)]
    rows += [("init", sources.init_place)] if sources.init_place else []
    return Origin(
        f"front of {made}: {config.model}",
        "on the front of one adapter" if one else f"on the front of {count} adapters",
        (
            f"A LoRA adapter of {base}, made by raywarp {version('raywarp')} from {made}."
            f" {'It was' if one else 'They were'} trained elsewhere; raywarp measured the rest."
        ),
        [(name, code(place)) for name, place in rows],
    )
