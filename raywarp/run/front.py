"""The KL–reward front: which points are measured, which of them is chosen, and front.json."""

from collections.abc import Mapping, Sequence
from typing import Any

from raywarp.algorithm.averaging import karcher, lerp, slerp
from raywarp.algorithm.deltas import AdapterDelta, add, scale
from raywarp.algorithm.truncation import compress
from raywarp.config.each import shares
from raywarp.config.front import ChooseConfig, FrontConfig
from raywarp.config.schema import Config
from raywarp.data.text import Prompt
from raywarp.run.points import Candidate, Point, Scored, or_none, point_json


def candidates(
    init: AdapterDelta,
    task_vectors: Sequence[AdapterDelta],
    etas: Sequence[float],
    between: Sequence[Candidate] = (),
    names: Sequence[str] = (),
    weights: Sequence[float] | None = None,
) -> list[Candidate]:
    """Return the points to measure: SFT, each policy, LERP, and the LITI front.

    The LITI front is η·(θ_slerp − θ_sft). SLERP is at η = 1, and points beyond it extrapolate.

    Args:
        init: θ_init − θ_sft of the last iteration.
        task_vectors: θ_m − θ_init of the last iteration's policies.
        etas: points of the front besides 0 and 1, which are always there.
        between: more points, which come before the LITI front.
        names: of the policies; by default their numbers.
        weights: of the policies in SLERP and LERP; by default equal.
    """
    names = names or [f"policy {m}" for m in range(1, len(task_vectors) + 1)]
    merged = compress(add(init, slerp(task_vectors, weights)))
    points = [Candidate("sft", 0.0, None)]
    points += [
        Candidate(name, None, add(init, vector))
        for name, vector in zip(names, task_vectors, strict=True)
    ]
    points += [Candidate("lerp", None, compress(add(init, lerp(task_vectors, weights)))), *between]
    for eta in sorted({*etas, 1.0} - {0.0}):
        name = "slerp" if eta == 1 else f"liti {eta:g}"
        points.append(Candidate(name, eta, scale(merged, eta)))
    return points


def run_candidates(
    config: Config, init: AdapterDelta, task_vectors: Sequence[AdapterDelta]
) -> list[Candidate]:
    """Return the points of a run's own front; see candidates."""
    return candidates(init, task_vectors, wanted_etas(config), weights=config.warp.merge_weights)


def more_averages(
    init: AdapterDelta, task_vectors: Sequence[AdapterDelta], lambdas: Sequence[float]
) -> list[Candidate]:
    """Return the Karcher mean, and for two policies SLERP at each λ.

    Args:
        init: see candidates.
        task_vectors: see candidates; two or more.
        lambdas: shares of the second policy, from 0 to 1.
    """
    found = [Candidate("karcher", None, compress(add(init, karcher(task_vectors))))]
    for share in lambdas:
        mixed = slerp(task_vectors, weights=(1 - share, share))
        found.append(Candidate(f"slerp λ {share:g}", None, compress(add(init, mixed))))
    return found


def on_line(points: Sequence[Candidate], eta: float) -> AdapterDelta:
    """Return η·(θ_slerp − θ_sft), for any η ≥ 0."""
    (merged,) = (point.delta for point in points if point.eta == 1 and point.delta is not None)
    return scale(merged, eta)


def choose(points: Sequence[Point], rule: ChooseConfig, of: Sequence[str] = ()) -> Point:
    """Return the point that adapter/ will hold.

    The rule names its η, or it is the largest measured η whose KL stays within max_kl, above 1 too.
    SFT's own KL is 0, so there is always such a point.

    Args:
        of: names of the rule's weights, see Config.corners. With weights, the point is on the line
            of the merge that has them.
    """
    line = {point.eta: point for point in points if point.eta is not None}
    if rule.weights:
        own = shares(rule.weights, of)
        line = {0.0: line[0.0]} | {p.liti: p for p in points if p.liti and p.weights == own}
    if rule.eta is not None:
        return line[rule.eta]
    return line[max(eta for eta, point in line.items() if point.kl <= (rule.max_kl or 0))]


def sample_rows(
    results: Sequence[tuple[Point, Scored]], held_out: Sequence[Prompt], front: FrontConfig
) -> list[dict[str, Any]]:
    """Return one row for each of the first prompts, with its first completion at every point.

    A row is {"prompt": …, point's name: completion, …}. Its entries "rewards", "kl" and "control"
    (if there is one) have that completion's own values, by point.
    """
    rows = []
    for n, prompt in enumerate(held_out[: min(front.samples, front.prompts)]):
        first = n * front.completions_per_prompt
        texts = {point.name: scored.texts[first] for point, scored in results}
        values: dict[str, dict[str, float | None]] = {
            "rewards": {point.name: or_none(scored.rewards[first]) for point, scored in results},
            "kl": {point.name: scored.kl[first] for point, scored in results},
            "control": {
                point.name: scored.control[first]
                for point, scored in results
                if scored.control is not None
            },
        }
        rows.append(
            {"prompt": prompt.text, **texts, **{name: own for name, own in values.items() if own}}
        )
    return rows


def wanted_etas(config: Config) -> list[float]:
    """Return front.etas, and the eta that front.choose names, if any."""
    chosen = config.front.choose.eta
    return [*config.front.etas, *([chosen] if chosen is not None else [])]


def front_json(
    points: Sequence[Point], chosen: Point, config: Config, ceiling: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the content of front.json: what was measured, how, and the chosen point.

    Args:
        ceiling: the front's ceiling as JSON, if it was measured.
    """
    return {
        "chosen": chosen.name,
        "chosen_eta": chosen.liti if chosen.eta is None else chosen.eta,
        "choose": _choice(config.front.choose),
        "prompts": config.front.prompts,
        "completions_per_prompt": config.front.completions_per_prompt,
        "temperature": config.rollout.temperature,
        "kl_unit": "nats per completion, KL(policy || SFT)",
        "interval": "half-width of 95 % over prompts",
        "points": [point_json(point) for point in points],
        "share_kl": config.front.share_kl,
        **({"ceiling": ceiling} if ceiling else {}),
    }


def is_current(front: Mapping[str, Any], config: Config, ceiling: Mapping[str, Any] | None) -> bool:
    """Return whether a front.json of the right points also has the right choice and ceiling."""
    told = [front.get(name) for name in ("choose", "share_kl", "ceiling", "prompts")]
    wanted = config.front
    return told == [_choice(wanted.choose), wanted.share_kl, ceiling, wanted.prompts]


def _choice(rule: ChooseConfig) -> dict[str, Any]:
    """Return a rule as front.json has it: with weights only if it names some."""
    return rule.model_dump(exclude=set() if rule.weights else {"weights"})
