"""Tests of cluster/local.sh in a copied repository, with stand-ins for the machine around it.

Nothing outside tmp_path is touched.
"""

import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from conftest import installed_in

REPOSITORY = Path(__file__).parents[2]

# A project without dependencies that builds without a registry. Its folder holds the modules that
# the installation's last check imports, and the program that `local.sh quickstart` starts.
PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
[project]
name = "raywarp"
version = "0.1.0"
optional-dependencies = {cpu = [], gpu = [], test = []}
"""
BACKEND = """
import os, zipfile

def build_editable(folder, *_):
    name = "raywarp-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(os.path.join(folder, name), "w") as wheel:
        wheel.writestr("raywarp.pth", os.getcwd())
        info = "raywarp-0.1.0.dist-info/"
        extras = "".join(f"Provides-Extra: {extra}\\n" for extra in ("cpu", "gpu", "test"))
        wheel.writestr(info + "METADATA", "Metadata-Version: 2.1\\nName: raywarp\\nVersion: 0.1.0\\n" + extras)
        wheel.writestr(info + "WHEEL", "Wheel-Version: 1.0\\nGenerator: test\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr(info + "entry_points.txt", "[console_scripts]\\nraywarp = program:main\\n")
        wheel.writestr(info + "RECORD", "")
    return name
"""  # noqa: E501
MODULES = {
    "backend.py": BACKEND,
    "program.py": (
        "import os, sys\ndef main():\n    print('started with', sys.argv[1:],"
        " os.environ['RAY_AUTH_MODE'])\n"
    ),
    "datasets.py": "",
    "peft.py": "",
    "ray/__init__.py": "",
    "ray/train.py": "",
    "ray/tune.py": "",
    "transformers.py": "LlamaForCausalLM = None",
    "vllm.py": "LLM = None",
    "raywarp/__init__.py": "",
    "raywarp/data/embedded.py": "",
}


@pytest.fixture
def repository(tmp_path):
    root = tmp_path / "a repository"
    (root / "bin").mkdir(parents=True)
    shutil.copytree(REPOSITORY / "cluster", root / "cluster")
    (root / "pyproject.toml").write_text(PYPROJECT)
    return root


def local_sh(repository, *arguments, **environment):
    """Runs local.sh where commands in repository/bin win over the machine's, and where pip has no
    registry.
    """
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PIP_", "UV_", "RAYWARP_", "RAY_"))
    }
    settings = {
        "HOME": str(repository),
        "PATH": f"{repository / 'bin'}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "RAYWARP_EXTRA": "cpu",
    }
    return subprocess.run(
        [repository / "cluster" / "local.sh", *arguments],
        env=inherited | settings | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )


def stand_in(repository, name, script):
    """Puts a shell script into repository/bin and returns its path."""
    path = repository / "bin" / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def assert_refused(result, *parts):
    assert result.returncode == 1
    assert result.stderr.startswith("raywarp: error: ")
    assert "Traceback" not in result.stdout + result.stderr
    for part in parts:
        assert part in result.stderr


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_usage(repository, arguments):
    result = local_sh(repository, *arguments)
    assert result.returncode == 0
    for command in ("quickstart", "test", "install", "browser", "start", "submit", "stop"):
        assert f"./cluster/local.sh {command}" in result.stdout
    assert not (repository / ".venv").exists()


def test_unknown_command(repository):
    assert_refused(local_sh(repository, "quickstrat"), "unknown command: quickstrat", "--help")
    assert not (repository / ".venv").exists()


def test_old_python(repository):
    python = stand_in(repository, "python-of-long-ago", "exit 1")
    assert_refused(
        local_sh(repository, "install", PYTHON=python), "no Python 3.11 to 3.14 found", python
    )


def test_finds_a_newer_python_behind_an_old_python3(repository):
    stand_in(repository, "python3", "exit 1")
    stand_in(repository, "python3.13", f'exec "{sys.executable}" "$@"')
    stand_in(repository, "df", "echo; echo fake 0 0 1048576")
    assert_refused(local_sh(repository, "install", PYTHON=""), "too little disk space")


def test_python_without_venv(repository):
    python = stand_in(
        repository,
        "python-of-debian",
        f'case "$2" in *ensurepip*) exit 1;; esac; exec "{sys.executable}" "$@"',
    )
    assert_refused(
        local_sh(repository, "install", PYTHON=python), "no venv or no ensurepip", "python3-venv"
    )


@pytest.mark.parametrize(
    ("gpus", "need"),
    [("", "raywarp[cpu] needs 6 GB"), ("GPU 0: H200\nGPU 1: H200", "raywarp[gpu] needs 20 GB")],
)
def test_too_little_disk_for_what_the_machine_needs(repository, gpus, need):
    stand_in(repository, "nvidia-smi", f"echo '{gpus}'")
    stand_in(
        repository,
        "df",
        "echo Filesystem blocks used available; echo /dev/disk 9000000 6900000 2100000",
    )
    assert_refused(local_sh(repository, "install", RAYWARP_EXTRA=""), "2 GB free", need)
    assert not (repository / ".venv").exists()


def test_unknown_extra(repository):
    assert_refused(
        local_sh(repository, "install", RAYWARP_EXTRA="tpu"),
        "RAYWARP_EXTRA=tpu is neither cpu nor gpu",
    )


def test_no_registry(repository):
    (repository / "backend.py").write_text(
        BACKEND.replace("+ extras", "+ extras + 'Requires-Dist: raywarp-dependency\\n'")
    )
    result = local_sh(
        repository,
        "install",
        PIP_NO_INDEX="0",
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_RETRIES="0",
    )
    assert_refused(
        result,
        "can a package registry be reached",
        "raywarp-install.log",
        "ERROR: No matching distribution found",
    )


def test_installs_once_and_recovers_from_an_interruption(repository):
    for name, text in MODULES.items():
        (repository / name).parent.mkdir(exist_ok=True)
        (repository / name).write_text(text)
    leftover = repository / ".venv" / "lib" / "half-written"
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    (repository / ".venv" / "raywarp-install").write_text("unfinished\n")

    first = local_sh(repository, "quickstart", "--policies", "2")
    assert first.returncode == 0, first.stdout + first.stderr
    assert "did not finish" in first.stdout
    assert "started with ['quickstart', '--policies', '2'] token" in first.stdout
    assert not leftover.exists()

    start = time.monotonic()
    second = local_sh(repository, "quickstart")
    assert second.stdout == "started with ['quickstart'] token\n"
    assert time.monotonic() - start < 3

    # The stand-in project has no pytest: that `test` asks for it is what matters.
    assert "No module named pytest" in local_sh(repository, "test").stderr

    with (repository / "pyproject.toml").open("a") as pyproject:
        pyproject.write("# changed\n")
    stand_in(repository, "df", "echo; echo fake 0 0 0")
    changed = local_sh(repository, "install")
    assert "pyproject.toml has changed" in changed.stdout
    assert_refused(changed, "too little disk space")


@pytest.fixture
def installed(repository):
    """With a `ray` that does not start, so that what local.sh does around it is seen;
    tests/end_to_end/test_jobs.py has the real one.
    """
    folder = repository / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "python").symlink_to(sys.executable)
    (folder / "ray").write_text(
        '#!/bin/sh\necho "ray $*"\necho "no room for the object store"\nexit 1\n'
    )
    (folder / "ray").chmod(0o755)
    (repository / ".venv" / "raywarp-install").write_text(installed_in(repository))
    return repository


@pytest.fixture
def short_path():
    """A folder that is short enough for the paths of sockets in it."""
    with tempfile.TemporaryDirectory(prefix="rw") as folder:
        yield Path(folder)


def test_a_cluster_that_does_not_start(installed, short_path):
    result = local_sh(
        installed,
        "start",
        "--num-cpus=3",
        RAYWARP_CLUSTER=str(short_path / "c"),
        RAYWARP_PORT="0",
        RAY_AUTH_TOKEN="x",
    )
    assert_refused(
        result,
        "Ray did not start",
        "no room for the object store",
        f"--temp-dir={short_path}/c/ray",
        "--num-cpus=3",
    )
    assert "--dashboard-host=127.0.0.1" in result.stderr
    assert stat.S_IMODE((short_path / "c").stat().st_mode) == 0o700


@pytest.mark.parametrize("name", ["c" * 40, "é" * 21])
def test_a_folder_that_is_too_long_for_sockets(installed, name):
    """/ray and Ray's 64 bytes leave 39 of a socket's 107."""
    result = local_sh(installed, "start", RAYWARP_CLUSTER=f"/{name[1:]}")
    assert_refused(result, "too long for the paths of Ray's sockets", "at most 39 bytes")
    assert not Path(f"/{name[1:]}").exists()


def test_a_port_that_is_taken(installed, short_path):
    with socket.create_server(("", 0)) as server:
        port = str(server.getsockname()[1])
        result = local_sh(
            installed, "start", RAYWARP_CLUSTER=str(short_path / "c"), RAYWARP_PORT=port
        )
    assert_refused(result, f"port {port} is taken", "RAYWARP_PORT")


def test_stop_ends_nothing_that_start_did_not_start(installed, tmp_path):
    """Also where the pid of a cluster that died belongs to somebody else by now."""
    (tmp_path / "c").mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        (tmp_path / "c" / "pid").write_text(f"{other.pid}\n")
        result = local_sh(installed, "stop", RAYWARP_CLUSTER=str(tmp_path / "c"))
        assert result.returncode == 0
        assert "no cluster of ./cluster/local.sh start is running" in result.stdout
        assert other.poll() is None
        other.kill()


def test_submit_without_a_cluster(installed, tmp_path):
    result = local_sh(
        installed,
        "submit",
        "my.yaml",
        RAYWARP_CLUSTER=str(tmp_path / "c"),
        RAY_API_SERVER_ADDRESS="",
    )
    assert_refused(result, "no cluster is running here: ./cluster/local.sh start makes one")


def test_shellcheck():
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (the test extra brings it)")
    result = subprocess.run(
        [shellcheck, REPOSITORY / "cluster" / "local.sh", REPOSITORY / ".ci" / "run"],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout
