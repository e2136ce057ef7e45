"""The readable form: builds the T x S matrix. The oracle of the others."""

import jax.numpy as jnp

from spectraformer_jax.typing import Array


def sums(
  query_features: Array,
  key_features: Array,
  value: Array,
  *,
  is_causal: bool,
  chunk_size: int | None = None,
) -> tuple[Array, Array]:
  """Weighted sums over the keys each query sees, the quadratic way.

  Args:
    query_features: ``[B, T, N, F]`` float32.
    key_features: ``[B, S, N, F]`` float32, zero where hidden.
    value: ``[B, S, N, V]`` float32.
    is_causal: query i sees keys 0..i.
    chunk_size: not used: nothing is chunked here.

  Returns:
    numerator ``[B, T, N, V]`` and normalizer ``[B, T, N]``.
  """
  del chunk_size
  weights = jnp.einsum(
    "btnf,bsnf->bnts", query_features, key_features, precision="highest"
  )
  if is_causal:
    weights = jnp.tril(weights)
  numerator = jnp.einsum("bnts,bsnv->btnv", weights, value, precision="highest")
  normalizer = jnp.sum(weights, axis=-1)
  return numerator, jnp.transpose(normalizer, (0, 2, 1))
