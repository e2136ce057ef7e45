"""The work on one block of a loop, and its vector-Jacobian product.

Names follow the equations of `bidirectional` and `causal`: phi and psi are the
features of queries and keys. `JoinedState.sums` holds S, the sum of
``psi_j v_j^T``, and in its last column z, the sum of ``psi_j``. Products with
the values and a column of ones (`with_ones`) therefore give numerators and
normalizers at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import exponents, leaves
from spectraformer_jax.linear_attention.inputs import Features, Maps
from spectraformer_jax.linear_attention.layouts import in_columns
from spectraformer_jax.linear_attention.state import (
  JoinedState,
  Linear,
  add_exactly,
  rescale,
)
from spectraformer_jax.linear_attention.xla import features as scaled
from spectraformer_jax.linear_attention.xla.blocks import Keys
from spectraformer_jax.linear_attention.xla.products import Products
from spectraformer_jax.linear_attention.xla.results import (
  MEAN,
  QuerySums,
  Result,
)
from spectraformer_jax.typing import Array, PyTree


class Engine(NamedTuple):
  """What the functions of a pass through a sequence share; static.

  Attributes:
    maps: the feature maps.
    products: see `Products`.
    chunk_size: positions of a chunk, C.
    result: what the pass returns for each query.
    is_strict: whether a causal query sees only the keys before its position,
      not the one at it.
  """

  maps: Maps
  products: Products
  chunk_size: int
  result: Result = MEAN
  is_strict: bool = False


class Saved(NamedTuple):
  """What is saved for the backward pass of a block, besides the outputs.

  Attributes:
    normalizer: the divisor of each query, ``[B, N, (L,) G C]``; None for signed
      maps.
    query_exponent: from `query_exponents`; None for plain features.
  """

  normalizer: Array | None
  query_exponent: Array | None


def add_keys(
  engine: Engine, constants: PyTree, state: JoinedState, keys: Keys
) -> JoinedState:
  """Returns the state after the keys of a block."""
  features, mask = map_keys(engine, constants, keys)
  exponent = scaled.key_exponents(features, state.exponent, mask)
  psi = scaled.scale_keys(features, exponent, mask, engine.products)
  return add(
    engine, rescale(state, exponent), psi[:, :, 0], with_ones(keys.value)
  )


def add_keys_vjp(
  engine: Engine,
  constants: PyTree,
  exponent: Array,
  keys: Keys,
  gradient: Linear,
) -> tuple[list[Array], Array, Array]:
  """Returns the gradients of a block's contribution to the final state.

  Args:
    engine: see `Engine`.
    constants: variables of the maps.
    exponent: of the final state, to which all sums are relative.
    keys: of the block.
    gradient: of the final state's sums.

  Returns:
    Gradients of the constants' floats, key and value.
  """

  def contribution(floats: list[Array], key: Array, value: Array) -> Linear:
    variables = leaves.with_floats(constants, floats)
    features, mask = map_keys(engine, variables, keys._replace(key=key))
    psi = scaled.scale_keys(features, exponent, mask, engine.products)[:, :, 0]
    sums = engine.products.keys_times_values(psi, with_ones(value))
    return sums, None if gradient[1] is None else jnp.sum(jnp.abs(psi), axis=2)

  floats = leaves.floats(constants)
  return jax.vjp(contribution, floats, keys.key, keys.value)[1](gradient)


def read(
  engine: Engine,
  constants: PyTree,
  state: JoinedState,
  query: Array,
  position: Array,
) -> tuple[Array, Saved]:
  """Returns the outputs of queries that see the state.

  Args:
    engine: see `Engine`.
    constants: variables of the maps.
    state: sums over all keys.
    query: ``[B, N, G, C, H]``.
    position: of the first query.

  Returns:
    Outputs ``[B, N, G, C, V]``, and what the backward pass gets.
  """
  features = map_queries(engine, constants, query, position)
  query_exponent = scaled.query_exponents(features, state.exponent)
  sums, needs_weight = _read_sums(engine, features, query_exponent, state)
  exponent = None if query_exponent is None else query_exponent[:, :, 0]
  out, normalizer = engine.result.forward(sums, needs_weight, exponent)
  out = out.reshape(*query.shape[:-1], -1)
  return out, Saved(normalizer, query_exponent)


def read_vjp(
  engine: Engine,
  constants: PyTree,
  state: JoinedState,
  query: Array,
  position: Array,
  out: Array,
  saved: Saved,
  d_out: Array,
) -> tuple[list[Array], Linear, Array]:
  """Returns the gradients of `read` for the constants' floats, sums and query.

  Args:
    engine: see `read`.
    constants: see `read`.
    state: see `read`.
    query: see `read`.
    position: see `read`.
    out: the outputs of `read`.
    saved: the other result of `read`.
    d_out: the gradient of `out`, float32.
  """
  query, out, saved = replace_unused(engine, query, out, saved, d_out)

  def sums_of(
    floats: list[Array], linear: Linear, query: Array
  ) -> tuple[QuerySums, Array | None]:
    variables = leaves.with_floats(constants, floats)
    features = map_queries(engine, variables, query, position)
    new_state = state.with_linear(linear)
    return _read_sums(engine, features, saved.query_exponent, new_state)

  floats = leaves.floats(constants)
  sums, pull, needs_weight = jax.vjp(
    sums_of, floats, state.linear, query, has_aux=True
  )
  d_sums = engine.result.backward(
    sums, needs_weight, out, saved.normalizer, d_out
  )
  return pull(d_sums)


def _read_sums(
  engine: Engine,
  features: Features,
  query_exponent: Array | None,
  state: JoinedState,
) -> tuple[QuerySums, Array | None]:
  """Returns queries' sums over a state, and the result of `needs_weight`."""
  phi = scaled.scale_queries(
    features, state.exponent, query_exponent, engine.products
  )[:, :, 0]
  if query_exponent is not None:
    query_exponent = query_exponent[:, :, 0]
  sums = QuerySums(
    engine.products.queries_times_state(phi, state.sums),
    times_magnitude(phi, state),
  )
  seen = has_keys(state)
  return sums, needs_weight(seen, features, phi, query_exponent, sums)


