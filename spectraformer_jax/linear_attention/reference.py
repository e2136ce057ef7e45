"""Linear attention in its simplest forms: in chunks, and as a matrix.

`causal_in_chunks` is the algorithm of `xla.causal`, without what makes that
fast and keeps it in the range of float32: read it first. `attend` is
``implementation="reference"``, which forms the T x S matrix of weights. Tests
compare `xla` with both.
"""

import math

import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.linear_attention.exponents import KEY_EXPONENT
from spectraformer_jax.linear_attention.inputs import (
  Call,
  Features,
  PlainFeatures,
)
from spectraformer_jax.linear_attention.normalize import normalize
from spectraformer_jax.linear_attention.state import (
  State,
  join_sums,
  split_sums,
)
from spectraformer_jax.linear_attention.xla import chunks
from spectraformer_jax.linear_attention.xla.blocks import Keys
from spectraformer_jax.linear_attention.xla.chunks import Engine
from spectraformer_jax.linear_attention.xla.products import EXACT
from spectraformer_jax.typing import Array


def causal_in_chunks(
  phi: Array, psi: Array, value: Array, *, chunk_size: int
) -> Array:
  r"""Computes causal linear attention of one head, chunk c after chunk.

  .. math::
    o_i = \frac{\phi_i \cdot S_{<c} + \sum_{j \in c, j \le i}
      (\phi_i \cdot \psi_j) v_j}{\phi_i \cdot z_{<c} + \sum_{j \in c, j \le i}
      \phi_i \cdot \psi_j}

  where S_<c and z_<c are the sums of ``psi_j v_j^T`` and of ``psi_j`` over the
  keys of earlier chunks.

  Args:
    phi: positive features of queries, ``[T, F]``.
    psi: positive features of keys, ``[T, F]``; a row of zeros hides its key.
    value: ``[T, V]``.
    chunk_size: C, which divides T.

  Returns:
    ``[T, V]``.
  """
  is_visible = jnp.tril(jnp.ones((chunk_size, chunk_size), bool))

  def step(
    sums: tuple[Array, Array], chunk: tuple[Array, Array, Array]
  ) -> tuple[tuple[Array, Array], Array]:
    (S, z), (phi, psi, value) = sums, chunk
    weights = jnp.where(is_visible, phi @ psi.T, 0.0)
    numerator = phi @ S + weights @ value
    normalizer = phi @ z + weights.sum(axis=1)
    sums = S + psi.T @ value, z + psi.sum(axis=0)
    return sums, numerator / normalizer[:, None]

  in_chunks = lambda x: x.reshape(-1, chunk_size, x.shape[1])
  S, z = jnp.zeros((psi.shape[1], value.shape[1])), jnp.zeros(psi.shape[1])
  _, out = jax.lax.scan(step, (S, z), tuple(map(in_chunks, (phi, psi, value))))
  return out.reshape(value.shape)


def attend(call: Call) -> tuple[Array, State]:
  """Attends, with all features and weights in memory; see `Implementation`."""
  maps, _, constants, state, inputs, is_causal = call
  query, key, value, key_mask, segment_ids = inputs
  position, value = state.length, value.astype(jnp.float32)
  is_visible = checks.visible_keys(query, key, is_causal, key_mask, segment_ids)
  map_queries = jax.vmap(maps.query, in_axes=(None, 2, None), out_axes=2)
  query = jnp.moveaxis(query, 1, 3)
  key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
  # Queries that are not finite give NaN, and add nothing to any gradient.
  is_bad = ~jnp.all(jnp.isfinite(query), axis=-1, keepdims=True)
  # Causal queries have the positions of the keys; others start at 0.
  first = position if is_causal else jnp.zeros_like(position)
  out = _attend_features(
    map_queries(constants, jnp.where(is_bad, 0, query), first),
    maps.key(constants, key, position),
    value,
    is_visible[:, :, None],
    state,
    segment_ids,
  )
  out = jnp.where(is_bad, jnp.nan, out)
  if key_mask is not None:
    key_mask = key_mask[:, None, :, None]
  keys = Keys(key, value, key_mask, position)
  engine = Engine(maps, EXACT, chunk_size=key.shape[2])
  after = chunks.add_keys(engine, constants, join_sums(state), keys)
  after = after._replace(length=position + key.shape[2])
  return jnp.moveaxis(out, 3, 1), split_sums(after)


