"""The readable form: builds the T x S matrix. The oracle of the others."""

import math

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.state import (
  KEY_EXPONENT,
  State,
  normalise,
)
from spectraformer_jax.typing import Array, LogFeatures


def attend(
  query: LogFeatures,
  key: LogFeatures,
  value: Array,
  visible: Array,
  *,
  state: State,
  segments: tuple[Array, Array] | None = None,
) -> Array:
  """Attention with features that all exist, the quadratic way.

  Args:
    query: features ``[B, N, G, T, F]`` of G groups of queries.
    key: features ``[B, N, S, F]``.
    value: ``[B, N, S, V]`` float32.
    visible: bool, broadcastable to ``[B, N, G, T, S]``.
    state: sums over keys that came before; every query sees them.
    segments: ids ``[B, T]`` and ``[B, S]`` of packed rows; no state then.

  Returns:
    ``[B, N, G, T, V]`` float32.
  """
  # Those too large for their features give NaN, and no gradient.
  is_bad = False
  for leaf in jax.tree.leaves(query):
    is_bad |= ~jnp.all(jnp.isfinite(leaf), axis=-1, keepdims=True)
  query = jax.tree.map(lambda leaf: jnp.where(is_bad, 0.0, leaf), query)
  phi, psi, old = stabilise(
    query, key, jnp.any(visible, (1, 2, 3)), state, segments
  )

  def weights(phi, psi):
    products = jnp.einsum("bngtf,bnsf->bngts", phi, psi, precision="highest")
    return jnp.where(visible, products, 0.0)

  def of_state(phi, sums):
    sums = sums * (old if sums.ndim == 3 else old[..., None])
    return jnp.einsum("bngtf,bnf...->bngt...", phi, sums, precision="highest")

  seen = weights(phi, psi)
  numerator = jnp.einsum("bngts,bnsv->bngtv", seen, value, precision="highest")
  numerator += of_state(phi, state.kv)
  normalizer = jnp.sum(seen, axis=-1) + of_state(phi, state.total)
  magnitude = None
  if state.magnitude is not None:
    magnitude = jnp.sum(weights(jnp.abs(phi), jnp.abs(psi)), axis=-1)
    magnitude += of_state(jnp.abs(phi), state.magnitude)
  out = normalise(numerator, normalizer, magnitude)
  # A query whose visible keys have all underflowed does not see none.
  size = normalizer if magnitude is None else magnitude
  if query.factor is None:
    is_bad |= (jnp.any(visible, axis=-1) & (size == 0.0))[..., None]
  return jnp.where(is_bad, jnp.nan, out)


def stabilise(
  query: LogFeatures,
  key: LogFeatures,
  key_mask: Array,
  state: State,
  segments: tuple[Array, Array] | None = None,
) -> tuple[Array, Array, Array]:
  """Features of bounded size whose attention equals the naive one, exactly.

  Each feature is shifted by its maximum over the visible keys of its example
  and head (and segment), which the queries take back; then each query by its
  own maximum.
  Both cancel in the ratio, so no gradient flows through them. For a positive
  map that is not causal every normalizer is at least 1.

  Args:
    query: log-features ``[B, N, G, T, F]``.
    key: log-features ``[B, N, S, F]``.
    key_mask: ``[B, S]`` bool.
    state: earlier sums, with an exponent of their own.
    segments: see `attend`.

  Returns:
    query features, key features (0 where hidden), and the factor ``[B, N, F]``
    that brings the sums of the state to the keys' shift.
  """
  if key.log_magnitude is None:
    one = jnp.ones_like(state.total[..., :1])
    hidden = ~key_mask[:, None, :, None]
    return query.factor, jnp.where(hidden, 0.0, key.factor), one
  key_log = jnp.where(key_mask[:, None, :, None], key.log_magnitude, -jnp.inf)
  earlier = state.exponent * math.log(2.0)
  shift = jnp.maximum(jnp.max(key_log, axis=2), earlier)
  of_queries = of_keys = shift = jax.lax.stop_gradient(shift)[:, :, None]
  if segments is not None:
    of_queries, of_keys = (
      jnp.maximum(jax.lax.stop_gradient(largest), earlier[:, :, None])
      for largest in _max_in_segments(key_log, segments)
    )
  query_log = query.log_magnitude + of_queries[:, :, None]
  top = jax.lax.stop_gradient(jnp.max(query_log, axis=-1, keepdims=True))
  phi = jnp.exp(query_log - top)
  psi = jnp.exp(key_log - of_keys)
  if query.factor is not None:
    phi, psi = query.factor * phi, key.factor * psi
  return phi, psi, 2.0**-KEY_EXPONENT * jnp.exp(earlier - shift[:, :, 0])


def _max_in_segments(x: Array, segments: tuple[Array, Array]):
  """The largest of ``x [B, N, S, F]`` in the segment of each query and key."""
  length = segments[0].shape[1]
  ids = jnp.concatenate(segments, axis=1)

  def of_example(x, ids):
    number = jnp.searchsorted(jnp.sort(ids), ids)
    largest = jax.ops.segment_max(
      jnp.swapaxes(x, 0, 1), number[length:], ids.size
    )
    return jnp.swapaxes(largest[number], 0, 1)

  largest = jax.vmap(of_example)(x, ids)
  return largest[:, :, :length], largest[:, :, length:]
