"""Planning of a run: its inputs, resolved once, its memory, and the checks before its start."""
