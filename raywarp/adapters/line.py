"""The adapters on a front's line: η times what the merge has changed since the SFT model."""

from collections.abc import Sequence
from pathlib import Path

from raywarp.adapters.peft import load_peft, save_peft
from raywarp.adapters.start import load_start, of_base, of_sft
from raywarp.algorithm.deltas import scale


def save_line(
    merged: Path, sft_adapter: str | None, etas: Sequence[float], folder: Path
) -> dict[str, Path]:
    """Write the adapter of each η into a folder of its own, as a change of the base.

    Args:
        merged: the folder of θ_slerp, as a run has it.
        sft_adapter: of the run, if it has one.
        etas: positions on the line.
        folder: where they are written.

    Returns:
        `eta-0.5` → its folder, for each η.
    """
    start = load_start(sft_adapter)
    whole = of_sft(start, load_peft(merged))
    found = {f"eta-{eta:g}": folder / f"eta-{eta:g}" for eta in etas}
    for eta, place in zip(etas, found.values(), strict=True):
        save_peft(of_base(start, scale(whole, eta)), place)
    return found
