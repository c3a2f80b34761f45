"""What was measured of points, kept in a run's store, so that no point is measured twice."""

from dataclasses import dataclass

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.identity import content_key
from raywarp.rollout.transport import digest
from raywarp.run.folder import Run
from raywarp.run.points import Scored


@dataclass(frozen=True)
class KeptPoints:
    """The store of a run's measured points.

    Attributes:
        run: whose store it is.
        key: of all that a point depends on besides its adapter, see raywarp.run.keys.points_key.
    """

    run: Run
    key: str

    def find(self, delta: AdapterDelta | None) -> Scored | None:
        """Return what was measured of an adapter, or None. Without an adapter: the SFT model."""
        found = self.run.find_measured(self._name(delta))
        return Scored.read(found) if found else None

    def save(self, delta: AdapterDelta | None, scored: Scored) -> None:
        self.run.save_measured(self._name(delta), scored.json())

    def _name(self, delta: AdapterDelta | None) -> str:
        own = digest(delta) if delta is not None and delta.rank else ""
        return f"points/{content_key([self.key, own])}"
