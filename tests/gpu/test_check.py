"""The GPU check's twin on the CPU: its parts run, and see what is wrong."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECK = Path(__file__).parent / "check.py"


def twin(*options: str) -> dict[str, Any]:
    """Return the check's last line."""
    command = [sys.executable, str(CHECK), "--device", "cpu", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_the_twin_on_the_cpu_passes() -> None:
    told = twin()
    parts = ("trainer", "exact", "nf4", "sampler", "run")
    assert told["ok"] == dict.fromkeys(parts, True)
    figures = told["figures"]
    assert figures["exact"]["float32: slope"] == pytest.approx(1, abs=1e-3)
    assert figures["exact"]["bfloat16: slope"] == pytest.approx(1, abs=0.1)
    assert figures["nf4"]["float32: slope"] == pytest.approx(1, abs=1e-3)
    assert figures["nf4"]["float32: gap, nats per token"] < 1e-4
    assert figures["sampler"]["slope after the swaps"] == pytest.approx(1, abs=0.1)
    assert figures["run"]["steps"] == 24


@pytest.mark.slow
def test_the_twin_in_float16_is_closer() -> None:
    """vLLM's engine and the trainer. Three more bits are a factor of eight."""
    told = twin("--dtype", "float16", "--parts", "trainer", "sampler")
    assert told["ok"] == dict.fromkeys(("trainer", "sampler"), True)
    figures = told["figures"]
    assert figures["trainer"]["tiny: loss scale of the last step"] >= 1
    assert figures["sampler"]["slope after the swaps"] == pytest.approx(1, abs=0.01)
