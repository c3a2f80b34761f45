"""Sampling: the protocol, engines (vLLM, transformers), how adapters reach them, workers, the pool,
and the proof by effect.
"""
