"""Compare the mean of two adapters, per feature of PEFT, with what the layers really compute.

The adapters are made by the PEFT that is installed, saved, and averaged three ways: by its
add_weighted_adapter (linear, cat, svd at full rank) and by `raywarp merge lerp`. The truth is the
mean of both adapters' weights and biases, measured by sending the identity through each layer. The
last line is JSON: feature → way → relative error, or why there is none. averaging.py runs this
under two versions of PEFT.
"""

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from raywarp.adapters.merging import merge
from raywarp.adapters.recipe import Recipe
from raywarp.algorithm.factors import AdapterError

SIZE, RANK = 24, 4
LAYERS = ("proj_out", "blocks.0.proj_out", "blocks.1.proj_out", "fc")
BOTH: dict[str, dict[str, Any]] = {
    "plain": {},
    "alpha ≠ r": {"lora_alpha": 11},
    "rsLoRA": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"fc": 7}},
    "alpha_pattern": {"alpha_pattern": {"fc": 3}},
    "DoRA": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "all"},
    "modules_to_save": {"target_modules": ["proj_out"], "modules_to_save": ["fc"]},
}
# What the second adapter has in other ways than the first.
SECOND: dict[str, dict[str, Any]] = {
    "unequal ranks": {"r": 7},
    "other rank_pattern": {"rank_pattern": {"fc": 7}},
    "unequal targets": {"target_modules": ["fc"]},
    "rsLoRA beside plain": {"use_rslora": True},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj_out, self.fc = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.blocks: Any = nn.ModuleList(
            nn.ModuleDict({"proj_out": nn.Linear(SIZE, SIZE)}) for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks[1]["proj_out"](self.blocks[0]["proj_out"](self.proj_out(x))))


def effect(model: PeftModel) -> torch.Tensor:
    """Return what every layer makes of the identity and of zero."""
    inputs = torch.cat([torch.eye(SIZE), torch.zeros(1, SIZE)])
    net: Any = model.base_model.model
    net.eval()
    with torch.no_grad():
        return torch.stack([net.get_submodule(name)(inputs) for name in LAYERS]).double()


def make(folder: Path, seed: int, config: dict[str, Any]) -> torch.Tensor:
    settings: dict[str, Any] = {
        "r": RANK,
        "target_modules": ["proj_out", "fc"],
        "init_lora_weights": False,
    }
    model = get_peft_model(Net(), LoraConfig(**settings | config))
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            move = torch.randn_like(weight) / 5
            weight.data = weight.data + move if "lora_" not in name else move
    model.save_pretrained(str(folder))
    return effect(model)


def with_peft(folder: Path, way: str, out: Path) -> torch.Tensor:
    model = PeftModel.from_pretrained(Net(), str(folder / "1"), adapter_name="x")
    model.load_adapter(str(folder / "2"), adapter_name="y")
    more = {"svd_rank": SIZE} if way == "svd" else {}
    model.add_weighted_adapter(["x", "y"], [0.5, 0.5], "mean", combination_type=way, **more)
    model.set_adapter("mean")
    model.save_pretrained(str(out), selected_adapters=["mean"])
    return effect(PeftModel.from_pretrained(Net(), str(out / "mean")))


def with_raywarp(folder: Path, per_module: bool, out: Path) -> torch.Tensor:
    sources = (str(folder / "1"), str(folder / "2"))
    merge(Recipe("lerp", sources, per_module_ranks=per_module), out)
    return effect(PeftModel.from_pretrained(Net(), str(out)))


def measure(first: dict[str, Any], second: dict[str, Any]) -> dict[str, float | str]:
    base = effect(get_peft_model(Net(), LoraConfig(target_modules=["fc"])))
    found: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            truth = (make(folder / "1", 1, first) + make(folder / "2", 2, second)) / 2
        except TypeError:
            return {"": "not in this version"}
        for way in ("linear", "cat", "svd", "raywarp", "raywarp --per-module-ranks"):
            out = folder / way.replace(" ", "")
            try:
                if way.startswith("raywarp"):
                    result = with_raywarp(folder, "per" in way, out)
                else:
                    result = with_peft(folder, way, out)
                found[way] = float((result - truth).norm() / (truth - base).norm())
            except AdapterError:
                found[way] = "refused"
            except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
                lost = isinstance(error, RuntimeError) and "size mismatch" in str(error)
                found[way] = "cannot be loaded" if lost else f"{type(error).__name__}"
    return found


def main() -> None:
    warnings.simplefilter("ignore")
    results = {name: measure(config, config) for name, config in BOTH.items()}
    results |= {name: measure({}, config) for name, config in SECOND.items()}
    print(f"PEFT {peft.__version__}", file=sys.stderr)
    for name, row in results.items():
        cells = (
            f"{way} {x:.1e}" if isinstance(x, float) else f"{way} {x}" for way, x in row.items()
        )
        print(f"{name:22s} {'; '.join(cells)}", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
