"""What was measured, per prompt, without texts: one compressed file per seed, small enough to
commit; all else follows from them.
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
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Measured:
    """A point.

    Attributes:
        reward: (N,) standardised by SFT's completions.
        control: (N,) raw score of the second reward model; of two rewards, the second.
        vader: (N,) from −1 to 1.
        kl: (N,) KL to SFT over the whole vocabulary, by the trainer, in nats.
        log_ratio: (C,) log π − log π_sft of the first C prompts' texts, both by the sampler, in
            nats. Its mean is a second measurement of the KL, which shares nothing with the first.
        length: (N,) tokens.
        finished: (N,) 1 where the text ended by itself.
        distinct_2: of all texts together.
        eta: factor of the end of its line, or how far a training had come, in units of T.
        norm: ‖ΔW‖ over all weights.
        slope: of the sampler's log-ratios on the trainer's (see raywarp.rollout.effect).
        slope_error: its standard error.
        gap: mean |sampler − trainer|, in nats per token.
        rms: root mean square of the trainer's log-ratios, in nats per token.
    """

    reward: Numbers
    control: Numbers
    vader: Numbers
    kl: Numbers
    log_ratio: Numbers
    length: Numbers
    finished: Numbers
    distinct_2: float = 0.0
    eta: float = 0.0
    norm: float = 0.0
    slope: float = 0.0
    slope_error: float = 0.0
    gap: float = 0.0
    rms: float = 0.0


PER_PROMPT = [field.name for field in fields(Measured) if field.type is Numbers]
SCALARS = [field.name for field in fields(Measured) if field.name not in PER_PROMPT]
SCORES = ("reward", "control", "vader", "kl", "log_ratio")


@dataclass
class Seed:
    """The points of a seed by name, and what else is known.

    Attributes:
        points: name → what was measured.
        facts: of the arms: their finished curves, geometry, timing, errors of merges.
        ceiling: (P, n) rewards of n SFT completions of each of the first P prompts; None until it
            is measured.
        sampler: the version that sampled the points.
    """

    points: dict[str, Measured]
    facts: dict[str, Any]
    ceiling: Numbers | None = None
    sampler: int = SAMPLER_VERSION


class OtherSettingsError(ValueError):
    """The results are of other settings, or of another sampler; the message says which."""


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
        by another version.
        """
        if self.seed(seed).sampler != SAMPLER_VERSION:
            raise OtherSettingsError(
                f"the numbers of seed {seed} in {self.folder} were sampled by another version;"
                " choose another --results, or move them away"
            )

    def add(self, seed: int, name: str, measured: Measured) -> None:
        """As it will be read back."""
        rounded = {column: np.round(getattr(measured, column), DIGITS) for column in SCORES}
        self.seed(seed).points[name] = replace(measured, **rounded)
        self.save(seed)

    def add_ceiling(self, seed: int, rewards: Numbers) -> None:
        """(P, n), as they will be read back."""
        self.seed(seed).ceiling = np.round(rewards, DIGITS)
        self.save(seed)

    def save(self, seed: int) -> None:
        own, columns = self.seed(seed), dict[str, Any]()
        names = sorted(own.points)
        for column in PER_PROMPT:
            values = np.array([getattr(own.points[name], column) for name in names])
            columns[column] = _integers(values, SCALE if column in SCORES else 1)
        for column in SCALARS:
            columns[column] = np.array([getattr(own.points[name], column) for name in names])
        if own.ceiling is not None:
            columns["ceiling"] = _integers(own.ceiling, SCALE)
        content = io.BytesIO()
        about = json.dumps(
            {"settings": self.settings, "points": names, "facts": own.facts, "sampler": own.sampler}
        )
        np.savez_compressed(content, about=np.frombuffer(about.encode(), dtype=np.uint8), **columns)
        write_bytes(self.folder / f"seed-{seed}.npz", content.getvalue())

    def _read(self, path: Path) -> Seed:
        with np.load(path) as file:
            about = json.loads(file["about"].tobytes())
            columns = {name: file[name] for name in file.files if name != "about"}
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
            row: dict[str, Any] = {
                column: columns[column][n] / (SCALE if column in SCORES else 1)
                for column in PER_PROMPT
            }
            scalars: dict[str, Any] = {column: float(columns[column][n]) for column in SCALARS}
            points[name] = Measured(**row, **scalars)
        ceiling = columns["ceiling"] / SCALE if "ceiling" in columns else None
        return Seed(points, about["facts"], ceiling, about["sampler"])


def _integers(values: Numbers, scale: int) -> NDArray[np.int32]:
    return np.round(values * scale).astype(np.int32)
