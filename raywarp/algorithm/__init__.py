"""The mathematics of WARP: deltas (factors of ΔW), averaging, losses, advantages, hypervolume.
torch and the standard library only.
"""