def map_keys(
  engine: Engine, constants: PyTree, keys: Keys
) -> tuple[Features, Array | None]:
  """Returns unscaled features ``[B, N, L, C, F]`` of L chunks, and the mask."""
  key, mask = in_chunks(engine, keys.key), keys.key_mask
  positions = keys.position + engine.chunk_size * jnp.arange(key.shape[2])
  features = scaled.map_chunks(engine.maps.key, constants, key, positions)
  return features, None if mask is None else in_chunks(engine, mask)


def map_queries(
  engine: Engine, constants: PyTree, query: Array, position: Array
) -> Features:
  """Returns unscaled features ``[B, N, L, G C, F]`` of queries in L chunks."""
  query = chunks_first(engine, query)
  batch, heads, count, groups, size, head_dim = query.shape
  positions = position + size * jnp.arange(count)
  features = scaled.map_chunks(
    engine.maps.query,
    constants,
    query.reshape(batch, heads, -1, size, head_dim),
    jnp.repeat(positions, groups),
  )
  return jax.tree.map(
    lambda x: x.reshape(batch, heads, count, -1, x.shape[-1]), features
  )


def needs_weight(
  sees_keys: Array,
  features: Features,
  phi: Array,
  query_exponent: Array | None,
  sums: QuerySums,
) -> Array | None:
  """Returns for which queries a zero sum of weights means underflow.

  Args:
    sees_keys: bool, broadcastable to ``[..., C]``.
    features: of the queries; exponentials without a factor are never zero.
    phi: the same features, scaled, ``[..., C, F]``.
    query_exponent: see `query_exponents`, ``[..., C, 1]``.
    sums: over the keys that each query sees.

  Returns:
    Bool ``[..., C]``; None where it cannot be known.
  """
  if features.log_magnitude is not None and features.factor is None:
    return sees_keys
  if sums.magnitude is None:
    return None
  is_zero = jnp.all(phi == 0.0, axis=-1)
  if query_exponent is not None:
    is_zero &= query_exponent[..., 0] < exponents.TOO_LARGE
  return sees_keys & ~is_zero


