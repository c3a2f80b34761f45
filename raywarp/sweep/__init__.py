"""Ray Tune over a configuration's keys: the sweep, its trials, their listeners, its files, and what
it found.
"""
