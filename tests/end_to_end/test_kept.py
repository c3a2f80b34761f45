"""Tests of what a run says beside reward and KL: what is kept, and what its merges can give.

One run of a tiny Llama with completions of one token, whose KLs follow exactly from the logits.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_models import WORDS
from tiny_run import DAMAGE, Listener, tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from raywarp.adapters.peft import load_peft
from raywarp.algorithm.factors import dense
from raywarp.config.schema import Config
from raywarp.planning.inputs import prepare
from raywarp.run.folder import Run
from raywarp.warp import train

TEMPERATURE = 0.7


def settings(project: Path, tiny_llama: Path, out: Path, **changes: Any) -> Config:
    own: dict[str, Any] = {
        "warp": {"steps": 4},
        "rollout": {"max_new_tokens": 1, "temperature": TEMPERATURE},
        "front": {"etas": [0.5, 1.5], "choose": {"eta": 1.5}, "tracked_prompts": 3},
        "retention": {"dataset": str(project / "texts.jsonl"), "column": "words", "max_tokens": 9},
    }
    for section, values in changes.items():
        own[section] = {**own.get(section, {}), **values} if isinstance(values, dict) else values
    return tiny_config(project, tiny_llama, out, **own)


@pytest.fixture(scope="module")
def texts(project: Path) -> list[str]:
    """Texts of different lengths, the first of a single token with the BOS."""
    found = ["", *(" ".join(WORDS[n : n + 2 + n % 11]) for n in range(12))]
    (project / "texts.jsonl").write_text("".join(json.dumps({"words": t}) + "\n" for t in found))
    return found


@pytest.fixture(scope="module")
def kept(ray_cluster: Any, project: Path, tiny_llama: Path, texts: list[str]) -> Run:
    return train(settings(project, tiny_llama, project / "kept"), Listener())


def points(run: Run) -> dict[str, dict[str, Any]]:
    return {point["name"]: point for point in run.front()["points"]}


def measured_merge(run: Run, iteration: int) -> dict[str, Any]:
    found = json.loads((run.folder / f"iterations/{iteration}/geometry.json").read_text())
    merge: dict[str, Any] = found["merge"]
    return merge


def policy_folders(run: Run, iteration: int) -> list[Path]:
    names = json.loads((run.folder / f"iterations/{iteration}/policies.json").read_text())
    return [run.folder / name for name in names]


def test_a_point_beyond_slerp_is_measured_kept_and_marked(kept: Run) -> None:
    found = points(kept)
    assert list(found) == ["sft", "policy 1", "policy 2", "lerp", "liti 0.5", "slerp", "liti 1.5"]
    assert [name for name, one in found.items() if one["extrapolated"]] == ["liti 1.5"]
    assert kept.front()["chosen"] == "liti 1.5"
    assert found["liti 1.5"]["kl"] > found["slerp"]["kl"] > found["liti 0.5"]["kl"] > 0
    merged, adapter = (load_peft(kept.folder / name) for name in ("iterations/2/merged", "adapter"))
    for module, f in merged.factors.items():
        torch.testing.assert_close(
            dense(adapter.factors[module]), 1.5 * dense(f), rtol=1e-5, atol=1e-6
        )
    card = " ".join((kept.folder / "adapter/README.md").read_text().split())
    assert "η = 1.5, extrapolated beyond the policies" in card


def test_retention_is_what_transformers_and_peft_compute(
    kept: Run, tiny_llama: Path, texts: list[str]
) -> None:
    """Their loss of labels, text by text, of the adapters that the run has saved."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = [tokenizer(text, return_tensors="pt").input_ids[:, :9] for text in texts[1:]]
    tokens = sum(one.shape[1] - 1 for one in ids)

    def loss(model: Any) -> float:
        with torch.no_grad():
            losses = [float(model(one, labels=one).loss) * (one.shape[1] - 1) for one in ids]
        return sum(losses) / tokens

    def adapted(folder: Path) -> Any:
        return PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tiny_llama), str(folder)
        ).eval()

    sft, found = loss(AutoModelForCausalLM.from_pretrained(tiny_llama).eval()), points(kept)
    one, two = policy_folders(kept, 2)
    folders = {"policy 1": one, "policy 2": two, "liti 1.5": kept.folder / "adapter"}
    folders["slerp"] = kept.folder / "iterations/2/merged"
    for name, folder in folders.items():
        assert found[name]["retention"] == pytest.approx(loss(adapted(folder)) - sft, abs=1e-4)
        assert abs(found[name]["retention"]) > 1e-3
        assert found[name]["retention_ci"] > 0
    assert (found["sft"]["retention"], found["sft"]["retention_ci"]) == (0, 0)


