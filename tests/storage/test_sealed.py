"""Tests of a run's folder: sealed files, fingerprints, keys, seeds, and damage."""

import json
from pathlib import Path

import pytest
from conftest import random_delta

from raywarp import identity
from raywarp.algorithm.factors import Factors
from raywarp.config.load import parse_config
from raywarp.config.schema import ConfigError
from raywarp.identity import batch_indices, derive_seed
from raywarp.run.folder import Run
from raywarp.run.keys import policy_keys
from raywarp.storage import sealed


def test_a_folder_counts_only_with_its_manifest_and_every_byte(tmp_path: Path) -> None:
    folder = tmp_path / "policy"
    folder.mkdir()
    (folder / "weights").write_bytes(b"12345")
    (folder / "metrics").write_text("{}")
    assert not sealed.is_sealed(folder)
    sealed.seal(folder)
    assert sealed.is_sealed(folder)
    for damage in (b"1234", b"12346", b""):
        (folder / "weights").write_bytes(damage)
        assert not sealed.is_sealed(folder)
    (folder / "weights").write_bytes(b"12345")
    assert sealed.is_sealed(folder)
    for manifest in ("{", "[]", "{}", '{"weights": 3}', '{"missing": {"size": 1, "sha256": ""}}'):
        (folder / sealed.MANIFEST).write_text(manifest)
        assert not sealed.is_sealed(folder)
    sealed.remove(folder)
    assert not folder.exists()


def test_replacing_a_file_leaves_no_litter(tmp_path: Path) -> None:
    path = tmp_path / "a" / "file.json"
    sealed.write_json(path, {"x": 1})
    sealed.write_json(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 2}
    assert list(path.parent.iterdir()) == [path]


def test_a_line_cut_off_by_a_kill_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert sealed.read_jsonl(path) == []
    sealed.append_jsonl(path, {"step": 1})
    sealed.append_jsonl(path, {"step": 2})
    path.write_text(path.read_text()[:-4])
    assert sealed.read_jsonl(path) == [{"step": 1}]


def test_fingerprints_are_of_contents(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "notes.txt").write_text(name)
    one, two = (identity.folder_fingerprint(tmp_path / name, ["*.json"]) for name in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "config.json").write_text("{} ")
    assert identity.folder_fingerprint(tmp_path / "two", ["*.json"]) != one
    assert (
        identity.content_key({"a": 1, "b": 2})
        == identity.content_key({"b": 2, "a": 1})
        != identity.content_key({"a": 1, "b": 3})
    )


def test_keys_change_with_what_decides_a_policy_and_with_nothing_else() -> None:
    inputs = {
        "base": "b",
        "prompts": "p",
        "reward": "r",
        "dtype": "float32",
        "threads": 1,
        "adapter": "merged",
    }
    keys = policy_keys(parse_config({}), inputs, 1, "sft")
    assert len(set(keys)) == 2
    for same in (
        {"cluster": {"gpus_per_policy": 0.5}},
        {"rollout": {"workers": 4}},
        {"out": "elsewhere"},
        {"out": "s3://bucket/run", "store": "elsewhere"},
        {"checkpoint_every": 3, "loggers": ["tensorboard"]},
        {"front": {"prompts": 7}},
        {"optim": {"max_tokens_per_microbatch": 512, "gradient_checkpointing": True}},
        {"reward": {"timeout_seconds": 5, "batch_size": 3}},
        {"warp": {"liti_rate": 0.9}},  # matters from the next iteration's init on
        {"warp": {"iterations": 7}},
    ):
        assert policy_keys(parse_config(same), inputs, 1, "sft") == keys
    assert policy_keys(parse_config({"warp": {"policies": 4}}), inputs, 1, "sft")[:2] == keys
    changed = [
        policy_keys(parse_config({"warp": {"ema_rate": 0.06}}), inputs, 1, "sft"),
        policy_keys(parse_config({"seed": 1}), inputs, 1, "sft"),
        policy_keys(parse_config({"lora": {"rank": 8}}), inputs, 1, "sft"),
        policy_keys(parse_config({"rollout": {"temperature": 1.0}}), inputs, 1, "sft"),
        policy_keys(parse_config({}), {**inputs, "reward": "retrained"}, 1, "sft"),
        policy_keys(parse_config({}), {**inputs, "prompts": "other"}, 1, "sft"),
        policy_keys(parse_config({}), inputs, 2, "sft"),
        policy_keys(parse_config({}), inputs, 1, "another init"),
    ]
    assert len({key for some in [keys, *changed] for key in some}) == 2 * 9


def test_a_record_notices_every_changed_byte(tmp_path: Path) -> None:
    path = tmp_path / "front.json"
    assert sealed.read_record(path) is None
    sealed.write_record(path, {"points": [1, 2.5], "key": "a"})
    assert sealed.read_record(path) == {"points": [1, 2.5], "key": "a"}
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in (0, 4):
            path.write_bytes(
                content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]
            )
            with pytest.raises(sealed.DamagedError):
                sealed.read_record(path)
    path.write_bytes(content)
    sealed.write_record(path, {"kl": 18.944862365722656})
    path.write_bytes(path.read_bytes().replace(b"656", b"657"))  # the same float
    with pytest.raises(sealed.DamagedError):
        sealed.read_record(path)


