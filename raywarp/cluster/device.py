"""What the machine supports: bfloat16, and the environment in which its CPU trains fastest."""

import re
from collections.abc import Collection

import torch

from raywarp.config.schema import ConfigError

CPU_ENV = {
    # By default glibc returns large blocks to the kernel after every free. Keeping them saves page
    # faults in every training step.
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
# How often an OpenMP thread polls for its next piece of work before it sleeps. To wake it takes as
# long as such a piece, of which a step of SmolLM2-135M on two cores has thousands. A policy actor
# polls for half a millisecond: an update then takes 2.5 s, and 2.7 s with the other figure. For
# rollouts the latter is as good, and leaves more to the trainer while points are measured. Then
# both work at once, and reach 75 % of what they do in turns; 55 % if both poll longer.
SPIN, SPIN_LONGER = {"GOMP_SPINCOUNT": "5000"}, {"GOMP_SPINCOUNT": "20000"}
# Where more threads have work than there are cores, spinning threads take cores from the others.
# Two policies on one trainer then take three times as long.
SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}


def cpu_environment(threads: int, crowded: bool) -> dict[str, str]:
    """Return the environment variables of a CPU process with `threads` threads.

    Args:
        threads: number of OpenMP threads.
        crowded: whether the processes of its node have more busy threads than there are cores.
    """
    return {**CPU_ENV, "OMP_NUM_THREADS": str(threads), **(SLEEP if crowded else SPIN)}


def supports_bf16(device: torch.device) -> bool:
    """Return whether the hardware computes in bfloat16.

    Emulation is ten times slower than float32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


# GPUs of compute capability below 8.0 by Ray's accelerator types, and by NVIDIA's names with
# hyphens. RTX-4000 to RTX-6000 are missing: Ray calls cards so that have bfloat16, and cards that
# have not.
NO_BFLOAT16 = re.compile(
    r"((NVIDIA|Tesla|GeForce)-)?"
    r"(T4G?|V100S?|G[VP]100|P4|P6|P40|M4|M6|M10|M40|M60|K8|K10|K20|K40|K80|[KMPT]\d{3,4}M?"
    r"|Quadro|TITAN|GTX|RTX-20[678]0|RTX-8000)(-.*)?",
    re.IGNORECASE,
)


def run_dtype(
    dtype: str, gpus: bool, accelerators: Collection[str] = (), sampling_gpus: bool = False
) -> str:
    """Return dtype, with auto resolved.

    auto means bfloat16 on GPUs and CPUs that compute in it, else float32.

    Args:
        dtype: auto, float32, bfloat16 or float16.
        gpus: whether the run's policies are trained on GPUs.
        accelerators: Ray's types of the cluster's GPUs; this machine's own are looked at, too.
        sampling_gpus: whether its rollout workers have GPUs.

    Raises:
        ConfigError: bfloat16 is asked for, and a GPU does not compute in it.
    """
    cuda = torch.device("cuda")
    old = [name for name in accelerators if NO_BFLOAT16.fullmatch(name)]
    if not (gpus or sampling_gpus):
        old = []
    elif not old and torch.cuda.is_available() and not supports_bf16(cuda):
        old = [torch.cuda.get_device_name(cuda)]
    if old and dtype == "bfloat16":
        raise ConfigError(
            f"dtype=bfloat16: the cluster has a GPU, {old[0]}, that does not compute in it; set"
            " dtype=float16 or dtype=float32, or use GPUs of compute capability 8.0 or above (A10,"
            " L4, A100, H100)"
        )
    if dtype != "auto":
        return dtype
    has = not old and (gpus or supports_bf16(torch.device("cpu")))
    return "bfloat16" if has else "float32"