def test_the_kl_cosine_is_that_of_the_exact_kls(kept: Run, tiny_llama: Path) -> None:
    """KL of one token over the whole vocabulary, from the logits of densely merged weights."""
    prompts = prepare(config_of(kept, tiny_llama)).prompts.held_out[-3:]

    def logprobs(*changes: dict[str, torch.Tensor]) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
        for change in changes:
            for module, weight in change.items():
                model.get_submodule(module).weight.data += weight.float()
        with torch.no_grad():
            rows = [model(torch.tensor([p.token_ids])).logits[0, -1] for p in prompts]
        return (torch.stack(rows).double() / TEMPERATURE).log_softmax(-1)

    for iteration in (1, 2):
        init = changes(kept.folder / f"iterations/{iteration}/init")
        own = [changes(folder) for folder in policy_folders(kept, iteration)]
        mean = {module: (own[0][module] + own[1][module]) / 2 for module in init}
        reference = logprobs(init)
        one, two, lerp = (
            float((p.exp() * (p - reference)).sum(-1).mean()) for p in map(logprobs, (*own, mean))
        )
        found = measured_merge(kept, iteration)
        assert found["kl_policies"] == pytest.approx([one, two], rel=1e-3, abs=1e-6)
        assert found["kl_lerp"] == pytest.approx(lerp, rel=1e-3, abs=1e-6)
        ratio = lerp / ((one + two) / 2)
        assert found["kl_cosine"] == pytest.approx(2 * ratio - 1, abs=2e-3)
        assert found["kl_gain"] == pytest.approx(max(1 - ratio**0.5, 0), abs=2e-3)
        assert found["kl_cosine_ci"] > 0
        assert found["prompts"] == 3


def changes(folder: Path) -> dict[str, torch.Tensor]:
    return {module: dense(f) for module, f in load_peft(folder).factors.items()}


def config_of(run: Run, tiny_llama: Path) -> Config:
    return settings(run.folder.parent, tiny_llama, run.folder)


def test_a_finished_run_measures_nothing_again(
    kept: Run, tiny_llama: Path, tmp_path: Path, no_ray: None
) -> None:
    folder = Path(shutil.copytree(kept.folder, tmp_path / "run"))
    shutil.rmtree(folder / "iterations")
    config = config_of(kept, tiny_llama).model_copy(update={"out": str(folder)})
    again = train(config, heard := Listener())
    assert again.front() == kept.front()
    for iteration in (1, 2):
        assert measured_merge(again, iteration) == measured_merge(kept, iteration)
    cosine = measured_merge(kept, 2)["kl_cosine"]
    assert f"iteration 2: KL cosine {cosine:.2f} ± " in heard.text()
    assert "% of √KL" in heard.text()
    assert "retention" in heard.text()


def test_a_merge_is_shared_through_the_store_and_made_good(
    kept: Run, tiny_llama: Path, project: Path, tmp_path: Path
) -> None:
    """Another run with the same store finds both; a damaged one is measured again, the same."""
    store = Path(shutil.copytree(kept.folder, tmp_path / "store"))
    one, two = sorted((store / "merges").iterdir())
    before = {path: path.read_bytes() for path in (one, two)}
    DAMAGE["flipped"](one)
    written = two.stat().st_mtime_ns
    config = config_of(kept, tiny_llama).model_copy(
        update={"out": str(tmp_path / "second"), "store": str(store)}
    )
    second = train(config, heard := Listener())
    assert f"{one} is not what was written (sha256); measured again" in heard.text()
    assert {path: path.read_bytes() for path in (store / "merges").iterdir()} == before
    assert two.stat().st_mtime_ns == written
    assert not (second.folder / "merges").exists()
    assert measured_merge(second, 2) == measured_merge(kept, 2)
    assert points(second) == points(kept)
