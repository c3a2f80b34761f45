"""The policy's model: base and adapters, layers, attention, head, batches and supported models."""
