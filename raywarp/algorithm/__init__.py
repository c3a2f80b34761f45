"""The mathematics of WARP: task vectors as LoRA factors, averaging, losses and advantages.

Also holds the hypervolume of a front. It imports torch and the standard library only.
"""
