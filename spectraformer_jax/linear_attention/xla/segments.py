"""Packed rows: attention inside segments, as one causal pass.

Positions are sorted by segment id, keys before queries where every query may
see all keys of its segment. In that order a query sees exactly the keys before
it that share its id, which is what the causal form with segments computes.
"""

import jax.numpy as jnp

from spectraformer_jax.linear_attention.state import Maps, State
from spectraformer_jax.linear_attention.xla.causal import causal
from spectraformer_jax.typing import Array, PyTree


def packed(
  maps: Maps,
  constants: PyTree,
  state: State,
  query: Array,
  key: Array,
  value: Array,
  keep: Array | None,
  segments: tuple[Array, Array],
  *,
  is_causal: bool,
  chunk: int | None,
) -> Array:
  """Each query sees the visible keys of its own segment.

  Args:
    maps: feature maps.
    constants: their variables.
    state: an empty state.
    query: ``[B, T, N, G, H]``.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    keep: bool ``[B, S]`` or None.
    segments: ids of queries ``[B, T]`` and of keys ``[B, S]``.
    is_causal: and only those up to its own position.
    chunk: positions in a chunk; None for what is best.

  Returns:
    ``[B, T, N, G, V]`` of value's dtype.
  """
  query_ids, key_ids = segments
  if is_causal and query_ids is key_ids:
    ids = query_ids
    order = jnp.argsort(ids, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)
  else:
    ids = jnp.concatenate([key_ids, query_ids], axis=1)
    order = jnp.argsort(ids, axis=1, stable=True)
    if is_causal:
      # A key at the position of a query comes before it.
      position = [jnp.arange(x.shape[1]) for x in (key_ids, query_ids)]
      position = jnp.broadcast_to(jnp.concatenate(position), ids.shape)
      order = jnp.lexsort((position, ids), axis=1)
    place = jnp.argsort(order, axis=1)[:, key.shape[1] :]
    if keep is None:
      keep = jnp.ones(key_ids.shape, bool)
    queries = jnp.zeros_like(query[:, :1], shape=_like(key, query))
    query = jnp.concatenate([queries, query], axis=1)
    key, value, keep = (
      jnp.concatenate([x, _zeros(x, query_ids.shape[1])], axis=1)
      for x in (key, value, keep)
    )
  query, key, value, ids = (_take(x, order) for x in (query, key, value, ids))
  if keep is not None:
    keep = _take(keep, order)
  # Numbered from 0, as floats: the tangent of an int has no type that varies
  # over the axes of `jax.shard_map`.
  steps = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
  ids = jnp.cumsum(steps, axis=1).astype(jnp.float32)
  state = state._replace(segment=ids[:, 0])
  out, _ = causal(maps, chunk, constants, state, query, key, value, keep, ids)
  return _take(out, place)


def _like(key: Array, query: Array) -> tuple[int, ...]:
  """Shape of queries in place of the keys."""
  return (*key.shape[:2], *query.shape[2:])


def _zeros(x: Array, length: int) -> Array:
  """Zeros (False) of that length."""
  return jnp.zeros((x.shape[0], length, *x.shape[2:]), x.dtype)


def _take(x: Array, order: Array) -> Array:
  """Positions of axis 1 in another order, per example."""
  return jnp.take_along_axis(
    x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1
  )
