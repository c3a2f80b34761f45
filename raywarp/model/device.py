"""What the machine is good at: bfloat16, and the environment in which its CPU trains fastest."""

import torch

CPU_ENV = {
    # glibc hands large blocks back to the kernel after every free; kept, they save a training step
    # its page faults.
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
# How often an OpenMP thread looks for its next piece of work, for half a millisecond or less,
# before it sleeps; waking it takes as long as such a piece. A step of SmolLM2-135M on two cores is
# thousands of them: 2.5 s against 3.1 (rollouts 0.9 of it, not 1.15; updates 1.4, not 1.65).
SPIN = {"GOMP_SPINCOUNT": "20000"}
# But where more threads have work than there are cores, those that spin take it from them: three
# times as long, for two policies on one trainer.
SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}


def cpu_environment(threads: int, crowded: bool) -> dict[str, str]:
    """Environment variables of a CPU process with so many threads.

    Args:
        crowded: the processes of its node have more threads at work than there are cores.
    """
    return {**CPU_ENV, "OMP_NUM_THREADS": str(threads), **(SLEEP if crowded else SPIN)}


def supports_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is done by the hardware; an emulation is ten times slower than
    float32.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return False


def run_dtype(dtype: str, gpus: bool) -> str:
    """What dtype: auto becomes: bfloat16 on GPUs and where the CPU has it."""
    if dtype != "auto":
        return dtype
    return "bfloat16" if gpus or supports_bf16(torch.device("cpu")) else "float32"
