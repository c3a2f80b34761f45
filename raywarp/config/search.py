"""The space that a sweep searches: the keys of `tune` resolved, and the points of the space.

A point is one trial's values: dotted key → value. With grid, random and asha all points are known
before anything starts. Optuna finds its points as the trials end. This module does not import Ray.
"""

import importlib.util
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from raywarp import identity
from raywarp.config import each
from raywarp.config.load import known_keys, parse_config, unknown
from raywarp.config.policies import unused_rates
from raywarp.config.schema import Config, ConfigError
from raywarp.config.tune import Domain, TuneConfig

Values = dict[str, Any]
_EACH = "warp.each."  # how keys of single policies begin
MOST_TRIALS = 10_000
DIRECTIONS: dict[str, str] = {
    "hypervolume": "max",
    "reward": "max",
    "kl": "min",
    "control": "max",
    "ceiling_share": "max",
}
# A trial's policies and front do not depend on these keys. They belong to the reward's own stage,
# or say how and where a run is carried out.
_NOT_OF_A_TRIAL = (
    "out",
    "store",
    "loggers",
    "tune",
    "cluster",
    "preferences",
    "reward_training",
    "checkpoint_every",
    "trust_remote_code",
    "recipe",
)
# Values of keys that decide the base's memory, the largest first. auto may mean float32.
_WIDEST = {"base.quantize": ("none",), "dtype": ("float32", "auto")}
# A policy's first iteration does not depend on these keys, so they vary last in a grid. Concurrent
# trials then seldom wait for each other's policies.
_LATER = ("warp.iterations", "warp.liti_rate", "front")


@dataclass(frozen=True)
class SearchSpace:
    """The values to search, and the configuration that all trials share.

    Attributes:
        base: the configuration that all trials have in common.
        settings: the section `tune`.
        domains: dotted key → its values.
    """

    base: Config
    settings: TuneConfig
    domains: Mapping[str, Domain]

    @property
    def search(self) -> str:
        """The method: grid, random, asha or optuna."""
        only_grids = all(domain.kind == "grid" for domain in self.domains.values())
        return self.settings.search or ("grid" if only_grids else "random")

    @property
    def seed(self) -> int:
        return self.base.seed if self.settings.seed is None else self.settings.seed

    @property
    def trials(self) -> int:
        """The number of trials."""
        return self.settings.num_samples if self.search == "optuna" else len(self.points)

    @cached_property
    def points(self) -> list[Values]:
        """All trials' values without duplicates, in the order of their start; empty for optuna."""
        if self.search == "optuna":
            return []
        grids = {
            key: domain.values for key, domain in self.domains.items() if domain.kind == "grid"
        }
        slowest_first = sorted(grids, key=lambda key: not key.startswith(_LATER))
        samples = self.settings.num_samples if self.search != "grid" else 1
        if (count := samples * math.prod(map(len, grids.values()))) > MOST_TRIALS:
            raise ConfigError(f"tune has {count} trials; more than {MOST_TRIALS} cannot be meant")
        random = np.random.default_rng(self.seed)
        points = []
        for _ in range(samples):
            for values in itertools.product(*(grids[key] for key in slowest_first)):
                point = dict(zip(slowest_first, values, strict=True))
                points.append(
                    self.resolved(
                        {
                            key: point[key] if key in point else _draw(d, random)
                            for key, d in self.domains.items()
                        }
                    )
                )
        return list({name_of(point): point for point in points}.values())

    def config(self, point: Values) -> Config:
        """Return the configuration of one trial, without its output folder.

        Raises:
            ConfigError: the configuration refuses the values.
        """
        tree = self.base.model_dump(mode="json", exclude={"tune"})
        try:
            for key, value in point.items():
                _put(tree, key, value)
        except ValueError as error:
            raise ConfigError(f"tune.{error}") from None
        if {"warp.anchor", "warp.elastic_reset"} & self.domains.keys():
            _drop_unused_rates(tree["warp"])
        try:
            config = parse_config(tree)
        except ConfigError as error:
            raise ConfigError(f"tune: with {describe(point)}: {error}") from None
        grid = self.domains.get("warp.liti_rate")
        if grid is None or grid.is_range:
            return config
        # The last iteration's η is a point of the front.
        etas = sorted({*config.front.etas, *(float(value) for value in grid.values)})
        return config.model_copy(update={"front": config.front.model_copy(update={"etas": etas})})

    def resolved(self, point: Values) -> Values:
        """Return the values as the configuration stores them.

        1 and 1.0, or 5e-4 and "5e-4", thereby become one value.
        """
        tree = self.config(point).model_dump(mode="json")
        return {key: _get(tree, key) for key in self.domains}

    def largest(self) -> Config:
        """Return the configuration of the trial that needs the most of a cluster."""
        sizes = ("warp.policies", "rollout.workers", "rollout.tensor_parallel_size")
        most: Values = {
            key: max(domain.values) - (domain.kind == "randint")
            for key, domain in self.domains.items()
            if key in sizes
        }
        for key, widest in _WIDEST.items():
            values = self.domains[key].values if key in self.domains else ()
            if found := [value for value in widest if value in values]:
                most[key] = found[0]
        return self.config({**self.first(), **most})

    def first(self) -> Values:
        """Return some point: the first, or the first value of every domain."""
        return (
            self.points[0]
            if self.points
            else {key: domain.values[0] for key, domain in self.domains.items()}
        )


