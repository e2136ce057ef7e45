"""Generators of examples, for tasks that are drawn rather than read."""
