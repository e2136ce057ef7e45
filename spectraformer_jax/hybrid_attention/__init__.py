"""Hybrid attention: exact weights for some keys, features for all others."""