def search_space(config: Config) -> SearchSpace:
    """Return the space of config.tune, checked as far as possible without Ray.

    Raises:
        ConfigError: no key, an unknown or ambiguous one, or values that the configuration refuses;
            or a search that does not fit the values or whose package is not installed. Also for
            trials that choose a merge by its shares.
    """
    settings = config.tune
    if settings is None or not settings.space:
        raise ConfigError(
            "tune has no key to search; for example tune: {ema_rate: {loguniform: [0.005, 0.2]},"
            " liti_rate: {grid: [0.3, 0.5]}}"
        )
    domains: dict[str, Domain] = {}
    for given, domain in settings.space.items():
        key = resolve_key(given)
        for other in domains:
            if key == other or key.startswith(f"{other}.") or other.startswith(f"{key}."):
                raise ConfigError(
                    f"tune.{given} and another key of tune both mean {min(key, other, key=len)};"
                    " keep one"
                )
        domains[key] = domain
    space = SearchSpace(config, settings, domains)
    _check_search(space)
    for point in _ends(space):
        if space.config(point).front.choose.weights:
            raise ConfigError("front.choose.weights: the trials of tune are compared by their line")
    if not space.points and space.search != "optuna":
        raise ConfigError("tune has no trials")
    return space


def resolve_key(given: str) -> str:
    """Return the dotted key of the configuration that a key of `tune` means.

    It is the key itself, or the only key that ends with it. A key of one policy, such as
    each.1.lr, stands for warp.each.1.optim.lr.

    Raises:
        ConfigError: the key is unknown, ambiguous, or the same for all trials.
    """
    try:
        own = each.key_of(given)
    except ValueError as error:
        raise ConfigError(f"tune.{given}: {error}") from None
    if own:
        return own
    allowed = [key for key in known_keys() if not _outside(key)]
    if given in allowed:
        return given
    if given in known_keys():
        raise ConfigError(
            f"tune.{given}: a trial's policies do not depend on {given}; it is the same for all"
            " trials, outside of tune"
        )
    meant = [key for key in allowed if key.endswith(f".{given}")]
    if len(meant) > 1:
        raise ConfigError(f"tune.{given} is ambiguous: {' or '.join(meant)}; write the key in full")
    if not meant:
        raise ConfigError(f"tune: {unknown(given)}")
    return meant[0]


def name_of(point: Values) -> str:
    """Return the name of a trial and of its folder: a hash of its values."""
    return identity.content_key(point)[:8]


def describe(point: Mapping[str, Any]) -> str:
    """Return a point in one line, keys by their last part: ema_rate=0.05, liti_rate=0.3.

    A rate that the trial does not use is left out.
    """
    return ", ".join(
        f"{short(key)}={show(value)}" for key, value in point.items() if value is not None
    )


def short(key: str) -> str:
    """Return a key's last part, after the policy that it belongs to: lr, each.1.lr."""
    path = key.split(".")
    return ".".join([*path[1:3], path[-1]] if key.startswith(_EACH) else path[-1:])