def _attend_features(
  query: Features,
  key: Features,
  value: Array,
  is_visible: Array,
  state: State,
  segment_ids: tuple[Array, Array] | None,
) -> Array:
  """Computes attention from features, by the matrix of weights.

  Args:
    query: features ``[B, N, G, T, F]`` of G groups of queries.
    key: features ``[B, N, S, F]``.
    value: ``[B, N, S, V]`` float32.
    is_visible: bool, broadcastable to ``[B, N, G, T, S]``.
    state: sums over keys that came before; every query sees them.
    segment_ids: of queries ``[B, T]`` and keys ``[B, S]``, or None; with
      segments the state is empty.

  Returns:
    ``[B, N, G, T, V]`` float32.
  """
  # Queries whose features are too large for float32 are treated the same way
  # as queries that are not finite.
  is_bad = jnp.zeros((), bool)
  for leaf in jax.tree.leaves(query):
    is_bad |= ~jnp.all(jnp.isfinite(leaf), axis=-1, keepdims=True)
  query = jax.tree.map(lambda leaf: jnp.where(is_bad, 0.0, leaf), query)
  key_mask = jnp.any(is_visible, (2, 3))
  phi, psi, state_factor, _ = scale_features(
    query, key, key_mask, state, segment_ids
  )

  def weights(phi: Array, psi: Array) -> Array:
    products = jnp.einsum("bngtf,bnsf->bngts", phi, psi, precision="highest")
    return jnp.where(is_visible, products, 0.0)

  def of_state(phi: Array, sums: Array) -> Array:
    factor = state_factor if sums.ndim == 3 else state_factor[..., None]
    sums = sums * factor
    return jnp.einsum("bngtf,bnf...->bngt...", phi, sums, precision="highest")

  seen = weights(phi, psi)
  numerator = jnp.einsum("bngts,bnsv->bngtv", seen, value, precision="highest")
  numerator += of_state(phi, state.kv)
  normalizer = weight_sum = jnp.sum(seen, axis=-1) + of_state(phi, state.total)
  magnitude = None
  if state.magnitude is not None:
    magnitude = jnp.sum(weights(jnp.abs(phi), jnp.abs(psi)), axis=-1)
    magnitude = weight_sum = magnitude + of_state(jnp.abs(phi), state.magnitude)
  out = normalize(numerator, normalizer, magnitude)
  # NaN where a query sees keys but all their weights have underflowed: zeros
  # would say that it sees none. A factor can be zero without underflow.
  if query.factor is None:
    is_bad |= (jnp.any(is_visible, axis=-1) & (weight_sum == 0.0))[..., None]
  return jnp.where(is_bad, jnp.nan, out)


def scale_features(
  query: Features,
  key: Features,
  key_mask: Array,
  state: State,
  segment_ids: tuple[Array, Array] | None,
) -> tuple[Array, Array, Array, Array]:
  """Returns features of bounded size that give exactly the same attention.

  Each key feature is divided by its maximum over the visible keys of the same
  example and head (and segment), and the query feature is multiplied by this
  maximum; a state counts as a key with the state's exponent. Then the features
  of each query are divided by their own maximum. Both maxima cancel in the
  ratio, so no gradient flows through them. If the map is positive, the call not
  causal and the state empty, every normalizer is at least 1, because its
  largest term is.

  Args:
    query: features ``[B, N, G, T, F]``.
    key: features ``[B, N, S, F]``.
    key_mask: bool, broadcastable to ``[B, N, S]``.
    state: sums over earlier keys, which have an exponent of their own.
    segment_ids: see `_attend_features`.

  Returns:
    phi, psi (0 where hidden), the factor ``[B, N, F]`` by which the sums of the
    state are brought to the scale of psi, and the logarithm
    ``[B, N, G, T, 1]`` of the factor that products of phi and psi lack.
  """
  key_mask = key_mask[..., None]
  if isinstance(query, PlainFeatures) and isinstance(key, PlainFeatures):
    one = jnp.ones_like(state.total[..., :1])
    psi = jnp.where(key_mask, key.factor, 0.0)
    return query.factor, psi, one, jnp.zeros_like(query.factor[..., :1])
  if query.log_magnitude is None or key.log_magnitude is None:
    raise TypeError(
      "the maps of queries and keys must both return log_magnitude, or neither."
    )
  key_log = jnp.where(key_mask, key.log_magnitude, -jnp.inf)
  earlier = state.exponent * math.log(2.0)
  shift = jnp.maximum(jnp.max(key_log, axis=2), earlier)
  of_queries = of_keys = shift = jax.lax.stop_gradient(shift)[:, :, None]
  if segment_ids is not None:
    of_queries, of_keys = (
      jnp.maximum(jax.lax.stop_gradient(largest), earlier[:, :, None])
      for largest in _max_in_segments(key_log, segment_ids)
    )
  query_log = query.log_magnitude + of_queries[:, :, None]
  top = jax.lax.stop_gradient(jnp.max(query_log, axis=-1, keepdims=True))
  phi = jnp.exp(query_log - top)
  psi = jnp.exp(key_log - of_keys)
  if query.factor is not None and key.factor is not None:
    phi, psi = query.factor * phi, key.factor * psi
  state_factor = 2.0**-KEY_EXPONENT * jnp.exp(earlier - shift[:, :, 0])
  return phi, psi, state_factor, top


def _max_in_segments(
  x: Array, segment_ids: tuple[Array, Array]
) -> tuple[Array, Array]:
  """Returns maxima of x ``[B, N, S, F]`` per segment, for queries and keys."""
  length = segment_ids[0].shape[1]
  ids = jnp.concatenate(segment_ids, axis=1)

  def of_example(x: Array, ids: Array) -> Array:
    # Equal ids get equal numbers, all below ids.size.
    number = jnp.searchsorted(jnp.sort(ids), ids)
    largest = jax.ops.segment_max(
      jnp.swapaxes(x, 0, 1), number[length:], ids.size
    )
    return jnp.swapaxes(largest[number], 0, 1)

  largest = jax.vmap(of_example)(x, ids)
  return largest[:, :, :length], largest[:, :, length:]
