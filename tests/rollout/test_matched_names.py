"""Tests that one module is found under the names that trainer, file and engine give it."""

import pytest

from raywarp.rollout.base_weights import match_names

LAYER = "layers.3.self_attn.q_proj"


@pytest.mark.parametrize(
    ("module", "names", "found"),
    [
        (f"model.{LAYER}", [f"model.{LAYER}", f"mtp.{LAYER}"], f"model.{LAYER}"),
        (
            f"model.{LAYER}",
            [f"model.language_model.{LAYER}", f"mtp.{LAYER}"],
            f"model.language_model.{LAYER}",
        ),
        (
            f"model.language_model.{LAYER}",
            [f"vision_tower.encoder.{LAYER}", f"language_model.model.{LAYER}"],
            f"language_model.model.{LAYER}",
        ),
        (
            f"model.{LAYER}",
            [f"model.vision_tower.{LAYER}", f"model.language_model.{LAYER}"],
            f"model.language_model.{LAYER}",
        ),
        ("transformer.h.0.attn.c_attn", ["h.0.attn.c_attn", "h.1.attn.c_attn"], "h.0.attn.c_attn"),
        (f"model.{LAYER}", [LAYER.replace("3", "4")], None),
        (f"model.{LAYER}", [f"a.{LAYER}", f"b.{LAYER}"], None),  # which of the two is not known
    ],
)
def test_the_name_that_means_a_module(module: str, names: list[str], found: str | None) -> None:
    assert match_names([module], names) == ({module: found} if found else {})


def test_a_name_that_two_modules_would_share_is_neither_ones() -> None:
    assert match_names([f"a.{LAYER}", f"b.{LAYER}"], [LAYER]) == {}
