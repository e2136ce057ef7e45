"""The bodies of kernels: one chunk of one head, in two dimensions.

The arithmetic and the exact powers of two are those of `xla.chunks`, without
leading axes. Sums are transposed, so that one factor per feature always forms a
row.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import exponents
from spectraformer_jax.linear_attention.normalize import divide
from spectraformer_jax.typing import Array

# (constants, x [C, H]) -> log-features [C, F].
LogMap = Callable[[Sequence[Array], Array], Array]


class HeadState(NamedTuple):
  """The sums of one head, float32; see `State`.

  Attributes:
    kv: ``[V, F]``.
    total: ``[1, F]``.
    exponent: ``[1, F]``.
  """

  kv: Array
  total: Array
  exponent: Array


def key_step(
  key_map: LogMap,
  constants: list[Array],
  sums: HeadState,
  xs: list[Array],
  mask: Array | None,
) -> tuple[HeadState, list[Array]]:
  """Adds the keys of a chunk; with the map bound, it is a `scan.Step`.

  Args:
    key_map: log-features of keys.
    constants: what the map needs.
    sums: over the keys before the chunk.
    xs: keys ``[C, H]`` and values ``[C, V]``.
    mask: bool ``[C, 1]``, False for hidden keys; or None.

  Returns:
    The sums after the chunk, and no outputs.
  """
  key, value = xs
  psi, exponent = _key_features(key_map, constants, key, mask, sums.exponent)
  sums = _rescale(sums, exponent)
  return _add(sums, psi, value.astype(jnp.float32)), []


def query_step(
  query_map: LogMap,
  dtype: jnp.dtype,
  constants: list[Array],
  carry: tuple[()],
  xs: list[Array],
  mask: Array | None,
) -> tuple[tuple[()], list[Array]]:
  """Attends with the queries of a chunk, on finished sums; see `key_step`.

  Args:
    query_map: log-features of queries.
    dtype: of the outputs.
    constants: what the map needs, and the three arrays of a `HeadState`.
    carry: empty.
    xs: queries ``[C, H]``.
    mask: not used.

  Returns:
    The carry, and outputs ``[C, V]``.
  """
  del mask
  *constants, kv, total, exponent = constants
  sums = HeadState(kv, total, exponent)
  phi = _query_features(query_map, constants, xs[0], exponent)
  return carry, [divide(*_sums_of_state(sums, phi)).astype(dtype)]


def causal_step(
  query_map: LogMap,
  key_map: LogMap,
  dtype: jnp.dtype,
  constants: list[Array],
  sums: HeadState,
  xs: list[Array],
  mask: Array | None,
) -> tuple[HeadState, list[Array]]:
  """Attends; each query of a chunk sees keys up to its own; see `key_step`.

  Args:
    query_map: log-features of queries.
    key_map: log-features of keys.
    dtype: of the outputs.
    constants: what the maps need.
    sums: over the keys before the chunk.
    xs: queries and keys ``[C, H]`` and values ``[C, V]``.
    mask: bool ``[C, 1]``, False for hidden keys; or None.

  Returns:
    The sums after the chunk, and outputs ``[C, V]``.
  """
  query, key, value = xs
  psi, exponent = _key_features(key_map, constants, key, mask, sums.exponent)
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
  out = divide(numerator, normalizer).astype(dtype)
  return _add(before, psi, value), [out]


def empty_like(sums: HeadState) -> HeadState:
  """Returns the sums before any key."""
  kv, total = jnp.zeros_like(sums.kv), jnp.zeros_like(sums.total)
  return HeadState(kv, total, jnp.full_like(sums.exponent, exponents.LOWEST))


def join(a: HeadState, b: HeadState) -> HeadState:
  """Returns the sums over the keys of a and b; leading axes are allowed."""
  exponent = jnp.maximum(a.exponent, b.exponent)
  a, b = (_rescale(sums, exponent) for sums in (a, b))
  return HeadState(a.kv + b.kv, a.total + b.total, exponent)


def _key_features(
  key_map: LogMap,
  constants: Sequence[Array],
  key: Array,
  mask: Array | None,
  exponent: Array,
) -> tuple[Array, Array]:
  """Returns features ``[C, F]``, and the exponent ``[1, F]`` divided out."""
  features, own = exponents.split(key_map(constants, key), jnp.exp)
  visible = own if mask is None else jnp.where(mask, own, exponents.LOWEST)
  exponent = jax.lax.stop_gradient(exponent)
  exponent = jnp.maximum(exponent, jnp.max(visible, axis=0, keepdims=True))
  below = jnp.minimum(own - exponent, 0.0)
  features = features * exponents.power_of_two(below + exponents.KEY_EXPONENT)
  if mask is not None:
    features = jnp.where(mask, features, 0.0)
  return features, exponent


def _query_features(
  query_map: LogMap, constants: Sequence[Array], query: Array, exponent: Array
) -> Array:
  """Returns features ``[C, F]`` of queries that read sums of an exponent."""
  features, own = exponents.split(query_map(constants, query), jnp.exp)
  own = own + jax.lax.stop_gradient(exponent)
  below = own - jnp.max(own, axis=1, keepdims=True)
  return features * exponents.power_of_two(below + exponents.QUERY_EXPONENT)


def _rescale(sums: HeadState, exponent: Array) -> HeadState:
  """Returns the same sums, relative to a larger exponent."""
  factor = exponents.power_of_two(sums.exponent - exponent)
  return HeadState(sums.kv * factor, sums.total * factor, exponent)


def _add(sums: HeadState, psi: Array, value: Array) -> HeadState:
  """Adds keys that have the exponent of the sums."""
  return HeadState(
    sums.kv + _dot(value, psi, 0, 0),
    sums.total + jnp.sum(psi, axis=0, keepdims=True),
    sums.exponent,
  )


def _sums_of_state(sums: HeadState, phi: Array) -> tuple[Array, Array]:
  """Returns the queries' numerators ``[C, V]`` and normalizers ``[C, 1]``."""
  normalizer = jnp.sum(phi * sums.total, axis=1, keepdims=True)
  return _dot(phi, sums.kv, 1, 1), normalizer


def _dot(a: Array, b: Array, axis_of_a: int, axis_of_b: int) -> Array:
  """Returns the matrix product over one axis of each."""
  return jax.lax.dot_general(
    a,
    b,
    (((axis_of_a,), (axis_of_b,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
