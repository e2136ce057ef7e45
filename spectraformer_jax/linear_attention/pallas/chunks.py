"""What `chunks` does, for one head in two dimensions: the bodies of kernels.

Same arithmetic and the same exact powers of two, without leading axes and with
sums transposed, so that a factor per feature is always a row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.state import (
  KEY_EXPONENT,
  LOWEST,
  QUERY_EXPONENT,
  divide,
  power_of_two,
  split,
)
from spectraformer_jax.typing import Array

# (constants, x [C, H]) -> log-features [C, F].
LogMap = Callable[[Sequence[Array], Array], Array]


class Sums(NamedTuple):
  """The state of one head, see `State`: float32.

  Attributes:
    kv: ``[V, F]``.
    total: ``[1, F]``.
    exponent: ``[1, F]``.
  """

  kv: Array
  total: Array
  exponent: Array


def add_keys(
  key_map: LogMap,
  constants: Sequence[Array],
  sums: Sums,
  key: Array,
  value: Array,
  keep: Array | None,
) -> Sums:
  """The sums after keys ``[C, H]`` and values ``[C, V]``, keep ``[C, 1]``."""
  psi, exponent = _key_features(key_map, constants, key, keep, sums.exponent)
  return _add(_rescale(sums, exponent), psi, value.astype(jnp.float32))


def read(
  query_map: LogMap, constants: Sequence[Array], sums: Sums, query: Array
) -> Array:
  """Queries ``[C, H]`` see the sums -> ``[C, V]`` float32."""
  phi = _query_features(query_map, constants, query, sums.exponent)
  return divide(*_sums_of_state(sums, phi))


def causal_chunk(
  query_map: LogMap,
  key_map: LogMap,
  constants: Sequence[Array],
  sums: Sums,
  query: Array,
  key: Array,
  value: Array,
  keep: Array | None,
) -> tuple[Sums, Array]:
  """Sums after a chunk, and outputs of queries that see earlier keys."""
  psi, exponent = _key_features(key_map, constants, key, keep, sums.exponent)
  before = _rescale(sums, exponent)
  phi = _query_features(query_map, constants, query, exponent)
  value = value.astype(jnp.float32)
  weights = _dot(phi, psi, 1, 1)
  row, column = (
    jax.lax.broadcasted_iota(jnp.int32, weights.shape, axis) for axis in (0, 1)
  )
  weights = jnp.where(row >= column, weights, 0.0)
  numerator, normalizer = _sums_of_state(before, phi)
  numerator += _dot(weights, value, 1, 0)
  normalizer += jnp.sum(weights, axis=1, keepdims=True)
  return _add(before, psi, value), divide(numerator, normalizer)


def empty_like(sums: Sums) -> Sums:
  """The sums before any key."""
  kv, total = jnp.zeros_like(sums.kv), jnp.zeros_like(sums.total)
  return Sums(kv, total, jnp.full_like(sums.exponent, LOWEST))


def join(a: Sums, b: Sums) -> Sums:
  """The sums over the keys of both; leading axes are welcome."""
  exponent = jnp.maximum(a.exponent, b.exponent)
  a, b = (_rescale(sums, exponent) for sums in (a, b))
  return Sums(a.kv + b.kv, a.total + b.total, exponent)


def _key_features(key_map, constants, key, keep, exponent):
  """Features ``[C, F]`` relative to the returned exponent ``[1, F]``."""
  features, own = split(key_map(constants, key), jnp.exp)
  visible = own if keep is None else jnp.where(keep, own, LOWEST)
  exponent = jax.lax.stop_gradient(exponent)
  exponent = jnp.maximum(exponent, jnp.max(visible, axis=0, keepdims=True))
  below = jnp.minimum(own - exponent, 0.0)
  features = features * power_of_two(below + KEY_EXPONENT)
  if keep is not None:
    features = jnp.where(keep, features, 0.0)
  return features, exponent


def _query_features(query_map, constants, query, exponent):
  """Features ``[C, F]`` of queries for sums of that exponent."""
  features, own = split(query_map(constants, query), jnp.exp)
  own = own + jax.lax.stop_gradient(exponent)
  below = own - jnp.max(own, axis=1, keepdims=True)
  return features * power_of_two(below + QUERY_EXPONENT)


def _rescale(sums: Sums, exponent: Array) -> Sums:
  """The same sums, relative to a larger exponent."""
  factor = power_of_two(sums.exponent - exponent)
  return Sums(sums.kv * factor, sums.total * factor, exponent)


def _add(sums: Sums, psi: Array, value: Array) -> Sums:
  """The sums with more keys, of the same exponent."""
  return Sums(
    sums.kv + _dot(value, psi, 0, 0),
    sums.total + jnp.sum(psi, axis=0, keepdims=True),
    sums.exponent,
  )


def _sums_of_state(sums: Sums, phi: Array) -> tuple[Array, Array]:
  """Numerator ``[C, V]`` and normalizer ``[C, 1]`` that queries find."""
  normalizer = jnp.sum(phi * sums.total, axis=1, keepdims=True)
  return _dot(phi, sums.kv, 1, 1), normalizer


def _dot(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
  """Matrix product over one axis of each."""
  return jax.lax.dot_general(
    a,
    b,
    (((axis_of_a,), (axis_of_b,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
