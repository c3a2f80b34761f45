"""Adapters as files: PEFT's format, tensor files and a model's weight files, and merging from
folder to folder.
"""
