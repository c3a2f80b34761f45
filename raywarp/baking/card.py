"""What was baked, and with what loss: the result, its summary, and the model's card."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from raywarp.baking.rounding import ENOUGH, Kept


@dataclass(frozen=True)
class Baked:
    """What `bake` wrote.

    Attributes:
        folder: of the model.
        base: as the user or the adapter named it.
        adapter: as the user named it.
        liti_rate: η.
        dtype: in which most numbers are written.
        kept: what rounding left of ΔW, by dtype: the written one, and float32 and float16 beside
            it, as far as no number is too large for them.
        shares: module → the share of its ΔW that is in the written weight.
        size: bytes of the weights.
        files: number of weight files.
        untied: whether the head was the embedding, and is a tensor of its own now.
        quantize: how the base is held that the adapter was trained on; see base.quantize.
    """

    folder: Path
    base: str
    adapter: str
    liti_rate: float
    dtype: str
    kept: Mapping[str, Kept]
    shares: Mapping[str, float]
    size: int
    files: int
    untied: bool
    quantize: str = "none"

    @property
    def base_in_words(self) -> str:
        """The base, and that its weights are dequantised ones, if they are."""
        held = "" if self.quantize == "none" else f" in {self.quantize}, dequantised,"
        return f"{self.base}{held}"


def summary(baked: Baked) -> str:
    """Return what was written and what rounding lost, in sentences."""
    lines = [
        f"{baked.size / 1e9:.2f} GB of {baked.dtype} in {_files(baked.files)}:"
        f" {baked.base_in_words} + {baked.liti_rate:g}·ΔW of {baked.adapter}"
    ]
    if baked.untied:
        lines.append("the head, which was the embedding, is a tensor of its own now")
    lines.append(_loss(baked))
    return "\n".join(lines)


def _loss(baked: Baked) -> str:
    """Return what the written dtype keeps, and what others would where it loses much."""
    own = baked.kept[baked.dtype]
    text = (
        f"{baked.dtype} keeps {own.share:.4g} of ΔW (least: {own.worst_share:.3g}, in {own.worst}),"
        f" with a relative error of {own.error:.2g}"
    )
    if own.share >= ENOUGH:
        return text
    others = [
        f"--dtype {name} keeps {kept.share:.4g} (error {kept.error:.2g})"
        for name, kept in baked.kept.items()
        if name != baked.dtype and kept.share > own.share
    ]
    advice = f"; {', '.join(others)}" if others else ""
    return f"{text}: the model is not base + ΔW{advice}"


def baked_card(baked: Baked, config: Any) -> str:
    """Return the model's README.md.

    Args:
        config: transformers' configuration of the base.
    """
    from raywarp.data.models import is_causal

    kind = "AutoModelForCausalLM" if is_causal(config) else "AutoModel"
    is_local = baked.base.startswith("embedded:") or Path(baked.base).expanduser().is_dir()
    head = {
        **({} if is_local else {"base_model": baked.base.partition("@")[0]}),
        "library_name": "transformers",
        **({"pipeline_tag": "text-generation"} if is_causal(config) else {}),
        "tags": ["lora", "raywarp"],
    }
    rows = {
        "base": baked.base_in_words.rstrip(","),
        "adapter": baked.adapter,
        "η": f"{baked.liti_rate:g}",
        "weights": f"{baked.dtype}, {baked.size / 1e9:.2f} GB in {_files(baked.files)}",
        "changed weights": str(len(baked.shares)),
    }
    parts = [
        "---\n" + yaml.safe_dump(head, sort_keys=False, allow_unicode=True) + "---",
        "# A model with its adapter baked in",
        f"W + η·ΔW, summed in float32 and rounded once, by raywarp {version('raywarp')}.",
        "|  |  |\n|---|---|\n" + "\n".join(f"| {key} | {value} |" for key, value in rows.items()),
        "## Rounding",
        _rounding(baked),
        f"```python\nfrom transformers import {kind}\n\n"
        f'model = {kind}.from_pretrained("this folder", dtype={json.dumps(baked.dtype)})\n```',
    ]
    return "\n\n".join(parts) + "\n"


def _rounding(baked: Baked) -> str:
    table = [
        "| dtype | share of ΔW kept | least of a module | relative error |",
        "|---|---|---|---|",
        *(
            f"| {name}{' (this model)' if name == baked.dtype else ''} | {kept.share:.4f}"
            f" | {kept.worst_share:.4f} ({kept.worst}) | {kept.error:.2g} |"
            for name, kept in baked.kept.items()
        ),
    ]
    note = (
        "The share is ⟨round(W + ΔW) − round(W), ΔW⟩ / ‖ΔW‖² over all changed weights: 1 is all of"
        " ΔW. The error, ‖round(W + ΔW) − round(W) − ΔW‖ / ‖ΔW‖, also counts rounding noise."
    )
    return "\n".join(table) + f"\n\n{note}"


def _files(count: int) -> str:
    return "one file" if count == 1 else f"{count} files"
