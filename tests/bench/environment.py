"""Virtual environments for the tools that a benchmark compares raywarp with.

pip makes them once, in the cache folder. Each has raywarp's own packages behind its own, so both
sides run the same torch wherever the other tool allows it.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from platformdirs import user_cache_dir


def python_with(name: str, requirements: Sequence[str]) -> Path:
    """The Python of an environment in which these requirements are installed.

    Raises:
        RuntimeError: pip failed; the message ends with what it said.
    """
    ours = sysconfig.get_paths()["purelib"]
    version = hashlib.sha256("\n".join([sys.version, ours, *requirements]).encode()).hexdigest()[:8]
    folder = (
        Path(os.environ.get("RAYWARP_CACHE") or user_cache_dir("raywarp"))
        / "bench"
        / f"{name}-{version}"
    )
    python, ready = folder / "bin" / "python", folder / "ready"
    if ready.is_file():
        return python
    shutil.rmtree(folder, ignore_errors=True)
    print(f"installing {' '.join(requirements)} into {folder} ...", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    site_packages = next(folder.glob("lib/python3*/site-packages"))
    (site_packages / "beside.pth").write_text(ours + "\n")
    installed = subprocess.run(
        [str(python), "-m", "pip", "install", *requirements], capture_output=True, text=True
    )
    if installed.returncode:
        raise RuntimeError(
            f"pip could not install {' '.join(requirements)}:\n{installed.stderr[-2000:]}"
        )
    ready.touch()
    return python
