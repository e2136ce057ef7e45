"""Attention on plain features: a dot product, so prefix sums do."""

from spectraformer_jax.linear_attention.api import (
  IMPLEMENTATIONS,
  linear_attention,
)

__all__ = ["IMPLEMENTATIONS", "linear_attention"]
