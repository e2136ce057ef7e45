"""The linear form in plain XLA: one sum, or a prefix sum over chunks."""

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import Array

DEFAULT_CHUNK_SIZE = 128


def sums(
  query_features: Array,
  key_features: Array,
  value: Array,
  *,
  is_causal: bool,
  chunk_size: int | None = None,
) -> tuple[Array, Array]:
  """Weighted sums over the keys each query sees, in O(T).

  Causal: inside a chunk a masked matrix product, between chunks a scan over
  ``[F, V]`` states. The gradient recomputes each chunk instead of keeping its
  ``[C, C]`` weights.

  Args:
    query_features: ``[B, T, N, F]`` float32.
    key_features: ``[B, S, N, F]`` float32, zero where hidden.
    value: ``[B, S, N, V]`` float32.
    is_causal: query i sees keys 0..i.
    chunk_size: C of the causal form; None is 128. Any length will do.

  Returns:
    numerator ``[B, T, N, V]`` and normalizer ``[B, T, N]``.
  """
  if is_causal:
    chunk = min(chunk_size or DEFAULT_CHUNK_SIZE, query_features.shape[1])
    return _causal(query_features, key_features, value, chunk)
  state = jnp.einsum("bsnf,bsnv->bnfv", key_features, value)
  numerator = jnp.einsum("btnf,bnfv->btnv", query_features, state)
  total = jnp.sum(key_features, axis=1)
  normalizer = jnp.einsum("btnf,bnf->btn", query_features, total)
  return numerator, normalizer


def _causal(query_features, key_features, value, chunk):
  """Scan over chunks of `chunk` positions."""
  batch, length, heads, features = key_features.shape
  padding = -length % chunk
  as_chunks = lambda x: jnp.moveaxis(
    jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))).reshape(
      batch, -1, chunk, heads, x.shape[-1]
    ),
    1,
    0,
  )

  @jax.checkpoint
  def step(state, inputs):
    state_kv, state_total = state
    phi_q, phi_k, v = inputs
    weights = jnp.tril(jnp.einsum("bcnf,bdnf->bncd", phi_q, phi_k))
    numerator = jnp.einsum("bncd,bdnv->bcnv", weights, v)
    numerator += jnp.einsum("bcnf,bnfv->bcnv", phi_q, state_kv)
    normalizer = jnp.moveaxis(jnp.sum(weights, axis=-1), 1, 2)
    normalizer += jnp.einsum("bcnf,bnf->bcn", phi_q, state_total)
    state_kv += jnp.einsum("bcnf,bcnv->bnfv", phi_k, v)
    state_total += jnp.sum(phi_k, axis=1)
    return (state_kv, state_total), (numerator, normalizer)

  zeros = (
    jnp.zeros((batch, heads, features, value.shape[-1]), value.dtype),
    jnp.zeros((batch, heads, features), value.dtype),
  )
  chunks = tuple(map(as_chunks, (query_features, key_features, value)))
  _, (numerator, normalizer) = jax.lax.scan(step, zeros, chunks)
  as_rows = lambda x: jnp.moveaxis(x, 0, 1).reshape(
    batch, length + padding, *x.shape[3:]
  )[:, :length]
  return as_rows(numerator), as_rows(normalizer)
