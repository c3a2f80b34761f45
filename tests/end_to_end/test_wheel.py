"""The wheel holds every package and every file of the page: a report is written from it alone."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import raywarp

SOURCE = Path(raywarp.__file__).parent
RUN = Path(__file__).parent / "interrupted_run.tar.gz"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since setuptools leaves its work beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=SOURCE.parent, capture_output=True, text=True, check=True
    )
    for name in filter(None, files.stdout.split("\0")):
        if name.startswith("raywarp/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            copy = folder / "source" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((SOURCE.parent / name).read_bytes())
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    built = subprocess.run(
        [sys.executable, "-c", build], cwd=folder / "source", capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    return folder / built.stdout.split()[-1]


def test_it_holds_every_file_of_the_package(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("raywarp/")}
    written = {
        path.relative_to(SOURCE.parent).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert held == written
    assert {"raywarp/py.typed", "raywarp/report/assets/page.js"} <= held


def test_a_report_from_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """With this environment's packages, but without the raywarp that is installed in it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    zipfile.ZipFile(wheel).extractall(where)
    with tarfile.open(RUN) as archive:
        archive.extractall(tmp_path, filter="data")
    environment = {**os.environ, "PYTHONPATH": sysconfig.get_path("purelib")}
    command = [
        python,
        "-c",
        "import sys, raywarp; print(raywarp.__file__); from raywarp.cli import main; main()",
        "report",
        "run",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{where}/raywarp/__init__.py\n")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "096e64f68bb40a42" in page