def show(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _check_search(space: SearchSpace) -> None:
    search, kinds = space.search, {key: domain.kind for key, domain in space.domains.items()}
    if search == "grid" and (others := [key for key, kind in kinds.items() if kind != "grid"]):
        raise ConfigError(
            f"tune.search=grid takes grids only, and {others[0]} is {kinds[others[0]]}; use random,"
            " asha or optuna"
        )
    if search == "optuna":
        if grids := [key for key, kind in kinds.items() if kind == "grid"]:
            raise ConfigError(
                f"tune.search=optuna chooses the values itself, and {grids[0]} is a grid; make it a"
                " choice or a range"
            )
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(
                "tune.search=optuna: optuna is not installed; pip install 'raywarp[optuna]'"
            )
    iterations = space.domains.get("warp.iterations")
    if (
        search == "asha"
        and max(iterations.values if iterations else [space.base.warp.iterations]) < 2
    ):
        raise ConfigError(
            "tune.search=asha ends trials between iterations, and"
            f" warp.iterations={space.base.warp.iterations}"
        )
    if "ceiling_share" in space.settings.objectives and 0 in _values(
        space, "front.ceiling_completions", space.base.front.ceiling_completions
    ):
        raise ConfigError(
            "tune.objectives has ceiling_share, and front.ceiling_completions=0 measures no"
            " ceiling; set it to at least 4, for example 32"
        )
    if (
        "control" in space.settings.objectives
        and space.base.control is None
        and not any(key.startswith("control") for key in kinds)
    ):
        raise ConfigError("tune.objectives has control, and the configuration has no control score")


def _values(space: SearchSpace, key: str, fixed: Any) -> list[Any]:
    """Return the values that a key may take: those that are searched, or the fixed one."""
    return space.domains[key].values if key in space.domains else [fixed]


def _ends(space: SearchSpace) -> Iterator[Values]:
    """Yield points that together hold every listed value and both ends of every range."""
    first = {key: domain.values[0] for key, domain in space.domains.items()}
    for key, domain in space.domains.items():
        for value in domain.values:
            last = value - 1 if domain.kind == "randint" and value == domain.values[1] else value
            yield {**first, key: last}


def _draw(domain: Domain, random: np.random.Generator) -> Any:
    values: Sequence[Any] = domain.values
    match domain.kind:
        case "choice":
            return values[int(random.integers(len(values)))]
        case "randint":
            return int(random.integers(*values))
        case "loguniform":
            return six_digits(math.exp(random.uniform(math.log(values[0]), math.log(values[1]))))
    return six_digits(float(random.uniform(values[0], values[1])))


def six_digits(value: Any) -> Any:
    """Round a drawn number to six digits, the precision in which it is shown and stored."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _drop_unused_rates(warp: dict[str, Any]) -> None:
    """Drop the rates that a trial's anchor and restart do not use.

    Trials that differ in them alone are then one.
    """
    for key in unused_rates(warp):
        warp[key] = None


def _outside(key: str) -> bool:
    return key.split(".")[0] in _NOT_OF_A_TRIAL


def _put(tree: dict[str, Any], key: str, value: Any) -> None:
    if key.startswith(_EACH):
        return each.put(tree["warp"], key, value)
    *path, leaf = key.split(".")
    for part in path:
        if not isinstance(tree.get(part), dict):
            tree[part] = {}
        tree = tree[part]
    tree[leaf] = value


def _get(tree: Any, key: str) -> Any:
    if key.startswith(_EACH):
        return each.get(tree["warp"], key)
    for part in key.split("."):
        tree = tree[part]
    return tree


def choice_texts(domain: Domain) -> list[str]:
    """Return a choice's values as texts: optuna's categories cannot be lists or mappings."""
    return [json.dumps(value) for value in domain.values]


def decode(config: Mapping[str, Any]) -> Values:
    """Return a trial's values from the configuration that Ray Tune passes to it.

    That is {"point": …} of a known list, or optuna's suggestion.
    """
    if "point" in config:
        return dict(config["point"])
    return {
        key: json.loads(value) if isinstance(value, str) else six_digits(value)
        for key, value in config.items()
    }
