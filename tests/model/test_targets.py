"""Tests of which modules get adapters: the linear layers of the language model.

They are recognised by what they compute. The other modules are named or refused.
"""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from architectures import FAMILIES
from peft.tuners.tuners_utils import check_target_module_exists
from torch.nn import Linear
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

from raywarp.config.policies import LoraConfig
from raywarp.config.schema import ConfigError
from raywarp.model.targets import _matches, find_targets, is_linear

ATTENTION = r"set lora.target_modules: \[q_proj, k_proj, v_proj, o_proj\], or all-linear"


class Renamed(Linear):
    """The same product in other words, as Falcon has it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T + self.bias


class Doubled(Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


class Pair(Linear):
    """As routers are: more than one result."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), x


def meta_model(name: str) -> Any:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(FAMILIES[name].build())


def test_a_layer_is_linear_by_what_it_computes() -> None:
    assert [is_linear(kind(4, 2)) for kind in (Linear, Renamed, Doubled, Pair)] == [
        True,
        True,
        False,
        False,
    ]
    assert not is_linear(DeepseekV4GroupedLinear(4, 4, n_groups=2))
    assert not is_linear(torch.nn.Embedding(4, 2))
    patched = Linear(4, 2)
    patched.forward = lambda x: x  # type: ignore[method-assign, assignment]
    assert not is_linear(patched)


@pytest.mark.parametrize(
    ("name", "names", "left"),
    [
        ("Llama", "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj", ""),
        ("GPT-2", "c_attn c_fc c_proj", ""),
        (
            "Qwen3-MoE",
            "k_proj o_proj q_proj v_proj",
            "mlp.experts (Qwen3MoeExperts) mlp.gate (Qwen3MoeTopKRouter)",
        ),
        (
            "Phi-MoE",
            "k_proj o_proj q_proj v_proj",
            "mlp.experts (PhimoeExperts) mlp.router (PhimoeTopKRouter)",
        ),
        (
            # PEFT 0.21 would take the dense layer's and the shared expert's projections for the
            # experts'
            "DeepSeek-V3",
            "kv_a_proj_with_mqa kv_b_proj o_proj q_a_proj q_b_proj",
            (
                "mlp.gate_proj (Linear) mlp.up_proj (Linear) mlp.down_proj (Linear) mlp.experts"
                " (DeepseekV3Experts) mlp.gate (DeepseekV3TopkRouter) mlp.shared_experts.gate_proj"
                " (Linear) mlp.shared_experts.up_proj (Linear) mlp.shared_experts.down_proj"
                " (Linear)"
            ),
        ),
        (
            "Mamba",
            "in_proj",
            "mixer.x_proj (Linear) mixer.dt_proj (Linear) mixer.out_proj (Linear)",
        ),
        ("Falcon, rotary", "dense dense_4h_to_h dense_h_to_4h query_key_value", ""),
    ],
)
def test_all_linear_adapts_what_can_be_adapted_and_names_the_rest(
    name: str, names: str, left: str
) -> None:
    found = find_targets(meta_model(name), LoraConfig())
    assert found.names == tuple(names.split())
    assert {text.rpartition("layers.*.")[2] for text in found.left} == set(
        re.findall(r"\S+ \(\w+\)", left)
    )


def test_a_vision_tower_is_left_alone() -> None:
    """Also where its modules have the same names; PEFT then finds the others by their whole
    paths.
    """
    model = meta_model("Gemma-3, wrapper")
    for wanted in ("all-linear", ["q_proj", "down_proj"], r".*\.q_proj"):
        found = find_targets(model, LoraConfig(target_modules=wanted))
        assert found.modules
        assert all(name.startswith("model.language_model.layers.") for name in found.modules)
        assert "q_proj" not in found.names
        assert {f"model.language_model.layers.{n}.self_attn.q_proj" for n in (0, 1)} <= set(
            found.names
        )
    assert find_targets(model, LoraConfig()).left == ("model.vision_tower (SiglipVisionModel)",)


def test_names_say_to_peft_exactly_these_modules() -> None:
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model

    for name in ("Llama", "Gemma-3, wrapper", "Llama-4", "DeepSeek-V3", "Qwen2-MoE"):
        found = find_targets(meta_model(name), LoraConfig())
        model = get_peft_model(meta_model(name), PeftConfig(target_modules=list(found.names)))
        prefix, suffix = "base_model.model.", ".lora_A.default"
        theirs = {
            module.removeprefix(prefix).removesuffix(suffix)
            for module, _ in model.named_modules()
            if module.endswith(suffix)
        }
        assert theirs == set(found.modules)


@pytest.mark.parametrize(
    ("name", "wanted", "message"),
    [
        (
            "Qwen3-MoE",
            ["q_proj", "down_proj"],
            r"names model.layers.0.mlp.experts.down_proj, one tensor of Qwen3MoeExperts",
        ),
        (
            "Mixtral",
            ["gate"],
            "names model.layers.0.mlp.gate, a MixtralTopKRouter; only linear layers are adapted",
        ),
        (
            "Llama-4",
            ["router"],
            "names model.layers.1.feed_forward.router, a Llama4Router; only linear layers",
        ),
        ("Llama", ["q_proj", "c_attn"], "does not fit the model: it has no module c_attn"),
        ("Llama", ["mlp"], "names model.layers.0.mlp, a LlamaMLP; only linear layers"),
        ("Llama", r".*\.nothing", "does not fit the model: it has no module"),
    ],
)
def test_what_cannot_be_adapted_is_refused_with_what_would_do(
    name: str, wanted: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*{ATTENTION}"):
        find_targets(meta_model(name), LoraConfig(target_modules=wanted))


def test_a_layer_whose_weight_is_read_past_it_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="names backbone.layers.0.mixer.dt_proj, a Linear"):
        find_targets(meta_model("Mamba"), LoraConfig(target_modules=["in_proj", "dt_proj"]))


@pytest.mark.parametrize(
    "wanted",
    [["q_proj"], ["self_attn.q_proj", "proj"], ["layers.0.mlp"], r".*\.0\..*_proj", "q_proj"],
)
def test_names_match_as_in_peft(wanted: str | list[str]) -> None:
    names = [name for name, _ in meta_model("Llama").named_modules()]
    config = peft.LoraConfig(target_modules=wanted)
    assert _matches(wanted, names) == [n for n in names if check_target_module_exists(config, n)]


def test_peft_is_imported_for_fused_experts_alone(tiny_llama: Path) -> None:
    script = (
        "import sys, torch; from raywarp.config.policies import LoraConfig;"
        " from raywarp.model.adapted"
        " import AdaptedModel; AdaptedModel(sys.argv[1], LoraConfig(), torch.float32,"
        " torch.device('cpu')); print('peft' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(tiny_llama)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
