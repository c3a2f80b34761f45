"""The policy's model: base and adapters, layers, attention, head, batches, device, and what of an
architecture is supported.
"""
