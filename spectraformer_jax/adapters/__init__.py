"""Spectral attention in place of the attention functions of Flax and JAX."""

from spectraformer_jax.adapters.attention_fns import (
  as_attention_fn,
  as_dot_product_attention,
)

__all__ = ["as_attention_fn", "as_dot_product_attention"]
