"""Tests of `raywarp front`: of adapters that PEFT made, and of a finished run anew.

Completions have one token, so that every KL follows exactly from the logits of PEFT's own models.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_run import Listener, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM

from raywarp.cli import main
from raywarp.config.schema import Config, ConfigError
from raywarp.front_stage import front
from raywarp.planning.inputs import prepare
from raywarp.report.data import report_data
from raywarp.run.folder import Run
from raywarp.storage import sealed
from raywarp.warp import train

TEMPERATURE = 0.7
ETAS = [0, 0.5, 1, 1.5]


def settings(project: Path, model: Path, out: str, **changes: Any) -> Config:
    own: dict[str, Any] = {
        "warp": {"steps": 3, "iterations": 2},
        "rollout": {"max_new_tokens": 1, "temperature": TEMPERATURE},
        "front": {"etas": ETAS, "tracked_prompts": 3, "choose": {"eta": 0.5}},
    }
    for section, values in changes.items():
        own[section] = {**own.get(section, {}), **values}
    return tiny_config(project, model, project / out, **own)


def make_adapter(model: Path, folder: Path, seed: int, **lora: Any) -> str:
    """An adapter as PEFT writes it, with random factors that show in the logits."""
    torch.manual_seed(seed)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **lora))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    adapted.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def adapters(project: Path, tiny_llama: Path) -> list[str]:
    """Of unequal targets, ranks and scalings."""
    return [
        make_adapter(
            tiny_llama, project / "a", 1, r=2, lora_alpha=3, target_modules=["q_proj", "v_proj"]
        ),
        make_adapter(
            tiny_llama,
            project / "b",
            2,
            r=4,
            lora_alpha=4,
            use_rslora=True,
            target_modules=["v_proj", "down_proj"],
        ),
    ]


@pytest.fixture(scope="module")
def measured(ray_cluster: Any, project: Path, tiny_llama: Path, adapters: list[str]) -> Run:
    config = settings(project, tiny_llama, "front")
    return front(adapters, config, lambdas=[0.5, 1], display=Listener())


@pytest.fixture(scope="module")
def trained(ray_cluster: Any, project: Path, tiny_llama: Path) -> Run:
    return train(settings(project, tiny_llama, "trained"), Listener())


def points(run: Run) -> dict[str, dict[str, Any]]:
    return {point["name"]: point for point in run.front()["points"]}


def kl_of(project: Path, model: Path, change: Callable[[Any], Any]) -> float:
    """Return the mean KL to the base over the held-out prompts, from the logits of two models."""
    prompts = prepare(settings(project, model, "none")).prompts.held_out[:2]
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = [_log_probs(base, prompt.token_ids) for prompt in prompts]
        other = change(base).eval()
        ours = [_log_probs(other, prompt.token_ids) for prompt in prompts]
    kls = [float((p.exp() * (p - q)).sum()) for p, q in zip(ours, theirs, strict=True)]
    return sum(kls) / len(kls)


def _log_probs(model: Any, tokens: Any) -> Tensor:
    logits: Tensor = model(torch.tensor([list(tokens)])).logits[0, -1].double()
    return (logits / TEMPERATURE).log_softmax(-1)


def dense_changes(model: Path, adapter: str) -> dict[str, Tensor]:
    """Return the change of each weight that PEFT makes when it merges an adapter."""
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    before = {name: weight.double().clone() for name, weight in base.state_dict().items()}
    merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    after = merged.state_dict()
    return {name: after[name].double() - weight for name, weight in before.items()}


def slerp_of(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The weights of SLERP at ½, as Ramé et al. write it down."""
    angle = torch.arccos(x @ y / (x.norm() * y.norm()))
    share = float(torch.sin(angle / 2) / torch.sin(angle))
    return share, share


