"""Conversion of runs of train.py, and the command that does it."""
