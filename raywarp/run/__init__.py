"""A run's folder, its loggers, and what the terminal shows of the run.

The folder holds the configuration, policies, events, front, figures and model card.
"""