def karcher_of(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The weights of the bisector of two directions, of the mean of their lengths."""
    length = (x.norm() + y.norm()) / 2 / (x / x.norm() + y / y.norm()).norm()
    return float(length / x.norm()), float(length / y.norm())


def averaged(
    a: dict[str, Tensor], b: dict[str, Tensor], weights: Callable[[Tensor, Tensor], Any]
) -> dict[str, Tensor]:
    """A mean on the sphere, block by block."""
    found = {}
    for block in ("layers.0.", "layers.1."):
        names = [name for name in a if block in name]
        x, y = (torch.cat([own[name].flatten() for name in names]) for own in (a, b))
        first, second = weights(x, y)
        found |= {name: first * a[name] + second * b[name] for name in names}
    return found


def add_to(model: Any, changes: dict[str, Tensor], eta: float) -> Any:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in changes:
                weight += (eta * changes[name]).float()
    return model


def test_each_point_is_measured_on_the_policy_that_its_name_says(
    measured: Run, project: Path, tiny_llama: Path, adapters: list[str]
) -> None:
    found = points(measured)
    assert list(found) == [
        *("sft", "a", "b", "lerp", "karcher", "slerp λ 0.5", "slerp λ 1", "liti 0.5", "slerp"),
        "liti 1.5",
    ]
    for name, place in zip("ab", adapters, strict=True):
        exact = kl_of(project, tiny_llama, lambda m, own=place: PeftModel.from_pretrained(m, own))
        assert exact > 0.01
        assert found[name]["kl"] == pytest.approx(exact, rel=1e-4)
    a, b = (dense_changes(tiny_llama, place) for place in adapters)
    merged = averaged(a, b, slerp_of)
    for name, eta in (("liti 0.5", 0.5), ("slerp", 1.0), ("liti 1.5", 1.5), ("slerp λ 0.5", 1.0)):
        exact = kl_of(project, tiny_llama, lambda m, own=eta: add_to(m, merged, own))
        assert found[name]["kl"] == pytest.approx(exact, rel=1e-3), name
    plain = {name: (a[name] + b[name]) / 2 for name in a}
    exact = kl_of(project, tiny_llama, lambda m: add_to(m, plain, 1.0))
    assert found["lerp"]["kl"] == pytest.approx(exact, rel=1e-3)
    assert found["slerp λ 1"]["kl"] == pytest.approx(found["b"]["kl"], rel=1e-3)
    bisector = averaged(a, b, karcher_of)
    exact = kl_of(project, tiny_llama, lambda m: add_to(m, bisector, 1.0))
    assert found["karcher"]["kl"] == pytest.approx(exact, rel=1e-3)


def test_an_init_is_where_the_task_vectors_start(
    ray_cluster: Any, project: Path, tiny_llama: Path, adapters: list[str]
) -> None:
    """The average is of what the adapters have changed since the init, and the init stays in it."""
    modules = ["q_proj", "v_proj"]
    init = make_adapter(tiny_llama, project / "init", 3, r=3, lora_alpha=3, target_modules=modules)
    config = settings(project, tiny_llama, "from-init", front={"ceiling_completions": 0})
    found = points(front(adapters, config, init=init, display=Listener()))
    a, b, start = (dense_changes(tiny_llama, place) for place in (*adapters, init))
    vectors = [{name: own[name] - start[name] for name in own} for own in (a, b)]
    mean = averaged(*vectors, slerp_of)
    merged = {name: start[name] + mean.get(name, 0) for name in start}
    for name, eta in (("liti 0.5", 0.5), ("slerp", 1.0)):
        exact = kl_of(project, tiny_llama, lambda m, own=eta: add_to(m, merged, own))
        assert found[name]["kl"] == pytest.approx(exact, rel=1e-3), name
    apart = kl_of(project, tiny_llama, lambda m: add_to(m, averaged(a, b, slerp_of), 1.0))
    assert abs(found["slerp"]["kl"] / apart - 1) > 0.01


def test_the_chosen_adapter_is_the_point(measured: Run, project: Path, tiny_llama: Path) -> None:
    place = str(measured.folder / "adapter")
    exact = kl_of(project, tiny_llama, lambda m: PeftModel.from_pretrained(m, place))
    assert points(measured)["liti 0.5"]["kl"] == pytest.approx(exact, rel=1e-4)


def test_card_page_and_front_name_the_adapters(measured: Run, adapters: list[str]) -> None:
    told = measured.front()
    assert [row["place"] for row in told["adapters"]] == adapters
    card = " ".join((measured.folder / "adapter" / "README.md").read_text().split())
    assert "on the front of 2 adapters" in card
    assert adapters[1] in card
    assert "steps" not in card.partition("## The front")[0]
    page = report_data(str(measured.folder))
    assert page["missing"] == []
    assert page["state"]["word"] == "finished"
    assert page["front"]["ceiling"]["said"]
    assert page["geometry"][0]["merge"]["kl_cosine"] is not None
    assert (measured.folder / "front.png").is_file()


def test_nothing_is_measured_twice(
    measured: Run, project: Path, tiny_llama: Path, adapters: list[str]
) -> None:
    """Without front.json, all points come from the store; a new η is the only one measured."""
    before, kept = points(measured), sorted((measured.folder / "points").iterdir())
    config = settings(project, tiny_llama, "front")
    (measured.folder / "front.json").unlink()
    again = front(adapters, config, lambdas=[0.5, 1], display=Listener())
    assert points(again) == before
    assert sorted((again.folder / "points").iterdir()) == kept
    more = settings(project, tiny_llama, "front", front={"etas": [*ETAS, 0.25]})
    shown = Listener()
    added = points(front(adapters, more, lambdas=[0.5, 1], display=shown))
    assert {name: added[name] for name in before} == before
    assert added.keys() - before.keys() == {"liti 0.25"}
    assert len(list((again.folder / "points").iterdir())) == len(kept) + 1


def test_shares_of_adapters(
    measured: Run, project: Path, tiny_llama: Path, adapters: list[str]
) -> None:
    """By name or one number each; the merge is that of the same λ, and the only one is chosen."""
    choose = {"etas": ETAS, "choose": {"eta": 1.0}}
    config = settings(project, tiny_llama, "shares", front=choose)
    config = config.model_copy(update={"store": str(measured.folder)})
    run = front(adapters, config, lambdas=[0.25], weights=[{"a": 3, "b": 1}], display=Listener())
    found = points(run)
    share = found["a 0.75 b 0.25"]
    assert share["weights"] == {"a": 0.75, "b": 0.25}
    same = ("reward", "kl", "length", "distinct_2")
    assert [share[key] for key in same] == [found["slerp λ 0.25"][key] for key in same]
    assert run.front()["chosen"] == "a 0.75 b 0.25"
    numbers = front(adapters, config, lambdas=[0.25], weights=[[3, 1]], display=Listener())
    assert points(numbers) == found


def test_a_finished_front_starts_no_actor(
    measured: Run, project: Path, tiny_llama: Path, adapters: list[str], monkeypatch: Any
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("an actor was started")

    config = settings(project, tiny_llama, "front", front={"etas": [*ETAS, 0.25]})
    front(adapters, config, lambdas=[0.5, 1], display=Listener())
    monkeypatch.setattr("raywarp.training.session.Session.start", refuse)
    front(adapters, config, lambdas=[0.5, 1], display=Listener())


def test_a_finished_run_measured_anew_has_the_same_front(
    trained: Run, project: Path, tiny_llama: Path
) -> None:
    config = settings(project, tiny_llama, "anew")
    run = front([str(trained.folder)], config, display=Listener())
    anew, own = points(run), points(trained)
    assert {name: anew[name] for name in own} == own
    assert anew.keys() - own.keys() == {"karcher"}
    cards = [(one.folder / "adapter/README.md").read_text() for one in (run, trained)]
    assert cards[0].partition("## The front")[0] == cards[1].partition("## The front")[0]


def test_the_command_takes_adapters_options_and_keys(
    ray_cluster: Any,
    project: Path,
    tiny_llama: Path,
    adapters: list[str],
    monkeypatch: Any,
    capsys: Any,
) -> None:
    """The base comes from the adapters; the front of one adapter is its line."""
    monkeypatch.chdir(project)
    monkeypatch.syspath_prepend(str(project))
    words = ["front", adapters[0], "rollout.engine=transformers", "rollout.max_new_tokens=1"]
    words += ["front.prompts=2", "dtype=float32", "front.ceiling_completions=0", "--quiet"]
    options = ["--out", "one", "--prompts", "prompts.jsonl", "--reward", "count_good:score"]
    assert main([*words, *options, "--etas", "0,.5"]) == 0, capsys.readouterr().err
    assert b"liti 0.5" in (project / "one" / "report.html").read_bytes()
    told = json.loads((project / "one" / "front.json").read_text())
    assert [point["name"] for point in told["points"]] == ["sft", "liti 0.5", "a"]
    assert f'"{tiny_llama}"' in (project / "one/adapter/adapter_config.json").read_text()


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("lambdas", "lambdas lie between two adapters, and there are 1"),
        ("weights", "nothing has the name c; there are a, b"),
        ("nan", "holds NaN or infinity"),
        ("base", "is an adapter of"),
        ("mixed", "is a run, and stands beside other adapters"),
        ("out of a run", "holds a run of `raywarp train`"),
        ("out of others", "holds the front of"),
        ("train", "holds a front of `raywarp front`"),
        ("unfinished", "has finished 1 of 2 iterations"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_starts(
    case: str,
    message: str,
    measured: Run,
    trained: Run,
    project: Path,
    tiny_llama: Path,
    adapters: list[str],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    config = settings(project, tiny_llama, f"none-{case.replace(' ', '-')}")
    a, b = adapters
    monkeypatch.setattr("raywarp.training.session.Session.start", None)

    def run() -> Any:
        if case == "lambdas":
            return front([a], config, lambdas=[0.5])
        if case == "weights":
            return front(adapters, config, weights=[{"c": 1}])
        if case in ("nan", "base"):
            return front([damaged(a, tmp_path / "odd", case)], config)
        if case == "mixed":
            return front([str(trained.folder), a], config)
        if case == "out of a run":
            return front([a], settings(project, tiny_llama, "trained"))
        if case == "out of others":
            return front([b], settings(project, tiny_llama, "front"))
        if case == "train":
            return train(settings(project, tiny_llama, "front"))
        return front([unfinished(trained, tmp_path / "part")], config)

    with pytest.raises(ConfigError, match=message):
        run()
    assert not Path(config.out).exists()


def damaged(adapter: str, folder: Path, how: str) -> str:
    """A copy of an adapter with a NaN, or that names another base."""
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    told = json.loads((Path(adapter) / "adapter_config.json").read_text())
    tensors = load_file(Path(adapter) / "adapter_model.safetensors")
    if how == "nan":
        next(iter(tensors.values()))[0, 0] = torch.nan
    else:
        told["base_model_name_or_path"] = "someone/another-base"
    (folder / "adapter_config.json").write_text(json.dumps(told))
    save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def unfinished(run: Run, folder: Path) -> str:
    """A copy of a run as it was after its first iteration."""
    (folder / "iterations").mkdir(parents=True)
    sealed.write_bytes(folder / "config.yaml", (run.folder / "config.yaml").read_bytes())
    (folder / "iterations" / "1").symlink_to(run.folder / "iterations" / "1")
    return str(folder)
