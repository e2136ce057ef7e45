"""Trains tasks x attentions x seeds, and compares them.

A sweep file imports `Sweep` from here.
"""

from spectraformer_jax.study.sweep.cells import Sweep

__all__ = ["Sweep"]
