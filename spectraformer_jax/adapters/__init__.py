"""Spectral attention in the places where other attention functions go."""

from spectraformer_jax.adapters.attention_fns import (
  as_attention_fn,
  as_dot_product_attention,
)

__all__ = ["as_attention_fn", "as_dot_product_attention"]
