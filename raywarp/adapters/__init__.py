"""Adapters as files: PEFT's format, tensor and weight files, and merging from folder to folder."""
