"""Tests of how reward functions are found and called: by the names of their parameters."""

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raywarp.config import callables
from raywarp.config.load import load_config
from raywarp.config.rewards import RewardConfig
from raywarp.config.schema import ConfigError
from raywarp.rewards.functions import call_of, load_function
from raywarp.rewards.reward import Batch, Reward
from raywarp.rewards.score import reward_fingerprint

GOT: dict[str, Any] = {}


def trl_order(completions, prompts, **kwargs):
    return GOT.update(kwargs, prompts=prompts, completions=completions) or [1.0]


def trl_documented(completions, **kwargs):
    return GOT.update(kwargs, completions=completions) or [1.0]


def trl_truth(completions, answer=None, missing="default", **kwargs):
    return GOT.update(kwargs, completions=completions, answer=answer, missing=missing) or [1.0]


def by_keyword(*, prompts, completions, **kwargs):
    return GOT.update(kwargs, prompts=prompts, completions=completions) or [1.0]


def by_position(completions, prompts, /, answer):
    return GOT.update(prompts=prompts, completions=completions, answer=answer) or [1.0]


def of_texts(prompts, texts, **columns):
    return GOT.update(columns, prompts=prompts, completions=texts) or [1.0]


def of_tokens(completion_ids, **columns):
    return GOT.update(columns, completion_ids=completion_ids) or [1.0]


@functools.wraps(trl_order)
def wrapped(*args, **kwargs):
    return trl_order(*args, **kwargs)


class Judge:
    def __call__(self, completions, prompts, **columns):
        return trl_order(completions, prompts, **columns)


@pytest.mark.parametrize(
    "function",
    [
        *(trl_order, trl_documented, trl_truth, by_keyword, by_position, of_texts, of_tokens),
        *(wrapped, functools.partial(trl_order, extra=3), Judge(), Judge().__call__),
    ],
)
def test_every_parameter_gets_what_its_name_says(function: Callable[..., Any]) -> None:
    GOT.clear()
    batch = Batch(["a prompt"], ["a completion"], {"answer": ["x"]}, [[5, 6]])
    assert Reward("mine:score", function).raw(batch) == [1.0]
    said = {
        "prompts": ["a prompt"],
        "completions": ["a completion"],
        "completion_ids": [[5, 6]],
        "answer": ["x"],
        "extra": 3,
        "missing": "default",
    }
    assert {name: said[name] for name in GOT} == GOT
    assert {"answer"} < set(GOT)


def one_text(prompt, completion, **columns):
    return [0.0]


def unnamed(p, c, **columns):
    return [0.0]


def of_verl(data_source, solution_str, ground_truth, extra_info=None):
    return 0.0


def of_both(prompts, texts, **columns):
    return [0.0]


def no_column(prompts, completions):
    return [0.0]


def misspelt(prompts, completion, **columns):
    return [0.0]


def by_unknown_position(row, prompts, completions, /, **columns):
    return [0.0]


def generator(prompts, completions, **columns):
    yield 0.0


@pytest.mark.parametrize(
    ("function", "columns", "said"),
    [
        (one_text, ["answer"], "its parameter 'prompt' is none of .* lists of a whole batch"),
        (unnamed, ["answer"], "its parameter 'p' is none of prompts, completions"),
        (of_verl, ["data_source", "ground_truth"], "'solution_str' is none of"),
        (of_both, ["texts"], "may stand for the completions or .* name the completions"),
        (no_column, ["answer"], r"not take the column answer; add \*\*columns to take any"),
        (misspelt, [], "did you mean 'completions'"),
        (by_unknown_position, ["answer"], "its parameter 'row' is none of"),
        (lambda **columns: [0.0], ["x"], None),
        (lambda: [0.0], [], "it takes no completions"),
        (generator, [], "is a generator"),
        (Judge, [], "is a class"),
        (max, [], "does not tell its parameters"),
    ],
)
def test_what_is_not_plain_is_refused_with_the_remedy(
    function: Callable[..., Any], columns: list[str], said: str | None
) -> None:
    if said is None:
        return call_of("mine:score", function, columns) and None
    with pytest.raises(ConfigError, match=f"(?s)'mine:score' .*{said}"):
        call_of("mine:score", function, columns)


def about_messages(
    completions: list[list[dict[str, str]]], prompts: Any, **columns: Any
) -> list[float]:
    return [float(len(c[0]["content"]) + len(p)) for c, p in zip(completions, prompts, strict=True)]


