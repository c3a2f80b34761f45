"""A run's folder: configuration, policies, keys, events, front, figures, card, loggers, and what
the terminal shows.
"""