def replace_unused(
  engine: Engine, query: Array, out: Array, saved: Saved, d_out: Array
) -> tuple[Array, Array, Saved]:
  """Replaces queries whose outputs have no gradient, such as padding.

  They may hold anything, NaN or 1e30 for example. A zero gradient is not enough
  to keep them out, because zero times the feature of such a query is NaN.

  Args:
    engine: see `Engine`.
    query: ``[B, N, G, L C, H]``.
    out: outputs of the forward pass, ``[B, N, G, L C, V]``.
    saved: other results of the forward pass.
    d_out: the gradient of the outputs.

  Returns:
    The queries, the outputs in float32, and `saved`, with harmless numbers.
  """
  unused = jnp.all(d_out == 0.0, axis=-1, keepdims=True)
  normalizer, query_exponent = saved
  is_unused = chunks_first(engine, unused)
  is_unused = is_unused.reshape(*is_unused.shape[:3], -1, 1)
  if normalizer is not None:
    normalizer = jnp.where(is_unused.reshape(normalizer.shape), 1.0, normalizer)
  if query_exponent is not None:
    # Divided by so large a power of two, their features become zero.
    query_exponent = jnp.where(is_unused, -exponents.LOWEST, query_exponent)
  out = jnp.where(unused, 0, out).astype(jnp.float32)
  saved = Saved(normalizer, query_exponent)
  return jnp.where(unused, 0, query), out, saved


def add(
  engine: Engine, state: JoinedState, psi: Array, value: Array
) -> JoinedState:
  """Adds keys ``[B, N, C, F]`` and their values `with_ones` to a state.

  The keys are relative to the exponent of the state.
  """
  magnitude = state.magnitude
  if magnitude is not None:
    magnitude = magnitude + jnp.sum(jnp.abs(psi), axis=2)
  sums, rest = engine.products.keys_times_values(psi, value), state.rest
  if rest is None:
    sums = state.sums + sums
  else:
    sums, rest = add_exactly(state.sums, sums, rest)
  return state._replace(sums=sums, magnitude=magnitude, rest=rest)


def times_magnitude(phi: Array, state: JoinedState) -> Array | None:
  """Returns sums ``[..., C]`` of absolute weights; None for positive maps."""
  if state.magnitude is None:
    return None
  return jnp.einsum("...cf,...f->...c", jnp.abs(phi), state.magnitude)


def has_keys(state: JoinedState) -> Array:
  """Whether keys were seen, bool ``[B, N, 1]``; False for plain features."""
  return jnp.any(state.exponent > exponents.LOWEST, axis=-1, keepdims=True)


def with_ones(value: Array) -> Array:
  """``[..., C, V] -> [..., C, V + 1]``: values and a column of ones."""
  value = in_columns(value.astype(jnp.float32))
  return jnp.concatenate([value, jnp.ones_like(value[..., :1])], axis=-1)


def in_chunks(engine: Engine, x: Array) -> Array:
  """``[B, N, L C, .] -> [B, N, L, C, .]``."""
  return x.reshape(*x.shape[:2], -1, engine.chunk_size, x.shape[-1])


def chunks_first(engine: Engine, x: Array) -> Array:
  """``[B, N, G, L C, .] -> [B, N, L, G, C, .]``."""
  x = x.reshape(*x.shape[:3], -1, engine.chunk_size, x.shape[-1])
  return jnp.swapaxes(x, 2, 3)