def test_messages_are_given_where_the_function_or_the_key_asks_for_them() -> None:
    turns = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    batch = Batch(["hello"], ["abc"], messages=[turns])
    assert Reward("mine:score", about_messages).raw(batch) == [5.0]
    assert Reward("mine:score", about_messages).raw(Batch(["hello"], ["abc"])) == [4.0]

    def plain(completions: Any, **columns: Any) -> list[float]:
        return [float(c[0]["role"] == "assistant") for c in completions]

    assert Reward("mine:score", plain, messages=True).raw(batch) == [1.0]
    with pytest.raises(RuntimeError, match="set messages: true"):
        Reward("mine:score", plain).raw(batch)


@pytest.fixture
def own_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))


def write(folder: Path, value: int) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "its_helper.py").write_text(f"VALUE = {value}.0\n")
    (folder / "its_rewards.py").write_text(
        "from its_helper import VALUE\n"
        f"def score(prompts, completions, **columns):\n    return [VALUE + {value}]\n"
    )


FRESH = (
    "from raywarp.rewards.score import reward_fingerprint\n"
    "from raywarp.config.rewards import RewardConfig\n"
    "print(reward_fingerprint(RewardConfig(function='its_rewards:score')))"
)


def test_a_second_project_of_a_process_has_its_own_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_modules: None
) -> None:
    config, seen = RewardConfig(function="its_rewards:score"), []
    for name, value in (("one", 1), ("two", 2), ("one", 1)):
        write(tmp_path / name, value)
        monkeypatch.chdir(tmp_path / name)
        assert load_function("its_rewards:score")([], ["c"]) == [2.0 * value]
        seen.append(reward_fingerprint(config))
    assert seen[0] == seen[2] != seen[1]
    fresh = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert fresh.stdout.split() == [seen[0]]
    (tmp_path / "two" / "its_helper.py").unlink()
    monkeypatch.chdir(tmp_path / "two")
    with pytest.raises(ConfigError, match="its_helper"):
        load_function("its_rewards:score")


def test_an_edited_function_is_read_again_and_an_unchanged_one_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_modules: None
) -> None:
    write(tmp_path, 1)
    monkeypatch.chdir(tmp_path)
    first = load_function("its_rewards:score")
    assert load_function("its_rewards:score") is first
    (tmp_path / "its_rewards.py").write_text(
        "def score(prompts, completions, answer):\n    return [3.0]\n"
    )
    with pytest.raises(ConfigError, match="its parameter 'answer' is none of"):
        call_of("its_rewards:score", load_function("its_rewards:score"), [])


def test_a_module_named_as_an_installed_one_does_not_replace_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_modules: None
) -> None:
    import colorsys

    write(tmp_path, 1)
    (tmp_path / "colorsys.py").write_text("")
    monkeypatch.chdir(tmp_path)
    load_function("its_rewards:score")
    assert sys.modules["colorsys"] is colorsys


class Counting:
    """An object with state, as a user's is."""

    def __init__(self, word: str):
        self.word = word

    def __call__(self, prompts: Any, completions: Any, **columns: Any) -> list[float]:
        return [float(c.count(self.word)) for c in completions]


def named(function: Any) -> str:
    return str(load_config({"reward": {"function": function}}).reward.function)


def test_a_callable_in_a_configuration_becomes_a_name_that_its_content_decides() -> None:
    assert named(trl_order) == f"{__name__}:trl_order"
    good, again, bad = (named(Counting(word)) for word in ("good", "good", "bad"))
    assert good.startswith("python:Counting@")
    assert good == again != bad
    assert load_function(bad)(["p"], ["bad bad"]) == [2.0]
    assert RewardConfig(function=Counting("good")).function == good  # type: ignore[arg-type]
    closures = [named(lambda prompts, completions, n=n: [n]) for n in (1, 2)]
    assert len({*closures}) == 2


def test_a_callable_that_another_process_gave_is_asked_for_again() -> None:
    with pytest.raises(ConfigError, match="give it again from Python, or name it as module"):
        load_function("python:Counting@0123456789abcdef")


def test_the_hash_of_a_callable_follows_all_that_it_refers_to() -> None:
    code = "LIMIT = {limit}\ndef helper(c):\n    return len(c) > LIMIT\n"
    code += "def score(prompts, completions):\n    return [helper(c) for c in completions]\n"

    def made(limit: int) -> str:
        space: dict[str, Any] = {"__name__": "__main__"}
        exec(compile(code.format(limit=limit), "<cell>", "exec"), space)
        return callables.fingerprint(space["score"])

    assert made(1) == made(1) != made(2)


def test_an_object_whose_content_cannot_be_told_is_refused() -> None:
    import threading

    counting = Counting("x")
    counting.word = threading.Lock()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="cannot be told; put the function into a module"):
        load_config({"reward": {"function": counting}})
