"""Sampling: protocol, engines, adapter loaders, workers, the pool, and the proof by effect."""
