"""What the machine is good at: bfloat16, and the environment in which its CPU trains fastest."""

import torch

CPU_ENV = {
    # glibc hands large blocks back to the kernel after every free; kept, they save a training step its page faults.
    "MALLOC_MMAP_THRESHOLD_": str(8 << 30),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}
# Where trainer and engine share the cores, threads that spin while they wait take them from whoever has work: two interleaved policies took
# 8.8 s a step instead of 2.9. A policy that has the cores to itself gains by spinning (GOMP_SPINCOUNT=20000: updates of 1.4 s, not 1.7).
SHARED_CPU_ENV = {**CPU_ENV, "OMP_WAIT_POLICY": "PASSIVE"}


def supports_bf16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is done by the hardware; an emulation is ten times slower than float32."""
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
