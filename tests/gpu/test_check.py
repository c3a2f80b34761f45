"""The GPU check's twin on the CPU: its parts run, and see what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).parent / "check.py"


@pytest.mark.slow
def test_the_twin_on_the_cpu_passes() -> None:
    done = subprocess.run(
        [sys.executable, str(CHECK), "--device", "cpu"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["ok"] == dict.fromkeys(("trainer", "exact", "sampler", "run"), True)
    figures = told["figures"]
    assert figures["exact"]["float32: slope"] == pytest.approx(1, abs=1e-3)
    assert figures["exact"]["bfloat16: slope"] == pytest.approx(1, abs=0.1)
    assert figures["sampler"]["slope after the swaps"] == pytest.approx(1, abs=0.1)
    assert figures["run"]["steps"] == 24
