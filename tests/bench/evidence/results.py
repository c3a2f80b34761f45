"""What was measured, per prompt, without texts: one compressed file per seed, small enough to
commit; all else is drawn from them.
"""

import io
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raywarp.run.config_file import SAMPLER_VERSION
from raywarp.storage.sealed import write_bytes

DIGITS = 3  # of scores
SCALE = 10**DIGITS


@dataclass(frozen=True)
class Measured:
    """A point: N numbers each, but for distinct_2, which is of all completions together.

    reward: standardised. control: raw score of the second reward model. vader: from −1 to 1. kl: to
    SFT, nats. length: tokens.
    finished: it ended by itself.
    """

    reward: NDArray[np.float64]
    control: NDArray[np.float64]
    vader: NDArray[np.float64]
    kl: NDArray[np.float64]
    length: NDArray[np.float64]
    finished: NDArray[np.float64]
    distinct_2: float


PER_PROMPT = [field.name for field in fields(Measured) if field.name != "distinct_2"]
SCORES = ("reward", "control", "vader", "kl")


@dataclass
class Seed:
    """points: name → what was measured. facts: what else is known of the arms: geometry, timing,
    errors of merges.

    sampler: the version that sampled them; 0 before there was one, when policies were sampled from
    rounded weights.
    """

    points: dict[str, Measured]
    facts: dict[str, Any]
    sampler: int = SAMPLER_VERSION


class OtherSettingsError(ValueError):
    """The results are of other settings, or of an earlier sampler; the message says which."""


class Results:
    """The files of one study. A file is replaced at once, after every point.

    Raises:
        OtherSettingsError: the folder's numbers are of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings = folder, settings
        self.seeds: dict[int, Seed] = {}
        for path in sorted(folder.glob("seed-*.npz")):
            self.seeds[int(path.stem.removeprefix("seed-"))] = self._read(path)

    def seed(self, number: int) -> Seed:
        return self.seeds.setdefault(number, Seed({}, {}))

    def check_sampler(self, seed: int) -> None:
        """Raises OtherSettingsError where nothing may be added to a seed: its points were sampled
        by an earlier version.
        """
        if self.seed(seed).sampler < SAMPLER_VERSION:
            raise OtherSettingsError(
                f"the numbers of seed {seed} in {self.folder} were sampled by an earlier version,"
                " from rounded weights; choose another --results, or move them away"
            )

    @property
    def are_earlier(self) -> bool:
        """Whether any of them were sampled by an earlier version."""
        return any(seed.sampler < SAMPLER_VERSION for seed in self.seeds.values())

    def add(self, seed: int, name: str, measured: Measured) -> None:
        """As it will be read back."""
        rounded = {column: np.round(getattr(measured, column), DIGITS) for column in SCORES}
        self.seed(seed).points[name] = replace(measured, **rounded)
        self.save(seed)

    def save(self, seed: int) -> None:
        own, columns = self.seed(seed), {}
        names = sorted(own.points)
        for column in PER_PROMPT:
            values = np.array([getattr(own.points[name], column) for name in names])
            columns[column] = np.round(values * (SCALE if column in SCORES else 1)).astype(np.int32)
        columns["distinct_2"] = np.array([own.points[name].distinct_2 for name in names])
        content = io.BytesIO()
        about = json.dumps(
            {"settings": self.settings, "points": names, "facts": own.facts, "sampler": own.sampler}
        )
        np.savez_compressed(content, about=np.frombuffer(about.encode(), dtype=np.uint8), **columns)
        write_bytes(self.folder / f"seed-{seed}.npz", content.getvalue())

    def _read(self, path: Path) -> Seed:
        with np.load(path) as file:
            about = json.loads(file["about"].tobytes())
            columns = {name: file[name] for name in [*PER_PROMPT, "distinct_2"]}
        if differing := [
            key for key, value in self.settings.items() if about["settings"].get(key) != value
        ]:
            there = {key: about["settings"].get(key) for key in differing}
            here = {key: self.settings[key] for key in differing}
            raise OtherSettingsError(
                f"{path} is of other settings ({there} there, {here} here); choose another"
                " --results, or move it away"
            )
        points = {}
        for n, name in enumerate(about["points"]):
            row = {
                column: columns[column][n] / (SCALE if column in SCORES else 1)
                for column in PER_PROMPT
            }
            points[name] = Measured(**row, distinct_2=float(columns["distinct_2"][n]))
        return Seed(points, about["facts"], about.get("sampler", 0))
