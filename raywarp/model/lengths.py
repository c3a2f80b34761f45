"""Sequence lengths that change what a model computes, and passes cut accordingly.

Some models compute something else for a longer pass, padding included. They use longrope, dynamic
NTK, or attention to the top k tokens:

- transformers 5.19 chooses a rope's frequencies once per pass.
- Dynamic NTK remembers the longest pass so far.
- Which of equal scores are among the top k depends on the pass's width.

So sequences of different kinds never share a pass here. Each pass starts from the frequencies that
the model was loaded with.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from raywarp.model.batches import MicroBatch

# The keys of DeepSeek-V3.2 and of Doge.
_TOP_K = re.compile(r"(index|sparse|attn|attention).*top_?k$|keep_window")


@dataclass(frozen=True)
class LengthLimits:
    """The lengths at which a model changes.

    Attributes:
        switches: sequences with more tokens than one of these are of another kind.
        growing: above it, every length is a kind of its own; None where there is no such limit.
    """

    switches: tuple[int, ...] = ()
    growing: int | None = None

    @property
    def lowest(self) -> int | None:
        """The longest sequence of the same kind as a short one; None where all are of that kind."""
        return min(
            (*self.switches, *(() if self.growing is None else (self.growing,))), default=None
        )

    def kind(self, length: int) -> tuple[int, ...]:
        """Return the kind of a length. Sequences of equal kind may share a pass."""
        grown = length if self.growing is not None and length > self.growing else 0
        return (*(int(length > switch) for switch in self.switches), grown)


def length_limits(config: Any, ropes_only: bool = False) -> LengthLimits:
    """Return the limits in transformers' configuration of a language model, for any of its layers.

    Args:
        config: of the model.
        ropes_only: whether to leave out top-k limits.
    """
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None) or 0
    switches, growing = (
        set(),
        (
            []
            if ropes_only
            else [
                n for key, n in text.to_dict().items() if _TOP_K.search(key) and isinstance(n, int)
            ]
        ),
    )
    for rope in _ropes(text.to_dict()):
        kind = str(rope.get("rope_type") or rope.get("type") or "")
        original = (
            rope.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
            or most
        )
        if kind in ("longrope", "su") or "long_factor" in rope or "long_mscale" in rope:
            switches.add(int(original))
        elif "dynamic" in kind:
            growing.append(min(int(original), int(most)) if most else int(original))
    return LengthLimits(tuple(sorted(switches)), min(growing, default=None))


def _ropes(tree: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for value in tree.values():
        if isinstance(value, Mapping):
            if "rope_type" in value or "type" in value:
                yield value
            yield from _ropes(value)


class Lengths:
    """How a loaded model's passes are cut.

    Its rotary embeddings are kept as loaded, and restored before a pass.
    """

    def __init__(self, model: Any):
        self.limits = length_limits(model.config)
        modules = [
            module
            for module in model.modules()
            if hasattr(module, "inv_freq") or hasattr(module, "max_seq_len_cached")
        ]
        self._saved = [(module, dict(module._buffers), dict(vars(module))) for module in modules]

    def restore(self) -> None:
        for module, buffers, attributes in self._saved:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)

    def passes(self, part: MicroBatch) -> list[tuple[Tensor, MicroBatch]]:
        """Cut a micro-batch of one sequence per row into passes of sequences of one kind.

        Each pass is as wide as its longest sequence needs. A row lacks its sequence's last token.
        Where the length counts, a column of padding stands for it.

        Returns:
            for each pass, which of the n response tokens it has, and the pass. Only its input_ids
            and sources are valid.
        """
        assert part.segments is None, "sequences that share a row are taken for one"
        width = part.input_ids.shape[1]
        rows, columns = part.sources // width, part.sources % width
        lengths = [int(columns[rows == row].max()) + 2 for row in range(len(part.input_ids))]
        kinds = [self.limits.kind(length) for length in lengths]
        return [
            self._pass(part, rows, columns, lengths, [r for r, k in enumerate(kinds) if k == kind])
            for kind in dict.fromkeys(kinds)
        ]

    def _pass(
        self, part: MicroBatch, rows: Tensor, columns: Tensor, lengths: list[int], chosen: list[int]
    ) -> tuple[Tensor, MicroBatch]:
        longest = max(lengths[row] for row in chosen)
        width = longest - 1 if longest <= (self.limits.lowest or 0) else longest
        picked = torch.tensor(chosen, device=rows.device)
        input_ids = torch.nn.functional.pad(part.input_ids, (0, 1))[picked, :width]
        inside = torch.isin(rows, picked).nonzero().squeeze(-1)
        new_rows = (rows[inside][:, None] == picked).long().argmax(-1)
        return inside, replace(
            part, input_ids=input_ids, sources=new_rows * width + columns[inside]
        )
