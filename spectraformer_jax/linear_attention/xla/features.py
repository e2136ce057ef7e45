"""Features of chunks, scaled by powers of two so that float32 can hold them.

A key feature is divided by ``2 ** exponent``, the largest power of two of that
feature among the keys so far. The query feature is multiplied by it again. Then
the features of each query are divided by the largest power of two among them,
which cancels in the output.
"""

import math

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.exponents import (
  KEY_EXPONENT,
  LOWEST,
  LOWEST_SEEN,
  QUERY_EXPONENT,
  power_of_two,
  split,
  whole_exponent,
)
from spectraformer_jax.linear_attention.inputs import FeatureFn, Features
from spectraformer_jax.linear_attention.layouts import (
  behind_barrier,
  in_columns,
)
from spectraformer_jax.linear_attention.xla.products import Products
from spectraformer_jax.typing import Array, PyTree


def map_chunks(
  feature_map: FeatureFn, constants: PyTree, x: Array, position: Array
) -> Features:
  """Returns unscaled features ``[B, N, L, C, F]`` of L chunks.

  Args:
    feature_map: of queries or keys.
    constants: its variables.
    x: ``[B, N, L, C, H]``.
    position: of the first token of each chunk, ``[L]``.
  """
  if x.shape[2] == 1:
    # With an axis of size 1 XLA for CPUs lays out products worse, which costs
    # 6 % of the causal time (docs/decisions/08-tpu-layouts.md). To be dropped
    # once that is no longer measured.
    features = feature_map(constants, x[:, :, 0], position[0])
    features = jax.tree.map(lambda leaf: leaf[:, :, None], features)
  else:
    of_chunks = jax.vmap(feature_map, in_axes=(None, 2, 0), out_axes=2)
    features = of_chunks(constants, x, position)
  if features.log_magnitude is None:
    return features
  return features._replace(log_magnitude=in_columns(features.log_magnitude))


def key_exponents(
  features: Features,
  exponent: Array,
  key_mask: Array | None,
  segment: Array | None = None,
) -> Array:
  """Returns the exponents of the state after some keys.

  Args:
    features: of the keys, ``[B, N, L, C, F]``.
    exponent: of the state before them, ``[B, N, F or 1]``.
    key_mask: ``[B, 1, L, C, 1]`` bool, or None.
    segment: ids ``[B, C]`` of the segments in one chunk, not decreasing, or
      None: there are no segments. The state belongs to the first segment.

  Returns:
    ``[B, N, F or 1]``; with `segment`, for each position the exponents of its
    segment, ``[B, N, C, F or 1]``.
  """
  if segment is not None:
    is_first = (segment == segment[:, :1])[:, None, :, None]
    exponent = jnp.where(is_first, exponent[:, :, None], LOWEST)
  if features.log_magnitude is None:
    return exponent
  visible = jax.lax.stop_gradient(features.log_magnitude)
  hidden = jnp.finfo(visible.dtype).min
  if key_mask is not None:
    visible = jnp.where(key_mask, visible, hidden)
  if segment is None:
    largest = jnp.max(visible, axis=(2, 3))
  else:
    largest = max_in_segments(visible[:, :, 0], segment)
  is_hidden = largest <= hidden
  largest = jnp.where(is_hidden, LOWEST, jnp.maximum(largest, LOWEST_SEEN))
  return behind_barrier(jnp.maximum(exponent, whole_exponent(largest)))


def max_in_segments(x: Array, segment: Array) -> Array:
  """Returns the maxima of ``x [B, N, C, F]`` over each position's segment.

  Args:
    x: numbers.
    segment: ids ``[B, C]``, not decreasing.
  """
  length = x.shape[2]
  # Maxima spread forwards, then backwards, over twice the distance each time.
  for side in (1, -1):
    distance = 1
    while distance < length:
      # If two ids at this distance are equal, so are all ids in between.
      moved = jnp.roll(segment, side * distance, axis=1)
      place = jnp.arange(length)[::side]
      same = (moved == segment) & (place >= distance)[None]
      other = jnp.roll(x, side * distance, axis=2)
      x = jnp.where(same[:, None, :, None], jnp.maximum(x, other), x)
      distance *= 2
  return x


def scale_keys(
  features: Features,
  exponent: Array,
  key_mask: Array | None,
  products: Products,
) -> Array:
  """Returns psi ``[B, N, L, C, F]``, relative to the exponents.

  Args:
    features: from `map_chunks`.
    exponent: from `key_exponents`.
    key_mask: ``[B, 1, L, C, 1]`` bool, or None; hidden keys get zeros.
    products: see `Products`.
  """
  if features.log_magnitude is None:
    psi = features.factor
  else:
    psi, own = split(features.log_magnitude)
    # Only hidden keys may have exponents above that of the state.
    below = jnp.minimum(own - _of_positions(exponent), 0.0)
    psi = psi * power_of_two(below + KEY_EXPONENT)
    psi = products.exponential(features.log_magnitude, psi)
    if features.factor is not None:
      psi = psi * features.factor
  return psi if key_mask is None else jnp.where(key_mask, psi, 0.0)


def query_exponents(features: Features, exponent: Array) -> Array | None:
  """Returns the largest exponent of each query, ``[B, N, L, G C, 1]``.

  It is the largest among the query's features times ``2 ** exponent``.

  Args:
    features: ``[B, N, L, G C, F]``.
    exponent: of the sums, ``[B, N, F or 1]`` if all queries read the same ones,
      ``[B, N, G C, F or 1]`` if each query has its own.

  Returns:
    The exponents, which take no gradient; None for plain features.
  """
  if features.log_magnitude is None:
    return None
  fixed = jax.lax.stop_gradient(features.log_magnitude)
  log_products = fixed + _of_positions(exponent) * math.log(2.0)
  return behind_barrier(
    whole_exponent(jnp.max(log_products, axis=-1, keepdims=True))
  )


def scale_queries(
  features: Features,
  exponent: Array,
  query_exponent: Array | None,
  products: Products,
) -> Array:
  """Returns phi ``[B, N, L, G C, F]``, relative to each query's exponent.

  Args:
    features: ``[B, N, L, G C, F]``.
    exponent: see `query_exponents`.
    query_exponent: from `query_exponents`.
    products: see `Products`.
  """
  if features.log_magnitude is None:
    return features.factor
  assert query_exponent is not None  # as `query_exponents` gives it
  phi, own = split(features.log_magnitude)
  # In float32, numbers are not added exactly to the exponent of an empty state.
  # So `scale` may be above QUERY_EXPONENT; `power_of_two` then limits it.
  scale = own + _of_positions(exponent) - query_exponent + QUERY_EXPONENT
  # No exact scale is above QUERY_EXPONENT + 1.
  phi = phi * power_of_two(scale, QUERY_EXPONENT + 8.0)
  phi = products.exponential(features.log_magnitude, phi)
  return phi if features.factor is None else phi * features.factor


def _of_positions(exponent: Array) -> Array:
  """``[B, N, F] -> [B, N, 1, 1, F]``; ``[B, N, C, F] -> [B, N, 1, C, F]``."""
  if exponent.ndim == 3:
    exponent = exponent[:, :, None]
  return exponent[:, :, None]
