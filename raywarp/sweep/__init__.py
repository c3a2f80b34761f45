"""Sweeps over a configuration's keys with Ray Tune: trials, listeners, files and results."""
