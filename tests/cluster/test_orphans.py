"""Tests that nothing is left of a driver's own Ray when the driver is killed, however early."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from killing import survivors

pytestmark = pytest.mark.slow

DRIVER = (
    "from raywarp.cluster.runtime import start_ray; start_ray(); print('started', flush=True);"
    " input()"
)


def start(tmp_path: Path) -> "subprocess.Popen[str]":
    environment = {**os.environ, "RAY_ADDRESS": "local"}
    with (tmp_path / "stderr").open("w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", DRIVER],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )


def is_agent(process: psutil.Process) -> bool:
    try:
        return process.name() != "raylet" and "agent" in " ".join(process.cmdline()).lower()
    except psutil.Error:
        return False


@pytest.mark.parametrize("moment", ["while Ray starts", "when Ray has started"])
def test_nothing_is_left_of_a_killed_drivers_ray(tmp_path: Path, moment: str) -> None:
    """At the first moment the raylet has just made its agents, and the driver has not come back
    from ray.init.
    """
    driver = start(tmp_path)
    process = psutil.Process(driver.pid)
    if moment == "when Ray has started":
        assert driver.stdout is not None
        assert driver.stdout.readline() == "started\n", (tmp_path / "stderr").read_text()
    else:
        while sum(map(is_agent, process.children(recursive=True))) < 2:
            assert driver.poll() is None, (tmp_path / "stderr").read_text()
            time.sleep(0.02)
    left = [one.pid for one in process.children(recursive=True)]
    driver.kill()
    driver.communicate()
    assert not survivors(left, 20)


def test_a_driver_that_ends_by_itself_leaves_nothing(tmp_path: Path) -> None:
    driver = start(tmp_path)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "started\n", (tmp_path / "stderr").read_text()
    left = [one.pid for one in psutil.Process(driver.pid).children(recursive=True)]
    driver.communicate("\n", timeout=60)
    assert driver.returncode == 0
    assert not survivors(left, 20)
