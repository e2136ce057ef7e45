"""Packed rows: attention inside segments, as one causal pass.

Positions are sorted by segment id. If a query may see all keys of its segment,
the keys of a segment come before its queries. In that order a query sees
exactly the keys before it that share its id, which is what `causal` computes.
"""

from typing import NamedTuple

import jax.numpy as jnp

from spectraformer_jax.linear_attention.inputs import Call, Inputs
from spectraformer_jax.linear_attention.xla.causal import causal
from spectraformer_jax.typing import Array


class SortedRows(NamedTuple):
  """Packed rows, sorted by segment.

  Attributes:
    inputs: the sorted arrays, of one length.
    place: where each query of the call is now, ``[B, T]``.
  """

  inputs: Inputs
  place: Array

  def unsorted(self, out: Array) -> Array:
    """Returns outputs ``[B, T, ...]`` in the order of the call's queries."""
    return _take(out, self.place)


def packed(call: Call) -> Array:
  """Attends; each query sees the visible keys of its own segment.

  Returns:
    ``[B, T, N, G, V]`` of value's dtype.
  """
  rows = sort_rows(call.inputs, is_causal=call.is_causal)
  out, _ = causal(call._replace(inputs=rows.inputs))
  return rows.unsorted(out)


def sort_rows(
  inputs: Inputs, *, is_causal: bool, keys_first: bool = True
) -> SortedRows:
  """Sorts positions by segment.

  Args:
    inputs: with segment ids.
    is_causal: whether queries see no later keys.
    keys_first: if not causal, whether the keys of a segment come before its
      queries; else a query and a key of one position share a place.
  """
  query, key, value, key_mask, segment_ids = inputs
  assert segment_ids is not None
  query_ids, key_ids = segment_ids
  if query_ids is key_ids and (is_causal or not keys_first):
    ids = query_ids
    order = jnp.argsort(ids, axis=1, stable=True)
    # The place of each query in the sorted row.
    place = jnp.argsort(order, axis=1)
  else:
    ids = jnp.concatenate([key_ids, query_ids], axis=1)
    if is_causal:
      # A key at the position of a query comes before it.
      position = [jnp.arange(x.shape[1]) for x in segment_ids[::-1]]
      position = jnp.broadcast_to(jnp.concatenate(position), ids.shape)
      order = jnp.lexsort((position, ids), axis=1)
    else:
      order = jnp.argsort(ids, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)[:, key.shape[1] :]
    if key_mask is None:
      key_mask = jnp.ones(key_ids.shape, bool)
    # In the sorted row, the place of a key has a query of zeros, and the place
    # of a query has a hidden key.
    query = jnp.pad(query, _widths(query, key.shape[1], 0))
    key, value, key_mask = (
      jnp.pad(x, _widths(x, 0, query_ids.shape[1]))
      for x in (key, value, key_mask)
    )
  query, key, value, ids = (_take(x, order) for x in (query, key, value, ids))
  if key_mask is not None:
    key_mask = _take(key_mask, order)
  # Segments are numbered from 0, in floats: the tangent of an int has no type
  # that varies over the axes of `jax.shard_map`.
  is_new_segment = jnp.diff(ids, axis=1, prepend=ids[:, :1]) != 0
  ids = jnp.cumsum(is_new_segment, axis=1).astype(jnp.float32)
  return SortedRows(Inputs(query, key, value, key_mask, (ids, ids)), place)


def _widths(x: Array, before: int, after: int) -> list[tuple[int, int]]:
  """Returns the padding of axis 1, for `jnp.pad`."""
  return [(0, 0), (before, after), *[(0, 0)] * (x.ndim - 2)]


def _take(x: Array, order: Array) -> Array:
  """Returns x with axis 1 in another order, one order for each example."""
  return jnp.take_along_axis(
    x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1
  )
