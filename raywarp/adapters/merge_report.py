"""Reports on a merge: a table for the terminal, JSON, and the merged adapter's model card."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from statistics import median
from typing import Any

from rich.console import Group as Lines
from rich.table import Table
from rich.text import Text

from raywarp.adapters.notes import absent_modules, merge_like, notes, pipeline_tag, usage
from raywarp.adapters.peft import AdapterFile
from raywarp.adapters.recipe import Group, Merge, Recipe, Survey
from raywarp.algorithm.deltas import grouped

# The pairs of up to M = 5 adapters get a row each; the angles of more share one.
_PAIRS_SHOWN = 10
_LOSSY = 0.01  # a rounding loss above this share of the norm calls for another dtype
_METHODS = {
    "slerp": (
        "spherical interpolation (SLERP) of the task vectors, by the recursion of WARP (Ramé et al."
        " 2024, eq. 26)"
    ),
    "lerp": "the plain mean (LERP)",
    "sum": "task arithmetic, the weighted sum of the task vectors",
    "karcher": "the Karcher mean of the task vectors' directions, at the mean of their norms",
    "ema": "an exponential moving average over the adapters as checkpoints, the oldest first",
    "liti": "linear interpolation towards the initialisation (LITI)",
}
_ANGLES = {
    "block": "one angle per transformer block",
    "tensor": "one angle per weight",
    "global": "one angle for the whole model",
}


def merge_table(merge: Merge) -> Lines:
    """Return what was merged, with the spread of norms, angles, ranks and retained norms.

    The spread is the least, the median and the largest value.
    """
    recipe, (first, *_) = merge.recipe, merge.files
    rows = _geometry_rows(merge.groups, len(recipe.adapters))
    blocks = merge.blocks.values()
    rows["norm of the merge"] = [block.norm for block in blocks]
    rows["rank of the merge"] = [block.rank for block in blocks]
    if recipe.rank or recipe.energy:
        rows["retained norm"] = [block.retained for block in blocks]
    base = merge_like(merge.files).base_model or "an unnamed base"
    title = (
        f"{recipe.method} of {len(recipe.adapters)} adapters, {len(first.shapes)} modules in"
        f" {len(blocks)} blocks of {base}"
    )
    dtype = f"dtype: {_dtype_line(merge)}"
    return Lines(title, *notes(merge.files), _spread_table(rows), dtype)


def _dtype_line(merge: Merge) -> str:
    """Return the dtype that was written, why, and what it loses."""
    found = sorted({_name(dtype) for file in merge.files for dtype in file.dtypes})
    line = _name(merge.dtype)
    if merge.recipe.dtype == "auto" and len(found) > 1:
        line += f", which holds the inputs' {' and '.join(found)}"
    if lost := max(block.rounding for block in merge.blocks.values()):
        line += f"; its rounding changes ΔW by up to {lost:.1e} of a block's norm"
        line += "; float32 keeps it" if lost > _LOSSY else ""
    return line


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def inspect_table(found: Survey) -> Lines:
    """Return one row per adapter, their norms and angles, and what merge would refuse."""
    table = Table(box=None, pad_edge=False)
    for name in ("adapter", "rank", "alpha", "modules", "blocks", "targets", "base"):
        table.add_column(name, overflow="fold")
    for number, file in enumerate(found.files, start=1):
        facts = adapter_facts(file)
        label = f"{number}" if number <= found.policies else "init"
        table.add_row(
            f"{label}: {file.name}",
            *(
                str(facts[key])
                for key in ("rank", "alpha", "modules", "blocks", "targets", "base_model")
            ),
        )
    refused = [f"merge refuses {source}: {why}" for source, why in found.refusals.items()]
    refused += [f"merge {method} refuses these: {why}" for method, why in found.undefined.items()]
    rows = _geometry_rows(found.groups, found.policies)
    return Lines(table, "", *notes(found.files), _spread_table(rows), *map(Text, refused))


def survey_json(found: Survey) -> dict[str, Any]:
    """Return everything that was found, for programs."""
    facts = [adapter_facts(file) for file in found.files]
    return {
        "adapters": facts[: found.policies],
        "init": next(iter(facts[found.policies :]), None),
        "groups": groups_json(found.groups, found.policies),
        "refused": found.refusals,
        "undefined": found.undefined,
    }


def adapter_facts(file: AdapterFile) -> dict[str, Any]:
    """Return what an adapter's header says.

    rank and alpha are one number or "least to largest"; alpha says whether it is rsLoRA's.
    """
    ranks = [file.shapes[module][1] for module in file.own]
    root = bool(file.config.get("use_rslora"))
    alphas = [
        file.scalings[module] * (math.sqrt(rank) if root else rank)
        for module, rank in zip(file.own, ranks, strict=True)
    ]
    return {
        "name": file.name,
        "rank": _span(ranks),
        "alpha": _span([round(alpha, 6) for alpha in alphas]) + (" (rsLoRA)" if root else ""),
        "modules": len(file.own),
        "blocks": len(grouped(file.own)),
        "targets": " ".join(sorted({module.rsplit(".", 1)[-1] for module in file.own})),
        "base_model": file.like().base_model,
        "absent": absent_modules(file),
        "skipped": file.skipped,
    }


def merge_json(merge: Merge) -> dict[str, Any]:
    """Return everything about a merge, for programs. Angles of zero vectors are null."""
    recipe = merge.recipe
    return {
        "method": recipe.method,
        "adapters": [adapter_facts(file) for file in merge.files[: len(recipe.adapters)]],
        "init": adapter_facts(merge.files[-1]) if recipe.init else None,
        "liti_rate": recipe.liti_rate,
        "granularity": recipe.granularity,
        "dtype": _name(merge.dtype),
        "groups": groups_json(merge.groups, len(recipe.adapters)),
        "blocks": {name: asdict(block) for name, block in merge.blocks.items()},
    }


def groups_json(groups: Mapping[str, Group], count: int) -> dict[str, Any]:
    """Return group → norms, angles and, where something was merged, coefficients.

    Angles are in degrees, by pair of adapters ("1-2").
    """
    pairs = [f"{i}-{j}" for i, j in combinations(range(1, count + 1), 2)]
    rows: dict[str, Any] = {}
    for name, group in groups.items():
        angles = {
            pair: None if math.isnan(angle) else angle
            for pair, angle in zip(pairs, group.angles, strict=True)
        }
        rows[name] = {
            "norms": group.norms,
            "angles": angles,
            **({"coefficients": group.coefficients} if group.coefficients else {}),
        }
    return rows


def merge_card(merge: Merge) -> str:
    """Return the merged adapter's README.md: what was merged, how, and how to load it."""
    recipe, like = merge.recipe, merge_like(merge.files)
    tag = pipeline_tag(like)
    head = [
        "---",
        *([f"base_model: {like.base_model}"] if like.base_model else []),
        *([f"pipeline_tag: {tag}"] if tag else []),
        "library_name: peft",
        "tags:",
        "- lora",
        "- peft",
        "- merge",
        "- raywarp",
        "---",
    ]
    lines = [
        *head,
        "",
        "# Merged LoRA adapter",
        "",
        f"Made by raywarp: {_METHODS[recipe.method]}.",
        "",
        *_inputs(merge),
        "",
        *_how(recipe, merge),
        "",
    ]
    lines += [
        (
            "Averages are taken of ΔW = s·B·A, never of A and B apart: the factors are"
            " concatenated, [c₁B₁ … c_MB_M]·[A₁; …; A_M],"
        ),
        "with the scaling and the coefficients c folded into B (`lora_alpha` equals `r`).",
        "",
        "|  | least | median | largest |",
        "|---|---|---|---|",
    ]
    rows = _geometry_rows(merge.groups, len(recipe.adapters))
    rows["rank"] = [block.rank for block in merge.blocks.values()]
    rows["retained norm"] = [block.retained for block in merge.blocks.values()]
    lines += [f"| {name} | {' | '.join(_spread(values))} |" for name, values in rows.items()]
    lines += ["", *usage(like), ""]
    return "\n".join(lines)


