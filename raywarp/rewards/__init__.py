"""Rewards: a function or a sequence classifier, its Ray actor, and Bradley–Terry training."""
