"""The ceiling of a front: the most reward that each KL can buy, and a front's share of that.

ceilings/<key>/ in the store of the policies holds a measured one. The key is a hash of all that
it depends on (see raywarp.run.keys.ceiling_key). So runs with one store measure it once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from safetensors.torch import save_file

from raywarp.algorithm.tilting import BestOf, best_of, tilted_line
from raywarp.run.points import Point
from raywarp.storage import sealed
from raywarp.storage.location import Storage
from raywarp.storage.sealed import DamagedError

FOLDER = "ceilings"
FILE = "ceiling.json"
CALL = 256  # completions of a call; not a share of the workers, on which results must not depend


@dataclass(frozen=True)
class Ceiling:
    """The tilted optimum of the SFT model, and best of n. All lists of the line are equally long.

    Attributes:
        key: see raywarp.run.keys.ceiling_key.
        prompts: held-out prompts, P.
        completions: SFT completions of each prompt, n.
        deviation: standard deviation of all P·n rewards.
        kl: in nats per completion, from 0 to the end of what n completions can measure.
        reward: the most that a policy can have at each KL; the first is the SFT model's mean.
        reward_ci: half the width of the reward's 95 % interval.
        gain_ci: likewise for the reward above the SFT model's.
        best_of: best of 2, 4, 8, …
    """

    key: str
    prompts: int
    completions: int
    deviation: float
    kl: list[float]
    reward: list[float]
    reward_ci: list[float]
    gain_ci: list[float]
    best_of: list[BestOf]

    @classmethod
    def of(cls, key: str, rewards: Sequence[Sequence[float]]) -> "Ceiling":
        """Return the ceiling that follows from the rewards of n completions of each prompt."""
        values = torch.tensor(rewards, dtype=torch.float64)
        line = tilted_line(values)
        return cls(
            key,
            len(values),
            values.shape[1],
            values.std(correction=0).item(),
            line.kl,
            line.reward,
            line.reward_ci,
            line.gain_ci,
            best_of(values),
        )

    @classmethod
    def read(cls, tree: Mapping[str, Any]) -> "Ceiling":
        """Return the ceiling of a JSON object, as in front.json."""
        return cls(**{**tree, "best_of": [BestOf(**row) for row in tree["best_of"]]})

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def end(self) -> float:
        """The largest KL at which the ceiling is measured."""
        return self.kl[-1]

    def at(self, kl: float) -> tuple[float, float] | None:
        """Return the reward at a KL, and half of its interval; None beyond the measured range."""
        if kl > self.end:
            return None
        return _between(kl, self.kl, self.reward), _between(kl, self.kl, self.reward_ci)

    def gain(self, kl: float) -> tuple[float, float] | None:
        """Return the reward above the SFT model's at a KL, and half of its interval.

        Return None beyond the measured range.
        """
        if kl > self.end:
            return None
        reward = _between(kl, self.kl, self.reward)
        return reward - self.reward[0], _between(kl, self.kl, self.gain_ci)

    def share(self, kl: float, reward: float) -> float | None:
        """Return which share of the ceiling's gain at this KL a policy has.

        Return None beyond the measured range, or where the ceiling gains no more than its error.
        """
        found = self.gain(kl)
        if found is None or found[0] <= found[1]:
            return None
        return (reward - self.reward[0]) / found[0]


def ceiling_of(front: Mapping[str, Any]) -> Ceiling | None:
    """Return the ceiling in front.json; None where none was measured."""
    return Ceiling.read(front["ceiling"]) if front.get("ceiling") else None


@dataclass(frozen=True)
class FrontShare:
    """A front's share of the ceiling at one KL.

    Attributes:
        wanted: the KL that was asked for, front.share_kl.
        kl: the KL that the share is of: the wanted one, or the end of what is measured.
        share: (the front's reward − SFT's) / (the ceiling's − SFT's), with the front interpolated
            between its points, see _reward_at; None where the ceiling gains no more than its error.
        ends: what ends before the wanted KL: "", "front" or "ceiling".
    """

    wanted: float
    kl: float
    share: float | None
    ends: str

    def __str__(self) -> str:
        what = f"{_nats(self.kl)} can buy"
        share = "nothing beyond the error of" if self.share is None else f"{self.share:.0%} of"
        line = f"SLERP's front: {share.replace('%', ' %')} what {what}"
        end = {
            "front": f"; it ends there, before {_nats(self.wanted)}",
            "ceiling": f"; at {_nats(self.wanted)} the ceiling is not measured",
        }
        return line + end.get(self.ends, "")


def front_share(points: Sequence[Point], ceiling: Ceiling, wanted: float) -> FrontShare:
    """Return a front's share of the ceiling at a KL, or at the end of what is measured.

    Args:
        points: points of the front; those without η are left out.
        ceiling: the ceiling of the same prompts and reward.
        wanted: KL in nats.
    """
    line = _line(points)
    longest = max(point.kl for point in line)
    kl = min(wanted, ceiling.end, longest)
    ends = "" if kl == wanted else "front" if longest < ceiling.end else "ceiling"
    return FrontShare(wanted, kl, ceiling.share(kl, _reward_at(line, kl)), ends)


def capped_share(points: Sequence[Point], ceiling: Ceiling, wanted: float) -> float:
    """Return a front's best share within a KL: what trials of a sweep are compared by.

    It is the best reward of the front within this KL, over the ceiling at this KL, both above the
    SFT model's. So a front that ends earlier counts with the best that it has. Where the ceiling
    ends earlier, its end takes the place of the KL. The result is 0 where there is nothing to gain,
    and never less, since every front has the SFT model.

    Args:
        points: see front_share.
        ceiling: see front_share.
        wanted: KL in nats, front.share_kl.
    """
    line, kl = _line(points), min(wanted, ceiling.end)
    within = [point.reward for point in line if point.kl <= kl]
    if any(point.kl > kl for point in line):
        within.append(_reward_at(line, kl))
    return max(ceiling.share(kl, max(within)) or 0.0, 0.0)


def points_above(points: Sequence[Point], ceiling: Ceiling) -> list[Point]:
    """Return the points that lie above the ceiling by more than both intervals.

    A point's KL may be larger by its own interval.
    """
    above = []
    for point in points:
        limit = ceiling.at(point.kl + point.kl_ci)
        if limit is not None and point.reward - point.reward_ci > sum(limit):
            above.append(point)
    return above


def verdict(ceiling: Ceiling, wanted: float) -> str:
    """Return, in words, whether a policy has anything to gain.

    Args:
        wanted: KL in nats, front.share_kl; beyond the measured range, its end is told.
    """
    kl = min(wanted, ceiling.end)
    gain, half = ceiling.gain(kl) or (0.0, 0.0)
    if not ceiling.end or not ceiling.deviation:
        return "nothing to gain: all completions of a prompt score the same"
    sft = ceiling.reward[0]
    found = (
        f"{_nats(kl)} can buy {gain:+.2f} ± {half:.2f} of reward, from {sft:.2f} to"
        f" {sft + gain:.2f}, which is {gain / ceiling.deviation:.1f} standard deviations of SFT"
        " completions' rewards"
    )
    if gain <= half:
        return (
            f"nothing to gain beyond the error: {found}; more front.prompts or"
            " front.ceiling_completions would narrow it"
        )
    return found if kl == wanted else f"{found}; {_nats(wanted)} are not measured"


def find_ceiling(store: Storage, key: str, say: Callable[[str], None]) -> Ceiling | None:
    """Return the ceiling of a key from the store, or None if it has to be measured.

    Args:
        say: gets a line if the stored one is damaged. It is removed.
    """
    try:
        folder = store.fetch(f"{FOLDER}/{key}")
        return Ceiling.read(sealed.read_record(folder / FILE) or {}) if folder else None
    except DamagedError as error:
        say(f"{error}; the ceiling is measured again")
        store.remove(f"{FOLDER}/{key}")
        return None


def save_ceiling(store: Storage, key: str, rewards: Sequence[Sequence[float]]) -> Ceiling:
    """Store the ceiling that follows from these rewards, and the rewards, and return it.

    Args:
        rewards: of n completions of each of P prompts.
    """
    ceiling = Ceiling.of(key, rewards)
    with store.writing(f"{FOLDER}/{key}") as folder:
        save_file(
            {"rewards": torch.tensor(rewards, dtype=torch.float64)}, folder / "rewards.safetensors"
        )
        sealed.write_record(folder / FILE, ceiling.json())
    return ceiling


def _nats(kl: float) -> str:
    return f"{kl:.3g} {'nat' if kl == 1 else 'nats'}"


def _line(points: Sequence[Point]) -> list[Point]:
    """Return the points from SFT to SLERP and beyond, by rising η."""
    line = [point for point in points if point.eta is not None]
    return sorted(line, key=lambda point: point.eta or 0.0)


def _reward_at(line: Sequence[Point], kl: float) -> float:
    """Return the reward where the line first reaches a KL.

    Between two points it is linear in √KL. Near the SFT model that is linear in η, since KL grows
    with η²; a line in KL would be far too low there.

    Args:
        line: points by rising η; the last or an earlier one has at least this KL.
        kl: in nats.
    """
    for a, b in pairwise(line):
        if a.kl <= kl <= b.kl:
            start, way = math.sqrt(a.kl), math.sqrt(b.kl) - math.sqrt(a.kl)
            share = (math.sqrt(kl) - start) / way if way else 1.0
            return a.reward + share * (b.reward - a.reward)
    return line[0].reward


def _between(at: float, x: Sequence[float], y: Sequence[float]) -> float:
    """Return y at `at`, linear between the points (x, y); x rises, and its last is not below."""
    for (x1, y1), (x2, y2) in pairwise(zip(x, y, strict=True)):
        if at <= x2:
            return y1 if y1 == y2 else y1 + (at - x1) / (x2 - x1) * (y2 - y1)
    return y[-1]
