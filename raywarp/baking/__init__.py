"""Adapters as whole models: base + η·ΔW as full weights, and LoRA files for llama.cpp."""
