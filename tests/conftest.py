"""Fixtures for all tests: random adapters, a tiny Llama and GPT-2 with a tokenizer, and one Ray.

The parts are real and small.
"""

import contextlib
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import platformdirs
import psutil
import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # waiting threads spin, on cores that are shared

import torch

# Tests move HOME; the fetched models stay.
os.environ.setdefault("RAYWARP_CACHE", platformdirs.user_cache_dir("raywarp"))
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_TRAIN_V2_ENABLED="1",
    RAY_AUTH_MODE="token",
    # What nobody reads here, less often: statistics of processes, and names of new log files.
    REPORTER_UPDATE_INTERVAL_MS="60000",
    LOG_NAME_UPDATE_INTERVAL_S="10",
)

if "PYTEST_XDIST_WORKER" in os.environ:
    # Of two processes side by side, neither sees the other's temporary files.
    os.environ["TMPDIR"] = tempfile.tempdir = tempfile.mkdtemp(prefix="rw")

from tiny_models import WORDS, save_tiny_gpt2, save_tiny_llama

from raywarp.algorithm.deltas import AdapterDelta
from raywarp.algorithm.factors import Factors, dense
from raywarp.model.batches import Batch
from raywarp.storage import scratch

# Files that take minutes, the longest first.
SLOW = (
    *("faults", "sweep", "pool", "three_nodes", "warp", "jobs", "stored_runs", "training"),
    *("evidence", "nodes", "proof", "merging", "architectures", "orphans"),
)