def test_a_row_after_a_cut_off_line_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"ste')
    sealed.append_jsonl(path, {"step": 2})
    path.write_bytes(path.read_bytes() + b'\xff{"step": 3}\n[1]\n')
    assert sealed.read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_metrics_are_made_anew_from_the_policies_folders(tmp_path: Path) -> None:
    said: list[str] = []
    run = Run(tmp_path, say=said.append)
    rows = [
        {"key": f"k{i}", "iteration": i, "policy": 1, "step": t} for i in (1, 2) for t in (0, 1)
    ]
    for i in (1, 2):
        sealed.write_jsonl(
            run.policy_folder(f"k{i}") / "metrics.jsonl",
            [row for row in rows if row["iteration"] == i],
        )
    stray = [
        {"key": "k0", "iteration": 3},
        {"key": "other", "iteration": 1, "policy": 1, "step": 0},
        {"step": 1},
    ]
    sealed.write_jsonl(run.metrics_file, [*stray, *rows])
    run.restore_rows(1, 2, ["k1"])
    assert run.metrics() == rows
    assert said == []
    sealed.write_jsonl(run.metrics_file, [rows[0], {**rows[2], "step": 7}])
    for i in (1, 2):
        run.restore_rows(i, 2, [f"k{i}"])
    assert run.metrics() == rows
    assert [f"iteration {i}" in line for i, line in zip((1, 2), said, strict=True)] == [True, True]


def test_a_damaged_configuration_is_not_taken_for_another_runs(tmp_path: Path) -> None:
    config, said = parse_config({"out": str(tmp_path / "run")}), list[str]()
    run = Run.open(config)
    run.save_config(config)
    run.add_metrics({"step": 0})
    path = run.folder / "config.yaml"
    content = path.read_bytes()
    for damaged in (
        content[: len(content) // 2],
        b"",
        content.replace(b"steps: 40", b"steps: 41"),
        b"\xff" + content,
        None,
    ):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        Run.open(config, said.append).save_config(config)
        assert str(path) in said.pop()
        assert path.read_bytes() == content
    assert Run.open(config, said.append) == run
    assert not said


def test_one_folder_one_run(tmp_path: Path) -> None:
    config = parse_config({"out": str(tmp_path / "run")})
    run = Run.open(config)
    assert not run.folder.exists()  # opening writes nothing
    run.save_config(config)
    Run.open(
        parse_config(
            {"out": str(tmp_path / "run"), "front": {"prompts": 5}, "cluster": {"threads": 3}}
        )
    )
    with pytest.raises(
        ConfigError,
        match=(
            r"different run \(warp.steps is 40 there and 41 here, optim.lr is 0.0005 there and 0.1"
            r" here\)"
        ),
    ):
        Run.open(
            parse_config(
                {"out": str(tmp_path / "run"), "warp": {"steps": 41}, "optim": {"lr": 0.1}}
            )
        )


def test_resuming_replaces_a_policys_rows(tmp_path: Path) -> None:
    run = Run(tmp_path)
    for key, step in (("a", 0), ("b", 0), ("a", 1), ("a", 2)):
        run.add_metrics({"key": key, "step": step})
    run.set_policy_rows("a", {"metrics.jsonl": [{"key": "a", "step": 0}]})
    run.add_metrics({"key": "a", "step": 1})
    assert sorted((row["key"], row["step"]) for row in run.metrics()) == [
        ("a", 0),
        ("a", 1),
        ("b", 0),
    ]


def test_an_iterations_folder(tmp_path: Path) -> None:
    run, delta = Run(tmp_path), random_delta(1).map(lambda _, f: Factors(f.B.float(), f.A.float()))
    run.save_iteration(1, delta, delta, ["k1", "k2"], [delta, delta])
    assert json.loads((tmp_path / "iterations/1/policies.json").read_text()) == [
        "policies/k1",
        "policies/k2",
    ]
    blocks = json.loads((tmp_path / "iterations/1/geometry.json").read_text())
    assert blocks["model.layers.0"]["angles"][0] == pytest.approx(0, abs=1e-3)


def test_prompts_come_without_replacement_and_from_the_seed() -> None:
    steps = [batch_indices(10, 4, step, seed=1) for step in range(5)]
    order = [index for step in steps for index in step]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:]
    assert steps[2] == batch_indices(10, 4, 2, seed=1) != batch_indices(10, 4, 2, seed=2)
    assert len(batch_indices(3, 8, 0, seed=1)) == 8  # more than there are: the next epoch's


def test_seeds_are_of_their_purpose() -> None:
    seeds = {
        derive_seed(0, "sampling", i, m, t, n)
        for i in range(2)
        for m in range(3)
        for t in range(10)
        for n in range(16)
    }
    assert len(seeds) == 2 * 3 * 10 * 16
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert derive_seed(0, "a") == derive_seed(0, "a") != derive_seed(1, "a")
