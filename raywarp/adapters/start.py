"""The adapter that a run starts from: with it, base + adapter is the SFT model.

Inside a run, every adapter is a change of the SFT model. In files, it is a change of the base, so
that PEFT and vLLM load it on the base as it is: the SFT adapter's columns come first in each
factor. Both directions are exact.
"""

from dataclasses import dataclass, replace

from raywarp.adapters.peft import AdapterFile, load_peft
from raywarp.algorithm.deltas import AdapterDelta, add
from raywarp.algorithm.factors import Factors


@dataclass(frozen=True)
class Start:
    """What the SFT model is, relative to the base.

    Attributes:
        delta: the SFT adapter, with its scaling folded into B.
    """

    delta: AdapterDelta

    @classmethod
    def load(cls, source: str) -> "Start":
        """Read a PEFT adapter.

        Raises:
            AdapterError: see AdapterFile.
        """
        delta = load_peft(source)
        factors = {m: Factors(f.B.float(), f.A.float()) for m, f in delta.factors.items()}
        return cls(replace(delta, factors=factors))

    @property
    def rank(self) -> int:
        """The largest rank of any module."""
        return self.delta.rank

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Module → (d_out, d_in)."""
        return {m: (f.B.shape[0], f.A.shape[1]) for m, f in self.delta.factors.items()}

    @property
    def numbers(self) -> int:
        """How many numbers its factors have."""
        return sum(f.B.numel() + f.A.numel() for f in self.delta.factors.values())

    def of_base(self, change: AdapterDelta) -> AdapterDelta:
        """Return SFT adapter + change, a change of the base.

        Args:
            change: of the SFT model. It has every module of the SFT adapter, at rank 0 where it
                changes nothing.
        """
        return add(self.over(change), change)

    def of_sft(self, whole: AdapterDelta) -> AdapterDelta:
        """Return the change of the SFT model in what `of_base` returned, bit for bit."""
        start = {m: f.rank for m, f in self.delta.factors.items()}
        return whole.map(lambda m, f: Factors(f.B[:, start.get(m, 0) :], f.A[start.get(m, 0) :]))

    def over(self, change: AdapterDelta) -> AdapterDelta:
        """Return the SFT adapter over all modules of a change, at rank 0 where it has no factors.

        Its other attributes are the change's.
        """
        own = self.delta.factors
        return change.map(lambda m, f: own.get(m, Factors(f.B[:, :0], f.A[:0])))


def of_base(start: Start | None, change: AdapterDelta) -> AdapterDelta:
    """Return a change of the SFT model as a change of the base."""
    return start.of_base(change) if start else change


def of_sft(start: Start | None, whole: AdapterDelta) -> AdapterDelta:
    """Return a change of the base as a change of the SFT model."""
    return start.of_sft(whole) if start else whole


def load_start(source: str | None) -> Start | None:
    """Return the SFT adapter of a run; None where the SFT model is the base.

    Raises:
        AdapterError: see AdapterFile.
    """
    return Start.load(source) if source else None


def start_rank(source: str | None) -> int:
    """Return the largest rank of the SFT adapter; 0 without one.

    Raises:
        AdapterError: see AdapterFile.
    """
    return max(rank for _, rank, _ in AdapterFile(source).shapes.values()) if source else 0