def _inputs(merge: Merge) -> list[str]:
    recipe = merge.recipe
    usual = 1.0 if recipe.method == "sum" else None
    weights = recipe.weights or (usual,) * len(recipe.adapters)
    names = [
        *(f"θ_{number}" for number in range(1, len(recipe.adapters) + 1)),
        *(["θ_init"] if recipe.init else []),
    ]
    lines = ["|  | adapter | rank | weight |", "|---|---|---|---|"]
    for name, file, weight in zip(
        names, merge.files, [*weights, *([None] if recipe.init else [])], strict=True
    ):
        shown = "" if name == "θ_init" else "equal" if weight is None else f"{weight:g}"
        lines.append(f"| {name} | {file.name} | {adapter_facts(file)['rank']} | {shown} |")
    return lines


def _how(recipe: Recipe, merge: Merge) -> list[str]:
    lines = [f"- from: {'θ_init above' if recipe.init else 'the base model (zero)'}"]
    if recipe.method in ("slerp", "karcher"):
        lines.append(f"- angles: {_ANGLES[recipe.granularity]}")
    if recipe.ema_rate is not None:
        lines.append(f"- EMA rate μ: {recipe.ema_rate:g}")
    if recipe.liti_rate != 1:
        lines.append(
            f"- LITI rate η: {recipe.liti_rate:g} of the way from the initialisation to the merge"
            + (" (extrapolated)" if recipe.liti_rate > 1 else "")
        )
    if recipe.rank or recipe.energy:
        limit = (
            f"rank {recipe.rank}"
            if recipe.rank
            else f"{recipe.energy:g} of each module's squared norm"
        )
        least = min(block.retained for block in merge.blocks.values())
        lines.append(
            f"- truncated by SVD to {limit}: at least {least:.4f} of each block's norm is retained"
        )
    else:
        lines.append("- not truncated: the rank is the sum of the ranks")
    return [*lines, f"- dtype: {_dtype_line(merge)}"]


def _geometry_rows(groups: Mapping[str, Group], count: int) -> dict[str, list[float]]:
    rows = {f"norm {m + 1}": [group.norms[m] for group in groups.values()] for m in range(count)}
    pairs = list(combinations(range(1, count + 1), 2))
    angles = {
        f"angle {i}-{j}, degrees": [group.angles[n] for group in groups.values()]
        for n, (i, j) in enumerate(pairs)
    }
    if len(pairs) > _PAIRS_SHOWN:
        angles = {
            "angles of all pairs, degrees": [
                angle for group in groups.values() for angle in group.angles
            ]
        }
    return rows | angles


def _spread_table(rows: Mapping[str, Sequence[float]]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in ("min", "median", "max"):
        table.add_column(name, justify="right")
    for name, values in rows.items():
        table.add_row(name, *_spread(values))
    return table


def _spread(values: Sequence[float]) -> list[str]:
    """Return the least, median and largest value; angles with zero vectors are left out."""
    known = [value for value in values if not math.isnan(value)]
    return (
        [f"{value:.4g}" for value in (min(known), median(known), max(known))]
        if known
        else ["-"] * 3
    )


def _span(values: Sequence[float]) -> str:
    least, largest = min(values), max(values)
    return f"{least:g}" if least == largest else f"{least:g} to {largest:g}"
