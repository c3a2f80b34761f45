"""Tests that docs/python.md has every public name with its signature, and that its examples run."""

import ast
import inspect
import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import random_delta

import raywarp
from raywarp.adapters.peft import save_peft
from raywarp.algorithm.factors import Factors
from raywarp.config.rewards import RewardConfig
from raywarp.rewards.process import FunctionProcesses, Source
from raywarp.rewards.reward import Batch
from raywarp.rewards.score import check_call

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
# sections whose examples need no training
RUN = (
    "Averages",
    "From folder to folder",
    "Configurations",
)


def signature(name: str) -> str:
    """As the page has it: without modules, and of a class what makes one, or (an exception, the
    configuration) what it derives from.
    """
    thing = getattr(raywarp, name)
    if isinstance(thing, type) and (
        issubclass(thing, BaseException) or hasattr(thing, "model_fields")
    ):
        return f"class {name}({', '.join(base.__name__ for base in thing.__bases__)})"
    text = re.sub(r"(?:[A-Za-z_]\w*\.)+(?=[A-Za-z_])", "", f"{name}{inspect.signature(thing)}")
    return (
        text.replace("<built-in function print>", "print")
        .replace("<factory>", "{}")
        .removesuffix(" -> None" if isinstance(thing, type) else "")
    )


def sections() -> dict[str, str]:
    parts = re.split(r"^## (.*)$", PAGE.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def examples(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_every_public_name_has_its_signature_below_its_heading() -> None:
    entries = dict(re.findall(r"^### `(\w+)`\n\n`([^`]*)`$", PAGE.read_text(), re.MULTILINE))
    assert entries == {name: signature(name) for name in raywarp.__all__}


def save(name: str, *seeds: int) -> None:
    """An adapter whose factors are those of the seeds, side by side."""
    delta = raywarp.add(*(random_delta(seed) for seed in seeds))
    save_peft(delta.map(lambda _, f: Factors(f.B.float(), f.A.float())), name)


@pytest.mark.parametrize("section", RUN)
def test_examples_run(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save("sft-lora", 0)
    save("adapter-a", 0, 1)
    save("adapter-b", 0, 2)
    found = examples(sections()[section])
    assert found
    names: dict[str, Any] = {}
    for code in found:
        exec(compile(code, str(PAGE), "exec"), names)


def test_the_other_examples_are_python_that_uses_what_there_is() -> None:
    others = [
        code for name, text in sections().items() if name not in RUN for code in examples(text)
    ]
    assert others
    for code in others:
        compile(code, str(PAGE), "exec")
        for name in re.findall(r"\braywarp\.(\w+)", code):
            assert name in raywarp.__all__, name


def test_the_reward_function_of_your_own() -> None:
    names: dict[str, Any] = {}
    code, judge = examples(PAGE.with_name("your-own.md").read_text())
    exec(code, names)
    check_call("my_rewards:score", names["score"], ["reference", "other"])
    assert judge.startswith("# judge.py\n")
    assert names["score"](["a", "b"], ["x y", "z"], reference=["y x q", "a"], other=[1, 2]) == [
        2.0,
        0.0,
    ]


class Judge(BaseHTTPRequestHandler):
    """A server with OpenAI's interface. It rates an answer by its last word."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        (message,) = asked["messages"]
        text = message["content"].rpartition(" ")[2]
        choice = {"index": 0, "message": {"role": "assistant", "content": text}}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"]}
        body = json.dumps({**reply, "choices": [choice | {"finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def test_the_judge_of_your_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai")
    (tmp_path / "judge.py").write_text(examples(PAGE.with_name("your-own.md").read_text())[1])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    monkeypatch.setenv("JUDGE_MODEL", "any")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = {"function": "judge:score", "retry_on": ["openai.APIConnectionError"]}
    processes = FunctionProcesses(Source.here(RewardConfig(**settings)))
    try:
        batch = Batch(["q"] * 4, ["I say 7", "about 2.5", "no idea", "it is 99"])
        assert processes.score(batch) == [0.7, 0.25, None, 1.0]
    finally:
        processes.close()
        server.shutdown()


def test_what_the_page_says_of_averages() -> None:
    """SLERP of two at λ = 1/2 is LERP / cos(Ω/2), in every block."""
    a, b = random_delta(1), random_delta(2)
    angles = {block: own["angles"][0] for block, own in raywarp.geometry([a, b]).items()}
    slerp, lerp = raywarp.slerp([a, b]), raywarp.lerp([a, b])
    for block, modules in a.blocks().items():
        longer = 1 / torch.cos(torch.deg2rad(torch.tensor(angles[block], dtype=torch.float64)) / 2)
        for module in modules:
            torch.testing.assert_close(
                slerp.factors[module].B @ slerp.factors[module].A,
                longer * lerp.factors[module].B @ lerp.factors[module].A,
            )


def test_type_checkers_and_python_know_the_same_names() -> None:
    stub = ast.parse((Path(raywarp.__file__).parent / "__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    found = {
        alias.asname: str(node.module).removeprefix("raywarp.")
        for node in imports
        for alias in node.names
    }
    assert found == raywarp._WHERE


def test_every_error_is_public() -> None:
    """But those that never leave the module that raises them, or its caller."""
    sources = (path.read_text() for path in Path(raywarp.__file__).parent.rglob("*.py"))
    errors = {
        name
        for source in sources
        for name in re.findall(r"^class (\w+Error)\(", source, re.MULTILINE)
    }
    inner = {"BrokenProcessError", "StrictYamlError", "TensorFileError", "TimeLimitError"}
    assert errors - inner == {name for name in raywarp.__all__ if name.endswith("Error")}