def pytest_configure() -> None:
    """Give vLLM one cache for the session: what it notes of a model's class is noted once."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        os.environ["VLLM_CACHE_ROOT"] = tempfile.mkdtemp(prefix="rwvllm")


def pytest_itemcollected(item: pytest.Item) -> None:
    if item.path.parent.name == "end_to_end":
        item.add_marker(pytest.mark.slow)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a process whole files, and one of them all files that look at the same finished run."""
    from xdist.scheduler import LoadFileScheduling

    @functools.cache
    def shares(file: str) -> bool:
        return "tiny_finished" in (config.rootpath / file).read_text()

    class Files(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "finished" if shares(file) else file

    return Files(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with the slow files, since the last process to end would have one of them alone."""
    if hasattr(config, "workerinput"):
        order = {f"test_{name}": n for n, name in enumerate(SLOW)}
        items.sort(key=lambda item: order.get(item.path.stem, len(order)))


def pytest_unconfigure() -> None:
    own = (
        tempfile.gettempdir()
        if "PYTEST_XDIST_WORKER" in os.environ
        else os.environ["VLLM_CACHE_ROOT"]
    )
    shutil.rmtree(own, ignore_errors=True)


def random_delta(
    seed: int,
    ranks: tuple[int, ...] = (3, 2, 4, 1),
    sizes: tuple[tuple[int, int], ...] = ((6, 5), (4, 6), (5, 5), (7, 4)),
) -> AdapterDelta:
    """Two blocks of two modules each, unequal ranks and sizes, float64 unless cast."""
    names = (
        "model.layers.0.attn.q",
        "model.layers.0.mlp.up",
        "model.layers.1.attn.q",
        "model.layers.1.mlp.up",
    )
    g = torch.Generator().manual_seed(seed)
    factors = {
        name: Factors(
            torch.randn(out, r, generator=g, dtype=torch.float64),
            torch.randn(r, inp, generator=g, dtype=torch.float64),
        )
        for name, r, (out, inp) in zip(names, ranks, sizes, strict=True)
    }
    return AdapterDelta(factors)


def assert_same_change(x: AdapterDelta, y: AdapterDelta, tolerance: float = 1e-10) -> None:
    assert x.factors.keys() == y.factors.keys()
    for module, f in x.factors.items():
        torch.testing.assert_close(
            dense(f), dense(y.factors[module]), rtol=tolerance, atol=tolerance
        )


def installed_in(root: Path) -> str:
    """What cluster/local.sh of a copied repository keeps in .venv/raywarp-install, once it has
    installed with this Python.
    """
    content = hashlib.sha256((root / "pyproject.toml").read_bytes()).hexdigest()
    return (
        f"Python {platform.python_version()}, raywarp[cpu,test] in {root}, pyproject.toml"
        f" {content}\n"
    )


def write_prompts(path: Path) -> None:
    """Prompts of three known words, a JSON line each."""
    rows = [{"text": f"{a} {b} {c}"} for a, b, c in zip(WORDS, WORDS[3:], WORDS[7:], strict=False)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def traces() -> set[str]:
    """What a session leaves on a machine while it lives: its actors' processes, shared memory (but
    for Ray's own), adapter files.
    """
    names = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            names.append(process.name())
    found = {
        name
        for name in names
        if name.startswith(("ray::Rollout", "ray::Policy", "ray::Reward", "VLLM"))
    }
    found |= {
        path.name for path in Path("/dev/shm").iterdir() if not path.name.startswith("plasma")
    }
    return found | {path.name for path in Path(tempfile.gettempdir()).glob(f"{scratch.PREFIX}*")}


def left_behind(before: set[str], seconds: float = 15) -> set[str]:
    """New traces since `before` that do not go away."""
    deadline = time.monotonic() + seconds
    while (left := traces() - before) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def plain_logits(model: Any, batch: Batch) -> torch.Tensor:
    """(N, T, V) logits of the response tokens, one completion at a time, all positions, no padding;
    zero after a completion's end.
    """
    rows = []
    for n, prompt in enumerate(batch.prompts):
        length = int(batch.mask[n].sum())
        ids = torch.tensor([[*prompt, *batch.responses[n, :length].tolist()]])
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
        rows.append(torch.nn.functional.pad(logits, (0, 0, 0, batch.mask.shape[1] - length)))
    return torch.stack(rows)


@dataclass(frozen=True)
class S3Server:
    """moto's, on a port of this machine, with one empty bucket; all of pyarrow's requests really go
    there.
    """

    address: str

    def uri(self, prefix: str) -> str:
        return f"s3://bucket/{prefix}?endpoint_override={self.address}&scheme=http&region=us-east-1"


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line per request
    os.environ.update(
        AWS_ACCESS_KEY_ID="loopback",
        AWS_SECRET_ACCESS_KEY="loopback",
        AWS_EC2_METADATA_DISABLED="true",
    )
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    urllib.request.urlopen(
        urllib.request.Request(f"http://{host}:{port}/bucket", method="PUT")
    ).close()
    yield S3Server(f"{host}:{port}")
    server.stop()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_gpt2(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A Ray of this test session's own, with its own home and temporary folder."""
    import ray

    home = tmp_path_factory.mktemp("home")
    os.environ["HOME"] = str(home)
    tests = Path(__file__).parent
    folders = [tests, *(folder for folder in tests.iterdir() if [*folder.glob("test_*.py")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*map(str, folders), os.environ.get("PYTHONPATH", "")]
    )
    with tempfile.TemporaryDirectory(
        prefix="rw", ignore_cleanup_errors=True
    ) as folder:  # short: it becomes a socket's path
        os.environ["RAY_TMPDIR"] = folder
        ray.init(
            address="local",
            num_cpus=4,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
        yield ray
        ray.shutdown()


@pytest.fixture(scope="session")
def tiny_finished(
    ray_cluster: Any, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """The Run of tiny_run's configuration with a control score and all loggers, finished. To be
    looked at, not changed.
    """
    from tiny_run import make_project, tiny_config

    from raywarp.warp import train

    folder = make_project(tmp_path_factory.mktemp("finished"))
    changes = {
        "control": {"function": "raywarp.embedded:vader"},
        "front": {"every": 3},
        "loggers": ["tensorboard", "wandb", "mlflow"],
    }
    # where the reward module is
    with (
        contextlib.chdir(folder),
        pytest.MonkeyPatch.context() as patched,
    ):
        for name, value in logger_environment(folder).items():
            patched.setenv(name, value)
        return train(tiny_config(folder, tiny_llama, folder / "run", **changes))


def logger_environment(folder: Path) -> dict[str, str]:
    """For W&B without a network, and MLflow in files below a folder."""
    services = {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"file:{folder / 'mlruns'}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }
    caches = {
        name: str(folder / "wandb-caches")
        for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR")
    }
    return services | caches


@pytest.fixture(scope="module")
def working_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty folder, the working directory of the file's tests, as a user's is."""
    folder = tmp_path_factory.mktemp("working")
    with contextlib.chdir(folder):
        yield folder


@pytest.fixture(scope="module")
def project(working_directory: Path) -> Path:
    """A user's folder with a reward module and prompts."""
    from tiny_run import make_project

    return make_project(working_directory)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would join or start a Ray fails the test."""
    monkeypatch.setattr(
        "raywarp.cluster.runtime.start_ray", lambda: pytest.fail("Ray would have started")
    )
