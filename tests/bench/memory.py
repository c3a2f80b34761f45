"""Compare `raywarp plan`'s estimate of memory with the peaks of a real run's processes (VmHWM).

The run takes a few steps on the embedded model, with any configuration.

    python tests/bench/memory.py                                        # the quickstart's sizes
    python tests/bench/memory.py optim.batch_size=64 rollout.max_new_tokens=64

The last line is JSON. For each kind of process it has the estimate and the measured peak in bytes,
and their ratio. A KV cache on a CPU is reserved, and takes memory only as it fills. The estimate is
therefore also compared without it.
"""

import contextlib
import json
import sys
import tempfile
import threading

import psutil

from raywarp.cli.quickstart import QUICKSTART
from raywarp.config.load import load_config
from raywarp.planning.plan import plan
from raywarp.warp import train

FEW = [
    "warp.steps=3",
    "warp.iterations=2",
    "warp.policies=2",
    "front.prompts=8",
    "front.etas=[0.5]",
]
NAMES = {
    "policy": "ray::PolicyActor",
    "rollout_worker": "ray::RolloutWorker",
    "reward_worker": "ray::RewardActor",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as out:
        given = {**QUICKSTART, "reward": {"function": "raywarp.embedded:vader"}, "control": None}
        config = load_config(given, [*FEW, f"out={out}/run", *sys.argv[1:]])
        found, peaks, over = plan(config), dict.fromkeys(NAMES, 0), threading.Event()
        threading.Thread(target=_watch, args=(peaks, over), daemon=True).start()
        train(config)
        over.set()
    result = {}
    for process in found.processes:
        peak, cache = peaks[process.need.key], process.components.get("KV cache", 0)
        ratio, without = process.bytes / peak, (process.bytes - cache) / peak
        result[process.need.key] = {
            "estimate": process.bytes,
            "peak": peak,
            "ratio": round(ratio, 3),
            "ratio_without_cache": round(without, 3),
        }
        print(
            f"{process.need.key}: estimate {process.bytes >> 20} MiB (KV cache {cache >> 20}),"
            f" measured {peak >> 20} MiB"
        )
    print(json.dumps(result))


def _watch(peaks: dict[str, int], over: threading.Event) -> None:
    while not over.wait(0.3):
        with contextlib.suppress(psutil.Error, OSError, StopIteration):  # one has ended meanwhile
            for process in psutil.Process().children(recursive=True):
                kind = next(
                    (kind for kind, name in NAMES.items() if process.name().startswith(name[:15])),
                    None,
                )
                if kind:
                    peaks[kind] = max(peaks[kind], _peak(process.pid))


def _peak(process: int) -> int:
    """VmHWM in bytes."""
    with open(f"/proc/{process}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
